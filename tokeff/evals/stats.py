"""Figures with their number of rows and a 95% interval, and the test whether a method beats a baseline.

Rows are measurements of single examples (or groups of them: see `group_means`). Two methods measured on the same
examples are compared by the differences of their rows, never by whether their own intervals overlap.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
RANKED_AT = 0.8  # a task ranks by exact match only where the full cache gets this share right
_RESAMPLES = 9999
Rows = Sequence[float] | Sequence[bool] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    value: the estimate. low, high: ends of the interval at `level`; infinite where one row cannot tell.
    n: rows that it rests on.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = LEVEL

    def __str__(self) -> str:
        """Return for example "0.83 [0.66, 0.93] (n=30)"."""
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n={self.n})"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A method against a baseline on the same examples.

    difference: mean of method - baseline, with its t interval.
    p_value: one-sided, of the sign-flip permutation test.
    better: whether the method is better at the 5% level in the direction that was asked for.
    """

    difference: Interval
    p_value: float
    better: bool


def proportion(hits: Rows, level: float = LEVEL) -> Interval:
    """Return the share of hits with the Wilson score interval, which is right for few rows and for shares near 0 and 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    Raises ValueError for no rows or rows that are not 0 or 1.
    """
    hits_n = _rows(hits)
    if not np.isin(hits_n, (0, 1)).all():
        raise ValueError("rows of a proportion must be 0 or 1; use mean() for other values")
    k, n = int(hits_n.sum()), len(hits_n)
    ends = stats.binomtest(k, n).proportion_ci(confidence_level=level, method="wilson")
    return Interval(k / n, float(ends.low), float(ends.high), n, level)


def mean(values: Rows, level: float = LEVEL) -> Interval:
    """Return the mean of independent rows with Student's t interval, mean +- t(n - 1) s / sqrt(n).

    One row gives an infinite interval. Source: Student 1908, "The probable error of a mean".
    Raises ValueError for no rows or rows that are not finite.
    """
    rows = _rows(values)
    n, value = len(rows), float(rows.mean())
    if n == 1:
        return Interval(value, -math.inf, math.inf, 1, level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(rows.std(ddof=1)) / math.sqrt(n)
    return Interval(value, value - half, value + half, n, level)


def bootstrap_mean(values: Rows, seed: int = 0, level: float = LEVEL) -> Interval:
    """Return the mean with its percentile bootstrap interval: for skewed rows such as divergences, from about 10 rows.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife". One row gives an infinite interval.
    Raises ValueError for no rows or rows that are not finite.
    """
    rows = _rows(values)
    value = float(rows.mean())
    if len(rows) == 1:
        return Interval(value, -math.inf, math.inf, 1, level)
    found = stats.bootstrap(
        (rows,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    ends = found.confidence_interval
    return Interval(value, float(ends.low), float(ends.high), len(rows), level)


def perplexity(nlls: Rows, tokens: Rows, level: float = LEVEL) -> Interval:
    """Return exp(sum of nlls / sum of tokens) over examples, n = examples.

    nlls: summed negative log-likelihoods in nats, one an example; tokens: how many tokens each sum has.
    The interval is exp of that of the ratio of sums, whose error is that of the residuals nll - ratio x tokens
    (Cochran 1977, "Sampling Techniques", section 6.4, with t instead of normal quantiles): tokens of one example
    depend on each other, so the example is the row. Perplexity itself: Jelinek et al. 1977.
    Raises ValueError for no rows, unequal numbers of them, or no tokens in one.
    """
    sums, counts = _rows(nlls), _rows(tokens)
    if len(sums) != len(counts) or (counts <= 0).any():
        raise ValueError(f"{len(sums)} sums and {len(counts)} token counts; give one positive count for each sum")
    rate = float(sums.sum() / counts.sum())
    error = mean((sums - rate * counts) / counts.mean(), level)
    return Interval(math.exp(rate), math.exp(rate + error.low), _exp(rate + error.high), len(sums), level)


def paired_difference(method: Rows, baseline: Rows, level: float = LEVEL) -> Interval:
    """Return the mean of method - baseline over examples that both measured, with the t interval of the differences.

    Raises ValueError when the two have unequal numbers of rows.
    """
    return mean(_differences(method, baseline), level)


def better_than(
    method: Rows,
    baseline: Rows,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Comparison:
    """Test whether a method beats a baseline on the same examples, row i of one against row i of the other.

    Under the null hypothesis each difference is as likely to be the other way round; the p-value is the share of sign
    flips whose mean is at least as good (all of them up to 13 rows, 9999 random ones above). For 0/1 rows this is
    McNemar's exact test, one-sided. Fewer than 5 rows can never reach 5%: the smallest p-value of n rows is 2^-n.
    Source: Fisher 1935, "The Design of Experiments", section 21. Raises ValueError for unequal numbers of rows.
    """
    differences = _differences(method, baseline)
    signed = differences if higher_is_better else -differences
    found = stats.permutation_test(
        (signed,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, 4_000_000 // len(signed)),
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    p_value = float(found.pvalue)
    return Comparison(mean(differences), p_value, p_value < 1 - LEVEL and float(signed.mean()) > 0)


def group_means(values: Rows, groups: Sequence[Hashable]) -> np.ndarray:
    """Return the mean of each group, (groups,), in the order groups first appear.

    Questions that share a context are not independent: their context is the row. Give `groups` one context a value,
    then pass the result to the functions above. Raises ValueError for unequal numbers.
    """
    rows = _rows(values)
    if len(rows) != len(groups):
        raise ValueError(f"{len(rows)} values and {len(groups)} groups; give one group for each value")
    members: dict[Hashable, list[float]] = {}
    for row, group in zip(rows, groups):
        members.setdefault(group, []).append(float(row))
    return np.array([np.mean(found) for found in members.values()])


def _differences(method: Rows, baseline: Rows) -> np.ndarray:
    """Return method - baseline, row by row."""
    ours, theirs = _rows(method), _rows(baseline)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rows against {len(theirs)}; compare methods on the same examples")
    return ours - theirs


def _rows(values: Rows) -> np.ndarray:
    """Return values as a float64 array (n,), n >= 1, all finite."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or len(rows) == 0:
        raise ValueError(f"rows of shape {rows.shape}; give at least one row in one dimension")
    if not np.isfinite(rows).all():
        raise ValueError("a row is infinite or not a number; leave out failed rows and say how many")
    return rows


def _exp(x: float) -> float:
    """Return exp(x), infinite where it overflows."""
    return math.exp(x) if x < 700 else math.inf
