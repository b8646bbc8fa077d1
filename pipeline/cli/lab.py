"""What every recipe's command opens and closes with: the lab, and the findings."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pipeline.cli.options import print_json, progress, stdout
from pipeline.errors import InvalidInput

if TYPE_CHECKING:
    from pipeline.evaluation.generate import ChatPrompt
    from pipeline.recipes.findings import Findings
    from pipeline.recipes.lab import Lab

CPUS: Final = max(1, os.cpu_count() or 1)
OUT: Final = Path("steerage-repro")


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


@contextmanager
def track(label: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, for recipes."""
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
            track=track,
        )


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


def finish(found: Findings, name: str, out: Path, as_json: bool) -> None:
    """Write the page and the figures, and print them."""
    from pipeline.recipes.findings import print_findings, write_findings

    page = write_findings(found, name, out.resolve())
    if as_json:
        print_json(dict(found.summary) | {"report": str(page)})
    else:
        print_findings(found, stdout)
        stdout.print(f"report: {page}", highlight=False, soft_wrap=True)
