"""Intervals, paired tests and verdicts: every number behind a `low`, a `high`, a `p` or a verdict comes from here.

Two kinds of sample size occur. *Over examples* (dozens to thousands of them, often 0/1): `wilson_interval`,
`mean_interval`, `paired_difference`. *Over seeds* (five, eight, at most some dozens): `paired_test`, `holm`, `judge`.

Seeds, n < 8: Student t, exact for normal differences. Seeds, 8 <= n <= 32: the exact sign-flip test, which needs
symmetry about the mean only, and the interval of all means it does not reject, so that interval and p agree. A percentile
bootstrap is nowhere: over 5 values its "95 %" interval covers about 83 %.

Sources: Wilson, JASA 1927; Brown, Cai & DasGupta, Statist. Sci. 16(2), 2001 (correction at the edges); Korn & Graubard,
Survey Methodology 24, 1998 (effective sample size); Agresti & Min, Statist. Med. 24, 2005 (paired proportions);
Fisher, The Design of Experiments, 1935 (sign flips); Schuirmann, J. Pharmacokin. Biopharm. 15, 1987 (TOST);
Holm, Scand. J. Statist. 6, 1979. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from surefoot.errors import check, check_at_least, check_non_negative, check_open_unit

ALPHA = 0.05  # a verdict needs a Holm-adjusted p of at most this
SIGN_FLIP_FROM = 8  # below, 2 / 2^n is too coarse to survive a correction
SIGN_FLIP_TO = 32  # beyond, Student's t is as good and the enumeration is not worth its seconds


class Interval(NamedTuple):
    low: float
    high: float


class Result(NamedTuple):
    """An effect with its confidence interval and the p-value of the hypothesis it was tested against."""

    effect: float
    low: float
    high: float
    p: float


def wilson_interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """Score interval of a proportion, with the one-sided Poisson bound where only one to three successes (or failures) were seen.

    Without that correction a "95 %" Wilson interval covers as little as 86 % when p is near 0 or 1, which is where
    accuracies live. `successes` may be fractional (see `mean_interval`).
    """
    check_at_least("n", n, 1)
    check_open_unit("level", level)
    check(0 <= successes <= n, f"successes must lie between 0 and n = {n}, got {successes!r}.")
    return Interval(_wilson_low(successes, n, level), 1.0 - _wilson_low(n - successes, n, level))


def _wilson_low(x: float, n: float, level: float) -> float:
    if x == 0:
        return 0.0
    z = special.ndtri(0.5 + level / 2)
    share = x / n
    spread = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low = max(0.0, (share + z * z / (2 * n) - spread) / (1 + z * z / n))
    if x <= (2 if n <= 50 else 3):
        low = min(
            low, 0.5 * special.chdtri(2 * x, level) / n
        )  # chi-square quantile at 1 - level, 2x degrees of freedom
    return float(low)


def mean_interval(samples: Any, level: float = 0.95, *, bounds: tuple[float, float] | None = None) -> Interval:
    """Interval of a mean from one value per example (`[n]`).

    - Values that are all 0 or 1 (and bounds (0, 1) or none) are a proportion: `wilson_interval`.
    - With `bounds` (the range a value can have): Wilson with the effective sample size n m(1 - m) / s², m and s² rescaled
      to [0, 1]. It stays inside the bounds and, as the assumed variance moves with the mean, keeps its coverage for
      values that are nearly always at one bound. A constant sample is treated as 0/1 data of the same mean.
    - Otherwise Student t. A constant sample carries no estimate of its spread: the interval is the whole line below six
      values and the point from six on (what the sign-flip test says about it). Give `bounds` for better.
    """
    check_open_unit("level", level)
    values = _values("samples", samples)
    if bounds in (None, (0, 1)) and np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(float(values.sum()), len(values), level)
    if bounds is None:
        return _t_interval(values, level)
    low, high = bounds
    check(low < high, f"bounds must be (low, high) with low < high, got {bounds!r}.")
    check(bool(low <= values.min() and values.max() <= high), f"samples must lie within bounds {bounds!r}.")
    unit = (values - low) / (high - low)
    mean = float(unit.mean())
    spread = float(unit.var(ddof=1)) if len(unit) > 1 else 0.0
    n = len(unit) if spread == 0 else max(1.0, (len(unit) - 1) * mean * (1 - mean) / spread)
    unit_low, unit_high = _wilson_low(mean * n, n, level), 1.0 - _wilson_low((1 - mean) * n, n, level)
    return Interval(low + (high - low) * unit_low, low + (high - low) * unit_high)


def paired_difference(
    before: Any, after: Any, level: float = 0.95, *, bounds: tuple[float, float] | None = None
) -> Result:
    """Mean of `after - before` over the same examples (`[n]` each), its interval, and the p-value of "no difference".

    0/1 pairs: adjusted Wald of Agresti & Min (half an observation added to each cell of the 2 x 2 table), which keeps its
    coverage when hardly anything changed, with the exact McNemar p. The same adjustment serves other values within
    `bounds`. Without bounds: Student t over the differences. The effect itself is never adjusted.
    """
    check_open_unit("level", level)
    first, second = _values("before", before), _values("after", after)
    check(len(first) == len(second), f"before and after must be pairs, got {len(first)} and {len(second)} values.")
    difference = second - first
    both = np.concatenate((first, second))
    binary = bool(np.isin(both, (0.0, 1.0)).all())
    if binary:
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        p = min(1.0, 2.0 * float(special.bdtr(min(gained, lost), gained + lost, 0.5)))
    else:
        p = _p_value(difference, 0.0)
    if not binary and bounds is None:
        return Result(float(difference.mean()), *_t_interval(difference, level), p)
    low, high = (0.0, 1.0) if bounds is None else bounds
    check(bool(low <= both.min() and both.max() <= high), f"before and after must lie within bounds {bounds!r}.")
    reach, n = high - low, len(difference) + 2
    centre = float(difference.sum()) / n
    half = special.ndtri(0.5 + level / 2) * math.sqrt(
        max(0.0, (float((difference**2).sum()) + reach**2) / n - centre**2) / n
    )
    return Result(float(difference.mean()), float(max(centre - half, -reach)), float(min(centre + half, reach)), p)


def paired_test(differences: Any, at_least: float = 0.0, *, within: float | None = None, level: float = 0.95) -> Result:
    """Paired test over seeds: one difference per seed (`[n]`), against "the mean is `at_least`", two-sided.

    `within` asks for equivalence instead: as long as |effect| <= within, p is that of two one-sided tests (small: the mean
    lies inside); outside, it is two-sided against the nearer edge (small: the mean lies outside).
    Equal differences in every seed have no spread, and t would give p = 0 out of nothing: the sign-flip value
    (2 / 2^n two-sided) and its interval (the whole line where even that exceeds 1 - level) are used. One seed: p = 1.
    """
    check_open_unit("level", level)
    values = _values("differences", differences)
    effect = float(values.mean())
    if within is None:
        p = _p_value(values, at_least)
    else:
        check_non_negative("within", within)
        if abs(effect) <= within:
            p = max(_p_value(values, -within, "greater"), _p_value(values, within, "less"))
        else:
            p = _p_value(values, math.copysign(within, effect))
    interval = _flip_interval(values, level) if _use_flips(values) else _t_interval(values, level)
    return Result(effect, *interval, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: reject where they are at most alpha."""
    p = np.asarray(p_values, dtype=np.float64).reshape(-1)
    check(bool(((p >= 0) & (p <= 1)).all()), f"p-values must lie between 0 and 1, got {list(p_values)!r}.")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def judge(
    effect: float, adjusted_p: float, at_least: float = 0.0, *, within: float | None = None, alpha: float = ALPHA
) -> Literal["holds", "inconclusive", "contradicted"]:
    """The verdict on one claim: by its Holm-adjusted p, and by the side of the threshold on which the effect lies."""
    if not adjusted_p <= alpha:
        return "inconclusive"
    good = effect > at_least if within is None else abs(effect) <= within
    return "holds" if good else "contradicted"


Alternative = Literal["two-sided", "greater", "less"]


def _values(name: str, samples: Any) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64).reshape(-1)
    check(len(values) > 0, f"{name} must hold at least one value.")
    check(bool(np.isfinite(values).all()), f"{name} must be finite, got NaN or infinity.")
    return values


def _constant(values: NDArray[np.float64]) -> bool:
    """Equal up to rounding: 0.9 - 0.8 and 0.5 - 0.4 are the same difference."""
    return bool(np.ptp(values) <= 1e-9 * np.abs(values).max())


def _use_flips(values: NDArray[np.float64]) -> bool:
    return _constant(values) or SIGN_FLIP_FROM <= len(values) <= SIGN_FLIP_TO


def _t_interval(values: NDArray[np.float64], level: float) -> Interval:
    if _constant(values):
        return _flip_interval(values, level)
    n, mean = len(values), float(values.mean())
    half = float(special.stdtrit(n - 1, 0.5 + level / 2) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean - half, mean + half)


def _p_value(values: NDArray[np.float64], mean: float, alternative: Alternative = "two-sided") -> float:
    """p of "the expectation is `mean`": sign flips or Student t, by the rule of this module."""
    if _constant(values):
        at_mean = math.isclose(float(values[0]), mean, rel_tol=1e-9)
        greater = 1.0 if at_mean or values[0] < mean else 2.0 ** -len(values)
        less = 1.0 if at_mean or values[0] > mean else 2.0 ** -len(values)
    elif _use_flips(values):
        greater, less = _flip_p_greater(values - mean), _flip_p_greater(mean - values)
    else:
        n = len(values)
        t = (float(values.mean()) - mean) / (float(values.std(ddof=1)) / math.sqrt(n))
        greater, less = float(special.stdtr(n - 1, -t)), float(special.stdtr(n - 1, t))
    return {"greater": greater, "less": less, "two-sided": min(1.0, 2 * min(greater, less))}[alternative]


def _flip_p_greater(values: NDArray[np.float64]) -> float:
    """Share of the 2^n sign patterns whose sum is at least the observed one, exactly, in O(2^(n/2) n).

    Flipping a subset S lowers the sum by twice the sum over S, so the patterns to count are the subsets with
    sum(S) <= 0; each is one subset of the first half beside one of the second (meet in the middle).
    """
    n = len(values)
    slack = 1e-12 * float(np.abs(values).sum())  # ties count as "at least", whatever the rounding
    left, right = _subset_sums(values[: n // 2]), np.sort(_subset_sums(values[n // 2 :]))
    return int(np.searchsorted(right, slack - left, side="right").sum()) / 2**n


def _subset_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate((sums, sums + value))
    return sums


def _flip_interval(values: NDArray[np.float64], level: float) -> Interval:
    """All means that the two-sided sign-flip test does not reject at 1 - level."""
    tail = (1.0 - level) / 2
    if 2.0 ** -len(values) > tail:
        return Interval(-math.inf, math.inf)
    if _constant(values):
        return Interval(float(values.mean()), float(values.mean()))
    return Interval(_flip_low(values, tail), -_flip_low(-values, tail))


def _flip_low(values: NDArray[np.float64], tail: float) -> float:
    """The smallest mean that is not rejected from below: bisection, as the p-value rises with the mean."""
    rejected, kept = float(values.min()) - 1e-9 * float(np.ptp(values)), float(values.mean())
    while kept - rejected > 1e-10 * float(np.ptp(values)):
        middle = 0.5 * (rejected + kept)
        if _flip_p_greater(values - middle) > tail:
            kept = middle
        else:
            rejected = middle
    return kept
