"""Boards: what replicas lay down about their nodes, and make of it together."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import json
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering_service.core.errors import Corrupt
from steering_service.server import nodes as nodes_module
from steering_service.server import telemetry
from steering_service.server.board import (
    Board,
    NodeState,
    dump_board,
    load_board,
    load_sound,
    plain,
)
from steering_service.server.node_rpc import convergence
from steering_service.server.nodes import Nodes
from steering_service.v1 import watch_pb2
from store.channels import ChannelEntry
from store.location import Location
from store.replicas import ReplicaBoard

COUNTERS = watch_pb2.DeploymentCounters(revision=1, identity="i", requests=7)
TEXT = st.text(max_size=20)
TIME = st.floats(0, 2e9)
STATES = st.builds(
    NodeState,
    node_id=st.sampled_from("abc"),
    channel=st.just("prod"),
    replica=TEXT,
    connected=st.booleans(),
    since=TIME,
    active_revision=st.integers(0, 5),
    identity=TEXT,
    active_since=TIME,
    acked=st.booleans(),
    nack_revision=st.integers(0, 5),
    nack_kind=TEXT,
    nack_reason=TEXT,
    nack_time=TIME,
)


@given(st.lists(STATES, max_size=5))
def test_a_board_is_read_as_it_was_written(states):
    board = Board("replica-1", 1e9, states)
    assert load_board(dump_board(board)) == board


def test_large_boards_are_compressed_and_all_is_bounded():
    states = [NodeState(f"node-{n:06d}", "prod", connected=True, since=1.0) for n in range(5000)]
    board = Board("replica-1", 1e9, states)
    data = dump_board(board)
    assert len(data) < 100 << 10
    assert load_board(data) == board
    bomb = zlib.compress(b" " * (300 << 20), 9)
    for bad in (b"", b"{}", b"{", b"\x00", data[:-10], bomb, json.dumps({"nodes": 3}).encode()):
        with pytest.raises(Corrupt) as caught:
            load_board(bad)
        assert caught.value.kind == "board"
    for field in ({"active_revision": 1 << 64}, {"since": -1.0}, {"node_id": "x" * 2000}):
        one = dump_board(Board("replica-1", 1e9, [dataclasses.replace(states[0])]))
        content = json.loads(one)
        content["nodes"][0] |= field
        with pytest.raises(Corrupt):
            load_board(json.dumps(content).encode())


@given(STATES, STATES, STATES)
def test_merging_does_not_depend_on_the_order(a, b, c):
    same = [dataclasses.replace(state, node_id="a") for state in (a, b, c)]
    # Ties cannot be told apart; two replicas do not see one node in the same microsecond.
    for number, state in enumerate(same):
        state.since += number * 1e-3
        state.nack_time += number * 1e-3
        state.active_since += number * 1e-3
    merged = nodes_module._merged

    def seen(state):
        return (
            state.connected,
            state.since,
            state.active_revision,
            state.nack_time,
            state.nack_kind,
        )

    one, two, three = same
    assert seen(merged(one, two)) == seen(merged(two, one))
    assert seen(merged(merged(one, two), three)) == seen(merged(one, merged(two, three)))
    newest = max(same, key=lambda state: (state.connected, state.since))
    assert merged(merged(one, two), three).replica == newest.replica


def entry(revision):
    return ChannelEntry(
        channel="prod",
        revision=revision,
        artifact=None,
        strength=0.0,
        enabled=True,
        share=1.0,
        actor="ada",
        time="2026-11-22T10:00:00.000000Z",
        reason="a test",
        previous="",
    )


@given(st.lists(STATES, max_size=8), st.one_of(st.none(), st.integers(1, 5)))
def test_convergence_counts_every_node_once(states, revision):
    found = convergence(entry(revision) if revision else None, states)
    assert found.converged + found.refusing + found.pending == found.connected
    assert found.connected + found.gone == len(states)
    assert found.seconds >= 0
    if found.pending:
        assert found.seconds == 0
    if found.connected and not found.pending and not found.refusing:
        assert all(s.active_revision == (revision or 0) for s in states if s.connected)


@given(st.text(), st.integers(0, 50))
def test_plain_texts_are_short_and_show_no_controls(text, limit):
    found = plain(text, limit)
    assert len(found) <= limit
    assert found.isprintable()
    if text.isprintable():
        assert found == text[:limit]


# ---- in the store


def in_loop(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), timeout=30))

    return run


def subscribe(node_id, revision=0):
    return watch_pb2.Subscribe(node_id=node_id, channel="prod", active_revision=revision)


@pytest.fixture
def board(tmp_path):
    return ReplicaBoard(Location.open(str(tmp_path)))


@in_loop
async def test_a_node_that_refuses_another_revision_of_the_same_number_has_not_converged(board):
    nodes = Nodes(board, replica="one")
    stream = nodes.connect(subscribe("a", revision=2), "")
    refusal = watch_pb2.Report(status=watch_pb2.Report.STATUS_NACK, active_revision=2)
    stream.refused(refusal, 2, "revision_order", "forked")
    found = convergence(entry(2), await nodes.of_channel("prod"))
    assert (found.converged, found.refusing) == (0, 1)
    stream.accepted(watch_pb2.Report(status=watch_pb2.Report.STATUS_ACK, active_revision=3))
    found = convergence(entry(3), await nodes.of_channel("prod"))
    assert (found.converged, found.refusing) == (1, 0)


@in_loop
async def test_nothing_is_written_while_nothing_changes(board):
    nodes = Nodes(board, replica="one")
    other = Nodes(board, replica="two")
    stream = nodes.connect(subscribe("a"), "")
    await nodes._write()
    assert not nodes.changed
    assert [s.node_id for s in await other.of_channel("prod")] == ["a"]
    stream.ended()
    assert nodes.changed
    assert [s.connected for s in await nodes.of_channel("prod")] == [False]


@in_loop
async def test_a_broken_board_hides_no_other(board, caplog):
    one, two = Nodes(board, replica="one"), Nodes(board, replica="two")
    one.connect(subscribe("a"), "")
    await one._write()
    board.write("three", b"not a board")
    assert [s.node_id for s in await two.of_channel("prod")] == ["a"]
    assert [r.what for r in caplog.records if r.message == "board failed"] == ["board three"]


@in_loop
async def test_a_node_that_cannot_be_read_hides_no_other(board, caplog):
    two = Nodes(board, replica="two")
    states = [NodeState(name, "prod", connected=True) for name in ("a", "b", "c")]
    content = json.loads(dump_board(Board("one", time.time(), states)))
    content["nodes"][1]["telemetry"] = "x" * 100_000
    board.write("one", json.dumps(content).encode())
    assert [s.node_id for s in await two.of_channel("prod")] == ["a", "c"]
    (told,) = (r for r in caplog.records if r.message == "board failed")
    assert (told.what, told.kind) == ("board one", "board_node")
    assert "'b'" in told.why
    assert "telemetry" in told.why


@pytest.mark.parametrize("node", [3, None, [], {}, {"node_id": 1}, {"node_id": "x" * 2000}])
def test_what_is_no_node_is_left_out(node):
    content = json.loads(dump_board(Board("one", 1e9, [NodeState("a", "prod")])))
    content["nodes"] += [node]
    data = json.dumps(content).encode()
    found, wrong = load_sound(data)
    assert [state.node_id for state in found.nodes] == ["a"]
    assert wrong.kind == "board_node"
    assert len(str(wrong)) < 1000
    for bad in (data[:-1], json.dumps(content | {"nodes": 3}).encode(), b"x"):
        with pytest.raises(Corrupt) as caught:
            load_sound(bad)
        assert caught.value.kind == "board"


@in_loop
async def test_fields_of_telemetry_that_nobody_knows_are_not_kept(board):
    # Field 99, of 60 kB, in the message and in one of its deployments.
    unknown = b"\x9a\x06\xe0\xd4\x03" + b"x" * 60_000
    inside = COUNTERS.SerializeToString() + unknown[:5].replace(b"\xe0\xd4\x03", b"\x01") + b"x"
    data = b"\x1a" + bytes([len(inside)]) + inside + unknown
    sent = watch_pb2.Telemetry.FromString(data)
    assert sent.ByteSize() == len(data)
    telemetry.check(sent)
    assert sent == watch_pb2.Telemetry(deployments=[COUNTERS])
    assert sent.ByteSize() < 100
    one, two = Nodes(board, replica="one"), Nodes(board, replica="two")
    one.connect(subscribe("a"), "").counted(sent)
    await one._write()
    assert [s.node_id for s in await two.of_channel("prod")] == ["a"]


def test_the_largest_telemetry_that_is_sound_fits_on_a_board():
    largest = watch_pb2.Telemetry()
    for time_ in (largest.since, largest.until):
        time_.seconds, time_.nanos = 253_402_300_799, 999_999_999
    fields = watch_pb2.DeploymentCounters.DESCRIPTOR.fields_by_name
    counts = dict.fromkeys(set(fields.keys()) - {"identity", "revision"}, 10**12)
    for _ in range(telemetry.MAX_DEPLOYMENTS):
        largest.deployments.add(identity="\U0001f600" * 200, revision=2**64 - 1, **counts)
    telemetry.check(largest)
    encoded = base64.b64encode(largest.SerializeToString()).decode()
    board = Board("one", 1e9, [NodeState("a", "prod", telemetry=encoded)])
    assert load_board(dump_board(board)) == board


@in_loop
async def test_nodes_of_a_silent_replica_have_gone(board, monkeypatch):
    one, two = Nodes(board, replica="one"), Nodes(board, replica="two")
    one.connect(subscribe("a"), "")
    await one._write()
    monkeypatch.setattr(nodes_module, "_SILENT_S", -1.0)
    (state,) = await two.of_channel("prod")
    assert not state.connected


@in_loop
async def test_a_node_that_comes_back_has_not_changed(board):
    nodes = Nodes(board, replica="one")
    stream = nodes.connect(subscribe("a"), "")
    stream.accepted(watch_pb2.Report(active_revision=3, identity="x"))
    stream.refused(watch_pb2.Report(active_revision=3, identity="x"), 4, "why", "because")
    since = stream._state.active_since
    stream.ended()
    again = nodes.connect(subscribe("a", 3), "")._state
    assert (again.active_since, again.acked, again.identity) == (since, True, "x")
    assert (again.nack_revision, again.nack_kind) == (4, "why")
    elsewhere = nodes.connect(subscribe("a", 2), "")._state
    assert (elsewhere.acked, elsewhere.identity) == (False, "")


@in_loop
async def test_what_is_remembered_of_nodes_that_went_is_bounded(board, monkeypatch):
    monkeypatch.setattr(nodes_module, "_MAX_GONE", 10)
    nodes = Nodes(board, replica="one")
    for number in range(100):
        nodes.connect(subscribe(f"node-{number:03d}"), "").ended()
    kept = [state.node_id for state in await nodes.of_channel("prod")]
    assert kept == [f"node-{number:03d}" for number in range(90, 100)]
    monkeypatch.setattr(nodes_module, "GONE_S", 0.0)
    nodes._forget()
    assert nodes._states == {}


@in_loop
async def test_a_store_that_is_away_is_told_once(board, tmp_path, caplog):
    # A link to itself: reading it is an error of the medium, for root too.
    (tmp_path / "replicas").symlink_to(tmp_path / "replicas")
    nodes = Nodes(board, replica="one")
    nodes.connect(subscribe("a"), "")
    for _ in range(3):
        await nodes._write()
        assert [s.node_id for s in await nodes.of_channel("prod")] == ["a"]
    assert nodes.changed
    told = [r.what for r in caplog.records if r.message == "board failed"]
    assert sorted(told) == ["read", "write"]
    (tmp_path / "replicas").unlink()
    await nodes._write()
    assert not nodes.changed
