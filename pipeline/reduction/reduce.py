"""Reduce: a finished cache becomes a direction and scores for every layer and every head.

At most three passes of Ray tasks over the rows, however many methods are asked for: Moments of the
training rows, kept in the store; fits of the methods that need rows, a layer a task; and scores, a
layer a task. Activations do not leave a task, but for pairs that lie in different shards.

Shapes: N samples, L layers, W width, H heads, S sites.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InvalidInput
from pipeline.ray_runtime import ray_session
from pipeline.reduction.directions import scaled_to, site_names, split_heads
from pipeline.reduction.fits import (
    Fit,
    Vectors,
    fit_layers,
    fit_moments,
    num_layer_tasks,
    shuffled_difference,
)
from pipeline.reduction.held_out import Columns
from pipeline.reduction.methods import OF_MOMENTS, OF_PAIRS, complete_parameters
from pipeline.reduction.moment_store import StoredMoments, num_count_tasks, training_moments
from pipeline.reduction.pairs import check_enough, check_pairs
from pipeline.reduction.results import Reduction, reduction_digest
from pipeline.reduction.samples import not_finite
from pipeline.reduction.scores import benjamini_hochberg, site_cosines
from pipeline.reduction.scoring import Scored, score
from pipeline.reduction.sources import (
    SPLITS,
    Source,
    TrainingRows,
    check_alike,
    kept_rows,
    parts_of,
)
from store.activations import ActivationCache
from store.layout import StreamLayout
from store.location import Location

log = logging.getLogger(__name__)

_CLASSES: Final = (("positive", True), ("negative", False))

Requests = Sequence[tuple[str, Mapping[str, int | float]]]
"""Methods and their parameters; those that are not given have their defaults."""


def reduce(
    cache: ActivationCache,
    root: Location,
    *,
    method: str,
    parameters: Mapping[str, int | float] | None = None,
    **options: Any,
) -> Reduction:
    """`reduce_all` of one method."""
    return reduce_all(cache, root, [(method, parameters or {})], **options)[0]


def reduce_all(
    cache: ActivationCache,
    root: Location,
    methods: Requests,
    *,
    num_workers: int,
    extends: Sequence[ActivationCache] = (),
    address: str | None = None,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reduction]:
    """Compute directions and scores of a complete cache, or find those computed before.

    Directions and sigma come from the rows of split ``train``; ``validation`` is there to choose
    with, ``test`` to report. HSI and ITI take direction and sigma over train and validation
    together (METHODS 1): ours leave validation out, so that a site's validation score is of rows
    that its direction has not seen.

    A sample is an entry of the cache's index. Those in quarantined rows are left out, with the
    others of their pairs; the result says how many.

    The methods:

    - ``difference_of_means`` keeps its length (CAA, HSI; METHODS 1 and 5).
    - ``paired_difference``: the mean of within-pair differences, as CAA takes it; it keeps its
      length, and is the difference of means where each row is in one pair.
    - ``pca``: the first principal component of within-pair differences, pair order shuffled, norm 1
      (RepE, Jailbreak Antidote; METHODS 3). + is the class whose row is the larger in more of the
      training pairs. Where the class means say otherwise, a few pairs outweigh the many: that
      majority stands, the site is among `Reduction.signs_in_doubt`, and `build_artifact` refuses
      it, so that + is never published as the class that it is not.
    - ``probe``: the weights of a logistic probe in activation space, norm 1 (ITI; METHODS 5).
      Accuracies are those of the probe, at logit 0; those of the other methods are at the midpoint
      of the training classes' means.
    - ``lda``: the difference of means whitened by the pooled covariance within the classes, norm 1.

    ``pca``, ``probe`` and ``lda`` are fitted on at most ``max_rows`` training samples, drawn as
    whole pairs. Every method is scored beside a random direction and one of shuffled labels.

    Args:
        root: The store that holds the cache and takes the results.
        methods: Names, and parameters as `methods.DEFAULT_PARAMETERS` has them.
        num_workers: Most Ray tasks at a time on a local Ray.
        extends: Caches of other prompts whose rows count too, as when a corpus was appended to.
            Their Moments are read from the store where they were counted before.
        address: A Ray cluster, or None for a local Ray.
        device: ``cuda``: covariances are computed on GPUs, one a task.
        on_progress: Called with tasks done and in all.

    Returns:
        In the order of the methods.

    Raises:
        NotFound: A cache is not complete.
        InvalidInput: An unknown method or parameter; a class has no training row; for ``pca`` and
            ``paired_difference``, a training row has no partner; for ``probe``, a site does not
            converge; the caches differ in more than their prompts, or one is named twice.
    """
    wanted = {name: complete_parameters(name, parameters) for name, parameters in methods}
    if len(wanted) < len(methods):
        raise InvalidInput(
            f"a method is named twice among {', '.join(name for name, _ in methods)}; reduce by "
            "one set of its parameters after the other",
            kind="method",
        )
    # In one order, as the order of rows decides the last bits.
    extends = sorted(extends, key=lambda one: one.digest)
    others = [other.digest for other in extends]
    if len({cache.digest, *others}) <= len(others):
        raise InvalidInput(
            f"cache {cache.digest[:12]}: reduce.extends names one capture twice, or this one "
            f"itself, and its rows would count twice: {', '.join(one[:12] for one in others)}; "
            "name each once, and leave out of `files` what it has",
            kind="sources_repeated",
        )
    rows_from = kept_rows(root, [cache, *extends])
    digests = {
        name: reduction_digest(cache.digest, name, parameters, others, rows_from)
        for name, parameters in wanted.items()
    }
    missing = {n: wanted[n] for n, digest in digests.items() if not Reduction.exists(root, digest)}
    if missing:
        sources = [Source.open(root, one) for one in (cache, *extends)]
        streams = check_alike(sources)
        _check_rows(sources, list(missing))
        with ray_session(address, num_workers, spare_cpus=0):
            _compute(root, sources, streams, missing, device, on_progress)
    return [Reduction.open(root, digest) for digest in digests.values()]


def _check_rows(sources: Sequence[Source], methods: Sequence[str]) -> None:
    where = sources[0].where
    for name, label in _CLASSES:
        if not any((s.chosen("train") & (s.samples.label_N == label)).any() for s in sources):
            raise InvalidInput(
                f"{where}: no {name} row in the training split; "
                "check the labels and the split shares of the run file",
                kind="class_empty",
            )
    for method in methods:
        if method in OF_PAIRS:
            num_pairs = 0
            for source in sources:
                pairs = source.pairs("train")
                check_pairs(pairs, source.samples.index, method=method, where=source.where)
                num_pairs += len(pairs)
            check_enough(num_pairs, method=method, where=where)
    apart = sum(source.pairs_apart for source in sources)
    if apart and "paired_difference" in methods:
        raise InvalidInput(
            f"{where}: of {apart:,} training pairs the sides were computed too far apart for "
            "--no-cache to compare them; use difference_of_means, which is the same where each row "
            "is in one pair, or run `steerage extract` without --no-cache",
            kind="pairs_apart",
        )


def _compute(
    root: Location,
    sources: Sequence[Source],
    streams: Mapping[str, StreamLayout],
    methods: Mapping[str, Mapping[str, int | float]],
    device: str,
    on_progress: Callable[[int, int], None],
) -> None:
    """Compute and store the reductions of some methods; Ray runs."""
    counting = [num_count_tasks(root, source.cache) for source in sources]
    reading = {name: parameters for name, parameters in methods.items() if name not in OF_MOMENTS}
    num_reads = len({parameters["max_rows"] for parameters in reading.values()}) + 1
    total = sum(counting) + num_reads * num_layer_tasks(streams)
    done_before = 0

    def on_done(done: int) -> None:
        on_progress(done_before + done, total)

    parts = []
    for source, num in zip(sources, counting, strict=True):
        parts.append(
            training_moments(
                source.cache, root, source.samples, source.pairs("train"), on_done=on_done
            )
        )
        done_before += num
    moments = parts[0]
    for part in parts[1:]:
        moments = moments.merge(part)
    fits: dict[str, Fit] = {
        name: fit_moments(moments, list(streams), name) for name in methods if name in OF_MOMENTS
    }
    # Those that are fitted on as many rows share a read; of one run file, all do.
    for most in sorted({int(parameters["max_rows"]) for parameters in reading.values()}):
        together = {name: one for name, one in reading.items() if one["max_rows"] == most}
        seed = int(together.get("pca", {}).get("pair_order_seed", 0))
        sizes = [int(source.chosen("train").sum()) for source in sources]
        rows = [
            TrainingRows.of(source, pair_order_seed=seed, max_rows=part)
            for source, part in zip(sources, parts_of(most, sizes), strict=True)
        ]
        fits |= fit_layers(root, streams, rows, together, device=device, on_done=on_done)
        done_before += num_layer_tasks(streams)
    for fit in fits.values():
        _check_finite(fit, streams)
    shuffled_LW = shuffled_difference(moments, list(streams))
    scored = score(root, streams, sources, fits, shuffled_LW, on_done=on_done)
    for name, fit in fits.items():
        _write(root, sources, streams, name, methods[name], fit, scored[name], moments, shuffled_LW)


def _write(
    root: Location,
    sources: Sequence[Source],
    streams: Mapping[str, StreamLayout],
    method: str,
    parameters: Mapping[str, int | float],
    fit: Fit,
    scored: Scored,
    moments: StoredMoments,
    shuffled_LW: Vectors,
) -> None:
    directions_LW = {
        stream: _turned(fit.directions_LW[stream], scored.sign_LH[stream], layout)
        for stream, layout in streams.items()
    }
    names = [str(site) for site in site_names(streams)]
    doubtful = np.concatenate([scored.in_doubt_LH[stream].reshape(-1) for stream in streams])
    counts = {
        f"{split}_{name}": sum(
            int((source.chosen(split) & (source.samples.label_N == label)).sum())
            for source in sources
        )
        for split in SPLITS
        for name, label in _CLASSES
    }
    if method in OF_MOMENTS:
        # Of kept rows there are fewer.
        stream = next(iter(streams))
        counts |= {
            f"train_{name}": moments.of(stream, label=label).count for name, label in _CLASSES
        }
    in_doubt = [names[site] for site in np.flatnonzero(doubtful)]
    if in_doubt:
        log.warning("pca signs in doubt", extra={"sites": in_doubt, "num_sites": len(names)})
    Reduction.write(
        root,
        cache=sources[0].cache,
        method=method,
        parameters=parameters,
        directions_LW=directions_LW,
        shuffled_LW={
            stream: scaled_to(shuffled_LW[stream], directions_LW[stream], layout)
            for stream, layout in streams.items()
        },
        scores=_score_table(streams, method, fit, scored, directions_LW),
        counts=counts,
        signs_in_doubt=in_doubt,
        left_out=sum(source.left_out for source in sources),
        extends=[source.cache.digest for source in sources[1:]],
        rows_from={
            source.cache.digest: source.rows.digest
            for source in sources
            if source.rows is not source.cache
        },
    )


def _check_finite(fit: Fit, streams: Mapping[str, StreamLayout]) -> None:
    for stream, vectors_LW in fit.directions_LW.items():
        finite_L = np.isfinite(vectors_LW).all(axis=1)
        if not finite_L.all():
            raise not_finite(
                f"the direction at {stream}.{streams[stream].layers[int(np.argmin(finite_L))]}"
            )


def _turned(
    vectors_LW: NDArray[np.float32], sign_LH: NDArray[np.float32], layout: StreamLayout
) -> NDArray[np.float32]:
    return (split_heads(vectors_LW, layout) * sign_LH[:, :, None]).reshape(vectors_LW.shape)


def _score_table(
    streams: Mapping[str, StreamLayout],
    method: str,
    fit: Fit,
    scored: Scored,
    directions_LW: Vectors,
) -> pa.Table:
    """One row a site; see `Reduction.scores`."""
    tables = []
    names = [str(site) for site in site_names(streams)]
    for stream, layout in streams.items():
        heads_LHD = split_heads(directions_LW[stream], layout)
        first, second = fit.halves_LW
        cosines = site_cosines(first[stream], second[stream], layout)
        columns: Columns = {
            "norm": np.linalg.norm(heads_LHD, axis=-1).reshape(-1).astype(np.float64),
            **scored.columns[stream],
            "q_test": benjamini_hochberg(scored.columns[stream]["p_test"]),
            # Components of the halves have no sign.
            "split_half_cosine": np.abs(cosines) if method == "pca" else cosines,
        }
        here, names = names[: len(columns["norm"])], names[len(columns["norm"]) :]
        tables.append(
            pa.table({"site": here} | {name: list(values) for name, values in columns.items()})
        )
    return pa.concat_tables(tables)
