"""Run files: TOML that says what is computed. Where and how it runs is said by flags.

What changes a result enters a digest, so two runs with equal run files and inputs share results.
"""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import InvalidInput
from steering_service.core.errors import SteeringError
from steering_service.core.intervention import Operation, Positions, StrengthUnit
from steering_service.core.site import Site

CaptureStream = Literal["resid_pre", "resid_post", "z"]
Split = Literal["train", "validation", "test"]

_SELECTION: Final = r"^(last|mean|all|-[1-9]\d*)$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(_Section):
    """Which model, and how its numbers are computed."""

    path: Path
    """Folder as `save_pretrained` writes it, safetensors only; relative to the run file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto is that of the checkpoint."""


class PromptsSection(_Section):
    """Which prompts, and how they become token ids."""

    files: Annotated[list[Path], Field(min_length=1)]
    """JSONL, CSV or Parquet; relative to the run file."""
    format: Literal["auto", "pairs", "caa", "labelled"] = "auto"
    """pairs: {prompt, positive, negative}; caa: {question, answer_matching_behavior,
    answer_not_matching_behavior}; labelled: {prompt, label}; auto: told from the first row."""
    template: Literal["chat", "none"] = "chat"
    """chat: the tokenizer's chat template; none: prompt and completion as they stand."""
    system: str | None = None
    """System prompt put before every prompt that has none of its own."""
    close_turn: bool = False
    """Whether a completion is closed by the template's end of turn. HSI reads that token; CAA reads
    the answer letter of an open turn."""
    date: datetime.date = datetime.date(2024, 7, 26)
    """Today, for chat templates that write the date."""
    positive_label: str | None = None
    """labelled: the label that is the positive class, where labels are neither 0/1 nor booleans."""
    max_quarantined: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of bad rows past which the run stops."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Shares of rows without a split of their own, by a hash of the pair."""

    @model_validator(mode="after")
    def _consistent(self) -> PromptsSection:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on")
        if self.template == "none" and (self.system is not None or self.close_turn):
            raise ValueError('system and close_turn need template = "chat"')
        return self


class CaptureSection(_Section):
    """What is recorded."""

    streams: Annotated[list[CaptureStream], Field(min_length=1)] = ["resid_post", "z"]
    layers: Literal["all"] | Annotated[list[int], Field(min_length=1)] = "all"
    tokens: Annotated[str, Field(pattern=_SELECTION)] = "last"
    """last, a negative index such as "-2", mean (over all tokens) or all (a row a token)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype on disk; auto is that of the computation."""
    tokens_per_pack: Annotated[int, Field(ge=1)] = 4096
    """Padded tokens of one forward pass. Part of the capture: it decides the last bits."""
    shard_mib: Annotated[float, Field(gt=0, le=4096)] = 128.0
    """Aim for the size of a shard, in MiB."""

    @field_validator("streams")
    @classmethod
    def _unique(cls, value: list[CaptureStream]) -> list[CaptureStream]:
        if len(set(value)) != len(value):
            raise ValueError("a stream is named twice")
        return sorted(value)


class ReduceSection(_Section):
    """Which directions are computed."""

    method: Literal["difference_of_means"] = "difference_of_means"


class PublishSection(_Section):
    """Which Interventions become an artifact, and its limits."""

    sites: Annotated[list[str], Field(min_length=1)] | Literal["best_layer", "best_head"] = (
        "best_layer"
    )
    """Sites such as "resid_post.3" or "z.2.5"; or the best by AUROC on the validation split."""
    operation: Operation = "add"
    strength_unit: StrengthUnit = "direction"
    positions: Positions = "generated"
    min_strength: Annotated[float, Field(allow_inf_nan=False)] = -1.0
    max_strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> PublishSection:
        if self.min_strength > self.max_strength:
            raise ValueError("min_strength is above max_strength")
        return self

    @field_validator("sites")
    @classmethod
    def _sites(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, list):
            for text in value:
                try:
                    Site.parse(text)
                except SteeringError as error:
                    raise ValueError(str(error)) from error
        return value


class RunFile(_Section):
    """One run, from prompts to artifact."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """Names the artifact, for people."""
    model: ModelSection
    prompts: PromptsSection
    capture: CaptureSection = CaptureSection()
    reduce: ReduceSection = ReduceSection()
    publish: PublishSection = PublishSection()


def load_run_file(path: Path) -> RunFile:
    """Read a run file; paths in it are taken from its folder.

    Raises:
        InvalidInput: Missing, not TOML, or a field that is unknown, missing or out of range; all
            such fields are named at once.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"run file {str(path)!r} cannot be read: {error.strerror}; "
            "examples/refusal.toml is one to start from",
            kind="run_file",
        ) from error
    try:
        run = RunFile.model_validate(tomllib.loads(raw.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"run file {str(path)!r} is not TOML: {error}", kind="run_file"
        ) from error
    except ValidationError as error:
        problems = "\n".join(f"  {_describe(item)}" for item in error.errors())
        raise InvalidInput(
            f"run file {str(path)!r} has {error.error_count()} problem(s):\n{problems}",
            kind="run_file",
        ) from error
    base = path.resolve().parent
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"path": base / run.model.path}),
            "prompts": run.prompts.model_copy(
                update={"files": [base / file for file in run.prompts.files]}
            ),
        }
    )


def _describe(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "the file"
    got = "" if item["type"] in ("missing", "extra_forbidden") else f", got {item['input']!r}"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{got}"
