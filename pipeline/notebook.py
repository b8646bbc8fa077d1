"""The Python API for notebooks: open a cache, fit, look, apply.

    run = extract("examples/refusal.toml")       # open_run and open_cache compute nothing
    found = fit(run, "difference_of_means")      # a notebook shows its best layers and heads
    direction = found.direction(found.best(heads=False))
    model, tokenizer = load_model(run)
    with steer(model, direction, strength=0.4):
        model.generate(...)

Every step finds what was computed before, by this API or by the commands. A local Ray is started
where one is needed, and ends with the step. Directions can be added, scaled, composed, made
orthogonal to others, saved and loaded (`steering_service.core.direction`); `measure` says what a
direction made in that way does.

Shapes: A array rows of a cache, N samples, D width of a site.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc
from torch import nn

from pipeline.config import RunFile, load_run_file
from pipeline.errors import InvalidInput, NotFound
from pipeline.extraction import models, workers
from pipeline.prompts.plan import Plan, plan
from pipeline.ray_runtime import Pool, check_device
from pipeline.reduction.held_out import HELD_OUT, HeldOut, ProjectedSplit
from pipeline.reduction.kept import find_kept
from pipeline.reduction.methods import Method, complete_parameters
from pipeline.reduction.reduce import reduce
from pipeline.reduction.results import Reduction
from pipeline.reduction.samples import not_finite
from pipeline.reduction.sources import Source
from steering_service.adapters.transformers import Steering, steered
from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.intervention import Intervention, Operation, Positions, StrengthUnit
from store.activations import ActivationCache
from store.bfloat16 import to_float32
from store.location import Location

__all__ = [
    "OpenCache",
    "extract",
    "fit",
    "load_model",
    "measure",
    "open_cache",
    "open_run",
    "steer",
]

DEFAULT_STORE: Final = "steerage-store"


@dataclass(frozen=True, slots=True, eq=False)
class OpenCache:
    """An activation cache, and where it lies.

    Attributes:
        cache: The activations.
        root: The store, which takes what is fitted.
        run: The run file that it was opened by, or None.
    """

    cache: ActivationCache
    root: Location
    run: RunFile | None = None

    def __repr__(self) -> str:
        streams = ", ".join(
            f"{name} [{', '.join(map(str, layout.shape))}]"
            for name, layout in self.cache.streams.items()
        )
        model = self.cache.capture.get("model", {}).get("name", "an unknown model")
        state = "" if self.cache.is_complete else f", {len(self.cache.missing())} shards missing"
        return (
            f"<cache {self.cache.digest[:12]} of {model}: {streams}; {self._samples()}{state}, in "
            f"{self.root.url}>"
        )

    def _samples(self) -> str:
        index = self.cache.index()
        counts = index.group_by("split").aggregate([("label", "count")]).to_pydict()
        found = sorted(zip(counts["split"], counts["label_count"], strict=True))
        positive = pc.sum(index["label"]).as_py() or 0
        splits = ", ".join(f"{split} {count}" for split, count in found)
        return f"{len(index)} samples ({positive} positive; {splits})"


def open_cache(store: str = DEFAULT_STORE, digest: str = "") -> OpenCache:
    """Open a cache by its digest.

    Args:
        store: A directory, or s3://bucket/prefix, gs://…, az://….
        digest: Of the capture, or how it begins; nothing, where the store has one cache only.

    Raises:
        NotFound: kind "cache", no cache of the store begins so.
        InvalidInput: kind "cache_ambiguous", several do.
    """
    root = Location.open(store)
    known = ActivationCache.list_digests(root)
    found = [name for name in known if name.startswith(digest)]
    if not found:
        raise NotFound(
            f"no cache in {root.url} has a digest that begins with {digest!r}; it has "
            f"{', '.join(name[:12] for name in known) or 'none'}; `steerage extract` makes one",
            kind="cache",
        )
    if len(found) > 1:
        raise InvalidInput(
            f"{len(found)} caches in {root.url} have a digest that begins with {digest!r}: "
            f"{', '.join(name[:12] for name in found)}; give more of it, or open a run file",
            kind="cache_ambiguous",
        )
    return OpenCache(ActivationCache.open(root, found[0]), root)


def open_run(run_file: str | Path, store: str = DEFAULT_STORE) -> OpenCache:
    """Open the cache of a run file; reads and tokenises its prompts, and runs no model.

    Raises:
        NotFound: kind "cache_incomplete", it has not been extracted.
        InvalidInput: The run file or its prompts cannot be used.
    """
    opened, _ = _planned(run_file, store)
    if not opened.cache.is_complete and find_kept(opened.root, opened.cache.digest) is None:
        raise NotFound(
            f"cache {opened.cache.digest[:12]} of {run_file} lacks {len(opened.cache.missing())} "
            f"of {opened.cache.num_shards} shards in {opened.root.url}; call extract instead, or "
            "run `steerage extract`",
            kind="cache_incomplete",
        )
    return opened


def extract(
    run_file: str | Path,
    store: str = DEFAULT_STORE,
    *,
    num_workers: int | None = None,
    device: str = "cpu",
    address: str | None = None,
) -> OpenCache:
    """Open the cache of a run file, and compute first what is missing of it.

    Args:
        run_file: What is computed; see `examples/refusal.toml`.
        store: See `open_cache`.
        num_workers: Most worker processes at a time; None: one a CPU.
        device: ``cpu`` or ``cuda``.
        address: A Ray cluster; None: a local Ray.

    Raises:
        InvalidInput: The run file or its prompts cannot be used.
        GateRefused: The activations are not those of the plain model.
    """
    opened, planned = _planned(run_file, store)
    pool = Pool(num_workers or _num_cpus())
    workers.extract(planned, opened.root, pool=pool, device=device, address=address)
    return opened


def _planned(run_file: str | Path, store: str) -> tuple[OpenCache, Plan]:
    run, root = load_run_file(Path(run_file)), Location.open(store)
    planned = plan(run, root)
    return OpenCache(planned.cache, root, run), planned


def _num_cpus() -> int:
    return max(1, os.cpu_count() or 1)


def load_model(opened: OpenCache, device: str = "cpu") -> tuple[nn.Module, Any]:
    """The model of a run file and its tokenizer, to generate with.

    Raises:
        InvalidInput: kind "run_missing", the cache was opened by its digest, which says what the
            model is, but not where.
    """
    if opened.run is None:
        raise InvalidInput(
            f"cache {opened.cache.digest[:12]} was opened by its digest, which does not say where "
            "its model lies; use open_run, or load the model yourself",
            kind="run_missing",
        )
    path, dtype = opened.run.model.path, opened.cache.capture["model"]["dtype"]
    return models.load_model(path, dtype, device), models.load_tokenizer(path)


def fit(
    opened: OpenCache,
    method: Method = "difference_of_means",
    *,
    num_workers: int | None = None,
    device: str = "cpu",
    address: str | None = None,
    **parameters: float,
) -> Reduction:
    """Directions and held-out scores of every layer and head, computed or found in the store.

    Where the cache was opened by a run file, its [reduce] counts, as in `steerage reduce`: it gives
    the parameters that are not named here, and the prompts of `extends` are taken in.

    Args:
        opened: A cache.
        method: See `pipeline.reduction.reduce.reduce_all`.
        num_workers: Most Ray tasks at a time; None: one a CPU.
        device: ``cpu`` or ``cuda``.
        address: A Ray cluster; None: a local Ray, which ends with the call.
        parameters: The method's, such as ``l2=0.1`` for ``probe``; else those of the run file, or
            the defaults.

    Raises:
        NotFound: The cache, or one that the run file extends, is not complete.
        InvalidInput: An unknown method or parameter, rows that do not suffice, or a run file under
            reduce.extends that cannot be used.
    """
    check_device(device, address)
    complete_parameters(method, parameters)
    extends: list[ActivationCache] = []
    if opened.run is not None:
        section = opened.run.reduce
        parameters = {**section.parameters(method), **parameters}
        extends = [plan(load_run_file(file), opened.root).cache for file in section.extends]
    return reduce(
        opened.cache,
        opened.root,
        method=method,
        parameters=parameters,
        extends=extends,
        num_workers=num_workers or _num_cpus(),
        device=device,
        address=address,
    )


def measure(opened: OpenCache, direction: Direction) -> Direction:
    """The direction with sigma, activation norm and held-out scores of a cache.

    For directions that were made of others, loaded, or fitted on other prompts. Sigma and norm are
    of the training rows, as `fit` has them where nothing is extended; scores are of the validation
    and the test rows. Reads the direction's layer only.

    Raises:
        NotFound: The cache is not complete, or has no such stream or layer.
        InvalidInput: Another width than the site's, a head that the model does not have, or no
            training row of a class.
    """
    source = Source.open(opened.root, opened.cache)
    value_A, norm_A = _projections(source.rows, direction)
    samples, train_N = source.samples, source.chosen("train")
    value_N, norm_N = value_A[samples.row_N], norm_A[samples.row_N]
    if not np.isfinite(value_N).all():
        raise not_finite(f"{source.where}: a row's projection at {direction.site}")
    sides = [value_N[train_N & (samples.label_N == label)] for label in (False, True)]
    if not all(map(len, sides)):
        raise InvalidInput(
            f"{source.where}: the training split has {len(sides[1])} positive and {len(sides[0])} "
            "negative rows, and a direction is measured on both",
            kind="class_empty",
        )
    threshold_H = np.array([np.mean([side.mean() for side in sides])])
    scores: dict[str, float] = {}
    for split in HELD_OUT:
        held = HeldOut.of(source, split)
        values_NHK = value_A[held.row_N][:, None, None].astype(np.float32)
        projected = ProjectedSplit.of([held], [values_NHK])
        columns = projected.scores(split, values_NHK[:, :, 0], threshold_H)
        if split == "test":
            columns |= projected.tests(values_NHK[:, :, 0])
        scores |= {name: float(value_H[0]) for name, value_H in columns.items()}
    measured = replace(
        direction,
        sigma=float(value_N[train_N].std()),
        activation_norm=float(norm_N[train_N].mean()),
        scores={name: value for name, value in scores.items() if np.isfinite(value)},
    )
    return measured.derived_from([direction], "measure", capture=opened.cache.digest)


def _projections(cache: ActivationCache, direction: Direction) -> tuple[Any, Any]:
    """Float64 [A] of every array row: its projection on the unit direction, and its norm."""
    site = direction.site
    layout = cache.layout(site.stream)
    start, stop = 0, layout.width
    if site.head is not None:
        if site.head >= (layout.num_heads or 0):
            raise InvalidInput(
                f"cache {cache.digest[:12]} has heads 0 to {(layout.num_heads or 0) - 1} at "
                f"{site.stream}.{site.layer}, asked for {site}",
                kind="site",
            )
        width = layout.width // (layout.num_heads or 1)
        start, stop = site.head * width, (site.head + 1) * width
    values, norms = [], []
    for _, _, values_RW in cache.scan(site.stream, [site.layer]):
        h_RD = to_float32(values_RW)[:, start:stop]
        values.append(direction.project(h_RD).astype(np.float64))
        norms.append(np.linalg.norm(h_RD, axis=-1).astype(np.float64))
    return np.concatenate(values), np.concatenate(norms)


@contextmanager
def steer(
    model: nn.Module,
    directions: Direction | Sequence[Direction],
    strength: float = 1.0,
    *,
    positions: Positions = "generated",
    unit: StrengthUnit = "direction",
    operation: Operation = "add",
) -> Iterator[Steering]:
    """Steer a model until the block ends, with directions that were never published.

    The edit is that of a node, without its checks: no signature, no fingerprint, and no limit but
    the strength given here.

    Args:
        model: A transformers causal language model, or its decoder body.
        directions: One, or several of different sites.
        strength: How many of `unit` are added; of ``project_out``, 1 removes the component.
        positions: See `Intervention`.
        unit: ``direction``: the vector as it is; ``unit``: at length 1; ``sigma``: one standard
            deviation of the activations along it.
        operation: ``add`` or ``project_out``.

    Yields:
        The `Steering`, through which a scoring pass names its prompt lengths.

    Raises:
        InvalidInput: A site that the model does not have, another width, two directions of one
            site (add them first), or the unit ``sigma`` where it was not measured.
    """
    several = [directions] if isinstance(directions, Direction) else list(directions)
    interventions = [Intervention(item, operation, unit, positions) for item in several]
    limit = abs(float(strength))
    artifact = build(
        [replace(item, direction=_with_sigma(item.direction)) for item in interventions],
        name="notebook",
        model=ModelReference(name="notebook", fingerprint="0" * 64),
        policy=Policy(min_strength=-limit, max_strength=limit),
    )
    with steered(model, artifact, strength) as steering:
        yield steering


def _with_sigma(direction: Direction) -> Direction:
    # An artifact has to say a sigma. This one is never published, and the units that are left where
    # it was not measured do not use it.
    return direction if direction.sigma is not None else replace(direction, sigma=0.0)
