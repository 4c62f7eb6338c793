"""Intervals: what resampling groups of images, or counting, says about an estimate."""

import dataclasses
from collections.abc import Callable

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


def share(right: int, n: int) -> Estimate:
    """Share of ``right`` among ``n``, with its Wilson interval."""
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    return Estimate(right / n, interval.low, interval.high)


def _quantile(confidence, freedom):
    return stats.t.ppf(0.5 + confidence / 2, freedom)


def _plain(value):
    value = np.asarray(value, dtype=float)
    return value.item() if value.ndim == 0 else value
