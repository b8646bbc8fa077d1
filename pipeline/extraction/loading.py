"""Loader: transformers' own way from checkpoint tensors to parameters, for part of a model.

Which tensors make which parameter (renames, prefixes, fused experts), in which dtype, and how
buffers that are in no checkpoint are computed is transformers' knowledge, so its functions do the
work. They are not public: all that is used of them is in this file, and `Loader` says so where a
version of transformers lacks one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pipeline.errors import InvalidInput
from pipeline.extraction.checkpoint import check_folder

_METHODS = (
    "_get_dtype_plan",
    "_move_missing_keys_from_meta_to_device",
    "_initialize_missing_keys",
    "_adjust_missing_and_unexpected_keys",
    "mark_tied_weights_as_initialized",
    "tie_weights",
)


def meta_body(path: Path, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    """A decoder body as `transformers.AutoModel` builds it for a folder, on the meta device.

    Args:
        attn_implementation: Passed on to transformers; its own choice if None.

    Raises:
        NotFound: No such folder.
        InvalidInput: The configuration cannot be read.
    """
    check_folder(path)
    where = os.fspath(path)
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
        # Told that this is the meta device, transformers initialises nothing, as from_pretrained.
        with torch.device("meta"):
            body = transformers.AutoModel.from_config(
                config, dtype=dtype, trust_remote_code=False, **attention
            )
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"model {where!r} cannot be built: {error}", kind="model_load"
        ) from error
    return body


class Loader:
    """Loads parts of a checkpoint into a body that is on the meta device.

    Args:
        body: A transformers model, built on the meta device.
        dtype: What floating-point weights are cast to.
        where: The model, as error messages name it.

    Raises:
        InvalidInput: This version of transformers lacks a function that this needs.
    """

    def __init__(self, body: Any, dtype: torch.dtype, where: str) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                LoadStateDictInfo,
                WeightConverter,
                WeightRenaming,
                convert_and_load_state_dict_in_model,
                rename_source_key,
            )
            from transformers.modeling_utils import LoadStateDictConfig
        except ImportError as error:
            raise _wrong_version(str(error)) from error
        if absent := [name for name in _METHODS if not hasattr(body, name)]:
            raise _wrong_version(f"{type(body).__name__} has no {absent[0]}")
        self._body = body
        self._wanted: dict[str, Tensor] = body.state_dict()
        self._where = where
        self._renaming, self._converter = WeightRenaming, WeightConverter
        self._rename: Any = rename_source_key
        self._convert: Any = convert_and_load_state_dict_in_model
        self._mapping: list[Any] = get_model_conversion_mapping(body)
        self._report: Any = LoadStateDictInfo
        self._config: Any = LoadStateDictConfig
        self._dtype, self._dtype_plan = dtype, body._get_dtype_plan(dtype)

    @property
    def names(self) -> Collection[str]:
        """The body's parameters and persistent buffers."""
        return self._wanted.keys()

    def targets(self, names: Iterable[str]) -> dict[str, str]:
        """By checkpoint tensor, the parameter (the first, if several) that it becomes part of.

        Tensors that the body has no use for, such as the language-model head, are left out.
        """
        mapping = copy.deepcopy(self._mapping)
        renamings = [entry for entry in mapping if isinstance(entry, self._renaming)]
        converters = [entry for entry in mapping if isinstance(entry, self._converter)]
        prefix, wanted = self._body.base_model_prefix, self._wanted
        found: dict[str, str] = {}
        for name in sorted(names):
            target, _ = self._rename(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:
                # As the loader has it: a name that is right already, for all that a rename matched.
                target, _ = self._rename(name, [], [], prefix, wanted)
            if target in wanted:
                found[name] = target
        return found

    def load(
        self, tensors: Mapping[str, Tensor], device: torch.device, only: Iterable[str] | None = None
    ) -> set[str]:
        """Set the parameters that some checkpoint tensors make.

        Args:
            only: The parameters that they make, if known: to look at all takes longer than to
                load a block of them.

        Returns:
            Names of parameters and persistent buffers, of the body or of `only`, that were not set.

        Raises:
            InvalidInput: A tensor has another shape than its parameter, or cannot be converted.
        """
        wanted = self._wanted if only is None else {name: self._wanted[name] for name in only}
        part = _Part(self._body, wanted)
        config = self._config(
            dtype=self._dtype,
            dtype_plan=self._dtype_plan,
            # Some renames remember which names they have seen: every load begins afresh.
            weight_mapping=copy.deepcopy(self._mapping),
            # Told that something is on disk (nothing is), the loader converts one parameter after
            # the other; else its threads would first copy all that they are given.
            device_map={"": device, "nothing": "disk"},
        )
        report, _ = self._convert(part, dict(tensors), config, None)
        wrong = [
            f"{name} {list(got)}, expected {list(expected)}"
            for name, got, expected in sorted(report.mismatched_keys)
        ]
        # Each error comes with its traceback; its last two lines say what and where.
        wrong += [
            f"{name}: {' '.join(error.splitlines()[-2:])}"
            for name, error in sorted(report.conversion_errors.items())
        ]
        if wrong := wrong + list(report.error_msgs):
            raise InvalidInput(
                f"model {self._where!r}: {len(wrong)} weights do not go from its safetensors "
                f"files into the model that its config.json describes, such as {wrong[0]}. Save "
                "the model again",
                kind="model_weights",
            )
        missing: set[str] = report.missing_keys
        return missing

    def finish(self, missing: set[str], device: torch.device) -> None:
        """Compute what no checkpoint holds: rotary frequencies and other buffers, and ties.

        Args:
            missing: What `load` did not set in a dry run over the whole checkpoint.

        Raises:
            InvalidInput: Weights are missing that from_pretrained would have left random.
        """
        report = self._report(
            missing_keys=set(missing),
            unexpected_keys=set(),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        body = self._body
        body.mark_tied_weights_as_initialized(report)
        body._adjust_missing_and_unexpected_keys(report)
        left_out = missing - report.missing_keys
        tied = set(body.all_tied_weights_keys)
        if absent := sorted(report.missing_keys - tied):
            raise InvalidInput(
                f"model {self._where!r}: {len(absent)} weights are not in its safetensors files, "
                f"such as {absent[0]}; they would be random. Save the model again",
                kind="model_weights",
            )
        body._move_missing_keys_from_meta_to_device(left_out, {"": device}, None, None)
        body._initialize_missing_keys(False)
        body.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)


class _Part:
    """A body of which the loader sees only some weights."""

    def __init__(self, body: Any, wanted: dict[str, Tensor]) -> None:
        self._body = body
        self._wanted = wanted

    def state_dict(self) -> dict[str, Tensor]:
        return self._wanted

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        return []  # Asked for only where weights are offloaded.

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _wrong_version(what: str) -> InvalidInput:
    return InvalidInput(
        f"transformers {transformers.__version__} cannot load a model block by block ({what}); "
        "expected 5.23 or a version that loads as it does. Install that version, or use the "
        "resident engine",
        kind="transformers_version",
    )
