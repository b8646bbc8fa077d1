"""Starting Ray, or joining a cluster, in one way for every step."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from pipeline.errors import OUR_ERRORS, InvalidInput


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
def ray_session(address: str | None, num_workers: int) -> Iterator[None]:
    """Have Ray running inside the block.

    Args:
        address: A cluster, such as ``auto`` or ``ray://head:10001``. None: a local Ray of this
            process, which ends with it.
        num_workers: Worker processes that a local Ray has room for. One more CPU is declared, since
            an actor pool that takes every CPU starves Ray Data's other stages for ever.
    """
    # Usage reports need a network that may not be there.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would warn of a default that it is going to change for tasks without a GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's C++ side writes to the terminal about its own internals, through our progress bars;
    # what concerns a user arrives as an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    started = not ray.is_initialized()
    if started:
        # With None, Ray would join whatever RAY_ADDRESS or an earlier `ray start` names.
        settings: dict[str, Any] = {"address": address or "local", "logging_level": logging.ERROR}
        if address is None:
            settings |= {
                "num_cpus": num_workers + 1,
                "include_dashboard": False,
                # Activations never pass through it; receipts are small.
                "object_store_memory": 128 << 20,
            }
        with _stderr_kept_back():
            ray.init(**settings, log_to_driver=False)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # What fails arrives as an exception.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
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
