"""Intervals and tests against closed forms, scipy, and the coverage they promise."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tokeff.evals import stats

pytestmark = pytest.mark.core


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 3), (7, 10), (45, 100)])
def test_wilson_is_its_closed_form(k, n):
    found = stats.proportion([1] * k + [0] * (n - k))
    z, p = scipy_stats.norm.ppf(0.975), k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.value, found.n) == (p, n)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_mean_is_scipys_t_interval():
    rows = np.random.default_rng(0).normal(2, 3, 17)
    found = stats.mean(rows)
    ends = scipy_stats.ttest_1samp(rows, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((rows.mean(), ends.low, ends.high))
    assert found.n == 17


def test_one_row_has_an_infinite_interval():
    for found in (stats.mean([3.0]), stats.bootstrap_mean([3.0])):
        assert (found.value, found.low, found.high, found.n) == (3.0, -math.inf, math.inf, 1)


def test_bootstrap_agrees_with_t_for_many_normal_rows():
    rows = np.random.default_rng(1).normal(0, 1, 400)
    found, expected = stats.bootstrap_mean(rows), stats.mean(rows)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert stats.bootstrap_mean(rows, seed=3) == stats.bootstrap_mean(rows, seed=3)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(2)
    hits = {"proportion": 0, "mean": 0, "perplexity": 0}
    for _ in range(400):
        share, mean = stats.proportion(rng.random(30) < 0.8), stats.mean(rng.normal(1, 2, 8))
        tokens = rng.integers(100, 200, 20)
        perplexity = stats.perplexity(tokens * rng.normal(3, 0.3, 20), tokens)
        hits["proportion"] += share.low <= 0.8 <= share.high
        hits["mean"] += mean.low <= 1 <= mean.high
        hits["perplexity"] += perplexity.low <= math.exp(3) <= perplexity.high
    assert all(0.92 * 400 <= found <= 0.98 * 400 for found in hits.values()), hits


def test_perplexity_weights_tokens_not_examples():
    found = stats.perplexity([100.0, 900.0], [100, 300])
    assert found.value == pytest.approx(math.exp(1000 / 400))
    assert found.n == 2


def test_perplexity_of_equal_lengths_is_exp_of_the_mean_interval():
    nlls = np.random.default_rng(3).normal(3, 0.2, 12)
    found, rate = stats.perplexity(nlls * 128, [128] * 12), stats.mean(nlls)
    assert (found.value, found.low, found.high) == pytest.approx(tuple(np.exp([rate.value, rate.low, rate.high])))


def test_paired_difference_is_narrower_than_either_mean():
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 10, 20)
    found = stats.paired_difference(hard + 1 + rng.normal(0, 0.1, 20), hard)
    assert found.low > 0.9 and found.high < 1.1
    assert stats.mean(hard).high - stats.mean(hard).low > 5


def sign_flips(differences):
    """Return the one-sided p-value by trying every choice of signs."""
    flips = [np.mean(np.multiply(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))]
    return np.mean(np.array(flips) >= np.mean(differences) - 1e-12)


@pytest.mark.parametrize("n", [3, 6, 9])
def test_p_values_are_those_of_all_sign_flips(n):
    differences = np.random.default_rng(n).normal(0.5, 1, n)
    found = stats.better_than(differences, np.zeros(n))
    assert found.p_value == pytest.approx(sign_flips(differences))
    assert found.difference == stats.mean(differences)
    assert found.better == (found.p_value < 0.05)


def test_binary_rows_give_mcnemars_exact_test():
    method, baseline = [1] * 9 + [0] * 3, [0] * 7 + [1] * 2 + [0, 0, 1]
    found = stats.better_than(method, baseline)
    assert found.p_value == pytest.approx(scipy_stats.binomtest(7, 8, alternative="greater").pvalue)


def test_lower_can_be_better():
    low, high = np.arange(8) - 5.0, np.arange(8.0)
    assert stats.better_than(low, high, higher_is_better=False).better
    assert not stats.better_than(low, high).better
    assert stats.better_than(low, high, higher_is_better=False).difference.value == -5


def test_no_better_than_itself_and_never_with_four_rows():
    assert not stats.better_than([1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 0, 1]).better
    assert not stats.better_than([1] * 4, [0] * 4).better
    assert stats.better_than([1] * 5, [0] * 5).better


def test_a_method_equal_to_the_baseline_is_called_better_at_most_one_time_in_twenty():
    rng = np.random.default_rng(5)
    called = sum(stats.better_than(rng.random(10) < 0.5, rng.random(10) < 0.5).better for _ in range(200))
    assert called <= 0.09 * 200


def test_group_means_make_one_row_of_each_context():
    assert stats.group_means([1, 0, 1, 1], ["a", "a", "b", "b"]).tolist() == [0.5, 1.0]
    assert stats.group_means([1, 5, 3], [2, 1, 2]).tolist() == [2.0, 5.0]


def test_intervals_print_with_n():
    assert str(stats.mean([1.0, 1.0, 1.0])) == "1 [1, 1] (n=3)"


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: stats.mean([]), "at least one row"),
        (lambda: stats.mean([[1.0]]), "one dimension"),
        (lambda: stats.mean([1.0, math.nan]), "leave out failed rows"),
        (lambda: stats.proportion([0.5]), "use mean"),
        (lambda: stats.perplexity([1.0], [0]), "one positive count"),
        (lambda: stats.perplexity([1.0], [1, 2]), "one positive count"),
        (lambda: stats.better_than([1.0], [1.0, 2.0]), "same examples"),
        (lambda: stats.group_means([1.0], []), "one group for each value"),
    ],
)
def test_bad_rows_are_refused_in_one_line(call, fix):
    with pytest.raises(ValueError, match=fix) as refused:
        call()
    assert "\n" not in str(refused.value)
