"""Replicas over one bucket: contention, and kill -9 in the middle of publishing and promoting."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from delivery import WHO, make_artifact
from publishers import FINGERPRINT
from waiting import eventually

from steering_service.client.fetch import fetch_artifact
from steering_service.client.operator import Operator
from steering_service.client.subscription import Subscription
from steering_service.core.errors import Conflict, Unavailable
from store.channels import ChannelLog
from store.location import Location

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

# Another seed kills at other moments; a failure names its seed and moment.
SEED = 20261122
NUM_KILLS = 30
OPERATORS, CHANGES = 8, 25

# Makes its changes one after the other, each until it is in; one line of JSON for every reply OK.
OPERATE = """
import json, sys
from steering_service.client.operator import Operator
from steering_service.core.errors import Conflict
name, changes, *addresses = sys.argv[1:]
operators = [Operator(address, deadline_s=30) for address in addresses]
turn = 0
for number in range(int(changes)):
    while True:
        operator = operators[turn % len(operators)]
        turn += 1
        head = operator.channel("prod").revision
        try:
            entry = operator.promote("prod", share=(int(number) + 1) / int(changes), actor=name,
                                     reason=f"{name} {number}", expected_revision=head)
        except Conflict as error:
            assert error.kind == "revision_taken", error
        else:
            print(json.dumps([entry.revision, entry.reason]), flush=True)
            break
"""


class Witness:
    """Watches a channel through one replica, over its restarts, and keeps all it is told.

    Attributes:
        told: (artifact, strength, share, enabled) by revision: what was told twice must agree.
        forks: Revisions that were told with two contents.
        last: The last revision told.
    """

    def __init__(self, address: str) -> None:
        self.told: dict[int, tuple[str, float, float, bool]] = {}
        self.forks: list[object] = []
        self.last = 0
        self._address = address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with Operator(self._address) as operator:
                    for state in operator.watch("prod"):
                        told = (state.artifact, state.strength, state.share, state.enabled)
                        if self.told.setdefault(state.revision, told) != told:
                            self.forks.append((state.revision, self.told[state.revision], told))
                        self.last = state.revision
                        if self._stop.is_set():
                            return
            except Unavailable:
                self._stop.wait(0.05)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def check(self, log: ChannelLog) -> None:
        """All that it was told is what the log says."""
        assert self.forks == []
        for revision, told in self.told.items():
            entry = log.entry("prod", revision)
            assert told == (entry.artifact, entry.strength, entry.share, entry.enabled)


def test_eight_operators_over_three_replicas_lose_no_update(
    bucket, publisher, start_replica, tmp_path
):
    replicas = [start_replica(bucket) for _ in range(3)]
    addresses = [replica.address for replica in replicas]
    with replicas[0].operator() as operator:
        digest = publisher.publish(operator, make_artifact())
        operator.promote("prod", artifact=digest, strength=1.0, share=0.0, **WHO)
    witnesses = [Witness(address) for address in addresses]
    nodes = [
        Subscription(
            address, "prod", f"node-{i}", tmp_path / f"cache-{i}", publisher.roots, FINGERPRINT
        )
        for i, address in enumerate(addresses)
    ]
    try:
        for watching in (*witnesses, *nodes):
            watching.__enter__()
        operators = [
            subprocess.Popen(
                # Each begins with another replica.
                [
                    *(sys.executable, "-c", OPERATE, f"operator-{i}", str(CHANGES)),
                    *(addresses[i % 3 :] + addresses[: i % 3]),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(OPERATORS)
        ]
        replies = {}
        for process in operators:
            out, err = process.communicate(timeout=400)
            assert process.returncode == 0, err
            for revision, reason in map(json.loads, out.splitlines()):
                assert revision not in replies, "two operators were told the same revision"
                replies[revision] = reason
        last = 1 + OPERATORS * CHANGES
        log = ChannelLog(Location.open(bucket))
        history = log.history("prod")
        assert [entry.revision for entry in history] == list(range(1, last + 1))
        assert {entry.revision: entry.reason for entry in history[1:]} == replies
        made = {f"operator-{i}": [f"operator-{i} {n}" for n in range(CHANGES)] for i in range(8)}
        for name, reasons in made.items():
            assert [entry.reason for entry in history if entry.actor == name] == reasons
        log.verify("prod")
        for replica, witness, node in zip(replicas, witnesses, nodes, strict=True):
            eventually(lambda witness=witness: witness.last == last, 10, "the watcher's end")
            witness.check(log)
            assert node.active.wait_for(last, 10).artifact.digest == digest
            with replica.operator() as operator:
                assert operator.channel("prod").revision == last
            assert replica.alive
    finally:
        for watching in (*witnesses, *nodes):
            watching.__exit__(None, None, None)


class Writer(threading.Thread):
    """Publishes and promotes through one address without end, each until it is in.

    Attributes:
        published: Digests of which a reply OK came.
        promoted: Reason by revision, of which a reply OK came, or which was found to be in.
        retries: How many calls failed and were made again.
        succeeded: How many calls did not fail.
        busy_with: The call that is in progress.
        error: What it died of.
    """

    def __init__(self, address: str, publisher, artifacts) -> None:
        super().__init__(daemon=True)
        self.published: list[str] = []
        self.promoted: dict[int, str] = {}
        self.retries = 0
        self.succeeded = 0
        self.busy_with = ""
        self.error: BaseException | None = None
        self.stop = threading.Event()
        self._operator = Operator(address, deadline_s=5)
        self._publisher = publisher
        self._artifacts = artifacts

    def run(self) -> None:
        try:
            for number, artifact in enumerate(self._artifacts):
                if self.stop.is_set():
                    return
                self.busy_with = "publish"
                self._again(lambda a=artifact: self._publisher.publish(self._operator, a))
                self.published.append(artifact.digest)
                self._promote(artifact.digest, number)
        except BaseException as error:
            self.error = error

    def _promote(self, digest: str, number: int) -> None:
        """Compare-and-set; after a lost reply, the log says whether it was done."""
        before = self._again(lambda: self._operator.channel("prod")).revision
        self.busy_with = "promote"
        reason = f"change {number}"
        while True:
            try:
                entry = self._operator.promote(
                    "prod",
                    artifact=digest,
                    strength=float(number),
                    expected_revision=before,
                    actor="ada",
                    reason=reason,
                )
            except Conflict:
                entry = self._again(lambda: self._operator.channel("prod"))
                assert entry.reason == reason, "somebody else changed the channel"
            except Unavailable:
                self.retries += 1
                time.sleep(0.05)
                continue
            assert entry.revision == before + 1
            self.promoted[entry.revision] = reason
            self.succeeded += 1
            return

    def _again(self, action):
        """Repeat until it succeeds; only being unavailable is a reason to."""
        deadline = time.monotonic() + 60
        while True:
            try:
                result = action()
            except Unavailable:
                assert time.monotonic() < deadline, "the replica does not come back"
                self.retries += 1
                time.sleep(0.05)
            else:
                self.succeeded += 1
                return result


def artifacts():
    """Without end: two small ones, then one that is uploaded in several pieces."""
    for number in itertools.count(1):
        # 9 MiB is above the 8 MiB of a piece.
        width = 64 if number % 3 else 9 << 18
        yield make_artifact(number, width=width)


def test_thirty_kills_leave_no_half_artifact_and_no_fork(
    bucket, publisher, start_replica, tmp_path
):
    moments = random.Random(SEED)
    victim, other = start_replica(bucket), start_replica(bucket)
    seen: set[str] = set()
    struck: Counter[str] = Counter()
    with other.operator() as operator:
        publisher.publish(operator, make_artifact())
        operator.promote("prod", artifact=make_artifact().digest, strength=0.0, **WHO)
    writer = Writer(victim.address, publisher, artifacts())
    with (
        Witness(victim.address) as witness,
        Witness(other.address) as neighbour,
        Subscription(
            other.address, "prod", "node", tmp_path / "cache", publisher.roots, FINGERPRINT
        ) as node,
    ):
        writer.start()
        for kill in range(NUM_KILLS):
            # Not before it is in the middle of its work again.
            before = writer.succeeded
            eventually(lambda before=before: writer.succeeded > before, 60, "a call that is OK")
            delay_s = moments.uniform(0.0, 0.5)
            time.sleep(delay_s)
            struck[writer.busy_with] += 1
            victim.kill()
            print(f"kill {kill} of seed {SEED} after {delay_s:.3f} s in {writer.busy_with}")
            # Whatever is visible now, through another replica, is whole.
            with other.operator() as operator:
                for digest in {str(getattr(e, "digest", e)) for e in operator.list()} - seen:
                    download(other, digest, publisher, tmp_path / f"look-{kill}")
                    seen.add(digest)
            victim.start()
            assert writer.error is None, writer.error
        # One more that nobody disturbs.
        done = len(writer.published)
        eventually(lambda: len(writer.published) > done + 1, 60, "a publish after the kills")
        writer.stop.set()
        writer.join(60)
        assert not writer.is_alive()
        assert writer.error is None, writer.error
        log = ChannelLog(Location.open(bucket))
        history = log.history("prod")
        log.verify("prod")
        assert {e.revision: e.reason for e in history[1:]} == writer.promoted
        assert [e.reason for e in history[1:]] == [
            f"change {number}" for number in range(len(history) - 1)
        ]
        last = history[-1].revision
        for watching in (witness, neighbour):
            eventually(lambda watching=watching: watching.last == last, 15, "watcher's end")
            watching.check(log)
        assert node.active.wait_for(last, 15).artifact.digest == history[-1].artifact
    for digest in writer.published:
        download(other, digest, publisher, tmp_path / "end")
    print(f"{len(writer.published)} published, {writer.retries} retries, revision {last}")
    assert set(struck) == {"publish", "promote"}


def download(replica, digest, publisher, folder) -> None:
    """As a node does it, with every check."""
    fetch_artifact(
        digest,
        replica.address,
        cache_dir=folder,
        trust_roots=publisher.roots,
        model_fingerprint=FINGERPRINT,
    )
