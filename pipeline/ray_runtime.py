"""Starting Ray, or joining a cluster, in one way for every step."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import PipelineError
from steering_service.core.errors import SteeringError
from store.errors import StoreError


@contextmanager
def ray_session(address: str | None, num_workers: int) -> Iterator[None]:
    """Have Ray running inside the block.

    Args:
        address: A cluster, such as ``auto`` or ``ray://head:10001``. None: a local Ray of this
            process, which ends with it.
        num_workers: Worker processes that a local Ray has room for. One more CPU is declared, since
            an actor pool that takes every CPU starves Ray Data's other stages for ever.
    """
    # Both only add noise to a local run: usage reports need a network that may not be there, and
    # the warning is about a default that Ray will change for GPU-less tasks.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    started = not ray.is_initialized()
    if started:
        settings: dict[str, Any] = {"address": address, "logging_level": logging.ERROR}
        if address is None:
            settings |= {
                "num_cpus": num_workers + 1,
                "include_dashboard": False,
                # Activations never pass through it; receipts are small.
                "object_store_memory": 128 << 20,
            }
        ray.init(**settings, log_to_driver=False)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    finally:
        if started:
            ray.shutdown()


def _cause(error: BaseException) -> BaseException:
    """The error of ours that a worker raised, or Ray's own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (PipelineError, SteeringError, StoreError)):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
