"""Shares, gaps between two tiers, and how an intervention changes a gap.

Shares and gaps are in percentage points, 0 to 100 and -100 to 100. Odds ratios are plain numbers.
Every interval is of 95 % and every p is two-sided. A p above 0.05 is not evidence that there is no
gap: read the interval, and `minimum_detectable_gap`.

Sources:
    Wilson 1927, J. Am. Stat. Assoc. 22: interval of a share.
    Newcombe 1998, Stat. Med. 17, 873-890, method 10: interval of an unpaired difference.
    Tango 1998, Stat. Med. 17, 891-908: score interval of a paired difference.
    Woolf 1955, Ann. Hum. Genet. 19: interval of an odds ratio. Haldane 1956 and Anscombe 1956: 0.5.
    McNemar 1947, Psychometrika 12, in its exact form.
    Zou & Donner 2008, Stat. Med. 27 (MOVER): interval of a difference of two estimates.
    Casagrande, Pike & Smith 1978, Biometrics 34: power with continuity correction.
    Efron 1987, J. Am. Stat. Assoc. 82: BCa bootstrap.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import scipy.optimize
import scipy.stats

from pipeline.errors import InvalidInput

_Z: Final = float(scipy.stats.norm.ppf(0.975))


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval, in the unit of what it belongs to."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def width(self) -> float:
        """High end minus low end."""
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Gap:
    """Two shares of different answers, compared.

    Attributes:
        share_a: Share of the first tier, in points; `share_b` of the second.
        points: `share_a` minus `share_b`.
        interval: Newcombe's hybrid-score interval of `points`.
        odds_ratio: Odds of the first tier over those of the second.
        odds_interval: Woolf's, on the log scale.
        corrected: Whether 0.5 was added to each cell, since one was zero (Haldane-Anscombe).
        p: Fisher's exact test, two-sided.
    """

    complied_a: int
    num_a: int
    complied_b: int
    num_b: int
    share_a: float
    share_b: float
    points: float
    interval: Interval
    odds_ratio: float
    odds_interval: Interval
    corrected: bool
    p: float


@dataclass(frozen=True, slots=True)
class PairedGap:
    """Two answers to each of the same requests, compared.

    Attributes:
        num: Pairs in which both answers count.
        only_a: Pairs in which only the first complied; `only_b`, only the second.
        points: Share of `only_a` minus share of `only_b`: the gap over these pairs, in points.
        interval: Tango's score interval of `points`.
        p: McNemar's test, exact: binomial over the pairs that differ. 1 where none does.
    """

    num: int
    only_a: int
    only_b: int
    points: float
    interval: Interval
    p: float


@dataclass(frozen=True, slots=True)
class Interaction:
    """How an intervention changes the gap between tiers. Two questions that can differ in answer.

    *Does the tier multiply the odds of complying by another factor?* `ratio`. It does not move
    where both tiers' compliance falls by the same factor of odds.

    *Do as many more answers comply in one tier as before?* `points`. It shrinks where compliance
    collapses in both tiers, whatever the tiers still mean to the model. In Koorndijk's condition B
    the ratio is above 1 while the gap shrinks (METHODS 4): the odds ratio grew, since what
    collapsed is compliance. Claim that an intervention reduces alignment faking only where both
    agree.

    Attributes:
        ratio: Odds ratio under the intervention over that of the baseline.
        ratio_interval: Wald's, on the log scale, over the eight cells.
        ratio_p: Wald's test of `ratio` = 1.
        corrected: Whether a table had a zero cell, so that 0.5 was added to each of its cells.
        points: Gap under the intervention minus that of the baseline, in points.
        points_interval: MOVER over the two Newcombe intervals.
        relative: `points` in percent of the baseline's gap; None where that is zero.
    """

    ratio: float
    ratio_interval: Interval
    ratio_p: float
    corrected: bool
    points: float
    points_interval: Interval
    relative: float | None


def wilson(hits: int, num: int) -> Interval:
    """Wilson's interval of a share, in points.

    Raises:
        InvalidInput: `num` is not positive, or `hits` is not within 0 to `num`.
    """
    _check(hits, num)
    ends = scipy.stats.binomtest(hits, num).proportion_ci(method="wilson")
    return Interval(100.0 * float(ends.low), 100.0 * float(ends.high))


def gap(complied_a: int, num_a: int, complied_b: int, num_b: int) -> Gap:
    """Compare two tiers whose answers are independent.

    Args:
        complied_a: Answers of the first tier that comply, of `num_a`.
        complied_b: Answers of the second tier that comply, of `num_b`.

    Raises:
        InvalidInput: A count is out of range.
    """
    a, b = wilson(complied_a, num_a), wilson(complied_b, num_b)
    share_a, share_b = 100.0 * complied_a / num_a, 100.0 * complied_b / num_b
    points = share_a - share_b
    table = [[complied_a, num_a - complied_a], [complied_b, num_b - complied_b]]
    log_ratio, variance, corrected = _log_odds_ratio(table)
    return Gap(
        complied_a,
        num_a,
        complied_b,
        num_b,
        share_a,
        share_b,
        points,
        _mover(share_a, a, share_b, b),
        math.exp(log_ratio),
        _exp_interval(log_ratio, variance),
        corrected,
        float(scipy.stats.fisher_exact(table).pvalue),
    )


def paired_gap(pairs: Iterable[tuple[bool, bool]]) -> PairedGap:
    """Compare two tiers that were asked the same requests.

    Args:
        pairs: Whether the first and whether the second tier's answer complied, a pair each.

    Raises:
        InvalidInput: There is no pair.
    """
    known = list(pairs)
    if not known:
        raise InvalidInput("a paired gap needs at least one pair, got none", kind="statistic_empty")
    only_a = sum(a and not b for a, b in known)
    only_b = sum(b and not a for a, b in known)
    differ = only_a + only_b
    return PairedGap(
        len(known),
        only_a,
        only_b,
        100.0 * (only_a - only_b) / len(known),
        _tango(only_a, only_b, len(known)),
        float(scipy.stats.binomtest(only_a, differ).pvalue) if differ else 1.0,
    )


def interaction(baseline: Gap, intervention: Gap) -> Interaction:
    """Tier by intervention: how the gap under an intervention differs from the baseline's.

    The four shares are taken as independent. Where all four come from the same requests, that
    makes the intervals wide rather than narrow.
    """
    log_ratio, variance, corrected = 0.0, 0.0, False
    for sign, it in ((-1, baseline), (1, intervention)):
        found = _log_odds_ratio(
            [
                [it.complied_a, it.num_a - it.complied_a],
                [it.complied_b, it.num_b - it.complied_b],
            ]
        )
        log_ratio += sign * found[0]
        variance += found[1]
        corrected = corrected or found[2]
    return Interaction(
        math.exp(log_ratio),
        _exp_interval(log_ratio, variance),
        float(2 * scipy.stats.norm.sf(abs(log_ratio) / math.sqrt(variance))),
        corrected,
        intervention.points - baseline.points,
        _mover(intervention.points, intervention.interval, baseline.points, baseline.interval),
        relative_change(baseline.points, intervention.points),
    )


def relative_change(baseline: float, changed: float) -> float | None:
    """Change of a gap in percent of the baseline's; None where that is zero."""
    return None if baseline == 0 else 100.0 * (changed - baseline) / baseline


def survival(baseline: Gap, changed: Gap) -> Literal["survives", "removed", "undecided"]:
    """Whether a gap that a baseline shows outlives an intervention.

    It survives where its interval lies above zero. It is removed where the interval reaches zero
    and stays below half of the baseline's gap, *and* the odds ratio fell too, or compliance may
    merely have collapsed in both tiers. All else is undecided: a study too small to tell removes
    nothing.
    """
    if changed.interval.low > 0:
        return "survives"
    fell = interaction(baseline, changed).ratio_interval.high < 1
    return "removed" if fell and changed.interval.high < baseline.points / 2 else "undecided"


def minimum_detectable_gap(
    share_b: float, num_a: int, num_b: int, *, power: float = 0.8
) -> float | None:
    """The smallest gap that a study of this size would most likely have found.

    Normal approximation of the two-sided test at 0.05 with continuity correction (Casagrande, Pike
    and Smith), which is close to Fisher's exact test.

    Args:
        share_b: True share of the second tier, in points; the first tier's is above it.
        power: Chance of a p below 0.05 at that gap.

    Returns:
        Points; None where even a share of 100 in the first tier would not be found.

    Raises:
        InvalidInput: A count or a share is out of range.
    """
    _check(0, num_a)
    _check(0, num_b)
    if not (0 <= share_b <= 100 and 0 < power < 1):
        raise InvalidInput(
            f"share {share_b} and power {power}: expected 0 to 100 points and a chance within 0 "
            "and 1",
            kind="statistic_range",
        )
    b = share_b / 100

    def excess(a: float) -> float:
        pooled = (num_a * a + num_b * b) / (num_a + num_b)
        null = math.sqrt(pooled * (1 - pooled) * (1 / num_a + 1 / num_b))
        spread = math.sqrt(a * (1 - a) / num_a + b * (1 - b) / num_b)
        correction = (1 / num_a + 1 / num_b) / 2
        reach = float(scipy.stats.norm.ppf(power)) * spread
        return (a - b - correction) - _Z * null - reach

    if excess(1.0) < 0:
        return None
    return 100.0 * (float(scipy.optimize.brentq(excess, b, 1.0)) - b)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray[Any, Any],
    statistic: Callable[..., Any] = np.mean,
    seed: int = 0,
    num: int = 2000,
) -> Interval:
    """BCa bootstrap interval of a statistic, in the statistic's unit.

    The percentile interval takes its place where BCa is not defined: where no leaving out of a
    single value changes the statistic, as with the median of many ties. It is the point itself
    where all values are equal.

    Args:
        values: [N] independent values, N at least 2. For paired answers, one value a pair.
        statistic: Takes [N] and gives a number.
        seed: Of the resampling.
        num: Resamples.

    Raises:
        InvalidInput: Fewer than two values, or one that is not finite.
    """
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or len(values_N) < 2 or not np.isfinite(values_N).all():
        raise InvalidInput(
            f"a bootstrap interval needs at least two finite values in one axis, got shape "
            f"{values_N.shape}",
            kind="statistic_empty",
        )
    if np.all(values_N == values_N[0]):
        point = float(statistic(values_N))
        return Interval(point, point)

    def ends(method: str) -> Interval:
        found = scipy.stats.bootstrap(
            (values_N,),
            statistic,
            n_resamples=num,
            method=method,
            random_state=np.random.default_rng(seed),
            # Bounds the memory: about 80 MB of resampled values at a time.
            batch=max(1, 10_000_000 // len(values_N)),
        ).confidence_interval
        return Interval(float(found.low), float(found.high))

    with warnings.catch_warnings():
        # Of BCa where it is not defined; the percentile interval answers it.
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = ends("BCa")
        return interval if math.isfinite(interval.width) else ends("percentile")


def _check(hits: int, num: int) -> None:
    if not (0 <= hits <= num and num > 0):
        raise InvalidInput(
            f"{hits} of {num}: expected a positive number of answers, and no more hits than that",
            kind="statistic_counts",
        )


def _log_odds_ratio(table: Sequence[Sequence[int]]) -> tuple[float, float, bool]:
    """Log odds ratio of [[hits, misses], [hits, misses]], its variance, whether 0.5 was added."""
    cells = [cell for row in table for cell in row]
    corrected = 0 in cells
    a, b, c, d = (cell + 0.5 * corrected for cell in cells)
    return math.log(a * d / (b * c)), 1 / a + 1 / b + 1 / c + 1 / d, corrected


def _exp_interval(log_value: float, variance: float) -> Interval:
    reach = _Z * math.sqrt(variance)
    return Interval(math.exp(log_value - reach), math.exp(log_value + reach))


def _mover(x: float, x_ends: Interval, y: float, y_ends: Interval) -> Interval:
    """Interval of x - y from the intervals of two independent estimates.

    With Wilson's intervals of two shares this is Newcombe's method 10.
    """
    low = x - y - math.hypot(x - x_ends.low, y_ends.high - y)
    high = x - y + math.hypot(x_ends.high - x, y - y_ends.low)
    return Interval(low, high)


def _tango(only_a: int, only_b: int, num: int) -> Interval:
    """Tango's score interval of (only_a - only_b) / num, in points."""
    point = (only_a - only_b) / num

    def excess(delta: float, sign: int) -> float:
        # The likeliest share of `only_b` were the difference delta (Tango's q21).
        linear = -only_a - only_b + (2 * num - only_a + only_b) * delta
        root = math.sqrt(max(0.0, linear**2 + 8 * num * only_b * delta * (1 - delta)))
        share = max(0.0, (root - linear) / (4 * num))
        variance = num * max(0.0, 2 * share + delta * (1 - delta))
        return sign * (only_a - only_b - num * delta) - _Z * math.sqrt(variance)

    ends = []
    for sign, edge in ((1, -1.0), (-1, 1.0)):
        # At the point itself the variance, and so the excess, may be zero: begin just beside it.
        beside = point - sign * 1e-9
        if sign * (beside - edge) <= 0:
            ends.append(edge)
        else:
            ends.append(float(scipy.optimize.brentq(excess, edge, beside, args=(sign,))))
    return Interval(100.0 * ends[0], 100.0 * ends[1])
