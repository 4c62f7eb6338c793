"""Intervals: what resampling groups of images, or counting, says about an estimate."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; numbers, or arrays of one shape."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value, margin) -> "Estimate":
        """``value`` plus and minus ``margin``: numbers, or arrays."""
        ends = (np.asarray(end, dtype=float) for end in (value, value - margin, value + margin))
        return cls(*(end.item() if end.ndim == 0 else end for end in ends))

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "–"
        if np.isnan(self.low):
            return f"{self.value:.3f} (no interval)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


UNKNOWN = Estimate(np.nan, np.nan, np.nan)


def jackknife(groups, statistic: Callable, confidence: float = 0.95) -> Estimate:
    """A statistic of sums over images and its interval, by leaving out one group of images each.

    Parameters
    ----------
    groups : array (g, ...) or tuple of arrays (g, ...)
        Sums over g disjoint sets of images. Sets in which everything is zero held no image; with
        fewer than two others the interval is NaN.
    statistic : callable
        Of the sum over groups, of one sum per array if there are several; a number or an array.
    """
    parts = groups if isinstance(groups, tuple) else (groups,)
    parts = [np.asarray(part, dtype=float) for part in parts]
    used = np.any([(part != 0).reshape(len(part), -1).any(1) for part in parts], axis=0)
    parts = [part[used] for part in parts]
    g, totals = int(used.sum()), [part.sum(0) for part in parts]
    with np.errstate(invalid="ignore", divide="ignore"):  # an infinite mean has no interval
        value = np.asarray(statistic(*totals), dtype=float)
        if g < 2:
            return Estimate.around(value, np.full_like(value, np.nan))
        pairs = list(zip(totals, parts, strict=True))
        left_out = [statistic(*(total - part[k] for total, part in pairs)) for k in range(g)]
        spread = np.var(left_out, axis=0) * (g - 1)
        return Estimate.around(value, _quantile(confidence, g - 1) * np.sqrt(spread))


def mean_of(scores) -> Estimate:
    """Mean of scores (draws, images), or (images,).

    Draws and images are crossed: every draw's probes read the same test images. The variances of
    the mean that come from either are added. For the difference of two probes give the differences,
    for their errors are not independent.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=float))
    draws, images = scores.shape
    over_draws = scores.mean(1).var(ddof=1) / draws if draws > 1 else 0.0
    over_images = scores.mean(0).var(ddof=1) / images
    parts = [(over_draws, max(1, draws - 1)), (over_images, images - 1)]
    return _sum_of_variances(float(scores.mean()), parts)


def over_replicates(replicates: Sequence[Estimate], groups: int = 20) -> Estimate:
    """Mean of a statistic over seed replicates, with an interval over seeds and images.

    Replicates, each with its 95 % interval over ``groups`` groups, are measured on the same images,
    so that the error of the mean has two parts: the replicates' variance, divided by their number,
    and the mean variance over images, which more replicates do not make smaller. Their sum has
    Satterthwaite's degrees of freedom. In simulations it covers the truth in 93 % of cases with
    three replicates and in 95 % with five. With fewer than two replicates it is NaN.
    """
    return _combined([(replicates, 1)], groups)


def learned(trained: Sequence[Estimate], baselines: Sequence[Estimate], groups: int = 20):
    """Mean over trained replicates minus mean over untrained baselines, as over_replicates()."""
    return _combined([(trained, 1), (baselines, -1)], groups)


def _combined(samples, groups) -> Estimate:
    value, parts = 0.0, []
    for replicates, sign in samples:
        values = np.array([one.value for one in replicates])
        margins = np.array([(one.high - one.low) / 2 for one in replicates])
        value += sign * (values.mean() if len(values) else np.nan)
        if len(values) < 2:
            return Estimate.around(value, np.nan)
        over_images = ((margins / _quantile(0.95, groups - 1)) ** 2).mean()
        parts += [(values.var(ddof=1) / len(values), len(values) - 1), (over_images, groups - 1)]
    return _sum_of_variances(value, parts)


def _sum_of_variances(value, parts, confidence=0.95) -> Estimate:
    """Student's interval from variances of a mean and their degrees of freedom (Satterthwaite)."""
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Estimate.around(value, 0.0)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    return Estimate.around(value, _quantile(confidence, freedom) * np.sqrt(variance))


def share(right: int, n: int) -> Estimate:
    """Share of ``right`` among ``n``, with its Wilson interval."""
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    return Estimate(right / n, interval.low, interval.high)


def _quantile(confidence, freedom):
    return stats.t.ppf(0.5 + confidence / 2, freedom)
