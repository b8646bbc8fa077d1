"""Commands of the batch side: plan, extract, reduce."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pipeline.cli.app import app
from pipeline.cli.extraction import extracting, extracting_moments
from pipeline.cli.options import (
    DEFAULT_STORE,
    AsJson,
    CpusPerWorker,
    Device,
    EngineFlag,
    GpusPerWorker,
    KeepRows,
    MinWorkers,
    NoCache,
    RayAddress,
    RunPath,
    StoreUrl,
    Workers,
    progress,
    show,
    stderr,
    stdout,
    where,
)

if TYPE_CHECKING:
    from pipeline.config import RunFile
    from pipeline.prompts.plan import Plan
    from pipeline.reduction.methods import Method
    from pipeline.reduction.results import Reduction
    from store.location import Location

log = logging.getLogger(__name__)

_CPUS = max(1, os.cpu_count() or 1)


@app.command()
def plan(
    run_file: RunPath,
    store: StoreUrl = DEFAULT_STORE,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say what the run will cost too: engine, tokens, FLOPs, hours; and of each step "
            "bytes, requests, tasks and memory.",
        ),
    ] = False,
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts",
            min=1,
            help="With --explain: as if the corpus had so many prompts, like those that it has.",
            show_default=False,
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            help="With --explain: what the hours are for, such as h100; by default this machine.",
            show_default=False,
        ),
    ] = None,
    workers: Workers = _CPUS,
    gpus_per_worker: GpusPerWorker = None,
    device: Device = "cpu",
    engine: EngineFlag = "auto",
    as_json: AsJson = False,
) -> None:
    """Read and tokenise the prompts, and say what extraction would do.

    Bad rows are reported with file, line and reason and left out; the run stops only past the share
    that prompts.max_quarantined allows. Workers, device and engine matter to --explain alone.
    """
    run, _, planned = planning(run_file, store)
    summary = planned.summary() | {"cache": where(planned.cache.location)}
    if not explain:
        show(summary, as_json, "Plan")
        return
    from pipeline.costs import SampleCounts, run_costs
    from pipeline.extraction.preflight import layouts_of, preflight
    from pipeline.ray_runtime import Pool

    resources = Pool(workers, gpus=gpus_per_worker).resources(device)
    costs = preflight(
        planned,
        workers=workers,
        device=device,
        engine=None if engine == "auto" else engine,
        hardware=hardware,
        gpus=resources["num_gpus"] or 1,
        prompts=prompts,
        shard_mib=run.capture.shard_mib,
    )
    steps = run_costs(
        layouts_of(planned, prompts, run.capture.shard_mib),
        SampleCounts.of(planned.cache).times(costs.prompts / planned.num_prompts),
        {method: run.reduce.parameters(method) for method in run.reduce.methods},
    )
    if as_json:
        show(summary | {"explain": costs.summary() | steps.summary()}, True, "")
        return
    show(summary, False, "Plan")
    title = "What it will cost"
    show(costs.readable(), False, title if prompts is None else f"{title} at {prompts:,} prompts")
    show(steps.readable(), False, "Of each step")


@app.command()
def extract(
    run_file: RunPath,
    store: StoreUrl = DEFAULT_STORE,
    workers: Workers = _CPUS,
    min_workers: MinWorkers = 1,
    cpus_per_worker: CpusPerWorker = 1,
    gpus_per_worker: GpusPerWorker = None,
    device: Device = "cpu",
    engine: EngineFlag = "auto",
    no_cache: NoCache = False,
    keep_rows: KeepRows = None,
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Run the model over the prompts and write the activation cache.

    Plans first. Safe to interrupt and to run again: finished shards are never computed twice, and
    damaged ones are put right. With --no-cache, Moments are written in place of the activations.
    """
    from pipeline.config import load_run_file
    from pipeline.errors import InvalidInput
    from pipeline.ray_runtime import Pool, check_device, ray_starting

    start = time.perf_counter()
    # A mistake in these is said before Ray is started.
    load_run_file(run_file)
    if keep_rows is not None and not no_cache:
        raise InvalidInput(
            f"--keep-rows {keep_rows} without --no-cache, which alone leaves rows out; add "
            "--no-cache, or leave --keep-rows out",
            kind="keep_rows",
        )
    pool = Pool(workers, min_workers, cpus_per_worker, gpus_per_worker)
    pool.resources(device)
    # Ray starts beside planning, which takes its time to import libraries and to tokenise.
    with ray_starting(ray, workers, cpus_per_worker=cpus_per_worker) as running:
        check_device(device, ray)
        _, root, planned = planning(run_file, store, running)
        plan_seconds = time.perf_counter() - start
        if no_cache:
            summary = extracting_moments(
                planned, root, pool, device, engine, ray, plan_seconds, keep_rows
            )
        else:
            summary = extracting(planned, root, pool, device, engine, ray, plan_seconds)
    show(summary, as_json, "Extraction")


@app.command()
def reduce(
    run_file: RunPath,
    store: StoreUrl = DEFAULT_STORE,
    workers: Workers = _CPUS,
    device: Device = "cpu",
    ray: RayAddress = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Layers and heads to list.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Compute a direction for every layer and head of a finished cache, and score them.

    Best layers and heads are chosen on the validation split and reported on the test split. Methods
    under reduce.compare are computed in the same passes; reduce.extends takes the prompts of other
    run files in, without counting them again. `steerage report` shows it all.
    """
    run, root, planned = planning(run_file, store)
    reductions = reducing(run, root, planned, store, workers, device, ray)
    summary = reduction_summary(reductions[0], top)
    summary["compared"] = {
        reduction.method: {"reduction": reduction.digest, "path": where(reduction.location)}
        for reduction in reductions[1:]
    }
    if as_json:
        show(summary, True, "")
    else:
        print_reduction(summary)


def planning(
    run_file: Path, store: str, before_report: Callable[[], None] = lambda: None
) -> tuple[RunFile, Location, Plan]:
    """Plan a run file, and say what was quarantined.

    Args:
        before_report: Called before anything is said.
    """
    from pipeline.config import load_run_file
    from pipeline.prompts import plan as plans
    from store.location import Location

    run = load_run_file(run_file)
    root = Location.open(store)
    with stderr.status("planning: reading and tokenising prompts"):
        planned = plans.plan(run, root)
        before_report()
    if planned.packing_reason:
        log.warning(
            "%s: prompts are packed as %s, not as a trie: %s",
            *(planned.model.name, planned.packing.layout, planned.packing_reason),
        )
    for row in planned.quarantined[:10]:
        stderr.print(f"[yellow]left out[/] {escape(str(row))}", highlight=False)
    if len(planned.quarantined) > 10:
        stderr.print(
            f"[yellow]left out[/] {len(planned.quarantined) - 10} more; all are in "
            f"{where(planned.cache.location)}/{plans.QUARANTINE_FILE}"
        )
    return run, root, planned


def reducing(
    run: RunFile,
    root: Location,
    planned: Plan,
    store: str,
    workers: int,
    device: str,
    ray: str | None,
) -> list[Reduction]:
    """Reduce by all methods of a run file, that to publish first, with a progress bar."""
    from pipeline.ray_runtime import check_device
    from pipeline.reduction.reduce import reduce_all

    check_device(device, ray)
    extends = [planning(file, store)[2].cache for file in run.reduce.extends]
    with progress("reduce", None) as (bar, task):
        return reduce_all(
            planned.cache,
            root,
            [(method, run.reduce.parameters(method)) for method in run.reduce.methods],
            extends=extends,
            num_workers=workers,
            address=ray,
            device=device,
            on_progress=lambda done, total: bar.update(
                task, completed=done, total=total, note="tasks"
            ),
        )


def reduction_of(
    run: RunFile, planned: Plan, store: str, method: Method | None = None
) -> Reduction:
    """The stored reduction of a run file, by the method that it publishes or another.

    Raises:
        NotFound: `steerage reduce` has not been run.
    """
    from pipeline.reduction.results import Reduction, reduction_digest
    from pipeline.reduction.sources import kept_rows
    from store.location import Location

    root, method = Location.open(store), method or run.reduce.method
    extends = [planning(file, store)[2].cache for file in run.reduce.extends]
    digest = reduction_digest(
        planned.cache.digest,
        method,
        run.reduce.parameters(method),
        [cache.digest for cache in extends],
        kept_rows(root, [planned.cache, *extends]),
    )
    return Reduction.open(root, digest)


def behaviours_of(run: RunFile, store: str) -> list[Reduction]:
    """The stored reductions of the run files that publish.norm_of names."""
    others = [planning(file, store) for file in run.publish.norm_of]
    return [reduction_of(other, planned, store) for other, _, planned in others]


def reduction_summary(reduction: Reduction, top: int) -> dict[str, Any]:
    """What `steerage reduce --json` prints."""
    from pipeline.errors import InvalidInput

    summary: dict[str, Any] = {
        "reduction": reduction.digest,
        "capture": reduction.capture_digest,
        "method": reduction.method,
        "parameters": dict(reduction.parameters),
        "rows": dict(reduction.counts),
        "left_out": reduction.left_out,
        "extends": list(reduction.extends),
        "rows_from": dict(reduction.rows_from),
        "path": where(reduction.location),
        "signs_in_doubt": list(reduction.signs_in_doubt),
    }
    for name, heads in (("best_layers", False), ("best_heads", True)):
        try:
            ranked = reduction.ranked(heads=heads)[:top]
        except InvalidInput:
            # A capture of one stream has either layers or heads.
            ranked = []
        summary[name] = [
            {column: value for column, value in row.items() if "histogram" not in column}
            for row in ranked
        ]
    return summary


def print_reduction(summary: dict[str, Any]) -> None:
    """The table of the best layers and heads, for people."""
    from rich.table import Table

    for title, key in (("Best layers", "best_layers"), ("Best heads", "best_heads")):
        if not summary[key]:
            continue
        table = Table(
            title=f"{title} by {summary['method']} (chosen on validation)", title_justify="left"
        )
        # A name that is cut off cannot be copied into a run file.
        table.add_column("site", no_wrap=True, overflow="ignore")
        columns = [
            ("AUROC\nval.", "auroc_validation", ".3f"),
            ("AUROC\ntest", "auroc_test", ".3f"),
            ("q\ntest", "q_test", ".1g"),
            ("acc.\ntest", "accuracy_test", ".3f"),
            ("pairs\ntest", "pair_accuracy_test", ".3f"),
            ("d\ntest", "cohens_d_test", ".3f"),
            ("norm", "norm", ".4g"),
        ]
        for heading, _, _ in columns:
            table.add_column(heading, justify="right")
        for row in summary[key]:
            # A q below this is as good as 0, and a longer text would cut off what is beside it.
            row = row | {"q_test": max(row["q_test"], 1e-9)}
            values = [(row[name], form) for _, name, form in columns]
            table.add_row(
                row["site"],
                *("–" if math.isnan(value) else f"{value:{form}}" for value, form in values),
            )
        stdout.print(table)
    if summary["signs_in_doubt"]:
        stdout.print(
            f"not to be steered along, as most pairs and the class means disagree about the sign: "
            f"{', '.join(summary['signs_in_doubt'])}",
            highlight=False,
            soft_wrap=True,
        )
    if summary.get("rows_from"):
        stdout.print("extracted with --no-cache: means are of all rows, the rest is of those kept")
    if summary.get("left_out"):
        stdout.print(f"left out as quarantined, with their pairs: {summary['left_out']:,} samples")
    stdout.print(f"written to {summary['path']}", highlight=False, soft_wrap=True)
