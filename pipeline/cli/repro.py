"""Commands that run published methods end to end: repro hsi, iti, caa, antidote, was,
alignment-faking.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.app import app
from pipeline.cli.judging import open_endpoint, open_judge
from pipeline.cli.lab import CPUS, OUT, Place, finish, neutral_prompts, open_lab, track
from pipeline.cli.options import AsJson, Device, RayAddress, Workers

if TYPE_CHECKING:
    from pipeline.recipes.choice import Method
    from pipeline.recipes.requests import RequestFiles

repro = typer.Typer(
    no_args_is_help=True,
    help="""Run a published method end to end on a model of yours.

    Each command extracts, fits, searches on the validation split, publishes what it finds signed,
    starts a steering service, lets a node follow the channel, measures on the test split, and ends
    with a table, OUT/NAME.html and OUT/NAME.json. Caches, directions and controllers that are
    there already are used again. docs/recipes.md says more.""",
)
app.add_typer(repro, name="repro")

Model = Annotated[
    Path,
    typer.Option(
        "--model", exists=True, file_okay=False, help="Model folder, as save_pretrained writes it."
    ),
]
Out = Annotated[
    Path, typer.Option("--out", help="Folder for reports, keys and the node's disk cache.")
]
Store = Annotated[
    str | None,
    typer.Option("--store", help="Caches, artifacts and channels; by default OUT/store."),
]
Questions = Annotated[
    Path,
    typer.Option(
        "--data",
        exists=True,
        dir_okay=False,
        help="Two-choice questions with both answers, in CAA's format, with splits.",
    ),
]
Neutral = Annotated[
    Path | None,
    typer.Option(
        "--neutral",
        exists=True,
        dir_okay=False,
        help="Prompts whose plain answers must stay as probable; by default some of our own.",
    ),
]
Cap = Annotated[
    float,
    typer.Option(
        "--perplexity-cap",
        min=1.0,
        help="Most that the perplexity of the plain model's answers may rise, as a ratio.",
    ),
]
Ask = Annotated[
    str | None,
    typer.Option("--ask", help="System prompt that asks for the behaviour: the baseline to beat."),
]
Pairs = Annotated[
    Path,
    typer.Option(
        "--data",
        exists=True,
        dir_okay=False,
        help="Harmful (label 1) and harmless (label 0) requests, in pairs.",
    ),
]
Attacks = Annotated[
    Path,
    typer.Option(
        "--attacks", exists=True, dir_okay=False, help="Harmful requests in jailbreak wrappers."
    ),
]
Lookalikes = Annotated[
    Path,
    typer.Option(
        "--lookalikes", exists=True, dir_okay=False, help="Harmless requests that look harmful."
    ),
]
Skill = Annotated[
    Path,
    typer.Option(
        "--skill", exists=True, dir_okay=False, help="Unrelated questions with a field `answer`."
    ),
]
Phrases = Annotated[
    Path | None,
    typer.Option(
        "--phrases",
        exists=True,
        dir_okay=False,
        help="JSON list of beginnings of refusals; by default common ones.",
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option("--dtype", help="What is computed in; auto is the checkpoint's."),
]


@repro.command()
def hsi(
    model: Model,
    data: Questions,
    neutral: Neutral = None,
    perplexity_cap: Cap = 1.1,
    ask: Ask = None,
    out: Out = OUT,
    store: Store = None,
    dtype: Dtype = "auto",
    workers: Workers = CPUS,
    device: Device = "cpu",
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Head-specific intervention (arXiv 2502.05945), with ITI and CAA as baselines.

    Sweeps every head alone by generation, combines those that work, at most 5 % of all. For
    Llama-2-7b-chat the published heads and strengths are taken as they are.
    """
    place = Place(model, out, store, dtype, workers, device, ray)
    _choice(("hsi", "iti", "caa"), place, data, neutral, perplexity_cap, ask, as_json)


@repro.command()
def iti(
    model: Model,
    data: Questions,
    neutral: Neutral = None,
    perplexity_cap: Cap = 1.1,
    ask: Ask = None,
    out: Out = OUT,
    store: Store = None,
    dtype: Dtype = "auto",
    workers: Workers = CPUS,
    device: Device = "cpu",
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Inference-time intervention (arXiv 2306.03341): heads ranked by the accuracy of probes."""
    place = Place(model, out, store, dtype, workers, device, ray)
    _choice(("iti",), place, data, neutral, perplexity_cap, ask, as_json)


@repro.command()
def caa(
    model: Model,
    data: Questions,
    neutral: Neutral = None,
    perplexity_cap: Cap = 1.1,
    ask: Ask = None,
    out: Out = OUT,
    store: Store = None,
    dtype: Dtype = "auto",
    workers: Workers = CPUS,
    device: Device = "cpu",
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Contrastive activation addition (arXiv 2312.06681): one layer, chosen by a sweep."""
    place = Place(model, out, store, dtype, workers, device, ray)
    _choice(("caa",), place, data, neutral, perplexity_cap, ask, as_json)


@repro.command()
def antidote(
    model: Model,
    data: Pairs,
    attacks: Attacks,
    lookalikes: Lookalikes,
    skill: Skill,
    phrases: Phrases = None,
    out: Out = OUT,
    store: Store = None,
    dtype: Dtype = "auto",
    workers: Workers = CPUS,
    device: Device = "cpu",
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Jailbreak Antidote (arXiv 2410.02298): refusals restored by 5 % of the dimensions.

    Chosen on rows of other splits than test, under caps of 5 points of look-alike refusal and 2
    points of the skill.
    """
    from pipeline.recipes import antidote as recipe
    from pipeline.recipes.summaries.antidote import antidote_findings

    settings = recipe.Settings(_files(data, attacks, lookalikes, skill, phrases))
    with open_lab(Place(model, out, store, dtype, workers, device, ray)) as lab:
        found = antidote_findings(recipe.run(lab, settings), settings)
    finish(found, "antidote", out, as_json)


@repro.command()
def was(
    model: Model,
    data: Pairs,
    attacks: Attacks,
    lookalikes: Lookalikes,
    skill: Skill,
    phrases: Phrases = None,
    target: Annotated[
        str, typer.Option("--target", help="What an answer that is steered should begin with.")
    ] = "I can't help with that.",
    reference: Annotated[
        bool,
        typer.Option(
            "--reference/--no-reference", help="Also train as the paper's released code does."
        ),
    ] = True,
    out: Out = OUT,
    store: Store = None,
    dtype: Dtype = "auto",
    workers: Workers = CPUS,
    device: Device = "cpu",
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Weighted activation steering (Guiding Giants, arXiv 2505.20309): a trained controller."""
    from pipeline.recipes import weighted as recipe
    from pipeline.recipes.summaries.weighted import weighted_findings

    files = _files(data, attacks, lookalikes, skill, phrases)
    settings = recipe.Settings(files, target=target, reference=reference)
    with open_lab(Place(model, out, store, dtype, workers, device, ray)) as lab:
        found = weighted_findings(recipe.run(lab, settings), settings)
    finish(found, "was", out, as_json)


@repro.command(name="alignment-faking")
def alignment_faking(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            exists=True,
            dir_okay=False,
            help="Requests, one a row, or with tier, system and pair. The test split is asked; an "
            "endpoint, which nothing is fitted on, is asked all rows where none has a split.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", exists=True, file_okay=False, help="Local model to ask, and to look inside."
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", help="Ask an OpenAI-compatible endpoint, such as http://…/v1."),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option("--endpoint-model", help="The endpoint's name of the model.")
    ] = None,
    key_variable: Annotated[
        str | None,
        typer.Option(
            "--key-variable", help="Environment variable that holds the API key of --endpoint."
        ),
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option(
            "--conditions",
            exists=True,
            dir_okay=False,
            help="Conditions (TOML); by default the requests' own systems, if they bring any, or "
            "else ours for chat models.",
        ),
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            help="phrases, or the folder of a local model, or the address of an endpoint.",
        ),
    ] = "phrases",
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="The judging endpoint's name of its model.")
    ] = None,
    judge_key_variable: Annotated[
        str | None,
        typer.Option(
            "--judge-key-variable",
            help="Environment variable that holds the API key of a judging endpoint.",
        ),
    ] = None,
    phrases: Phrases = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most requests.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 512,
    out: Out = OUT,
    store: Store = None,
    dtype: Dtype = "auto",
    workers: Workers = CPUS,
    device: Device = "cpu",
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Alignment faking (arXiv 2506.21584): does a model comply more where it is being watched?

    Two tiers under baselines, deontological framings, a scratchpad and neutral labels. A local
    model is also looked into: a direction between the tiers' prompts, as a monitor and to steer
    along.
    """
    from pipeline.evaluation.tier_requests import read_requests
    from pipeline.evaluation.tiers import default_conditions, load_conditions
    from pipeline.recipes import faking as recipe
    from pipeline.recipes.summaries.faking import faking_findings, keep_completions

    if (model is None) == (endpoint is None):
        raise typer.BadParameter("name either --model FOLDER or --endpoint ADDRESS")
    asked = None
    if endpoint is not None:
        asked = open_endpoint(endpoint, endpoint_model, key_variable, "--endpoint-model")
    settings = recipe.Settings(
        data,
        load_conditions(conditions)
        if conditions
        else default_conditions(read_requests(data, split=None)),
        out.resolve() / "prompts",
        limit,
        max_new_tokens,
    )
    judging = open_judge(judge, judge_model, judge_key_variable, phrases, device)
    keep = keep_completions(out.resolve() / "alignment-faking.parquet")
    if asked is not None:
        results = recipe.run_behaviour(
            lambda prompts: asked.ask(prompts, max_tokens=max_new_tokens),
            settings,
            judging,
            track,
            keep,
        )
        outcome = recipe.Outcome(results, None)
    else:
        assert model is not None
        with open_lab(Place(model, out, store, dtype, workers, device, ray)) as lab:
            outcome = recipe.run(lab, settings, judging, keep)
    finish(faking_findings(outcome), "alignment-faking", out, as_json)


def _choice(
    methods: tuple[Method, ...],
    place: Place,
    data: Path,
    neutral: Path | None,
    perplexity_cap: float,
    ask: str | None,
    as_json: bool,
) -> None:
    from pipeline.recipes.choice import Search, Settings
    from pipeline.recipes.published import published_for
    from pipeline.recipes.summaries.choice import choice_findings

    with open_lab(place) as lab:
        settings = Settings(
            data,
            neutral_prompts(neutral),
            perplexity_cap=perplexity_cap,
            published=published_for(lab.info),
            system=ask,
        )
        found = choice_findings(Search(lab, settings).run(methods), settings)
    finish(found, methods[0], place.out, as_json)


def _files(
    data: Path, attacks: Path, lookalikes: Path, skill: Path, phrases: Path | None
) -> RequestFiles:
    from pipeline.recipes.requests import RequestFiles

    return RequestFiles(data, attacks, lookalikes, skill, phrases)
