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
        """``value`` plus and minus ``margin``."""
        return cls(*(_plain(part) for part in (value, value - margin, value + margin)))

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
        Sums over g disjoint sets of images. Sets in which everything is zero held no image.
    statistic : callable
        Of the sum over groups; of one sum per array if there are several.

    Returns
    -------
    Estimate
        Of the statistic's shape; its interval is NaN with fewer than two groups.
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
        left_out = [
            statistic(*(total - part[k] for total, part in zip(totals, parts, strict=True)))
            for k in range(g)
        ]
        spread = np.var(left_out, axis=0) * (g - 1)
        return Estimate.around(value, _quantile(confidence, g - 1) * np.sqrt(spread))


def mean_of(scores, confidence: float = 0.95) -> Estimate:
    """Mean of scores (draws, images), or (images,).

    Draws and images are crossed: every draw's probes read the same test images. The variances of
    the mean that come from either are added, and their degrees of freedom are Satterthwaite's. For
    the difference of two probes give the differences, for their errors are not independent.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=float))
    draws, images = scores.shape
    over_draws = scores.mean(1).var(ddof=1) / draws if draws > 1 else 0.0
    over_images = scores.mean(0).var(ddof=1) / images
    variance, value = over_draws + over_images, float(scores.mean())
    if variance == 0:
        return Estimate.around(value, 0.0)
    freedom = over_draws**2 / max(1, draws - 1) + over_images**2 / (images - 1)
    freedom = variance**2 / freedom
    return Estimate.around(value, _quantile(confidence, freedom) * np.sqrt(variance))


def over_replicates(replicates: Sequence[Estimate], groups: int = 20) -> Estimate:
    """Mean of a statistic over seed replicates, with an interval over seeds and images.

    The replicates are measured on the same images, so that the error of the mean has two parts:
    the replicates' variance, divided by their number, and the mean variance over images, which more
    replicates do not make smaller. Their sum has Satterthwaite's degrees of freedom. In simulations
    it covers the truth in 93 % of cases with three replicates and in 95 % with five.

    Parameters
    ----------
    replicates : sequence of Estimate
        Each with its 95 % interval over ``groups`` groups of images.

    Returns
    -------
    Estimate
        Its interval is NaN with fewer than two replicates.
    """
    return _combined([(replicates, 1)], groups)


def learned(
    trained: Sequence[Estimate], baselines: Sequence[Estimate], groups: int = 20
) -> Estimate:
    """Mean over trained replicates minus mean over untrained baselines, as over_replicates()."""
    return _combined([(trained, 1), (baselines, -1)], groups)


def _combined(samples, groups) -> Estimate:
    value, parts = 0.0, []
    for replicates, sign in samples:
        values = np.array([one.value for one in replicates])
        over_images = np.array([(one.high - one.low) / 2 for one in replicates])
        over_images = (over_images / _quantile(0.95, groups - 1)) ** 2
        value += sign * (values.mean() if len(values) else np.nan)
        if len(values) < 2:
            return Estimate.around(value, np.nan)
        parts.append((values.var(ddof=1) / len(values), len(values) - 1))
        parts.append((over_images.mean(), groups - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Estimate.around(value, 0.0)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    return Estimate.around(value, _quantile(0.95, freedom) * np.sqrt(variance))


def share(right: int, n: int) -> Estimate:
    """Share of ``right`` among ``n``, with its Wilson interval."""
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    return Estimate(right / n, interval.low, interval.high)


def _quantile(confidence, freedom):
    return stats.t.ppf(0.5 + confidence / 2, freedom)


def _plain(value):
    value = np.asarray(value, dtype=float)
    return value.item() if value.ndim == 0 else value
