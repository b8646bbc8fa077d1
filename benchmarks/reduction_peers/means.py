"""Others' difference of means, and a plain read: a program for the peers' environment.

    python -m reduction_peers.means JOB.json

Nothing of ours is imported. The job is an object: `contestant`, `path` (a file, a folder, or for
`raw_*` a list of files), `dtype` (of the stored values) and `out`, where the difference of means
goes as float64 [L, W]. The last line of stdout is one JSON object with `seconds`.

Shapes: A array rows, R some of them, L layers, W width.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

_READ_NBYTES: Final = 8 << 20
_LIBRARIES: Final = {"numpy": ("numpy",), "dask": ("numpy", "dask.array", "zarr")}
_ROWS: Final = 64
"""Rows that numpy takes at a time: 16 MiB of bits."""


def main() -> None:
    """Run one job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    contestants: dict[str, Callable[[dict[str, Any]], Any]] = {
        "raw_1": lambda job: _read(job["path"], 1),
        "raw_2": lambda job: _read(job["path"], 2),
        "numpy": _numpy,
        "dask": _dask,
    }
    run = contestants[job["contestant"]]
    # As ours, without the time that libraries take to be imported.
    for library in _LIBRARIES.get(job["contestant"], ()):
        import_module(library)
    start = time.perf_counter()
    result = run(job)
    seconds = time.perf_counter() - start
    if job.get("out"):
        import numpy as np

        np.save(job["out"], result)
    print(json.dumps({"seconds": seconds}))


def _read(paths: list[str], num_threads: int) -> None:
    """Read files from their beginnings to their ends, into the same memory again and again."""
    waiting = list(reversed(paths))

    def work() -> None:
        buffer = bytearray(_READ_NBYTES)
        while True:
            try:
                path = waiting.pop()
            except IndexError:
                return
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while os.readv(descriptor, [buffer]):
                pass
            os.close(descriptor)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _widened(values: Any) -> Any:
    """float32 of what may be bits of bfloat16."""
    import numpy as np

    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == "u2" else values


def _numpy(job: dict[str, Any]) -> Any:
    """Block by block, each class added up in float64."""
    import numpy as np

    values_ALW = np.load(job["path"], mmap_mode="r")
    label_A = np.arange(len(values_ALW)) % 2 == 0
    sums_CLW = np.zeros((2, *values_ALW.shape[1:]))
    for start in range(0, len(values_ALW), _ROWS):
        label_R = label_A[start : start + _ROWS]
        rows_RLW = _widened(values_ALW[start : start + _ROWS])
        for label in (0, 1):
            sums_CLW[label] += rows_RLW[label_R == bool(label)].sum(axis=0, dtype=np.float64)
    counts_C = np.bincount(label_A, minlength=2)
    return sums_CLW[1] / counts_C[1] - sums_CLW[0] / counts_C[0]


def _dask(job: dict[str, Any]) -> Any:
    """Two means of one lazy array, in one pass, on dask's threads."""
    import numpy as np
    import zarr

    dask, da = import_module("dask"), import_module("dask.array")
    values_ALW = da.from_zarr(zarr.open_array(job["path"], mode="r"))
    if values_ALW.dtype == "u2":
        values_ALW = values_ALW.map_blocks(_widened, dtype=np.float32)
    sides = [values_ALW[first::2].mean(axis=0, dtype=np.float64) for first in (0, 1)]
    positive_LW, negative_LW = dask.compute(*sides)
    return positive_LW - negative_LW


if __name__ == "__main__":
    main()
