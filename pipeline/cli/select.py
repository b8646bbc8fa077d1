"""The command that chooses what is steered: select."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from pipeline.cli.app import app
from pipeline.cli.options import (
    DEFAULT_STORE,
    AsJson,
    Device,
    RunPath,
    StoreUrl,
    present,
    progress,
    stderr,
)
from pipeline.cli.selections import show_selection

if TYPE_CHECKING:
    from pipeline.config import RunFile
    from pipeline.prompts.plan import Plan
    from pipeline.reduction.results import Reduction
    from pipeline.selection.bench import Bench
    from pipeline.selection.journal import Journal
    from pipeline.selection.results import SiteSelection
    from pipeline.selection.select import Settings
    from pipeline.selection.validation import ValidationFile
    from store.location import Location

_REFUSAL_KL: Final = 0.1


@app.command()
def select(
    run_file: RunPath,
    by: Annotated[
        Literal["score", "sweep", "forward", "refusal"],
        typer.Option(
            "--by",
            help="score: a held-out score of the reduction; nothing is run. sweep: each site alone "
            "at every strength, by what the steered model answers (HSI). forward: from the best "
            "site on, one more at a time, while that helps. refusal: the rules of Arditi et al. "
            "for a refusal direction: KL, induced refusals, depth.",
        ),
    ],
    suites: Annotated[
        Path | None,
        typer.Option(
            "--suites",
            metavar="SUITES.toml",
            help="Suite file, as `steerage evaluate` takes it; for all but --by score. Its rows of "
            "the validation split are asked, whatever split it names.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="Suite to raise; by default all with role = target; repeatable."
        ),
    ] = None,
    among: Annotated[
        Literal["heads", "layers"] | None,
        typer.Option(
            "--among",
            help="By default heads where the stream z was captured, and else layers; --by refusal "
            "is about layers.",
            show_default=False,
        ),
    ] = None,
    score: Annotated[
        Literal["auroc", "accuracy", "pair_accuracy"],
        typer.Option("--score", help="--by score: which one, on the validation rows."),
    ] = "auroc",
    strengths: Annotated[
        str | None,
        typer.Option(
            "--strengths",
            metavar="S,S,…",
            help="Tried with each candidate, in publish.strength_unit, which for heads is sigma "
            "unless the run file says otherwise; by default '4,8,16,32,64' for sigma and "
            "'0.1,0.25,0.5,0.75,1,1.5,2' for direction.",
        ),
    ] = None,
    top: Annotated[
        int,
        typer.Option("--top", min=1, help="Sites listed; of --by forward, those chosen among."),
    ] = 8,
    most_heads: Annotated[
        int | None,
        typer.Option(
            "--most-heads",
            min=1,
            help="Sites chosen: exactly so many by score (default 1), at most so many by forward "
            "(default 4).",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        Literal["sweep", "score"],
        typer.Option(
            "--from",
            help="--by forward: what gives the --top sites. score spares the sweep of all sites.",
        ),
    ] = "sweep",
    margin: Annotated[
        float,
        typer.Option("--margin", min=0, help="--by forward: points that a further site must add."),
    ] = 1.0,
    prompts: Annotated[
        int,
        typer.Option(
            "--prompts", min=1, help="Most prompts of a suite or class. 32 gives ±17 points."
        ),
    ] = 32,
    max_perplexity: Annotated[
        float,
        typer.Option(
            "--max-perplexity",
            help="--by sweep and forward: most that the perplexity of the plain model's own "
            "answers to the first suite of kind fluency may rise, as a ratio.",
        ),
    ] = 1.1,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            min=0,
            help="--by refusal: most KL to the plain model at the first answer token of harmless "
            "prompts under ablation, in nats (default 0.1). --by sweep and forward: a second cap, "
            "nats a token along the answers of the suite of kind fluency (default none).",
            show_default=False,
        ),
    ] = None,
    max_harm: Annotated[
        float,
        typer.Option(
            "--max-harm",
            help="--by sweep and forward: most points that a suite of role harm may rise.",
        ),
    ] = 5.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")
    ] = False,
    store: StoreUrl = DEFAULT_STORE,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Choose sites (heads or layers) and a strength, and say what to write into the run file.

    Needs `extract` and `reduce` of the same run file. Everything is chosen on validation prompts,
    and nothing on test prompts, which are there to report: by score, the run's validation rows; by
    sweep and forward, the rows of the validation split of the files that the suite file names; by
    refusal, the run's own validation prompts, the positive class being the harmful one (the KL is
    of the negative class), while the suite file gives the phrases that a refusal begins with.

    Sites are applied as [publish] says, so that what is measured is what `steerage publish`
    publishes. Each measured candidate is stored at once: run it again, and it goes on; a forward
    search finds what the sweep has measured. Exit code 3: no candidate keeps to the caps.
    """
    from pipeline.cli.batch import behaviours_of, planning, reduction_of

    if by != "score" and suites is None:
        raise typer.BadParameter(
            f"--by {by} measures what the steered model answers: add --suites SUITES.toml"
        )
    chosen = None if strengths is None else _strengths(strengths)
    run, root, planned = planning(run_file, store)
    # The rules for a refusal direction are about mean differences, whatever the run publishes.
    method = "difference_of_means" if by == "refusal" else run.reduce.method
    reduction = reduction_of(run, planned, store, method)
    heads = among == "heads" if among else "z" in planned.cache.streams
    found: SiteSelection | None
    if by == "score":
        from pipeline.selection.select import select_by_score

        found = select_by_score(root, reduction, heads=heads, by=score, num=most_heads or 1)
    else:
        from pipeline.selection.candidates import Caps
        from pipeline.selection.validation import ValidationFile

        assert suites is not None
        file = ValidationFile.load(suites, targets=target or [], most=prompts)
        if by == "refusal":
            kl = _REFUSAL_KL if max_kl is None else max_kl
            found = _by_refusal(run, root, planned, reduction, file, kl, prompts, device, dry_run)
        else:
            from pipeline.selection.select import Settings, applied_section, default_strengths

            section = applied_section(run.publish, heads=heads)
            settings = Settings(
                heads=heads,
                strengths=chosen or default_strengths(section),
                caps=Caps(max_perplexity, max_kl, max_harm),
                top=top,
                most=most_heads or 4,
                margin=margin,
                start=start,
            )
            run = run.model_copy(update={"publish": section})
            behaviours = behaviours_of(run, store)
            found = _by_search(
                by, run, root, planned, reduction, behaviours, file, settings, device, dry_run
            )
    if found is not None:
        show_selection(found, top, as_json)


def _by_search(
    by: Literal["sweep", "forward"],
    run: RunFile,
    root: Location,
    planned: Plan,
    reduction: Reduction,
    behaviours: list[Reduction],
    file: ValidationFile,
    settings: Settings,
    device: str,
    dry_run: bool,
) -> SiteSelection | None:
    """Sweep or search with a progress bar, or find what was chosen before; None: only the cost."""
    from pipeline.errors import InvalidInput
    from pipeline.selection.bench import Bench
    from pipeline.selection.candidates import Candidate, candidate_sites
    from pipeline.selection.journal import Journal
    from pipeline.selection.results import SiteSelection, selection_digest
    from pipeline.selection.select import measurement_request, most_candidates, select_by_search
    from steering_service.core.artifact import ModelReference

    if file.fluency is None:
        raise InvalidInput(
            'the suite file has no suite of kind = "fluency", whose plain answers must stay '
            "probable; add one (examples/suites.toml has one), or steering that ruins the model "
            "would look best",
            kind="suite_fluency",
        )
    sites = candidate_sites(reduction, heads=settings.heads, behaviours=behaviours)
    has_kl = settings.caps.kl is not None
    measured = measurement_request(
        reduction, run.publish, file.record(), has_kl=has_kl, behaviours=behaviours
    )
    journal = Journal(root, measured)
    digest = selection_digest(by, {"measurements": journal.digest} | settings.record(by))
    if SiteSelection.exists(root, digest):
        return SiteSelection.open(root, digest)
    model, tokenizer = _loaded(planned, reduction, device)
    with stderr.status("reading the suites"):
        perplexity, kl = file.build([file.fluency], model, tokenizer)
        bench = Bench(
            model,
            tokenizer,
            ModelReference(name=planned.model.name, fingerprint=planned.model.fingerprint),
            file.build(file.targets, model, tokenizer),
            perplexity=perplexity,
            kl=kl if has_kl else None,
            harms=file.build(file.harms, model, tokenizer) if file.harms else [],
        )
    total = most_candidates(by, len(sites), settings)
    _say_cost(total, bench, journal)
    if dry_run:
        return None
    with progress(by, total) as (bar, task):

        def on_measured(candidate: Candidate) -> None:
            bar.update(task, advance=1, note=str(candidate))

        return select_by_search(
            by,
            root,
            reduction,
            run.publish,
            settings,
            bench=bench,
            journal=journal,
            model=planned.model,
            behaviours=behaviours,
            on_measured=on_measured,
        )


def _by_refusal(
    run: RunFile,
    root: Location,
    planned: Plan,
    reduction: Reduction,
    file: ValidationFile,
    max_kl: float,
    most: int,
    device: str,
    dry_run: bool,
) -> SiteSelection | None:
    """Apply the rules for a refusal direction, or find what was chosen before."""
    from pipeline.selection.journal import Journal
    from pipeline.selection.positions import position_directions
    from pipeline.selection.refusal import RefusalCandidate, RefusalRules
    from pipeline.selection.refusal_bench import (
        RefusalBench,
        read_requests,
        refusal_measurement_request,
        refusal_tokens,
    )
    from pipeline.selection.results import SiteSelection, selection_digest
    from pipeline.selection.select import refusal_request, select_refusal
    from steering_service.core.artifact import ModelReference

    rules = RefusalRules(max_kl=max_kl)
    journal = Journal(root, refusal_measurement_request(reduction, file, most))
    digest = selection_digest("refusal", refusal_request(journal.digest, rules))
    if SiteSelection.exists(root, digest):
        return SiteSelection.open(root, digest)
    requests = read_requests(run, most)
    candidates = list(position_directions(planned.cache, reduction))
    stderr.print(
        f"{len(candidates)} directions, each in three passes over at most {most} prompts; "
        f"{len(journal):,} of them are stored already"
    )
    if dry_run:
        return None
    model, tokenizer = _loaded(planned, reduction, device)
    with stderr.status("asking the plain model"):
        tokens = refusal_tokens(
            model,
            tokenizer,
            requests.harmful_train,
            requests.harmless_train,
            file.refusal_judge(model, tokenizer),
        )
        bench = RefusalBench(
            model,
            tokenizer,
            ModelReference(name=planned.model.name, fingerprint=planned.model.fingerprint),
            requests.harmful,
            requests.harmless,
            tokens,
        )
    with progress("refusal", len(candidates)) as (bar, task):

        def on_measured(candidate: RefusalCandidate) -> None:
            bar.update(task, advance=1, note=f"{candidate.site}: KL {candidate.kl:.3f}")

        return select_refusal(
            root,
            candidates,
            rules,
            bench=bench,
            journal=journal,
            model=planned.model,
            on_measured=on_measured,
        )


def _loaded(planned: Plan, reduction: Reduction, device: str) -> tuple[Any, Any]:
    import torch

    from pipeline.extraction.models import load_model, load_tokenizer

    present(device)
    info = planned.model
    if info.d_model <= 512:
        # More threads make a small model no faster, and ten times slower on a busy machine.
        torch.set_num_threads(1)
    with stderr.status("loading the model"):
        model = load_model(info.path, reduction.capture["model"]["dtype"], device)
        return model, load_tokenizer(info.path)


def _say_cost(total: int, bench: Bench, journal: Journal) -> None:
    """What is about to be spent, before it is."""
    targets, harms = bench.generations
    most = f" and {harms} more where the target rises" if harms else ""
    stderr.print(
        f"at most {total:,} candidates, each {targets} answers generated{most}, and "
        f"{bench.scorings} scored: up to {total * (targets + harms):,} generations. "
        f"{len(journal):,} candidates of these prompts and settings are stored already",
        highlight=False,
    )


def _strengths(text: str) -> tuple[float, ...]:
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)) or 0.0 in values:
        raise typer.BadParameter(
            f"--strengths {text!r}: expected numbers other than 0 with commas between, such as "
            "'8,16,32'"
        )
    return values
