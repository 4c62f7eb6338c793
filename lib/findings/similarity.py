"""Statistics of similarity maps: CKA between the layers of a claim's networks."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import torch
import xarray as xr

from lib.cka import MinibatchCKA, alignment, centre
from lib.findings.claims import Claim, NotMeasurable
from lib.intervals import UNKNOWN, Estimate, jackknife
from lib.records import compared

ORDERS = 6  # random orders of the images, of which each gives other minibatches


class Maps:
    """CKA maps by pair of arms: ``maps["vit", "resnet"]`` is (blocks, blocks), input to output.

    ``maps.all("vit", "vit")`` has all taps instead of the outputs of blocks, and
    ``maps.layers("vit")`` says which those are.
    """

    def __init__(self, record: xr.Dataset, cast: dict[str, str]):
        self._places, self._names, self._full = {}, {}, None
        for arm, role in cast.items():
            own = compared(record) & (record["role"].values == role)
            for blocks in (True, False):
                part = record["layer"][own & record["block"].values if blocks else own]
                self._names[arm, blocks] = part.values.tolist()
                self._places[arm, blocks] = record.indexes["other"].get_indexer(part["tap"].values)

    def of(self, hsic: np.ndarray) -> "Maps":
        """The maps of some HSICs (other, other)."""
        self._full = alignment(hsic)
        return self

    def __getitem__(self, pair: tuple[str, str]) -> np.ndarray:
        return self._full[np.ix_(*(self._places[arm, True] for arm in pair))]

    def all(self, *pair: str) -> np.ndarray:
        return self._full[np.ix_(*(self._places[arm, False] for arm in pair))]

    def layers(self, arm: str, blocks: bool = True) -> list[str]:
        return self._names[arm, blocks]


def of_maps(statistic: Callable[[Maps], float]) -> Callable[[xr.Dataset, dict], Estimate]:
    """A statistic of maps as one of a record, with its interval over images.

    Unknown if a role of the cast was not measured.
    """

    def estimate(record, cast):
        if not set(cast.values()) <= set(record["role"].values.tolist()):
            return UNKNOWN
        # Taps of other measurements have NaN, by which a group without an image would count as one.
        hsic, maps = record["hsic"].sel(tap=record["other"].values).values, Maps(record, cast)
        return jackknife(hsic, lambda sums: statistic(maps.of(sums)))

    return estimate


def thirds(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First, middle and last third of something by block, (blocks, ...)."""
    third = max(1, round(len(curve) / 3))
    return curve[:third], curve[third:-third], curve[-third:]


def low_high(square: np.ndarray) -> float:
    """Mean CKA between the lowest and the highest third of a network's layers."""
    lowest = thirds(square)[0]
    return float(np.nanmean(lowest[:, -len(lowest) :]))


def two_block_contrast(square: np.ndarray) -> float:
    """Mean CKA within two parts of the layers minus across them, at the cut where it is largest."""
    n = len(square)
    return max(_contrast(square, np.arange(n) >= cut) for cut in range(1, n))


def stage_contrast(square: np.ndarray, layers: list[str]) -> float:
    """Contrast of a network's own stages minus the mean contrast of all other divisions.

    Layers that are close are similar anyway, so any division of the layers into runs has some
    contrast; what counts is whether the stages have more of it than as many runs cut elsewhere.
    """
    n, stages = len(square), [layer.rpartition(".")[0] for layer in layers]
    own = np.cumsum([0] + [a != b for a, b in itertools.pairwise(stages)])
    divisions = (
        np.searchsorted(cuts, np.arange(n), side="right")
        for cuts in itertools.combinations(range(1, n), int(own[-1]))
    )
    others = [_contrast(square, labels) for labels in divisions if (labels != own).any()]
    return _contrast(square, own) - float(np.mean(others))


def diagonal_contrast(square: np.ndarray) -> float:
    """Mean CKA of layers at equal relative depth minus that of all other pairs."""
    rows, columns = square.shape
    depth = np.round(np.linspace(0, columns - 1, rows)).astype(int)
    equal = np.zeros(square.shape, dtype=bool)
    equal[np.arange(rows), depth] = True
    return float(np.nanmean(square[equal]) - np.nanmean(square[~equal]))


def kind_contrast(square: np.ndarray, layers: list[str]) -> float:
    """How much of a grid a map of all taps shows.

    Mean CKA between taps on the residual stream minus that between such a tap and one inside a
    branch, over pairs of different blocks that are equally far apart on average.
    """
    parts = [layer.split(".") for layer in layers]
    inside = [part[0] == "blocks" and part[1].isdigit() for part in parts]
    block = np.array([int(part[1]) if ok else -1 for part, ok in zip(parts, inside, strict=True)])
    stream = np.array([len(part) == 2 or part[-1] == "norm2:input" for part in parts])
    apart = (block[:, None] != block[None]) & (block[:, None] >= 0) & (block[None] >= 0)
    alike = apart & stream[:, None] & stream[None]
    unlike = apart & (stream[:, None] != stream[None])
    return float(np.nanmean(square[alike]) - np.nanmean(square[unlike]))


def across(square: np.ndarray, cut: int) -> float:
    """Mean CKA between the layers before a cut and those from it on; ``cut`` counts from 0."""
    return float(np.mean(square[:cut, cut:]))


def _contrast(square: np.ndarray, labels: np.ndarray) -> float:
    same = labels[:, None] == labels[None]
    off_diagonal = ~np.eye(len(square), dtype=bool)
    return float(np.nanmean(square[same & off_diagonal]) - np.nanmean(square[~same]))


# The size of the minibatch ------------------------------------------------------------------------


def in_minibatches(grams: Mapping, size: int, estimator="unbiased", order=None) -> xr.Dataset:
    """CKA between layers, from minibatches of some size.

    ``grams`` has, by layer, the Gram matrix (n, n) over all images, of which a minibatch's is a
    square; the images come in ``order``, a tensor (n,).
    """
    metric = MinibatchCKA(estimator=estimator)
    order = torch.arange(len(next(iter(grams.values())))) if order is None else order
    for batch in order.split(size):
        metric.update({tap: centre(k[batch][:, batch], estimator) for tap, k in grams.items()})
    return metric.compute()


def batch_size_effect(
    grams: Mapping[str, Mapping], cast: dict[str, str], size: int = 128, estimator="unbiased"
) -> Estimate:
    """Largest change of any cell between minibatches of some size and all images at once.

    Of the mean over random orders of the images, with its interval over them; ``grams`` by role
    and layer, of the roles that were measured.
    """
    layers = {tap: gram for role in cast.values() for tap, gram in grams.get(role, {}).items()}
    n = len(next(iter(layers.values())))
    if n < 2 * size:
        raise NotMeasurable(f"needs at least two minibatches of {size}")
    at_once = in_minibatches(layers, n, estimator)["cka"].values
    orders = (torch.randperm(n, generator=torch.Generator().manual_seed(i)) for i in range(ORDERS))
    maps = [in_minibatches(layers, size, estimator, order)["cka"].values for order in orders]
    sums = np.stack(maps), np.ones(ORDERS)
    found = jackknife(sums, lambda total, count: np.abs(total / count - at_once).max())
    return Estimate(found.value, max(0.0, found.low), found.high)


# fmt: off
MINIBATCHES = [
    Claim("E23-batch-size", "The size of the minibatch does not matter to CKA.", "appendix A",
          batch_size_effect, "largest change of any cell between minibatches of 128 and all images "
          "at once", 0.02, ("vit", "resnet"), below=True, ours=True),
]
