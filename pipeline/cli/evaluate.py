"""The command that measures an artifact: evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.app import app
from pipeline.cli.connecting import Service, connecting
from pipeline.cli.digests import resolve
from pipeline.cli.options import (
    AsJson,
    present,
    print_json,
    progress,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from pipeline.evaluation.evaluate import Evaluation
    from pipeline.evaluation.suites import Point


@app.command()
@connecting
def evaluate(
    suite_file: Annotated[
        Path,
        typer.Argument(
            metavar="SUITES.toml", help="Suite file; examples/suites.toml is one to start from."
        ),
    ],
    model: Annotated[Path, typer.Option("--model", help="Model folder.")],
    trust: Annotated[
        list[Path],
        typer.Option("--trust", help="Public key, or folder of them, that is trusted; repeatable."),
    ],
    service: Service,
    artifact: Annotated[
        str | None,
        typer.Option(
            "--artifact", help="Digest, or its first digits (8 or more); or name a --channel."
        ),
    ] = None,
    channel: Annotated[
        str | None,
        typer.Option("--channel", help="Evaluate what this channel assigns, at its strength."),
    ] = None,
    strengths: Annotated[
        str | None,
        typer.Option(
            "--strengths",
            metavar="S,S,…",
            help="Such as '-1,-0.5,0.5,1'; by default nine over the artifact's signed limits. 0 is "
            "always measured.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Random directions to compare with.")
    ] = 3,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="This suite only; repeatable.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the results; what is there is replaced.")
    ] = Path("steerage-evaluation"),
    cache: Annotated[
        Path, typer.Option("--cache", help="Where artifacts are kept, as for `steerage steer`.")
    ] = Path("~/.cache/steerage"),
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option("--dtype", help="Dtype of the computation; auto is the checkpoint's."),
    ] = "auto",
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option("--device", help="What the model runs on.")
    ] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure what an artifact does, and what it costs.

    Every suite of the file is asked four ways: without steering, with a system prompt that asks for
    the behaviour, steered at each strength, and with random directions of the same norm. Steering
    that does not beat the prompt, or that random directions match, is not worth deploying.

    The artifact comes from the service and is checked as a node checks it: digest, signature, model
    fingerprint, strength limits. The results are `report.html` (open it first), `summary.json` (all
    figures with intervals) and `completions.parquet` (every answer).
    """
    if (artifact is None) == (channel is None):
        raise typer.BadParameter("name either an --artifact or a --channel")
    chosen = None if strengths is None else _numbers(strengths)
    from steering_service.client.fetch import fetch_artifact
    from steering_service.core.fingerprint import model_fingerprint
    from steering_service.core.signing import TrustRoots

    fingerprint = model_fingerprint(model)
    if channel is not None:
        digest, strength = _assigned(channel, service)
        chosen = chosen or [strength]
    else:
        assert artifact is not None
        with service.operator() as operator:
            digest = resolve(operator, artifact)
    fetched = fetch_artifact(
        digest,
        service.address,
        cache_dir=cache.expanduser(),
        trust_roots=TrustRoots.from_paths(trust),
        model_fingerprint=fingerprint,
        credentials=service.credentials,
    )
    for strength in chosen or ():
        fetched.manifest.policy.check(strength)
    # torch and what needs it take seconds to import: what can be refused, is refused before.
    from pipeline.evaluation.completions import COMPLETIONS_FILE, write_completions
    from pipeline.evaluation.conditions import num_points
    from pipeline.evaluation.evaluate import default_strengths
    from pipeline.evaluation.evaluate import evaluate as run_evaluation
    from pipeline.evaluation.suite_file import build_suites, load_suite_file
    from pipeline.extraction.models import ModelInfo, load_model, load_tokenizer
    from pipeline.report.environment import environment
    from pipeline.report.evaluation_page import REPORT_FILE, write_evaluation_report

    file = load_suite_file(suite_file, suite or [])
    info = ModelInfo.read(model)
    chosen = chosen or default_strengths(fetched.manifest.policy)
    with stderr.status("loading the model"):
        tokenizer = load_tokenizer(model)
        loaded = load_model(model, info.dtype if dtype == "auto" else dtype, present(device))
    with stderr.status("reading the suites"):
        suites = build_suites(file, loaded, tokenizer)
    total = num_points(fetched, len(suites), chosen, range(seeds))
    with progress("evaluate", total) as (bar, task):

        def on_point(point: Point) -> None:
            bar.update(task, advance=1, note=f"{point.condition} {point.strength:+g}")

        evaluation = run_evaluation(
            loaded,
            tokenizer,
            suites,
            fetched,
            name=file.name,
            system=file.prompt_baseline.system,
            strengths=chosen,
            seeds=range(seeds),
            on_point=on_point,
        )
    versions = environment()
    summary = write_completions(out, evaluation, versions)
    write_evaluation_report(out / REPORT_FILE, evaluation, versions)
    if as_json:
        print_json(summary | {"report": str(out / REPORT_FILE)})
        return
    _print(evaluation)
    for name in (REPORT_FILE, COMPLETIONS_FILE):
        stdout.print(str(out / name), highlight=False, soft_wrap=True, markup=False)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--strengths {text!r}: expected numbers with commas between, such as '-1,0.5,1'"
        ) from error


def _assigned(channel: str, service: Service) -> tuple[str, float]:
    """Artifact and strength that a channel gives its nodes now."""
    from pipeline.errors import NotFound

    with service.operator() as operator:
        entry = operator.channel(channel)
    if entry.artifact is None:
        raise NotFound(
            f"channel {channel!r} points at no artifact at revision {entry.revision}; "
            "`steerage promote` gives it one",
            kind="channel_silent",
        )
    return entry.artifact, entry.strength


def _print(evaluation: Evaluation) -> None:
    """A row a suite: the figures beside each other, for people."""
    from rich.table import Table

    from pipeline.report.evaluation_page import best_strength, number

    best = best_strength(evaluation)
    table = Table(title=f"Evaluation of {evaluation.artifact.manifest.name}", title_justify="left")
    table.add_column("suite")
    steered = "" if best is None else f"steered {best:+g}"
    for heading in ("no steering", "prompt", steered, "random directions"):
        table.add_column(heading, justify="right")
    for suite in evaluation.suites:
        random = [p.value for p in evaluation.of(suite.name, "random") if p.strength == best]
        cells: list[Any] = [
            evaluation.plain(suite.name).value,
            evaluation.prompted(suite.name).value,
            None if best is None else evaluation.at(suite.name, best).value,
        ]
        texts = ["" if cell is None else number(cell, suite.metric) for cell in cells]
        spread = [number(end, suite.metric) for end in (min(random), max(random))] if random else []
        table.add_row(suite.name, *texts, " to ".join(dict.fromkeys(spread)))
    stdout.print(table)
