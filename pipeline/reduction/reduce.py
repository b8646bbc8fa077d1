"""Reduce: a finished cache becomes a direction and scores for every layer and every head.

Two passes of Ray tasks over the cache. The first fits directions on the training rows; the second
projects every row on them, which is what sigma and the held-out scores need. Activations do not
leave a task, but for pairs that lie in different shards.

Shapes: N samples, P pairs, L layers, W width, H heads, D width of a site, S sites.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InvalidInput, NotFound
from pipeline.ray_runtime import ray_session
from pipeline.reduction.components import OrderedPairs, sign_by_pairs
from pipeline.reduction.directions import site_names, split_heads
from pipeline.reduction.fits import (
    Fit,
    TrainingCounts,
    fit_all_probes,
    fit_components,
    fit_means,
    num_tasks,
)
from pipeline.reduction.methods import complete_parameters
from pipeline.reduction.pairs import Pairs, check_pairs, find_pairs, pair_order
from pipeline.reduction.passes import shard_groups
from pipeline.reduction.projections import Projections, project
from pipeline.reduction.results import Reduction, reduction_digest
from pipeline.reduction.samples import read_samples
from pipeline.reduction.scores import accuracy, auroc, cohens_d, pair_accuracy
from store.activations import ActivationCache
from store.location import Location

log = logging.getLogger(__name__)


def reduce(
    cache: ActivationCache,
    root: Location,
    *,
    method: str,
    parameters: Mapping[str, int | float] | None = None,
    num_workers: int,
    address: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reduction:
    """Compute directions and scores of a complete cache, or find those computed before.

    Directions and sigma come from the rows of split ``train``; ``validation`` is there to choose
    with, ``test`` to report. HSI and ITI take direction and sigma over train and validation
    together (METHODS 1): ours leave validation out, so that a site's validation score is of rows
    that its direction has not seen.

    A sample is an entry of the cache's index. Those in quarantined rows are left out, with the
    others of their pairs; the result says how many.

    The methods:

    - ``difference_of_means`` keeps its length (CAA, HSI; METHODS 1 and 5).
    - ``pca``: the first principal component of within-pair differences, pair order shuffled, norm 1
      (RepE, Jailbreak Antidote; METHODS 3). + is the class whose row is the larger in more of the
      training pairs. Where the class means say otherwise, a few pairs outweigh the many: that
      majority stands, the site is among `Reduction.signs_in_doubt`, and `build_artifact` refuses
      it, so that + is never published as the class that it is not.
    - ``probe``: the weights of a logistic probe in activation space, norm 1 (ITI; METHODS 5).
      Accuracies are those of the probe, at logit 0; those of the other methods are at the midpoint
      of the training classes' means.

    Args:
        root: The store that holds the cache and takes the result.
        method: One of the above.
        parameters: The method's, see `methods.DEFAULT_PARAMETERS`.
        num_workers: Most Ray tasks at a time on a local Ray.
        address: A Ray cluster, or None for a local Ray.
        on_progress: Called with tasks done and in all.

    Raises:
        NotFound: The cache is not complete.
        InvalidInput: An unknown method or parameter; a class has no training row; for ``pca``, a
            training row has no partner; for ``probe``, a site does not converge.
    """
    parameters = complete_parameters(method, parameters)
    digest = reduction_digest(cache.digest, method, parameters)
    if Reduction.exists(root, digest):
        return Reduction.open(root, digest)
    if not cache.is_complete:
        raise NotFound(
            f"cache {cache.digest[:12]} lacks {len(cache.missing())} of {cache.num_shards} shards; "
            "run `steerage extract` on the same run file first",
            kind="cache_incomplete",
        )
    samples = read_samples(cache)
    index, label_N, split_N = samples.index, samples.label_N, samples.split_N
    train_N = split_N == "train"
    for name, num in (
        ("positive", (train_N & label_N).sum()),
        ("negative", (train_N & ~label_N).sum()),
    ):
        if num == 0:
            raise InvalidInput(
                f"cache {cache.digest[:12]}: no {name} row in the training split; "
                "check the labels and the split shares of the run file",
                kind="class_empty",
            )
    pairs = find_pairs(index, train_N)
    if method == "pca":
        check_pairs(pairs, index, method=method, where=f"cache {cache.digest[:12]}")
    counts = TrainingCounts(samples.counts(train_N & label_N), samples.counts(train_N & ~label_N))
    num_fits = num_tasks(cache, method)
    total = num_fits + len(shard_groups(cache.num_shards))
    with ray_session(address, num_workers):

        def on_fit(done: int) -> None:
            on_progress(done, total)

        match method:
            case "pca":
                signs_P = pair_order(pairs.names, int(parameters["pair_order_seed"]))
                ordered = OrderedPairs(
                    samples.row_N[pairs.positive_P], samples.row_N[pairs.negative_P], signs_P
                )
                fit = fit_components(cache, root, ordered, on_fit)
            case "probe":
                fit = fit_all_probes(
                    cache, root, counts, l2=float(parameters["l2"]), on_done=on_fit
                )
            case _:
                fit = fit_means(cache, root, counts, on_fit)
        _check_finite(cache, fit)
        projections = project(
            cache, root, fit.directions_LW, lambda done: on_progress(num_fits + done, total)
        ).of(samples)
        if not np.isfinite(projections.norms_NS).all():
            # Of validation or test: they would count as answers of one class.
            raise _not_finite(cache, "a row's projection")
    in_doubt: list[str] = []
    if method == "pca":
        fit, projections, in_doubt = _oriented(cache, fit, projections, pairs)
    return Reduction.write(
        root,
        cache=cache,
        method=method,
        parameters=parameters,
        directions_LW=fit.directions_LW,
        scores=_score_table(cache, fit, projections, index, label_N, split_N),
        counts={
            f"{split}_{name}": int(((split_N == split) & (label_N == label)).sum())
            for split in ("train", "validation", "test")
            for name, label in (("positive", True), ("negative", False))
        },
        signs_in_doubt=in_doubt,
        left_out=samples.left_out,
    )


def _check_finite(cache: ActivationCache, fit: Fit) -> None:
    for stream, vectors_LW in fit.directions_LW.items():
        finite_L = np.isfinite(vectors_LW).all(axis=1)
        if not finite_L.all():
            layer = cache.streams[stream].layers[int(np.argmin(finite_L))]
            raise _not_finite(cache, f"the direction at {stream}.{layer}")


def _not_finite(cache: ActivationCache, what: str) -> InvalidInput:
    return InvalidInput(
        f"cache {cache.digest[:12]}: {what} is not finite, so rows that are not in quarantine hold "
        "NaN or infinity; run `steerage verify`, which finds a quarantine that was lost",
        kind="not_finite",
    )


def _oriented(
    cache: ActivationCache,
    fit: Fit,
    projections: Projections,
    pairs: Pairs,
) -> tuple[Fit, Projections, list[str]]:
    """Turn directions and projections so that + is the positive class of most training pairs.

    An eigenvector has no sign of its own. Reading it from the projections saves a pass over the
    cache.

    Returns:
        Both, and the sites at which the means of these pairs' rows say the opposite.
    """
    values_NS = projections.values_NS
    positive_PS, negative_PS = values_NS[pairs.positive_P], values_NS[pairs.negative_P]
    sign_S = sign_by_pairs(positive_PS, negative_PS)
    gap_S = sign_S * (positive_PS.astype(np.float64) - negative_PS).mean(axis=0)
    names = [str(site) for site in site_names(cache.streams)]
    in_doubt = [names[site] for site in np.flatnonzero(gap_S < 0)]
    if in_doubt:
        log.warning("pca signs in doubt", extra={"sites": in_doubt, "num_sites": len(names)})
    oriented: dict[str, NDArray[np.float32]] = {}
    rest_S = sign_S
    for stream, layout in cache.streams.items():
        heads_LHD = split_heads(fit.directions_LW[stream], layout)
        num_sites = heads_LHD.shape[0] * heads_LHD.shape[1]
        sign_LH1 = rest_S[:num_sites].reshape(*heads_LHD.shape[:2], 1)
        rest_S = rest_S[num_sites:]
        oriented[stream] = (heads_LHD * sign_LH1).reshape(fit.directions_LW[stream].shape)
    turned = Projections(values_NS * sign_S, projections.norms_NS)
    return Fit(oriented, fit.threshold_S), turned, in_doubt


def _score_table(
    cache: ActivationCache,
    fit: Fit,
    projections: Projections,
    index: pa.Table,
    label_N: NDArray[np.bool_],
    split_N: NDArray[Any],
) -> pa.Table:
    """One row a site: norms and sigma of the training rows, scores of the others."""
    values_NS, norms_NS = projections.values_NS, projections.norms_NS
    train_N = split_N == "train"
    threshold_S = fit.threshold_S
    if threshold_S is None:
        threshold_S = (
            values_NS[train_N & label_N].mean(axis=0, dtype=np.float64)
            + values_NS[train_N & ~label_N].mean(axis=0, dtype=np.float64)
        ) / 2
    columns: dict[str, Any] = {
        "site": [str(site) for site in site_names(cache.streams)],
        "norm": np.concatenate(
            [
                np.linalg.norm(split_heads(fit.directions_LW[stream], layout), axis=-1).reshape(-1)
                for stream, layout in cache.streams.items()
            ]
        ).astype(np.float64),
        "sigma": values_NS[train_N].std(axis=0, dtype=np.float64),
        "activation_norm": norms_NS[train_N].mean(axis=0, dtype=np.float64),
    }
    for split in ("validation", "test"):
        chosen_N = split_N == split
        held_NS, held_label_N = values_NS[chosen_N], label_N[chosen_N]
        pairs = find_pairs(index, chosen_N)
        columns[f"auroc_{split}"] = auroc(held_NS, held_label_N)
        columns[f"accuracy_{split}"] = accuracy(held_NS, held_label_N, threshold_S)
        columns[f"cohens_d_{split}"] = cohens_d(held_NS, held_label_N)
        columns[f"pair_accuracy_{split}"] = pair_accuracy(
            values_NS[pairs.positive_P], values_NS[pairs.negative_P]
        )
    return pa.table(columns)
