"""Intervals over replicates: closed forms, simulated coverage, the table of rules."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import verdicts
from lib.intervals import Estimate, learned, over_replicates
from lib.records import ROOT

Z = stats.t.ppf(0.975, 19)


def estimates(values, error):
    return [Estimate.around(np.asarray(value), Z * error) for value in values]


def test_without_error_over_images_it_is_students_interval():
    values = [0.2, 0.5, 0.9, 0.3, 0.4]
    found = over_replicates(estimates(values, 0.0))
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_replicates_that_agree_keep_the_error_over_images():
    found = over_replicates(estimates([0.3] * 5, 0.1))
    # However many replicates: they are measured on the same images.
    assert found.high - found.value == pytest.approx(Z * 0.1)


def test_both_parts_add_up():
    values, error = [1.0, 2.0, 4.0], 0.5
    found = over_replicates(estimates(values, error))
    parts = np.var(values, ddof=1) / 3, error**2
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 19)
    margin = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    assert (found.value, found.high - found.value) == pytest.approx((7 / 3, margin))


def test_one_replicate_has_no_interval():
    found = over_replicates(estimates([0.7], 0.1))
    assert found.value == 0.7
    assert np.isnan(found.low)
    assert np.isnan(over_replicates([]).value)


def test_what_is_learned_is_trained_minus_baseline_with_the_errors_of_both():
    trained, baselines = estimates([0.9, 1.1, 1.0], 0.0), estimates([0.1, 0.3, 0.2, 0.2], 0.0)
    found = learned(trained, baselines)
    test = stats.ttest_ind([0.9, 1.1, 1.0], [0.1, 0.3, 0.2, 0.2], equal_var=False)
    interval = test.confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, interval.low, interval.high))
    assert np.isnan(learned(trained, []).low)


@pytest.mark.parametrize(
    ("replicates", "spread", "error"), [(3, 3.6, 1), (5, 3.6, 1), (5, 0.5, 1), (5, 12, 1)]
)
def test_the_interval_covers_the_truth_whatever_dominates(replicates, spread, error):
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(1500):
        common = error * rng.standard_normal()  # of the images that all replicates share
        values = 5 + common + spread * rng.standard_normal(replicates)
        found = over_replicates(estimates(values, error))
        hits.append(found.low < 5 < found.high)
    assert 0.915 < np.mean(hits) < 0.99  # three replicates: .93, five: .95


def test_the_rule_of_the_book_is_the_one_simulated():
    x = verdicts.draw(5, 1.0, 0.5, seed=3)[:40]
    decided = verdicts.t_and_images(x)
    for row, says in zip(x.reshape(-1, 5), decided.ravel(), strict=True):
        assert (over_replicates(estimates(row, 1.0)).low > 0) == says


def test_the_table_says_why_this_rule():
    rows = json.loads((ROOT / "book" / "results" / "rules.json").read_text())
    by = {(row["rule"], row["replicates"], row["shared"]): row for row in rows}
    for shared in (0.0, 0.5, 1.0):
        ours, first = by["t_and_images", 5, shared], by["every_image_interval", 2, shared]
        assert ours["false"] <= 0.03
        assert ours["worst"] <= 0.05
        assert ours["power"] >= 0.8
        assert first["false"] > 0.08
    # Without the error over images, shared images make false support.
    assert by["t", 5, 1.0]["worst"] > 0.3
    assert by["moderated_t", 5, 1.0]["worst"] > 0.2


def test_the_table_is_that_of_the_script(monkeypatch):
    monkeypatch.setattr(verdicts, "DRAWS", 400)
    made = verdicts.table()
    kept = json.loads((ROOT / "book" / "results" / "rules.json").read_text())
    for one, other in zip(made, kept, strict=True):
        assert (one["rule"], one["replicates"]) == (other["rule"], other["replicates"])
        assert one["false"] == pytest.approx(other["false"], abs=0.01)
        assert one["power"] == pytest.approx(other["power"], abs=0.02)
