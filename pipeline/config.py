"""Run files: TOML that says what is computed. Where and how it runs is said by flags.

What changes a result enters a digest, so two runs with equal run files and inputs share results.
"""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import InvalidInput
from pipeline.prompts.selection import Selection
from pipeline.reduction.methods import DEFAULT_PARAMETERS, Method, complete_parameters
from steering_service.core.controller import Mode, check_order
from steering_service.core.errors import SteeringError
from steering_service.core.intervention import Operation, Positions, StrengthUnit
from steering_service.core.site import Site, Stream

CaptureStream = Stream
Split = Literal["train", "validation", "test"]


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
    tokens: str = "last"
    """Which tokens of a prompt become rows: last; a negative index such as "-2"; "last_3" (the last
    three tokens, a row each); mean (over all tokens), mean_prompt (over those before the
    completion) or mean_completion; answer_letter (the token with the letter of an answer such as
    (A), which CAA reads); all (a row a token, of which prompts that begin alike share those they
    share); completion (a row a token of the completion); "text:SUBSTRING" (the mean over the last
    occurrence); or "regex:PATTERN" (the mean over the last match's first group, or over all of the
    match). `pipeline.prompts.selection` says the rest."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype on disk; auto is that of the computation."""
    packing: Literal["auto", "trie", "batches"] = "auto"
    """auto: as a token trie, in which what prompts share is computed once, where the model can take
    it; batches: right-padded prompts of like lengths, which every causal model can take."""
    tokens_per_pack: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens of one forward pass; auto is 1024 for models narrower than 2048, which CPUs run, and
    else 4096, which keep a GPU busy. Part of the capture: it decides the last bits."""
    shard_mib: Annotated[float, Field(gt=0, le=4096)] = 128.0
    """Aim for the size of a shard, in MiB."""

    @field_validator("streams")
    @classmethod
    def _unique(cls, value: list[CaptureStream]) -> list[CaptureStream]:
        if len(set(value)) != len(value):
            raise ValueError("a stream is named twice")
        return sorted(value)

    @field_validator("tokens")
    @classmethod
    def _selects(cls, value: str) -> str:
        try:
            Selection.parse(value)
        except InvalidInput as error:
            raise ValueError(str(error)) from error
        return value


class ReduceSection(_Section):
    """Which directions are computed."""

    method: Method = "difference_of_means"
    """difference_of_means (CAA, HSI), paired_difference (the mean over pairs), pca of within-pair
    differences (RepE, Jailbreak Antidote), probe, a logistic regression (ITI), or lda, the
    difference of means whitened. Its directions are published."""
    compare: list[Method] = []
    """More methods, which are computed in the same passes, for the report to compare."""
    extends: list[Path] = []
    """Other run files, relative to this one, whose prompts count too: those of a corpus that this
    run appends to. What was counted of them before is not counted again."""
    pair_order_seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    """pca: which half of the pairs is turned around; 0 where it is not given."""
    l2: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] | None = None
    """probe: weight of the L2 term beside the sum of log losses, over standardised features (1/C in
    scikit-learn's terms); 1 where it is not given."""
    max_rows: Annotated[int, Field(ge=2)] | None = None
    """pca, probe and lda: most training samples that they are fitted on, whole pairs drawn with a
    fixed seed; a task holds rows of them in memory. 65536 where it is not given."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] | None = None
    """lda: share of the covariance that is replaced by its mean variance; 0.1 where not given."""

    @model_validator(mode="after")
    def _parameters_of_the_methods(self) -> ReduceSection:
        if len(set(self.methods)) != len(self.methods):
            raise ValueError("a method is named twice")
        known = {name for method in self.methods for name in DEFAULT_PARAMETERS[method]}
        given = {name: getattr(self, name) for name in _parameter_names()}
        for name, value in given.items():
            if value is not None and name not in known:
                owners = [m for m, named in DEFAULT_PARAMETERS.items() if name in named]
                raise ValueError(
                    f"{name} is a parameter of {' and '.join(owners)}, which is not computed; "
                    f"expected {' or '.join(owners)} as method or under compare"
                )
        return self

    @property
    def methods(self) -> list[Method]:
        """All that are computed, that to publish first."""
        return [self.method, *self.compare]

    def parameters(self, method: Method) -> dict[str, int | float]:
        """A method's parameters, defaults included."""
        given = {name: getattr(self, name) for name in DEFAULT_PARAMETERS[method]}
        return complete_parameters(
            method, {name: value for name, value in given.items() if value is not None}
        )


def _parameter_names() -> list[str]:
    return [name for named in DEFAULT_PARAMETERS.values() for name in named]


class PublishSection(_Section):
    """Which Interventions become an artifact, and its limits."""

    sites: Annotated[list[str], Field(min_length=1)] | Literal["best_layer", "best_head"] = (
        "best_layer"
    )
    """Sites such as "resid_post.3" or "z.2.5"; or the best by AUROC on the validation split."""
    operation: Operation = "add"
    strength_unit: StrengthUnit = "direction"
    positions: Positions = "generated"
    keep_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep this share of a direction's entries, the largest, and set the others to zero (Jailbreak
    Antidote keeps 0.05)."""
    match_norm: bool = False
    """Scale what is kept to the norm of the whole direction, so that the dose stays the same."""
    keep_by: Literal["magnitude", "t"] = "magnitude"
    """What makes an entry large: its magnitude, or the t statistic of the classes there."""
    keep_over: Literal["site", "all"] = "site"
    """Keep the share of each direction, or of the entries of all sites together."""
    norm_of: list[Path] = []
    """Other run files, relative to this one: each direction is scaled to the mean of the norms that
    theirs and this one's have at its site, so that one strength is one dose for all (CAA)."""
    min_strength: Annotated[float, Field(allow_inf_nan=False)] = -1.0
    max_strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> PublishSection:
        if self.min_strength > self.max_strength:
            raise ValueError("min_strength is above max_strength")
        return self

    @model_validator(mode="after")
    def _dose_said(self) -> PublishSection:
        applies_norm = self.operation == "add" and self.strength_unit == "direction"
        if self.keep_fraction < 1 and not self.match_norm and not applies_norm:
            raise ValueError(
                'keep_fraction with strength_unit "sigma" or "unit", or with operation '
                '"project_out", applies a unit vector, so the norm that a mask takes away comes '
                'back: say match_norm = true, or use strength_unit = "direction"'
            )
        return self

    @field_validator("sites")
    @classmethod
    def _sites(cls, value: list[str] | str) -> list[str] | str:
        return _checked_sites(value) if isinstance(value, list) else value


def _checked_sites(value: list[str]) -> list[str]:
    for text in value:
        try:
            Site.parse(text)
        except SteeringError as error:
            raise ValueError(str(error)) from error
    return value


class TrainSection(_Section):
    """A controller that is trained from the cache (METHODS 2, weighted activation steering)."""

    mode: Mode = "gated"
    """gated: bounded, trained on outcomes. reference_compat: what the code released with the paper
    does, its defects included; for comparison only."""
    reads: Annotated[list[str], Field(min_length=1)]
    """Sites that the controller reads at the last token of the prompt, such as "resid_post.3"; they
    must be among those captured."""
    edits: Annotated[list[str], Field(min_length=1)]
    """Sites that it steers, none before the last one that it reads."""
    directions: Path | None = None
    """Another run file whose directions are steered along, relative to this one; without it, those
    of this run. The controller's prompts may well hold what a direction should not, such as
    jailbreak wrappers."""
    target: Annotated[str, Field(min_length=1)]
    """What an answer that is steered should begin with, such as "I can't help with that."."""
    strength: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Strength of the channel that it is trained for: what a scale and a weight of 1 add."""
    hidden: Annotated[int, Field(ge=1)] = 64
    """Units of the hidden layer."""
    gate_steps: Annotated[int, Field(ge=1)] = 500
    """Steps on the classes alone, which need no forward pass of the model."""
    outcome_steps: Annotated[int, Field(ge=0)] = 150
    """Steps on what the steered model says."""
    batch: Annotated[int, Field(ge=2)] = 32
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """AdamW's, of the gate. Large, since there are fewer rows than a stream is wide."""
    answer_tokens: Annotated[int, Field(ge=1)] = 12
    """Tokens of the own answers that must stay as they are where nothing is to be steered."""
    keep_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the KL to the base model on the negative class."""
    cost_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Weight of the steering's own size, relative to the activations, on the positive class."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0

    @field_validator("reads", "edits")
    @classmethod
    def _are_sites(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("a site is named twice")
        return _checked_sites(value)

    @model_validator(mode="after")
    def _reads_before_edits(self) -> TrainSection:
        # A node would refuse the artifact, but only after it has been trained.
        reads, edits = (tuple(map(Site.parse, sites)) for sites in (self.reads, self.edits))
        try:
            check_order(reads, edits)
        except SteeringError as error:
            raise ValueError(str(error)) from error
        return self


class RunFile(_Section):
    """One run, from prompts to artifact."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """Names the artifact, for people."""
    model: ModelSection
    prompts: PromptsSection
    capture: CaptureSection = CaptureSection()
    reduce: ReduceSection = ReduceSection()
    publish: PublishSection = PublishSection()
    train: TrainSection | None = None
    """With it, `steerage train` makes a controller, and `steerage publish` publishes that."""

    @model_validator(mode="after")
    def _controller_is_published_as_trained(self) -> RunFile:
        named = self.publish.model_fields_set - {"min_strength", "max_strength"}
        if self.train is not None and named:
            raise ValueError(
                f"publish.{', publish.'.join(sorted(named))}: a controller is published with the "
                "sites and positions that it was trained with; leave it out"
            )
        return self


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
    norm_of = [base / file for file in run.publish.norm_of]
    extends = [base / file for file in run.reduce.extends]
    train = run.train
    if train is not None and train.directions is not None:
        train = train.model_copy(update={"directions": base / train.directions})
    return run.model_copy(
        update={
            "train": train,
            "reduce": run.reduce.model_copy(update={"extends": extends}),
            "publish": run.publish.model_copy(update={"norm_of": norm_of}),
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
