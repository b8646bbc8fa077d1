"""Commands that run published methods end to end: repro hsi, iti, caa, antidote, was,
alignment-faking.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.app import app
from pipeline.cli.options import (
    AsJson,
    Device,
    RayAddress,
    Workers,
    print_json,
    progress,
    stdout,
)
from pipeline.errors import InvalidInput

if TYPE_CHECKING:
    from pipeline.evaluation.endpoint import Endpoint
    from pipeline.evaluation.generate import ChatPrompt
    from pipeline.evaluation.judges import Judge
    from pipeline.recipes.choice import Method
    from pipeline.recipes.findings import Findings
    from pipeline.recipes.lab import Lab
    from pipeline.recipes.requests import RequestFiles

repro = typer.Typer(
    no_args_is_help=True,
    help="""Run a published method end to end on a model of yours.

    Each command extracts, fits, searches on the validation split, publishes what it finds signed,
    starts a steering service, lets a node follow the channel, measures on the test split, and ends
    with a table, OUT/NAME.html and OUT/NAME.json. Run again, it goes on where it was.""",
)
app.add_typer(repro, name="repro")

Model = Annotated[Path, typer.Option("--model", help="Model folder, as save_pretrained writes it.")]
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
        "--data", help="Two-choice questions with both answers, in CAA's format, with splits."
    ),
]
Neutral = Annotated[
    Path | None,
    typer.Option(
        "--neutral",
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
    typer.Option("--data", help="Harmful (label 1) and harmless (label 0) requests, in pairs."),
]
Attacks = Annotated[Path, typer.Option("--attacks", help="Harmful requests in jailbreak wrappers.")]
Lookalikes = Annotated[
    Path, typer.Option("--lookalikes", help="Harmless requests that look harmful.")
]
Skill = Annotated[Path, typer.Option("--skill", help="Unrelated questions with a field `answer`.")]
Phrases = Annotated[
    Path | None,
    typer.Option("--phrases", help="JSON list of beginnings of refusals; by default common ones."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option("--dtype", help="What is computed in; auto is the checkpoint's."),
]
CPUS = max(1, os.cpu_count() or 1)
OUT = Path("steerage-repro")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a recipe runs and what it leaves: the flags that all of them share."""

    model: Path
    out: Path
    store: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: int = CPUS
    device: Literal["cpu", "cuda"] = "cpu"
    ray: str | None = None


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

    Chosen on validation under caps of 5 points of look-alike refusal and 2 points of the skill.
    """
    from pipeline.recipes import antidote as recipe
    from pipeline.recipes.summaries.antidote import antidote_findings

    settings = recipe.Settings(_files(data, attacks, lookalikes, skill, phrases))
    with open_lab(Place(model, out, store, dtype, workers, device, ray)) as lab:
        found = antidote_findings(recipe.run(lab, settings), settings)
    _finish(found, "antidote", out, as_json)


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
    _finish(found, "was", out, as_json)


@repro.command(name="alignment-faking")
def alignment_faking(
    data: Annotated[
        Path,
        typer.Option(
            "--data", help="Requests; with tier, system and pair, those systems are used."
        ),
    ],
    model: Annotated[
        Path | None, typer.Option("--model", help="Local model to ask, and to look inside.")
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
        typer.Option("--key-variable", help="Environment variable that holds the API key."),
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option("--conditions", help="Conditions (TOML); by default ours for chat models."),
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
    from pipeline.evaluation.tiers import DEFAULT_CONDITIONS, load_conditions
    from pipeline.recipes import faking as recipe
    from pipeline.recipes.summaries.faking import faking_findings

    if (model is None) == (endpoint is None):
        raise typer.BadParameter("name either --model FOLDER or --endpoint ADDRESS")
    settings = recipe.Settings(
        data,
        load_conditions(conditions or DEFAULT_CONDITIONS),
        out.resolve() / "prompts",
        limit,
        max_new_tokens,
    )
    judging = _judge(judge, judge_model, key_variable, phrases, device)
    if model is None:
        asked = _endpoint(endpoint or "", endpoint_model, key_variable, "--endpoint-model")
        results = recipe.run_behaviour(
            lambda prompts: asked.ask(prompts, max_tokens=max_new_tokens),
            settings,
            judging,
            _track,
        )
        outcome = recipe.Outcome(results, None)
    else:
        with open_lab(Place(model, out, store, dtype, workers, device, ray)) as lab:
            outcome = recipe.run(lab, settings, judging)
    _finish(faking_findings(outcome), "alignment-faking", out, as_json)


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
    _finish(found, methods[0], place.out, as_json)


def neutral_prompts(path: Path | None) -> list[ChatPrompt]:
    """Prompts of a file, the benign ones where it has labels; or a few everyday ones of ours."""
    from pipeline.config import PromptsSection
    from pipeline.evaluation.generate import ChatPrompt
    from pipeline.prompts.corpus import read_corpus
    from pipeline.recipes.published import EVERYDAY

    if path is None:
        return [ChatPrompt(text) for text in EVERYDAY]
    examples = read_corpus(PromptsSection(files=[path])).examples
    chosen = [e for e in examples if e.split == "validation" and not e.label]
    chosen = chosen or [e for e in examples if not e.label]
    if not chosen:
        raise InvalidInput(f"{path}: no prompt with label 0", kind="neutral_empty")
    return [ChatPrompt(e.prompt, e.system) for e in chosen[:32]]


def _files(
    data: Path, attacks: Path, lookalikes: Path, skill: Path, phrases: Path | None
) -> RequestFiles:
    from pipeline.recipes.requests import RequestFiles

    return RequestFiles(data, attacks, lookalikes, skill, phrases)


def _judge(
    judge: str, judge_model: str | None, key_variable: str | None, phrases: Path | None, device: str
) -> Judge:
    from pipeline.evaluation.judges import EndpointJudge, ModelJudge, PhraseJudge
    from pipeline.extraction.models import ModelInfo, load_model, load_tokenizer
    from pipeline.recipes.requests import read_phrases

    if judge == "phrases":
        return PhraseJudge(read_phrases(phrases))
    if judge.startswith(("http://", "https://")):
        return EndpointJudge(_endpoint(judge, judge_model, key_variable, "--judge-model"))
    folder = Path(judge)
    info = ModelInfo.read(folder)
    return ModelJudge(load_model(folder, info.dtype, device), load_tokenizer(folder))


def _endpoint(address: str, name: str | None, key_variable: str | None, flag: str) -> Endpoint:
    from pipeline.evaluation.endpoint import Endpoint

    if name is None:
        raise typer.BadParameter(f"an endpoint serves models by name: add {flag}")
    return Endpoint(address, name, key_variable)


@contextmanager
def _track(label: str, total: int | None) -> Iterator[Callable[[str], None]]:
    with progress(label, total) as (bar, task):
        yield lambda note: bar.update(task, advance=1, note=note)


@contextmanager
def open_lab(place: Place) -> Iterator[Lab]:
    """Load a model, start Ray and a steering service, and make keys, for the recipes."""
    import torch

    from pipeline.cli.service import running_service
    from pipeline.extraction.models import ModelInfo, load_model, load_tokenizer
    from pipeline.ray_runtime import ray_session
    from pipeline.recipes.lab import Lab
    from steering_service.client.operator import Operator
    from steering_service.core.signing import Signer, TrustRoots, generate_key
    from store.location import Location

    info = ModelInfo.read(place.model.resolve())
    out = place.out.resolve()
    private, public = out / "keys" / "publisher.key", out / "keys" / "publisher.pub"
    if not private.exists():
        private.parent.mkdir(parents=True, exist_ok=True)
        generate_key(private, public)
    url = place.store or str(out / "store")
    root = Location.open(url)
    dtype = info.dtype if place.dtype == "auto" else place.dtype
    if info.d_model <= 512:
        # More threads make a small model no faster, and ten times slower on a busy machine.
        torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(ray_session(place.ray, place.workers))
        # As Ctrl-C, so that the service, a process of its own, is ended on the way out. Here, since
        # Ray sets a handler of its own as it starts.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        address = stack.enter_context(running_service(url, public, out / "service.log"))
        yield Lab(
            root=root,
            info=info,
            dtype=dtype,
            model=load_model(info.path, dtype, place.device),
            tokenizer=load_tokenizer(info.path),
            operator=stack.enter_context(Operator(address)),
            address=address,
            signer=Signer.from_file(private),
            trust=TrustRoots.from_paths([public]),
            node_cache=out / "node",
            num_workers=place.workers,
            ray=place.ray,
            device=place.device,
            track=_track,
        )


def _finish(found: Findings, name: str, out: Path, as_json: bool) -> None:
    """Write the page and the figures, and print them."""
    from pipeline.recipes.findings import print_findings, write_findings

    page = write_findings(found, name, out.resolve())
    if as_json:
        print_json(dict(found.summary) | {"report": str(page)})
    else:
        print_findings(found, stdout)
        stdout.print(f"report: {page}", highlight=False, soft_wrap=True)
