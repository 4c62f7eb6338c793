"""Does a token still know where it came from? CKA between every token and every patch.

A token that mostly describes its own patch has a Gram matrix like that of the patch's pixels, and
unlike those of other patches. All tokens of a layer are compared with all patches of the image at
once (the paper's Figs. 9 and 10): one small Gram matrix per token and per patch, one matrix product
per minibatch.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from lib.cka import SMALLEST_BATCH, centred_gram
from lib.intervals import Estimate, jackknife
from lib.measure import Measurement
from lib.measurements.places import Layout, layouts


def coarsen(cells: Tensor, grid: int | None) -> Tensor:
    """Average cells (n, side * side, width) over squares, down to (n, grid * grid, width)."""
    side = math.isqrt(cells.shape[1])
    if grid in (None, side):
        return cells
    if grid < 1 or side % grid:
        raise ValueError(f"cannot average a {side} x {side} grid down to {grid} x {grid}")
    return F.avg_pool2d(cells.mT.unflatten(2, (side, side)), side // grid).flatten(2).mT


def common_grid(sides, most: int) -> int:
    """The finest grid, of at most ``most`` cells a side, that grids of all the sides average to."""
    sides = sorted(set(sides))
    found = max(k for k in range(1, max(1, most) + 1) if not any(side % k for side in sides))
    if found == 1:
        advice = "networks whose patches fit into each other, or crop the pictures so that they do"
        grids = f"grids of {' and '.join(map(str, sides))} cells a side"
        raise ValueError(f"{grids} have nothing in common: compare {advice}")
    return found


def patches(pixels: Tensor, grid: int) -> Tensor:
    """Cut images (n, 3, h, h) into patches (n, grid * grid, 3 * size * size), row by row."""
    height, width = pixels.shape[-2:]
    if height != width or height % grid:
        raise ValueError(f"a {height} x {width} image cannot be cut into {grid} x {grid} patches")
    return F.pixel_unshuffle(pixels.float(), height // grid).flatten(2).mT


def token_grams(cells: Tensor) -> Tensor:
    """Gram matrices (tokens, n, n) of each token of (n, tokens, width), zero on the diagonal.

    Up to that diagonal they are centred over the images. For HSIC it is enough if one of the two
    matrices is U-centred, and the patches' are: U-centring is a projection. So all tokens can share
    one product of matrices, where :func:`lib.cka.centred_gram` takes them one by one.
    """
    x = cells.transpose(0, 1).contiguous()
    x = x if x.is_floating_point() else x.double()
    resolution = torch.finfo(x.dtype).eps
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    energy = x.square().sum((1, 2))
    x = x - x[:, :1]  # exact: of a token that does not vary nothing is left
    x = x - x.mean(1, keepdim=True)
    gram = x @ x.mT
    constant = gram.diagonal(dim1=1, dim2=2).sum(1) <= resolution**2 * energy
    gram[constant] = 0
    gram.diagonal(dim1=1, dim2=2).zero_()
    return gram


def own_hsic(grams: Tensor) -> Tensor:
    """Unbiased HSIC (k,) of Gram matrices (k, n, n) with themselves, times n (n - 3).

    The matrices have zeros on the diagonal and need not be centred (Song et al., 2012, eq. 5).
    """
    n, rows = grams.shape[-1], grams.sum(2)
    every = rows.sum(1).square() / ((n - 1) * (n - 2))
    return grams.square().sum((1, 2)) + every - 2 / (n - 2) * rows.square().sum(1)


class Localisation(Measurement):
    """CKA between every token of the tapped layers and every patch of the input image.

    The taps must make tokens or feature maps. Finer grids are averaged down to ``grid`` x ``grid``
    tokens, which is needed if the taps' grids differ, as those of a ResNet's stages do. The image
    is cut into as many patches.

    Of every tap, a hook keeps one Gram matrix per token, in float32, as long as the minibatch
    lasts: 1 MB for 64 tokens and 64 images. From then on tokens x patches numbers per tap and group
    are kept: 0.7 MB per tap for 64 tokens and 20 groups. The control comes along: the same, with
    every image's tokens set against another image's patches, must be zero.
    """

    smallest = SMALLEST_BATCH

    def __init__(self, taps="blocks", grid: int | None = None):
        super().__init__(taps)
        self.grid = grid

    def reduce(self, value: Tensor, where: Layout = Layout()) -> Tensor:  # noqa: B008
        return token_grams(coarsen(where.split(value)[0], self.grid)).float()

    def reducer(self, model, names, x):
        found = layouts(model, names, x)
        return lambda name, value: self.reduce(value, found[name])

    def size(self, kept) -> int:
        return kept.shape[-1]

    def make_room(self, reduced, images) -> None:
        grids = {name: math.isqrt(len(gram)) for name, gram in reduced.items()}
        if len(set(grids.values())) != 1:
            one_each = sorted({side: name for name, side in grids.items()}.items())
            few = ", ".join(f"{name}: {side} x {side}" for side, name in one_each)
            advice = f"average the finer ones with grid={one_each[0][0]}"
            raise ValueError(f"the taps' grids differ ({few}); {advice}")
        grid = grids[self.names[0]]
        self.cell_size = images.pixels.shape[-1] // grid
        taps, square = len(grids), (grid**2, grid**2)
        self.room(reduced, cross_hsic=(self.groups, taps, *square), shuffled_hsic=(taps, *square))
        self.room(reduced, token_hsic=(self.groups, taps, grid**2))
        self.room(reduced, patch_hsic=(self.groups, *square))

    def add(self, group, reduced, images) -> None:
        n, grid = len(images), math.isqrt(self.patch_hsic.shape[-1])
        weight = 1 / (n - 3)  # HSIC divides by n (n - 3); minibatches weigh by their images, n
        cells = patches(images.pixels, grid).unbind(1)
        grams = torch.stack([centred_gram(cell) for cell in cells]).float()
        patch = grams.flatten(1).to(self.patch_hsic.device)
        # The same patches, each image's in the place of its predecessor's.
        other = grams.roll((1, 1), (1, 2)).flatten(1).to(patch.device)
        self.patch_hsic[group] += weight * (patch @ patch.T)
        for place, name in enumerate(self.names):
            token = reduced[name].to(patch.device)
            self.token_hsic[group, place] += weight * own_hsic(token)
            token = token.flatten(1)
            self.cross_hsic[group, place] += weight * (token @ patch.T)
            self.shuffled_hsic[place] += weight * (token @ other.T)

    def results(self) -> xr.Dataset:
        """The maps and what their intervals are made of.

        ``localisation`` (tap, cell, patch): CKA; NaN where a token or a patch is the same in all
        images. ``shuffled`` (tap, cell, patch): the control, with the patches of other images.
        ``pixels`` (cell, patch): the patches' pixels in the place of the tokens. ``cross_hsic``,
        ``token_hsic``, ``patch_hsic``: sums per group of minibatches. ``cell_size``: side of a
        cell, in pixels.
        """
        states = self.cross_hsic, self.token_hsic, self.patch_hsic, self.shuffled_hsic
        cross, token, patch, shuffled = (state.cpu().numpy() for state in states)
        own = np.diagonal(patch, axis1=1, axis2=2).sum(0)
        square, maps = ("cell", "patch"), ("tap", "cell", "patch")
        variables = {
            "localisation": (maps, _alignment(cross.sum(0), token.sum(0), own)),
            "shuffled": (maps, _alignment(shuffled, token.sum(0), own)),
            "pixels": (square, _alignment(patch.sum(0), own, own)),
            "cross_hsic": (("group", *maps), cross),
            "token_hsic": (("group", "tap", "cell"), token),
            "patch_hsic": (("group", *square), patch),
            "cell_size": ((), self.cell_size),
        }
        return xr.Dataset(variables, {"tap": self.names})


# Scores of maps -----------------------------------------------------------------------------------


def hit(maps, interior: bool = False) -> np.ndarray:
    """Share of tokens that are most like their own patch (hit@1); by chance 1 / patches.

    ``maps`` is (..., tokens, patches). With ``interior``, tokens at the image's border are left
    out. A token whose own patch never varies does not count.
    """
    maps = np.asarray(maps, dtype=float)
    own = np.diagonal(maps, axis1=-2, axis2=-1)
    best = np.where(np.isnan(maps), -np.inf, maps).argmax(-1)
    return _share(best == np.arange(maps.shape[-1]), ~np.isnan(own), interior)


def contrast(maps) -> np.ndarray:
    """Mean CKA of tokens (..., tokens, patches) with their own patch minus that with all others."""
    maps = np.asarray(maps, dtype=float)
    own = np.eye(maps.shape[-1], dtype=bool)
    return np.nanmean(maps[..., own], axis=-1) - np.nanmean(maps[..., ~own], axis=-1)


def edge_contrast(maps) -> np.ndarray:
    """How much more edge tokens are like patches at the image's edge than like interior ones.

    Over the tokens at the edge, and over the distances at which there are patches of both kinds:
    mean CKA (..., tokens, patches) with the ones minus that with the others.
    """
    return (np.asarray(maps, dtype=float) * _edge_weights(np.shape(maps)[-1])).sum((-2, -1))


def last_loss(scores) -> np.ndarray:
    """How much more of a score (..., taps) is lost at the last tap than at any one before it.

    Where none before loses anything, what is lost at the last one.
    """
    loss = -np.diff(np.asarray(scores, dtype=float), axis=-1)
    return loss[..., -1] - loss[..., :-1].max(-1).clip(min=0)


def expected_distance(maps, patch_size: float = 1.0) -> np.ndarray:
    """How far from its token a map's mass lies on average, in pixels.

    A map (..., tokens, patches) is taken as weights over the patches; a mass cannot be negative, so
    cells below 0 count as 0 here, and only here. The price is that the noise of few images adds
    mass everywhere and no interval over images shows it: compare maps of equally many images, and
    with :func:`uniform_distance`.
    """
    mass = np.nan_to_num(np.asarray(maps, dtype=float)).clip(min=0)
    distance, total = patch_size * _distances(mass.shape[-1]), mass.sum(-1)
    return np.nanmean((mass * distance).sum(-1) / np.where(total > 0, total, np.nan), axis=-1)


def uniform_distance(tokens: int, patch_size: float = 1.0) -> float:
    """The expected distance of a map that is the same everywhere, in pixels."""
    return float(patch_size * _distances(tokens).mean())


def interior_cells(tokens: int) -> np.ndarray:
    """Which of the tokens of a square grid do not lie at its border: bool (tokens,)."""
    inside = np.zeros((math.isqrt(tokens),) * 2, dtype=bool)
    inside[1:-1, 1:-1] = True
    return inside.ravel()


def estimate(record: xr.Dataset, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A smooth statistic of a record's maps (tap, tokens, patches) with its interval over images.

    Select the taps that it speaks of. For :func:`hit`, which is not smooth, there is
    :func:`estimate_hits`.
    """
    return jackknife(_sums(record), lambda *sums: statistic(_alignment(*sums)))


def estimate_hits(record: xr.Dataset, interior: bool = False) -> Estimate:
    """:func:`hit` of every tap (tap,) with bounds for what it would be with all possible images.

    A faint peak drowns in the noise of few images, so hits are too few and become more with more
    images; no resampling of the images at hand shows that. How far the own patch leads over another
    is smooth, and its jackknife interval is right. So ``low`` counts the tokens whose own patch
    leads over all others beyond doubt, and ``high`` those that do not trail any other beyond doubt.
    In simulations with known maps such bounds held the truth in at least 95 % of the cases.
    """
    sums, patches = _sums(record), record.sizes["patch"]

    def lead(*sums):
        maps = _alignment(*sums)
        return np.diagonal(maps, axis1=-2, axis2=-1)[..., None] - maps

    # For a false hit one certain lead must be wrong, for a false miss any of so many may be.
    one, any_of = jackknife(sums, lead), jackknife(sums, lead, 1 - (1 - 0.95) / patches)
    rivals = ~np.eye(patches, dtype=bool) & ~np.isnan(one.value)
    hits = np.where(rivals, one.low > 0, True).all(-1)
    misses, counts = (rivals & (any_of.high < 0)).any(-1), rivals.any(-1)
    found = hit(_alignment(*(part.sum(0) for part in sums)), interior)
    if np.isnan(one.low).all():
        return Estimate.around(found, np.full_like(found, np.nan))
    return Estimate(found, _share(hits, counts, interior), _share(~misses, counts, interior))


def _sums(record) -> tuple[np.ndarray, ...]:
    """The record's HSICs by group: of tokens with patches, of tokens, of patches."""
    cross, token = record["cross_hsic"].values, record["token_hsic"].values
    return cross, token, np.diagonal(record["patch_hsic"].values, axis1=1, axis2=2)


def _share(which: np.ndarray, counts: np.ndarray, interior: bool) -> np.ndarray:
    """Share of the tokens (..., tokens) that count, or of the interior ones."""
    which = np.where(counts, which, np.nan)
    return np.nanmean(which[..., interior_cells(which.shape[-1])] if interior else which, axis=-1)


def _alignment(cross: np.ndarray, token: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """CKA (..., tokens, patches) from HSICs; NaN where one's own is not positive."""
    token, patch = (np.sqrt(np.where(own > 0, own, np.nan)) for own in (token, patch))
    return cross / (token[..., :, None] * patch[..., None, :])


@functools.cache
def _edge_weights(tokens: int) -> np.ndarray:
    """Weights (tokens, patches) of :func:`edge_contrast`."""
    distance, inside = _distances(tokens), interior_cells(tokens)
    weights, rings = np.zeros((tokens, tokens)), 0
    for token in np.flatnonzero(~inside):
        for ring in distance[token] == np.unique(distance[token])[1:, None]:
            edge, interior = ring & ~inside, ring & inside
            if edge.any() and interior.any():
                weights[token] += edge / edge.sum() - interior / interior.sum()
                rings += 1
    return weights / max(1, rings)


def _distances(tokens: int) -> np.ndarray:
    """Distances (tokens, tokens) between the cells of a square grid, in cells."""
    y, x = np.divmod(np.arange(tokens), math.isqrt(tokens))
    return np.hypot(y[:, None] - y[None], x[:, None] - x[None])
