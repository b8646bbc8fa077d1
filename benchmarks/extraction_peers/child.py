"""One contestant in its own process and environment: load, run, report.

    PYTHONPATH=benchmarks PYTHON -m extraction_peers.child JOB.json

The job says which contestant, model and texts. What it measured is printed as the last line of
stdout, one JSON object; its rows go to a file, outside of what is timed, so that they can be
compared with the reference.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from extraction_peers.contestants import CONTESTANTS


def main() -> None:
    """Run one job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    texts = json.loads(Path(job["texts"]).read_text())
    contestant = CONTESTANTS[job["contestant"]]()
    contestant.load(Path(job["model"]), job["device"], getattr(torch, job["dtype"]))
    loaded, loaded_cpu = time.monotonic(), time.process_time()
    rows = contestant.run(texts)
    done, done_cpu = time.monotonic(), time.process_time()
    if job["rows"]:
        np.savez(job["rows"], allow_pickle=False, **rows)
    names = ("torch", "transformers", "numpy", contestant.distribution)
    print(
        json.dumps(
            {
                # The parent's clock is the same: monotonic time is the machine's.
                "done": done,
                "warm_s": done - loaded,
                "warm_cpu_s": done_cpu - loaded_cpu,
                "texts": len(texts),
                "versions": {name: version(name) for name in names},
            }
        )
    )


if __name__ == "__main__":
    main()
