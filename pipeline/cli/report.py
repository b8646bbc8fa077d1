"""The command that shows what a reduction found: report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.batch import planning
from pipeline.cli.options import (
    DEFAULT_STORE,
    AsJson,
    RunPath,
    StoreUrl,
    print_json,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from pipeline.config import RunFile


@app.command()
def report(
    run_file: RunPath,
    store: StoreUrl = DEFAULT_STORE,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the page; what is there of it is replaced.")
    ] = Path("steerage-report"),
    as_json: AsJson = False,
) -> None:
    """Show what `steerage reduce` found, on one page for somebody who did not run it.

    Which layer and head tell the classes apart, how surely, what chance and the controls reach,
    whether methods and layers agree, how few entries of a direction would do; with the tables
    behind the pictures, and what to doubt.

    `report.html` holds everything it shows and can be sent by itself; the PNG files beside it are
    the same pictures, for slides. Methods that have been computed for the same capture are compared
    with the run file's. Nothing is computed anew but the sparsity curve, which reads one layer.
    """
    run, root, planned = planning(run_file, store)
    from pipeline.reduction.comparing import stored_reductions
    from pipeline.reduction.results import Reduction, reduction_digest
    from pipeline.report.environment import environment
    from pipeline.report.reduction_page import write_reduction_report
    from pipeline.report.reduction_sections import Subject

    cache = planned.cache
    digest = reduction_digest(cache.digest, run.reduce.method, run.reduce.parameters)
    reduction = Reduction.open(root, digest)
    with stderr.status("drawing the report"):
        summary = write_reduction_report(
            out,
            Subject(
                name=run.name,
                reduction=reduction,
                others=stored_reductions(root, cache.digest, _others(run)),
                cache=cache if cache.is_complete else None,
                corpus_files=[file.name for file in run.prompts.files],
                environment=environment(),
            ),
        )
    if as_json:
        print_json(summary)
        return
    for sentence in summary["lead"]:
        stdout.print(sentence, highlight=False, markup=False)
    for doubt in summary["doubts"]:
        stdout.print(f"careful: {doubt}", highlight=False, markup=False)
    stdout.print(f"report: {summary['report']}", highlight=False, soft_wrap=True, markup=False)


def _others(run: RunFile) -> dict[str, Mapping[str, int | float]]:
    """The methods beside the run file's, with those of its parameters that they have."""
    from pipeline.reduction.methods import DEFAULT_PARAMETERS

    return {
        method: {name: run.reduce.parameters.get(name, value) for name, value in defaults.items()}
        for method, defaults in DEFAULT_PARAMETERS.items()
        if method != run.reduce.method
    }
