"""How a block joins attention and MLP to the residual stream: measured, not looked up by family.

A block's forward runs once with every child replaced by a stub that returns a marked tensor. What
lies between the children in the forward is additions and scalings, so the inputs of the children
and the block's output are sums of marks, and their coefficients say who reads which stream, what is
added to it, by which factor (Granite's residual_multiplier), and whether attention and MLP follow
each other or are parallel. No weight is touched: blocks on the meta device are read as well.

Shapes: B sequences, T positions, D d_model, K marks, R rows of K values.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from steering_service.core.errors import InvalidInput

_NUM_MARKS: Final = 32
_INPUT: Final = "resid_pre"
_EDIT: Final = "edit"
# How many values attention, and then the MLP, returns: 0 is a tensor that is no tuple.
_ARITIES: Final = ((2, 0), (3, 0), (0, 0), (2, 2), (3, 2), (0, 2))
# What the foreign code of a block raises when it meets a stub that it cannot use.
_MISFIT: Final = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    NameError,
    AssertionError,
    RuntimeError,
)

_Sum = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Branch:
    """One of the two things that a block adds to its residual stream.

    Attributes:
        end: The module whose output, times `scale`, is added: attention or MLP itself, or the norm
            that follows it (Gemma 2 and 3, OLMo-2).
        scale: The factor.
    """

    end: nn.Module
    scale: float


@dataclass(frozen=True, slots=True)
class Wiring:
    """Where the streams inside one block are.

    Attributes:
        attention: The child that computes attention.
        attn_out: What is added after attention.
        mlp_out: What is added after the MLP.
        mid: The child that reads the stream between the two, first argument; None where there is no
            such stream, in a parallel block.
        mid_is_shared: Whether the tensor that `mid` reads is the one that goes on, so that writing
            into it edits the stream.
    """

    attention: nn.Module
    attn_out: Branch
    mlp_out: Branch
    mid: nn.Module | None
    mid_is_shared: bool


@dataclass(frozen=True, slots=True)
class _Call:
    child: str
    read: _Sum | None
    num_arguments: int
    is_flat: bool


@dataclass(frozen=True, slots=True)
class _Trace:
    calls: tuple[_Call, ...]
    output: _Sum | None


def trace(block: nn.Module, d_model: int, where: str) -> Wiring:
    """Find the streams inside a block.

    Args:
        block: A decoder block; its forward takes the hidden states first.
        d_model: Width of the residual stream.
        where: The block's name for messages.

    Raises:
        InvalidInput: The block is not resid_pre + attention + MLP, as far as its children show.
    """
    name = f"{where} ({type(block).__name__})"
    traced = _run(block, d_model, name)
    looked_for = (
        f"{name}: looked for resid_post = resid_pre + attn_out + mlp_out among its children"
    )
    output = traced.output
    if output is None or output.get(_INPUT) != 1.0 or len(output) != 3:
        raise _unfound(f"{looked_for}, and found {_written(output)}", block)
    reads = {call.child: call.read for call in traced.calls}
    attention = _attention(traced, looked_for, block)
    ends = [child for child in output if child != _INPUT]
    attn_ends = [end for end in ends if attention in _chain(end, reads)]
    if len(attn_ends) != 1:
        raise _unfound(
            f"{looked_for}: found {_written(output)}, and {len(attn_ends)} of the two terms come "
            f"from the attention {attention!r}",
            block,
        )
    attn_end = attn_ends[0]
    mlp_end = next(end for end in ends if end != attn_end)
    middle = {_INPUT: 1.0, attn_end: output[attn_end]}
    mid = next((call.child for call in traced.calls if call.read == middle), None)
    called = [block.get_submodule(call.child) for call in traced.calls]
    flat = [call.child for call in traced.calls if call.is_flat]
    for child in (attention, attn_end, mlp_end, mid):
        if child is not None and called.count(block.get_submodule(child)) > 1:
            raise _unfound(
                f"{looked_for}: {child!r} is called more than once in a block, so its calls cannot "
                "be told apart",
                block,
            )
        if child in flat:
            raise _unfound(
                f"{looked_for}: {child!r} works on positions without sequences, [B * T, D], where "
                "[B, T, D] is needed",
                block,
            )
    shared = False
    if mid is not None:
        edited = _run(block, d_model, name, edit_at=mid).output
        shared = edited == {**output, _EDIT: 1.0}
    elif not _is_parallel(mlp_end, reads):
        raise _unfound(
            f"{looked_for}: {_written(output)} was found, but no child that reads resid_pre + "
            f"attn_out, and the MLP {mlp_end!r} does not read resid_pre either",
            block,
        )
    return Wiring(
        attention=block.get_submodule(attention),
        attn_out=Branch(block.get_submodule(attn_end), output[attn_end]),
        mlp_out=Branch(block.get_submodule(mlp_end), output[mlp_end]),
        mid=None if mid is None else block.get_submodule(mid),
        mid_is_shared=shared,
    )


def _attention(traced: _Trace, looked_for: str, block: nn.Module) -> str:
    """The child that is told of positions or masks, not of the hidden states alone."""
    found = list(dict.fromkeys(c.child for c in traced.calls if c.num_arguments > 1))
    if len(found) != 1:
        found = [
            child
            for child in dict.fromkeys(call.child for call in traced.calls)
            if ("attn" in child or "attention" in child)
            and not _is_norm(block.get_submodule(child))
        ]
    if len(found) != 1:
        raise _unfound(
            f"{looked_for}: expected one child that is called with a mask or positions beside the "
            f"hidden states, or else one named attn or attention, found {found or 'none'}",
            block,
        )
    return found[0]


def _chain(end: str, reads: Mapping[str, _Sum | None]) -> list[str]:
    """The children through which a term came, backwards to the stream that it was read from."""
    chain = [end]
    while True:
        read = reads[chain[-1]]
        if read is None or len(read) != 1 or _INPUT in read or (only := next(iter(read))) in chain:
            return chain
        chain.append(only)


def _is_parallel(mlp_end: str, reads: Mapping[str, _Sum | None]) -> bool:
    return reads[_chain(mlp_end, reads)[-1]] == {_INPUT: 1.0}


def _run(block: nn.Module, d_model: int, name: str, edit_at: str | None = None) -> _Trace:
    ran: list[_Trace] = []
    why: list[str] = []
    for attention_arity, mlp_arity in _ARITIES:
        try:
            traced = _Probe(block, d_model, attention_arity, mlp_arity, edit_at).run()
        except _MISFIT as error:
            why.append(f"{type(error).__name__}: {error}")
            continue
        if traced.output is not None and _INPUT in traced.output:
            return traced
        ran.append(traced)
    if ran:
        return ran[0]
    raise _unfound(
        f"{name}: looked for the streams inside the block by running its forward with its children "
        f"replaced, which failed with {why[0]}",
        block,
    )


class _Probe:
    """One run of a block's forward with marked stubs."""

    def __init__(
        self,
        block: nn.Module,
        d_model: int,
        attention_arity: int,
        mlp_arity: int,
        edit_at: str | None,
    ) -> None:
        self._block = block
        self._arities = (attention_arity, mlp_arity)
        self._edit_at = edit_at
        # Two sequences, so that output[0] of what should be a tuple is not taken for the whole.
        self._shape = (2, max(2, -(-2 * _NUM_MARKS // d_model)), d_model)
        size = math.prod(self._shape)
        # Column k holds the values of mark k. Of both signs and of different sizes, so that a
        # nonlinear function is seen as one; short binary fractions, so that sums are exact in every
        # dtype.
        cycle = torch.tensor([1.0, -2.0, 3.5, -0.5, 2.25, -1.25], dtype=torch.float64, device="cpu")
        num_rows = -(-size // _NUM_MARKS)
        values = cycle.repeat(-(-num_rows // len(cycle)))[:num_rows, None].repeat(1, _NUM_MARKS)
        values.view(-1)[size:] = 0.0
        self._values_RK = values
        self._names: list[str] = []
        self._calls: list[_Call] = []
        # The first child that is told of more than the hidden states: attention, most likely.
        self._first_told: str | None = None

    def run(self) -> _Trace:
        # A shallow copy with children of its own: the model itself is never changed.
        twin = copy.copy(self._block)
        twin.__dict__["_modules"] = {
            child: None if module is None else _Stub(self, child, module)
            for child, module in self._block._modules.items()
        }
        twin.__dict__["training"] = False
        hidden_BTD = self._mark(_INPUT)
        forward = type(self._block).forward
        # Position embeddings and the like go from argument to child; no child looks at them here.
        required = [
            p.name
            for p in list(inspect.signature(forward).parameters.values())[2:]
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        with torch.no_grad():
            output = forward(twin, hidden_BTD, **dict.fromkeys(required))
        output = output[0] if isinstance(output, tuple) else output
        return _Trace(tuple(self._calls), self._sum(output))

    def call(self, child: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        hidden: Any = (
            args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        )
        if isinstance(module, (nn.Dropout, nn.Identity)):
            return hidden
        shape = hidden.shape
        if child == self._edit_at:
            hidden += self._mark(_EDIT).view(shape)
        num_arguments = len(args) + len(kwargs)
        self._calls.append(
            _Call(child, self._sum(hidden), num_arguments, is_flat=shape != self._shape)
        )
        marked = self._mark(child).view(shape)
        if _is_norm(module):
            return marked
        if self._first_told is None and num_arguments > 1:
            self._first_told = child
        arity = self._arities[0 if child == self._first_told else 1]
        return marked if arity == 0 else (marked, *[None] * (arity - 1))

    def _mark(self, name: str) -> Tensor:
        """A tensor [B, T, D] that is nonzero where no other mark is."""
        index = len(self._names)
        if index == _NUM_MARKS:
            raise ValueError(f"its children are called more than {_NUM_MARKS - 1} times")
        self._names.append(name)
        marked_RK = torch.zeros_like(self._values_RK)
        marked_RK[:, index] = self._values_RK[:, index]
        return marked_RK.view(-1)[: math.prod(self._shape)].view(self._shape)

    def _sum(self, value: Any) -> _Sum | None:
        """The coefficients of a sum of marks; None if the value is something else."""
        size = math.prod(self._shape)
        if not isinstance(value, Tensor) or value.numel() != size or value.is_meta:
            return None
        found_RK = torch.zeros_like(self._values_RK)
        found_RK.view(-1)[:size] = value.detach().reshape(-1).to("cpu", torch.float64)
        factors_K = (found_RK * self._values_RK).sum(0) / self._values_RK.square().sum(0)
        # Columns without a mark must be zero.
        factors_K[len(self._names) :] = 0.0
        if not torch.allclose(found_RK, factors_K * self._values_RK, rtol=1e-6, atol=1e-6):
            return None
        found: dict[str, float] = {}
        for name, factor in zip(self._names, factors_K.tolist(), strict=False):
            if abs(factor) > 1e-6:
                # The digits of a factor as it stands in a configuration, not those of the quotient.
                found[name] = found.get(name, 0.0) + float(f"{factor:.12g}")
        return found


def _is_norm(module: nn.Module) -> bool:
    """Whether a child has no matrix: norms, activations and the like."""
    return all(parameter.ndim < 2 for parameter in module.parameters())


class _Stub:
    """Stands where a child was; whatever else a block asks of the child, the child answers."""

    def __init__(self, probe: _Probe, child: str, module: nn.Module) -> None:
        self._probe = probe
        self._child = child
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._probe.call(self._child, self._module, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _written(found: _Sum | None) -> str:
    if found is None:
        return "no sum of its children's outputs"
    terms = [n if c == 1.0 else f"{c:g} {n}" for n, c in found.items()]
    return f"resid_post = {' + '.join(terms) or '0'}"


def _unfound(message: str, block: nn.Module) -> InvalidInput:
    children = [f"{name} ({type(child).__name__})" for name, child in block.named_children()]
    return InvalidInput(
        f"{message}. Its children are {', '.join(children) or 'none'}. resid_pre and resid_post "
        "need none of this, and z only the attention output projection",
        kind="model_wiring",
    )
