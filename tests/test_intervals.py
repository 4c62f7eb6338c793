"""Estimates and their intervals, against closed forms and by simulation."""

import numpy as np
import pytest
from scipy import stats

from lib.intervals import UNKNOWN, Estimate, jackknife, mean_of, share


def test_an_estimate_is_written_with_its_interval():
    assert str(Estimate(0.1234, 0.1, 0.15)) == "0.123 [0.100, 0.150]"
    assert str(Estimate(0.5, np.nan, np.nan)) == "0.500 (no interval)"
    assert str(UNKNOWN) == "–"


def ends(estimate):
    return estimate.value, estimate.low, estimate.high


# Leaving out groups -------------------------------------------------------------------------------


def test_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(0).normal(3, 2, 12)
    found = jackknife((values, np.ones(12)), lambda total, count: total / count)
    low, high = stats.t.interval(0.95, 11, values.mean(), values.std(ddof=1) / 12**0.5)
    assert ends(found) == pytest.approx((values.mean(), low, high), rel=1e-9)
    assert all(isinstance(part, float) for part in ends(found))
    together = jackknife(np.stack([values, np.ones(12)], 1), lambda total: total[0] / total[1])
    assert ends(together) == pytest.approx(ends(found), rel=1e-12)
    narrow = jackknife((values, np.ones(12)), lambda total, count: total / count, 0.5)
    assert narrow.high - narrow.value == pytest.approx(
        stats.t.ppf(0.75, 11) * values.std(ddof=1) / 12**0.5
    )


def test_statistics_may_be_arrays():
    groups = np.random.default_rng(0).normal(3, 2, (8, 2, 3))
    found = jackknife(groups, lambda total: total**2)
    assert found.value.shape == found.low.shape == found.high.shape == (2, 3)
    alone = jackknife(groups[:, 1, 2], lambda total: total**2)
    assert (found.low[1, 2], found.high[1, 2]) == pytest.approx((alone.low, alone.high))


def test_groups_without_images_are_left_out():
    sums, counts = np.random.default_rng(0).normal(3, 2, (5, 2)), np.full(5, 4.0)
    empty = np.concatenate([sums[:3], 0 * sums[:2], sums[3:]]), np.array([4, 4, 4, 0, 0, 4, 4])

    def mean(total, count):
        return total / count

    few, many = jackknife((sums, counts), mean), jackknife(empty, mean)
    np.testing.assert_allclose([*ends(few)], [*ends(many)])
    # A sum that happens to be zero is no empty group where another array counts its images.
    sums[1] = 0
    zero = jackknife((sums, counts), mean)
    assert not np.allclose(zero.high, jackknife((np.delete(sums, 1, 0), counts[1:]), mean).high)


def test_a_group_that_is_not_a_number_is_no_empty_group():
    groups = np.array([1.0, 2.0, np.nan])
    assert np.isnan(ends(jackknife(groups, lambda total: total))).all()


def test_fewer_than_two_groups_have_no_interval():
    for groups in (np.array([3.0]), np.array([3.0, 0.0])):
        found = jackknife(groups, lambda total: 2 * total)
        assert found.value == 6
        assert np.isnan([found.low, found.high]).all()


def test_an_infinite_statistic_has_no_interval():
    found = jackknife(np.array([1.0, np.inf, 2.0]), lambda total: total)
    assert found.value == np.inf
    assert np.isnan([found.low, found.high]).all()


# Scores over draws and images ---------------------------------------------------------------------


def test_the_interval_is_that_of_images_if_draws_agree():
    scores = np.random.default_rng(0).random((1, 200)).repeat(3, axis=0).round()
    margin = stats.t.ppf(0.975, 199) * scores[0].std(ddof=1) / np.sqrt(200)
    mean = scores.mean()
    assert ends(mean_of(scores)) == pytest.approx((mean, mean - margin, mean + margin))
    assert ends(mean_of(scores[0])) == pytest.approx(ends(mean_of(scores)))


def test_the_interval_covers_the_truth_over_draws_and_images():
    stream = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        scores = 0.03 * stream.normal(size=(3, 1)) + stream.normal(0.4, 0.5, size=(1, 300))
        found = mean_of(scores + 0.3 * stream.normal(size=(3, 300)))
        covered.append(found.low <= 0.4 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_scores_that_never_differ_have_no_width():
    assert ends(mean_of(np.ones((3, 10)))) == (1, 1, 1)
    assert np.isnan(ends(mean_of(np.full((3, 10), np.nan)))).all()


# Shares -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 20), (7, 20), (20, 20)])
def test_a_share_has_wilsons_interval(right, n):
    z, p = stats.norm.ppf(0.975), right / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert ends(share(right, n)) == pytest.approx((p, centre - margin, centre + margin))
