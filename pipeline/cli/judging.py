"""Endpoints and judges, as flags name them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pipeline.evaluation.endpoint import Endpoint
    from pipeline.evaluation.judges import Judge


def open_judge(
    judge: str, judge_model: str | None, key_variable: str | None, phrases: Path | None, device: str
) -> Judge:
    """The judge that --judge names.

    Args:
        key_variable: Of the judge alone: a subject's key is never sent to its judge.
    """
    from pipeline.evaluation.judges import EndpointJudge, ModelJudge, PhraseJudge
    from pipeline.extraction.models import ModelInfo, load_model, load_tokenizer
    from pipeline.recipes.requests import read_phrases

    if judge == "phrases":
        return PhraseJudge(read_phrases(phrases))
    if judge.startswith(("http://", "https://")):
        return EndpointJudge(open_endpoint(judge, judge_model, key_variable, "--judge-model"))
    folder = Path(judge)
    info = ModelInfo.read(folder)
    return ModelJudge(load_model(folder, info.dtype, device), load_tokenizer(folder))


def open_endpoint(address: str, name: str | None, key_variable: str | None, flag: str) -> Endpoint:
    """An endpoint; `flag` is the one that gives its model's name."""
    from pipeline.evaluation.endpoint import Endpoint

    if name is None:
        raise typer.BadParameter(f"an endpoint serves models by name: add {flag}")
    return Endpoint(address, name, key_variable)
