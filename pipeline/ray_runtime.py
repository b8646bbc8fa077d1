"""Starting Ray, or joining a cluster, in one way for every step."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any, Final

from pipeline.errors import OUR_ERRORS, InvalidInput

log = logging.getLogger(__name__)

LOCAL_STORE_NBYTES: Final = 128 << 20
"""Of a local Ray's object store."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How many workers there are, and what each of them reserves.

    Attributes:
        max_workers: Most at a time.
        min_workers: Kept even when there is less to do; a cluster's autoscaler makes room for them.
        cpus: CPUs of each; it computes on one thread all the same.
        gpus: GPUs of each, such as 1, 2 or 0.5. None: 1 on ``cuda``, else 0.
    """

    max_workers: int
    min_workers: int = 1
    cpus: float = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.min_workers > self.max_workers:
            raise InvalidInput(
                f"--min-workers {self.min_workers} is more than --workers {self.max_workers}; "
                "--workers is the most at a time",
                kind="workers",
            )
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise InvalidInput(
                f"--gpus-per-worker {self.gpus:g}: Ray shares out parts of one GPU or several "
                "whole ones; choose a whole number, or less than 1",
                kind="workers",
            )

    def resources(self, device: str) -> dict[str, float]:
        """What Ray reserves for each worker."""
        gpus = float(device == "cuda") if self.gpus is None else self.gpus
        if device == "cuda" and not gpus:
            raise InvalidInput(
                "--gpus-per-worker 0 with --device cuda: a worker would see no GPU; expected more "
                "than 0, such as 0.5",
                kind="workers",
            )
        return {"num_cpus": self.cpus, "num_gpus": gpus}


def check_device(device: str, address: str | None) -> None:
    """Refuse a local run on a GPU that is not there, which Ray would wait for, for ever.

    Raises:
        InvalidInput: ``cuda`` without a cluster's address, and PyTorch sees no GPU here.
    """
    import torch

    if device == "cuda" and address is None and not torch.cuda.is_available():
        raise InvalidInput(
            f"--device cuda: torch {torch.__version__} sees no GPU on this machine; "
            "use --device cpu, or --ray ADDRESS for a cluster that has some",
            kind="device",
        )


@contextmanager
def ray_session(
    address: str | None,
    num_workers: int,
    *,
    cpus_per_worker: float = 1,
    spare_cpus: int = 1,
) -> Iterator[None]:
    """Have Ray running inside the block; a Ray that runs already is used, and left running.

    Args:
        address: A cluster, such as ``auto`` or ``ray://head:10001``. None: a local Ray of this
            process, which ends with it.
        num_workers: Worker processes that a local Ray has room for.
        cpus_per_worker: CPUs that each of them reserves.
        spare_cpus: Declared beside theirs. An actor pool that takes every CPU starves Ray Data's
            other stages for ever; plain tasks need none, and would use it.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        _start(address, num_workers, cpus_per_worker, spare_cpus)
    _quiet_ray_data()
    # Ray prints the failures that it recovers from on stdout, some as late as in its shutdown; but
    # stdout is for results.
    with redirect_stdout(sys.stderr) if started else nullcontext():
        try:
            yield
        except ray.exceptions.RayError as error:
            raise _cause(error) from error
        finally:
            if started:
                ray.shutdown()


@contextmanager
def ray_starting(
    address: str | None,
    num_workers: int,
    *,
    cpus_per_worker: float = 1,
) -> Iterator[Callable[[], None]]:
    """Start Ray beside what the block does first, such as planning; `ray_session` then finds it.

    What the process writes to its stderr before Ray runs is lost: call what is yielded, which
    waits, and then write. Arguments as for `ray_session`.
    """
    running, over = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def hold() -> None:
        try:
            _start(address, num_workers, cpus_per_worker)
        except BaseException as error:
            failed.append(error)
        finally:
            running.set()
        # Ray's daemons are told to die with the thread that started them, so it must live as long.
        over.wait()

    def wait() -> None:
        running.wait()
        if failed:
            raise failed[0]

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    import ray

    if ray.is_initialized():
        yield lambda: None
        return
    # Ray sets one such handler where it is started by the main thread: to end is to clean up.
    before = signal.signal(signal.SIGTERM, stop)
    thread = threading.Thread(target=hold, name="ray", daemon=True)
    thread.start()
    with redirect_stdout(sys.stderr):
        try:
            yield wait
        finally:
            running.wait()
            if not failed:
                ray.shutdown()
            over.set()
            thread.join()
            signal.signal(signal.SIGTERM, before)


def warn_without_room(resources: Mapping[str, float]) -> None:
    """Say if no node of the cluster could ever hold a worker; Ray waits for one that could.

    Args:
        resources: Of a worker, as `Pool.resources` gives them.
    """
    import ray

    wanted = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(k, 0) >= amount for k, amount in wanted.items()) for node in nodes):
        log.warning(
            "no node of the Ray cluster has the %g CPUs and %g GPUs of a worker; waiting for one",
            *wanted.values(),
        )


def num_actors_alive(class_name: str) -> int | None:
    """Actors of this driver's job, of a class or a Ray Data stage that holds its name, that run;
    None where Ray does not say, as to a client of a cluster (``ray://``)."""
    import ray

    if ray.util.client.ray.is_connected():
        return None

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    alive = ray._private.state.actors(job_id=job, actor_state_name="ALIVE")
    return sum(class_name in actor["ActorClassName"] for actor in alive.values())


def _start(
    address: str | None, num_workers: int, cpus_per_worker: float, spare_cpus: int = 1
) -> None:
    # Usage reports need a network that may not be there.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would warn of a default that it is going to change for tasks without a GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's C++ side writes to the terminal about its own internals, through our progress bars;
    # what concerns a user arrives as an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    # With None, Ray would join whatever RAY_ADDRESS or an earlier `ray start` names.
    settings: dict[str, Any] = {"address": address or "local", "logging_level": logging.ERROR}
    if address is None:
        settings |= {
            "num_cpus": math.ceil(num_workers * cpus_per_worker) + spare_cpus,
            "include_dashboard": False,
            # Activations never pass through it; receipts are small.
            "object_store_memory": LOCAL_STORE_NBYTES,
        }
    with _stderr_kept_back():
        ray.init(**settings, log_to_driver=False)


def _quiet_ray_data() -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What fails arrives as an exception.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextmanager
def _stderr_kept_back() -> Iterator[None]:
    """Show what the block writes to the process's stderr only if it fails.

    Ray's C++ side greets the terminal directly, past any logging set-up.
    """
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(original, kept.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def _cause(error: BaseException) -> BaseException:
    """The error of ours that a worker raised, or Ray's own."""
    from ray.exceptions import RayError

    seen: BaseException | None = error
    while seen is not None:
        # Ray's wrapper is an instance of both, and its text is the worker's traceback.
        if isinstance(seen, OUR_ERRORS) and not isinstance(seen, RayError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
