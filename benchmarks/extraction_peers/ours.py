"""Steerage in its own process: plan and extract as a program calls them, with Ray already up.

    PYTHON -m extraction_peers.ours JOB.json

The job is a folder of a run file and a store. What it measured is printed as the last line of
stdout, one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from extraction_peers.process_tree import tree_cpu_s
from pipeline.config import load_run_file
from pipeline.extraction.shard_worker import Receipt
from pipeline.extraction.workers import extract
from pipeline.prompts.plan import plan
from pipeline.ray_runtime import Pool, ray_session
from store.location import Location


def main() -> None:
    """Run one job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    root = Location.open(job["store"])
    first_shard: list[float] = []

    def on_receipt(receipt: Receipt) -> None:
        # A receipt arrives when its shard is written: the earliest of all beginnings counts.
        first_shard.append(time.monotonic() - receipt.age)

    # Only where another than the product's own choice is asked for.
    engine = {} if job["engine"] is None else {"engine": job["engine"]}
    with ray_session(None, job["workers"]):
        start, start_cpu = time.monotonic(), tree_cpu_s(os.getpid())
        planned = plan(load_run_file(Path(job["run_file"])), root)
        planned_at = time.monotonic()
        result = extract(
            planned,
            root,
            pool=Pool(job["workers"]),
            device=job["device"],
            on_receipt=on_receipt,
            **engine,
        )
        done, done_cpu = time.monotonic(), tree_cpu_s(os.getpid())
    print(
        json.dumps(
            {
                "capture": planned.cache.digest,
                "done": done,
                "warm_s": done - start,
                "warm_cpu_s": done_cpu - start_cpu,
                "plan_s": planned_at - start,
                # The workers' start and their loading of the model.
                "start_workers_s": min(first_shard) - planned_at,
                "texts": planned.num_prompts,
                "tokens_planned": planned.num_tokens,
                "tokens_computed": result.tokens,
                "shards": planned.cache.num_shards,
            }
        )
    )


if __name__ == "__main__":
    main()
