"""Who runs what: what replicas see of their nodes, and what they make of it together."""

from __future__ import annotations

import queue
import time

import grpc
import psutil
import pytest

from steering_service.client.connection import Connection
from steering_service.v1 import node_pb2, watch_pb2

WHO = {"actor": "ada", "reason": "a test"}
ACK, NACK = watch_pb2.Report.STATUS_ACK, watch_pb2.Report.STATUS_NACK


class Node:
    """A Watch stream by hand."""

    def __init__(self, address, channel, node_id, **subscribe):
        self.connection = Connection(address)
        self.outbox = queue.SimpleQueue()
        self.channel = channel
        self.send(
            subscribe=watch_pb2.Subscribe(
                node_id=node_id,
                channel=channel,
                client="by-hand/1",
                model_fingerprint="f" * 64,
                **subscribe,
            )
        )
        self.call = self.connection.watches.Watch(iter(self.outbox.get, None), timeout=60)

    def send(self, **part):
        self.outbox.put(watch_pb2.WatchRequest(**part))

    def assignment(self):
        return next(r.assignment for r in self.call if r.WhichOneof("message") == "assignment")

    def report(self, status, *, nonce, revision, active, **more):
        self.send(
            report=watch_pb2.Report(
                channel=self.channel,
                revision=revision,
                nonce=nonce,
                status=status,
                active_revision=active,
                **more,
            )
        )

    def accept(self):
        told = self.assignment()
        self.report(
            ACK,
            nonce=told.nonce,
            revision=told.revision,
            active=told.revision,
            identity=f"identity-{told.revision}",
        )
        return told.revision

    def close(self):
        self.outbox.put(None)
        self.connection.close()


@pytest.fixture
def node():
    opened = []

    def make(service, channel, node_id, **subscribe):
        opened.append(Node(service.address, channel, node_id, **subscribe))
        return opened[-1]

    yield make
    for item in opened:
        item.close()


def when(operator, channel, condition, timeout_s=20.0):
    """Nodes by id, and convergence, as soon as they fulfil the condition."""
    deadline = time.monotonic() + timeout_s
    while True:
        listed, found = operator.nodes(channel)
        nodes = {item.node_id: item for item in listed}
        assert [item.node_id for item in listed] == sorted(nodes)
        if condition(nodes, found):
            return nodes, found
        assert time.monotonic() < deadline, (nodes, found)
        time.sleep(0.02)


def test_nodes_of_two_replicas_and_how_far_a_change_has_come(start, node, channel):
    here, there = start(), start()
    with here.operator() as operator, there.operator() as other:
        operator.promote(channel, **WHO)
        near, far = node(here, channel, "near"), node(there, channel, "far")
        near.accept()
        _, found = when(operator, channel, lambda n, c: c.converged == 1 and c.connected == 2)
        assert (found.pending, found.refusing, found.seconds) == (1, 0, None)
        far.accept()
        for asked in (operator, other):
            nodes, found = when(asked, channel, lambda n, c: c.converged == 2)
            assert found.seconds > 0
            assert found.head_revision == 1
            assert {item.identity for item in nodes.values()} == {"identity-1"}
            assert all(item.connected and item.nack is None for item in nodes.values())
            assert {item.client for item in nodes.values()} == {"by-hand/1"}
            assert len({item.replica for item in nodes.values()}) == 2
        other.promote(channel, **WHO)
        told = far.assignment()
        far.report(
            NACK,
            nonce=told.nonce,
            revision=2,
            active=1,
            identity="identity-1",
            kind="policy_strength",
            reason="too\x1b[31m strong\n" + "x" * 5000,
        )
        near.accept()
        nodes, found = when(operator, channel, lambda n, c: c.refusing == 1 and c.converged == 1)
        assert (found.pending, found.head_revision) == (0, 2)
        refused = nodes["far"]
        assert refused.refuses_head
        assert (refused.nack.revision, refused.nack.kind) == (2, "policy_strength")
        assert refused.nack.reason.startswith("too\N{REPLACEMENT CHARACTER}[31m strong")
        assert len(refused.nack.reason) == 1000
        assert (refused.active_revision, refused.identity) == (1, "identity-1")
        far.close()
        nodes, found = when(operator, channel, lambda n, c: c.gone == 1)
        assert not nodes["far"].connected
        # It comes back through the other replica: one node, connected, and its refusal stays.
        back = node(here, channel, "far", active_revision=1)
        assert back.accept() == 2
        nodes, found = when(operator, channel, lambda n, c: c.converged == 2)
        assert found.gone == 0
        assert nodes["far"].nack.revision == 2
        assert not nodes["far"].refuses_head
        assert nodes["far"].replica == nodes["near"].replica


def test_a_replica_that_drains_says_that_its_nodes_have_gone(start, node, channel):
    here, there = start(), start()
    with here.operator() as operator:
        node(there, channel, "node-1")
        when(operator, channel, lambda n, c: c.connected == 1)
        there.terminate()
        when(operator, channel, lambda n, c: (c.connected, c.gone) == (0, 1))


def test_observers_and_other_channels_are_not_counted(
    shared_service, shared_operator, node, channel
):
    shared_operator.promote(channel, **WHO)
    looking = node(shared_service, channel, "looking", observer=True)
    looking.accept()
    node(shared_service, f"{channel}-other", "elsewhere")
    node(shared_service, channel, "node-1").accept()
    nodes, found = when(shared_operator, channel, lambda n, c: c.converged == 1)
    assert (list(nodes), found.connected) == (["node-1"], 1)


def test_a_later_stream_of_a_node_takes_over(shared_service, shared_operator, node, channel):
    shared_operator.promote(channel, **WHO)
    old = node(shared_service, channel, "node-1")
    told = old.assignment()
    new = node(shared_service, channel, "node-1")
    new.accept()
    when(shared_operator, channel, lambda n, c: c.converged == 1)
    old.report(NACK, nonce=told.nonce, revision=1, active=0, kind="old")
    old.close()
    time.sleep(0.5)  # in which nothing must happen
    nodes, found = shared_operator.nodes(channel)
    assert (found.connected, found.converged, nodes[0].nack) == (1, 1, None)


def test_pages_of_nodes(shared_service, shared_operator, node, channel):
    ids = [f"node-{number}" for number in range(5)]
    for node_id in ids:
        node(shared_service, channel, node_id)
    when(shared_operator, channel, lambda n, c: c.connected == 5)
    with Connection(shared_service.address) as connection:
        pages, token = [], ""
        while not pages or token:
            page = connection.nodes.ListNodes(
                node_pb2.ListNodesRequest(channel=channel, page_size=2, page_token=token), timeout=5
            )
            assert page.convergence.connected == 5
            pages.append([item.node_id for item in page.nodes])
            token = page.next_page_token
    assert pages == [ids[:2], ids[2:4], ids[4:]]


def counters(**changes):
    return watch_pb2.DeploymentCounters(revision=1, identity="i", requests=7, **changes)


def test_telemetry_is_kept_if_it_can_be_true(shared_service, shared_operator, node, channel):
    shared_operator.promote(channel, **WHO)
    sender = node(shared_service, channel, "node-1")
    sender.accept()
    sound = watch_pb2.Telemetry(deployments=[counters()])
    sound.until.FromSeconds(1_800_000_000)
    sender.send(telemetry=sound)
    nodes, _ = when(shared_operator, channel, lambda n, c: n["node-1"].telemetry)
    assert nodes["node-1"].telemetry[1, "i"].requests == 7
    absurd = [
        watch_pb2.Telemetry(deployments=[counters(errors=2**64 - 1)]),
        watch_pb2.Telemetry(deployments=[counters() for _ in range(17)]),
        watch_pb2.Telemetry(deployments=[watch_pb2.DeploymentCounters(identity="x" * 201)]),
        watch_pb2.Telemetry(deployments=[counters(errors=3)]),
    ]
    absurd[3].since.seconds = -(2**62)
    for item in absurd:
        sender.send(telemetry=item)
    # The stream goes on all the same, and what was good stays.
    shared_operator.promote(channel, **WHO)
    assert sender.accept() == 2
    nodes, _ = when(shared_operator, channel, lambda n, c: c.converged == 1)
    assert nodes["node-1"].telemetry[1, "i"].errors == 0


@pytest.mark.parametrize("status", [0, 3])
def test_a_report_says_ack_or_nack(shared_service, shared_operator, node, channel, status):
    shared_operator.promote(channel, **WHO)
    sender = node(shared_service, channel, "node-1")
    told = sender.assignment()
    sender.report(status, nonce=told.nonce, revision=1, active=1)
    with pytest.raises(grpc.RpcError) as caught:
        list(sender.call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_reports_with_wrong_nonces_change_nothing(shared_service, shared_operator, node, channel):
    shared_operator.promote(channel, **WHO)
    sender = node(shared_service, channel, "node-1")
    told = sender.assignment()
    for nonce in (0, told.nonce + 1, 2**64 - 1):
        sender.report(ACK, nonce=nonce, revision=1, active=1)
    sender.report(NACK, nonce=told.nonce, revision=99, active=0, kind="why", reason="because")
    sender.report(ACK, nonce=told.nonce, revision=1, active=1)  # settled already
    nodes, _found = when(shared_operator, channel, lambda n, c: c.refusing == 1)
    # What is refused is what was assigned, whatever the node calls it.
    assert (nodes["node-1"].nack.revision, nodes["node-1"].active_revision) == (1, 0)


def test_a_flood_of_reports_is_read_slowly_and_stops_nobody(
    shared_service, shared_operator, node, channel
):
    process = psutil.Process(shared_service.process.pid)
    shared_operator.promote(channel, **WHO)
    flooding = node(shared_service, channel, "flooding")
    told = flooding.assignment()
    before, used = process.memory_info().rss, sum(process.cpu_times()[:2])
    junk = watch_pb2.Report(nonce=told.nonce, status=NACK, reason="x" * 60_000, kind="y" * 1000)
    for _ in range(2000):  # 120 MB
        flooding.send(report=junk)
    other = node(shared_service, channel, "other")
    started = time.monotonic()
    for _ in range(5):
        revision = shared_operator.promote(channel, **WHO).revision
        while other.accept() < revision:
            pass
    assert process.memory_info().rss - before < 60 << 20
    busy = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - started + 1.0)
    assert busy < 0.9


def test_a_name_that_is_too_long_is_refused(shared_service, channel):
    for field in ("client", "model_fingerprint"):
        with Connection(shared_service.address) as connection:
            subscribe = watch_pb2.Subscribe(node_id="n", channel=channel, **{field: "x" * 201})
            call = connection.watches.Watch(
                iter([watch_pb2.WatchRequest(subscribe=subscribe)]), timeout=10
            )
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
