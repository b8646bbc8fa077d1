"""A run that is slow enough to be killed in the middle, and its undisturbed result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.fs
import pytest

# pytest's importlib mode puts no folder of tests on the path; the helpers beside this file, and the
# certificates of the service's tests:
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "service")]

import radosgw
from delivery import Replica, environment
from publishers import Publisher

NUM_PAIRS = 1792
TIMEOUT_S = 400
# Ray's agents outlive a killed raylet: they wait up to a minute for its dead control service first.
END_S = 120
_MARK = "STEERAGE_TEST_RUN"
_CLUSTER = {
    # Tokens would be kept in the home folder of whoever runs the tests.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A node is given up after two seconds; Ray's default is fifteen.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


@dataclass
class Driver:
    """One `steerage extract` process and everything that it starts."""

    run_file: Path
    store: Path
    flags: tuple[str, ...] = ()
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[str] | None = None

    def start(self) -> Driver:
        self.process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("steerage")), "extract", str(self.run_file)),
                *("--store", str(self.store), "--workers", "2", "--json", *self.flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", _MARK: self.mark},
            # A group of its own, as a shell gives every job: Ctrl-C reaches all of it.
            start_new_session=True,
        )
        return self

    def finish(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err

    @property
    def cache(self) -> Cache:
        return Cache(self.store)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def family(self) -> list[psutil.Process]:
        """Living processes that inherited this driver's environment, itself included."""
        return marked(self.mark)

    def shard_workers(self) -> list[psutil.Process]:
        """The Ray actors that hold a model."""
        return shard_workers_of(self.family())

    def wait_for_family_to_end(self, timeout_s: float = END_S) -> list[str]:
        """Command lines of what is still alive when the time is over; it is killed."""
        return wait_for_end(self.mark, timeout_s)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that were started with a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(*_GONE):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def shard_workers_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are Ray actors of an actor pool."""
    workers = []
    for process in processes:
        with contextlib.suppress(*_GONE):
            if "MapWorker" in process.cmdline()[0]:
                workers.append(process)
    return workers


def wait_for_end(mark: str, timeout_s: float) -> list[str]:
    """Command lines of what is still alive when the time is over; it is killed."""
    deadline = time.monotonic() + timeout_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = []
    for process in left:
        with contextlib.suppress(*_GONE):
            names.append(" ".join(process.cmdline())[:120])
            process.kill()
    return names


@dataclass
class Node:
    """A raylet and what it starts, such as a machine of a cluster."""

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, *flags: str) -> Node:
        """Join, or with ``--head`` begin, a cluster; returns once it runs."""
        done = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", *flags),
                *("--object-store-memory", str(80_000_000)),
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, **_CLUSTER, _MARK: self.mark},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self

    def raylet(self) -> psutil.Process:
        for process in marked(self.mark):
            with contextlib.suppress(*_GONE):
                if process.name() == "raylet":
                    return process
        raise AssertionError("the node has no raylet")

    def shard_workers(self) -> list[psutil.Process]:
        return shard_workers_of(marked(self.mark))

    def end(self) -> None:
        """Kill all of it at once, as when a machine is switched off."""
        wait_for_end(self.mark, 0)


@dataclass
class Cluster:
    """A Ray cluster of several raylets on this machine: a head without CPUs, and nodes of one."""

    address: str
    folder: Path
    head: Node
    nodes: list[Node] = field(default_factory=list)

    @classmethod
    def start(cls, num_nodes: int) -> Cluster:
        # Not pytest's folder: a socket's path may have 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="ray-test-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        head = Node()
        cluster = cls(f"127.0.0.1:{port}", folder, head)
        try:
            head.start(
                *("--head", "--port", str(port), "--num-cpus", "0", "--temp-dir", str(folder)),
                *("--include-dashboard", "false", "--node-ip-address", "127.0.0.1"),
            )
            for _ in range(num_nodes):
                cluster.add_node()
        except BaseException:
            cluster.end()
            raise
        return cluster

    def add_node(self) -> Node:
        self.nodes.append(Node())
        flags = ("--address", self.address, "--num-cpus", "1", "--node-ip-address", "127.0.0.1")
        return self.nodes[-1].start(*flags)

    def lose_node(self, node: Node) -> None:
        """kill -9 of the raylet; its workers end by themselves, as Ray promises."""
        workers = node.shard_workers()
        node.raylet().kill()
        self.nodes.remove(node)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert alive == [], "workers outlive their raylet"
        # Ray's log monitor outlives it.
        node.end()

    def shard_workers(self) -> list[psutil.Process]:
        return [worker for node in self.nodes for worker in node.shard_workers()]

    def shards_begun(self) -> Counter[int]:
        """How often each shard was begun, by any worker of any run."""
        begun: Counter[int] = Counter()
        # Ray moves the logs of ended workers to `old` when it has many open.
        for path in self.folder.glob("session_2*/logs/**/worker-*.err"):
            for line in path.read_text(errors="replace").splitlines():
                words = line.split()
                if words[-3:-1] == ["shard", "begun"]:
                    begun[int(words[-1])] += 1
        return begun

    def end(self) -> None:
        for node in (*self.nodes, self.head):
            node.end()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Cache:
    """The one cache in a store, as files."""

    store: Path

    @property
    def folder(self) -> Path | None:
        folders = sorted((self.store / "caches").glob("*"))
        return folders[0] if folders else None

    def records(self) -> dict[str, tuple[int, int]]:
        """Commit records and shards by path: inode and time of change."""
        if self.folder is None:
            return {}
        found = {}
        for path in (self.folder / "_commits").rglob("*.json"):
            info = path.stat()
            found[str(path.relative_to(self.folder))] = (info.st_ino, info.st_mtime_ns)
            shard = self.folder / path.parent.name / "c" / str(int(path.stem)) / "0" / "0"
            info = shard.stat()
            found[str(shard.relative_to(self.folder))] = (info.st_ino, info.st_mtime_ns)
        return found

    def num_committed(self) -> int:
        """Shards with the record of every stream; `z` is written last."""
        return 0 if self.folder is None else len(list(self.folder.glob("_commits/z/*.json")))

    def contents(self) -> dict[str, str]:
        """sha256 of every file by path, but for the commit records, which hold timings, and what
        killed writers leave, whose names begin with a dot."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and "_commits" not in path.parts and path.name[0] != "."
        }


StartDriver = Callable[..., Driver]


@pytest.fixture
def start_driver(run_file: Path) -> Iterator[StartDriver]:
    """Start `steerage extract` on a store; whatever it leaves behind is killed at the end."""
    drivers: list[Driver] = []

    def start(store: Path, *flags: str, run: Path = run_file) -> Driver:
        drivers.append(Driver(run, store, flags).start())
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.wait_for_family_to_end(0)


@pytest.fixture(scope="module")
def run_file(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = make_model(
        "llama", hidden_size=192, intermediate_size=512, num_hidden_layers=6, initializer_range=0.05
    )
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(NUM_PAIRS):
            row = {
                "prompt": f"question {number}: which way does the ship steer tonight?",
                "positive": "to the north, captain",
                "negative": "to the south, captain",
            }
            file.write(json.dumps(row) + "\n")
    path = folder / "run.toml"
    path.write_text(
        f"""
        name = "kill"
        [model]
        path = "{model}"
        [prompts]
        files = ["pairs.jsonl"]
        [capture]
        tokens = "last"
        tokens_per_pack = 2048
        shard_mib = 0.5
        """
    )
    return path


@pytest.fixture(scope="module")
def undisturbed(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run writes that nobody disturbs."""
    store = tmp_path_factory.mktemp("undisturbed")
    driver = Driver(run_file, store).start()
    code, _, err = driver.finish()
    assert code == 0, err
    assert driver.wait_for_family_to_end() == []
    assert Cache(store).num_committed() >= 16
    return Cache(store).contents()


@pytest.fixture(scope="module")
def start_cluster() -> Iterator[Callable[[int], Cluster]]:
    """Start a Ray cluster; all of its processes are killed at the end."""
    clusters: list[Cluster] = []

    def start(num_nodes: int) -> Cluster:
        clusters.append(Cluster.start(num_nodes))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.end()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[radosgw.RadosGateway]:
    """A real S3 server with a bucket `steerage`."""
    if absent := radosgw.missing():
        pytest.skip(f"needs radosgw: {', '.join(absent)} are not installed")
    gateway = radosgw.RadosGateway(tmp_path_factory.mktemp("rgw"))
    try:
        pyarrow.fs.S3FileSystem(
            access_key=radosgw.KEY,
            secret_key=radosgw.SECRET,
            endpoint_override=gateway.endpoint,
            allow_bucket_creation=True,
        ).create_dir("steerage")
        yield gateway
    finally:
        gateway.stop()


@pytest.fixture
def bucket(gateway: radosgw.RadosGateway) -> Iterator[str]:
    """URL of an empty place in the bucket; this process and what it starts have its credentials."""
    with environment(gateway.environment):
        yield f"s3://steerage/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return Publisher(tmp_path_factory.mktemp("keys") / "publisher")


@pytest.fixture
def start_replica(tmp_path: Path, publisher: Publisher) -> Iterator[Callable[..., Replica]]:
    """Start service processes over one store; they trust the publisher and end with the test."""
    replicas: list[Replica] = []

    def start(store: str | None = None, **options: object) -> Replica:
        replica = Replica(
            store or str(tmp_path / "store"),
            tmp_path / f"replica-{len(replicas)}.log",
            (str(publisher.public_key),),
        )
        replica.options |= options
        replicas.append(replica)
        return replica.start()

    yield start
    for replica in replicas:
        if replica.process is not None and replica.alive:
            replica.kill()
