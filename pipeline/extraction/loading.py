"""Loader: transformers' own way from checkpoint tensors to parameters, for part of a model.

Which tensors make which parameter (renames, prefixes, fused experts), in which dtype, and how
buffers that are in no checkpoint are computed is transformers' knowledge, so its functions do the
work. They are not public: all that is used of them is in this file, and `Loader` says so where a
version of transformers lacks one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from pipeline.errors import InvalidInput

_METHODS = (
    "_get_dtype_plan",
    "_move_missing_keys_from_meta_to_device",
    "_initialize_missing_keys",
    "_adjust_missing_and_unexpected_keys",
    "mark_tied_weights_as_initialized",
    "tie_weights",
)


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
        self._where = where
        self._renaming, self._converter = WeightRenaming, WeightConverter
        self._rename, self._convert = rename_source_key, convert_and_load_state_dict_in_model
        self._mapping: list[Any] = get_model_conversion_mapping(body)
        plan = body._get_dtype_plan(dtype)
        self._config = lambda device: LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=plan,
            # Some renames remember which names they have seen: every load begins afresh.
            weight_mapping=copy.deepcopy(self._mapping),
            device_map={"": device},
        )

    def targets(self, names: Iterable[str]) -> dict[str, str]:
        """By checkpoint tensor, the parameter (the first, if several) that it becomes part of.

        Tensors that the body has no use for, such as the language-model head, are left out.
        """
        mapping = copy.deepcopy(self._mapping)
        renamings = [entry for entry in mapping if isinstance(entry, self._renaming)]
        converters = [entry for entry in mapping if isinstance(entry, self._converter)]
        prefix, wanted = self._body.base_model_prefix, self._body.state_dict()
        found: dict[str, str] = {}
        for name in sorted(names):
            target, _ = self._rename(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:
                # As the loader has it: a name that is right already, for all that a rename matched.
                target, _ = self._rename(name, [], [], prefix, wanted)
            if target in wanted:
                found[name] = target
        return found

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> set[str]:
        """Set the parameters that some checkpoint tensors make.

        Returns:
            Names of the body's parameters and persistent buffers that were not set.

        Raises:
            InvalidInput: A tensor has another shape than its parameter, or cannot be converted.
        """
        report, _ = self._convert(self._body, dict(tensors), self._config(device), None)
        wrong = [
            f"{name} {list(got)}, expected {list(expected)}"
            for name, got, expected in sorted(report.mismatched_keys)
        ]
        wrong += [f"{name}: {error}" for name, error in sorted(report.conversion_errors.items())]
        if wrong := wrong + list(report.error_msgs):
            raise InvalidInput(
                f"model {self._where!r}: {len(wrong)} weights in its safetensors files do not fit "
                f"its configuration, such as {wrong[0]}. Save the model again",
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
        from transformers.core_model_loading import LoadStateDictInfo

        report = LoadStateDictInfo(
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


def _wrong_version(what: str) -> InvalidInput:
    return InvalidInput(
        f"transformers {transformers.__version__} cannot load a model block by block ({what}); "
        "expected 5.23 or a version that loads as it does. Install that version, or use the "
        "resident engine",
        kind="transformers_version",
    )
