"""The command that shows what a reduction found: report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import app
from pipeline.cli.batch import planning, reduction_of
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
    from pipeline.reduction.results import Reduction
    from store.activations import ActivationCache
    from store.location import Location


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
    from pipeline.reduction.comparing import stored_beside
    from pipeline.reduction.methods import DEFAULT_PARAMETERS
    from pipeline.report.environment import environment
    from pipeline.report.reduction_page import write_reduction_report
    from pipeline.report.reduction_sections import Subject

    reduction = reduction_of(run, planned, store)
    with stderr.status("drawing the report"):
        summary = write_reduction_report(
            out,
            Subject(
                name=run.name,
                reduction=reduction,
                others=stored_beside(
                    root,
                    reduction,
                    {method: run.reduce.parameters(method) for method in DEFAULT_PARAMETERS},
                ),
                caches=_caches(root, reduction),
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


def _caches(root: Location, reduction: Reduction) -> list[ActivationCache]:
    """Those of a reduction's rows of which activations are still in the store."""
    from store.activations import ActivationCache
    from store.errors import NotFound

    caches = []
    for digest in (reduction.capture_digest, *reduction.extends):
        try:
            cache = ActivationCache.open(root, reduction.rows_from.get(digest, digest))
        except NotFound:
            # Removed since; the page says what it cannot show without them.
            continue
        if cache.is_complete:
            caches.append(cache)
    return caches
