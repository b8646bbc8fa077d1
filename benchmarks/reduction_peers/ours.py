"""Ours: count a cache in Ray tasks, in a process of its own.

    python -m reduction_peers.ours JOB.json

The job is an object: `store`, `digest`, `workers`, `what` (``means``: Moments of the two classes,
of which the difference of means is taken; ``moments``: all that `steerage reduce` counts, eight
groups and the pairs), `bound` (each worker to a core of its own) and `out`, where the difference of
means goes. The last line of stdout is one JSON object: `seconds` from the open cache to the result
in memory, and `start_s`, which Ray took to start and its workers to import what they need.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import ray

from pipeline.reduction.counting import Counting, count
from pipeline.reduction.moment_store import StoredMoments, training_counting
from pipeline.reduction.pairs import find_pairs
from pipeline.reduction.samples import Samples, read_samples
from reduction_peers.inputs import STREAM
from store.activations import ActivationCache
from store.location import Location


def main() -> None:
    """Run one job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    root = Location.open(job["store"])
    start = time.perf_counter()
    # As many tasks at a time as workers were asked for; `ray_session` has room for one more.
    ray.init(
        num_cpus=job["workers"],
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    begin = ray.remote(num_cpus=1)(_begin)
    cores = sorted(os.sched_getaffinity(0))[: job["workers"]]
    begun = ray.get([begin.remote(core if job["bound"] else None) for core in cores])
    assert not job["bound"] or len(set(begun)) == len(cores), "two workers share a core"
    running = time.perf_counter()
    cache = ActivationCache.open(root, job["digest"])
    samples = read_samples(cache)
    counted = count(cache, root, _counting(samples, job["what"]), on_done=lambda done: None)
    moments = StoredMoments(cache.digest, counted)
    if job["what"] == "means":
        groups = counted[STREAM].groups
        difference_LW = groups.mean[0] - groups.mean[1]
    else:
        positive, negative = (moments.of(STREAM, label=label) for label in (True, False))
        difference_LW = positive.mean - negative.mean
    told = {
        "seconds": time.perf_counter() - running,
        "start_s": running - start,
    }
    if job.get("out"):
        np.save(job["out"], difference_LW)
    ray.shutdown()
    print(json.dumps(told))


def _begin(core: int | None) -> int:
    """Have a worker import what a task will, and stay on a core; its process.

    The threads that a task starts stay there too.
    """
    import pipeline.reduction.counting  # noqa: F401

    if core is not None:
        os.sched_setaffinity(0, {core})
        # Long enough for the other workers to begin, rather than for this one to do it twice.
        time.sleep(2)
    return os.getpid()


def _counting(samples: Samples, what: str) -> Counting:
    if what == "moments":
        pairs = find_pairs(samples.index, np.ones(len(samples), np.bool_))
        return training_counting(samples, pairs)
    none = np.zeros(0, np.int64)
    counts_2A = np.stack([samples.counts(samples.label_N), samples.counts(~samples.label_N)])
    return Counting(counts_2A, none, none, none, 0)


if __name__ == "__main__":
    main()
