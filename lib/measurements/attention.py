"""How far attention reaches: the distances of heads.

An attention map says, for every token that asks (the query), how much it takes from every token
that answers (the keys). Maps are contracted to a few numbers per image and head while they exist:
no (images, heads, tokens, tokens) tensor outlives its block.
"""

import math
import re
from collections.abc import Callable

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from lib.intervals import Estimate, jackknife
from lib.measure import Measurement
from lib.measurements.places import layouts
from lib.taps import TapError

# What is summed over images, of every head. Means over queries; "rows" counts those queries that
# look at patches at all, and whatever follows it is over patches alone, class token left out.
SUMS = ("images", "unnormalised", "prefix_mass", "object_area", "rows", "distance", "patches")
SUMS += ("common", "object_mass")


def attention_taps(model: nn.Module) -> list[str]:
    """The taps of a ViT's attention maps (n, heads, tokens, tokens), one per block.

    Known are timm's transformers in which every token may look at every other: plain attention,
    relative positions, EVA and rotary positions, with or without class and register tokens.
    """
    kind = type(model).__name__
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    maps = r"blocks\.\d+\.attn\.attn_drop"
    names = [name for name, _ in model.named_modules() if re.fullmatch(maps, name)]
    if not names or grid is None or not hasattr(model, "num_prefix_tokens"):
        why = "has no attention of every token to every other, so its attention has no distance"
        raise TapError(f"{kind} {why}: measure it of Vision Transformers only")
    if grid[0] != grid[1]:
        raise TapError(f"{kind} has {grid[0]} x {grid[1]} patches; the grid must be square")
    return names


def cell_distances(side: int) -> Tensor:
    """Distances (side^2, side^2), in patches, between the centres of the cells of a square grid."""
    row, column = (torch.arange(side**2) // side).float(), (torch.arange(side**2) % side).float()
    return torch.hypot(row[:, None] - row, column[:, None] - column)


def uniform_distance(side: int, patch_size: float = 1.0, window: int | None = None) -> float:
    """The distance, in pixels, of a head that looks at all patches of a square grid alike.

    Or at the ``window`` x ``window`` patches around the query alone, an odd number, as far as they
    lie within the image. ``patch_size`` is in pixels.
    """
    distance, cells = cell_distances(side).double(), torch.arange(side**2)
    seen = torch.ones_like(distance)
    for axis in (cells // side, cells % side) if window is not None else ():
        seen *= (axis[:, None] - axis).abs() <= window // 2
    return float(patch_size * ((seen * distance).sum(1) / seen.sum(1)).mean())


class AttentionDistance(Measurement):
    """Mean attention distance of every head, and what else tells how it looks (the paper's Fig. 3).

    The distance is that from a query's patch to the patches it takes from, weighted by attention,
    averaged over queries and images, in pixels of the image. Attention to class and register tokens
    has no distance. It is left out and reported apart, and the remaining weights are scaled to sum
    to 1: otherwise a head that gives half its mass to the class token would seem half as far.
    """

    needs = ("boxes",)

    def __init__(self, taps=attention_taps):
        super().__init__(taps)

    def reducer(self, model, names, x):
        blocks = [name.partition(".attn.")[0] for name in names]
        where = layouts(model, blocks[:1], x)[blocks[0]]
        return lambda name, value: self.reduce(value, where.prefix)

    def reduce(self, value: Tensor, prefix: int = 0) -> dict[str, Tensor]:
        """Of attention maps (n, heads, tokens, tokens) sums alone, distances in patches.

        ``keys`` (n, heads, patches) is how much attention every patch gets.
        """
        side = _side(value, prefix)
        value = value if value.dtype in (torch.float32, torch.float64) else value.float()
        maps = value[:, :, prefix:, prefix:]
        mass = maps.sum(-1)
        elsewhere = value[:, :, prefix:, :prefix].sum(-1)
        off = (mass + elsewhere - 1).abs().max()
        if not off < 1e-2:
            sums = f"the rows of an attention map must sum to 1, and here one is off by {off:.2g}"
            raise TapError(f"{sums}: this is no softmax over tokens")
        # Contracted without a temporary of the maps' size.
        moment = torch.einsum("nhij,ij->nhi", maps, cell_distances(side).to(maps))
        square = torch.linalg.vector_norm(maps, dim=-1).square()
        looks = mass > 0
        scale = torch.where(looks, 1 / mass, 0)
        return {
            "unnormalised": moment.mean(-1),
            "prefix_mass": elsewhere.mean(-1),
            "rows": looks.to(mass).mean(-1),
            "distance": (moment * scale).mean(-1),
            "patches": torch.where(looks, mass.square() / square, 0).mean(-1),
            "keys": (scale[:, :, None] @ maps)[:, :, 0] / side**2,
        }

    def size(self, kept) -> int:
        return len(kept["keys"])

    def make_room(self, reduced, images) -> None:
        heads, patches = zip(*(parts["keys"].shape[1:] for parts in reduced.values()), strict=True)
        self.sides = [math.isqrt(n) for n in patches]
        self.patch_sizes = [images.pixels.shape[-1] / side for side in self.sides]
        empty = torch.zeros(self.groups, len(heads), len(SUMS), max(heads), dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx="sum")

    def add(self, group, reduced, images) -> None:
        for place, name in enumerate(self.names):
            parts = dict(reduced[name])
            keys = parts.pop("keys")
            parts["common"] = keys @ cell_distances(self.sides[place]).mean(0).to(keys)
            covered = _coverage(images.boxes, self.sides[place], self.patch_sizes[place]).to(keys)
            parts["object_mass"] = torch.einsum("nhj,nj->nh", keys, covered)
            parts["object_area"] = covered.mean(1, keepdim=True).expand(len(keys), keys.shape[1])
            parts["images"] = torch.ones_like(parts["rows"])
            sums = torch.stack([parts[quantity].double().sum(0).cpu() for quantity in SUMS])
            self.sums[group, place, :, : keys.shape[1]] += sums.to(self.sums.device)

    def results(self) -> xr.Dataset:
        """The heads' distances and what their intervals are made of.

        Of every ``tap`` and ``head`` (NaN where a network has fewer heads): ``distance`` in pixels
        with its 95 % interval, ``distance_low`` and ``distance_high``; the same ``unnormalised``,
        with the mass on class and register tokens counted as distance 0; ``prefix_mass``, that
        mass; ``patches``, how many patches a query looks at, the inverse of the sum of squared
        weights; ``common``, the distance if every query of an image took what its average query
        takes, so that a head with the same distance aims at places and not at what is near;
        ``object_mass``, the share of attention that falls on the box around the image's object, and
        ``object_area``, the share of the image it covers. Of every tap: ``uniform``, the distance
        of uniform attention, and ``patch_size``, in pixels. ``head_sums`` (group, tap, head_sum,
        head): see :func:`estimate`.
        """
        coords = {"tap": self.names, "head_sum": list(SUMS), "head": np.arange(self.sums.shape[-1])}
        uniform = map(uniform_distance, self.sides, self.patch_sizes)
        taps = {"uniform": ("tap", list(uniform)), "patch_size": ("tap", self.patch_sizes)}
        sums = (("group", "tap", "head_sum", "head"), self.sums.cpu().numpy())
        record = xr.Dataset({"head_sums": sums, **taps}, coords)
        found = estimate(record, lambda heads: heads["distance"])
        means = heads_of(record) | {"distance_low": found.low, "distance_high": found.high}
        return record.assign({name: (("tap", "head"), value) for name, value in means.items()})


def heads_of(record: xr.Dataset, sums: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What is known of every head (tap, head), from sums over images (tap, head_sum, head).

    ``distance``, ``unnormalised``, ``common``, ``prefix_mass``, ``patches``, ``object_mass`` and
    ``object_area`` as in :meth:`AttentionDistance.compute`, and ``relative``, the distance divided
    by that of uniform attention.
    """
    sums = record["head_sums"].values.astype(float).sum(0) if sums is None else sums
    total = dict(zip(record["head_sum"].values.tolist(), np.moveaxis(sums, -2, 0), strict=True))
    images, rows = (np.where(total[n] > 0, total[n], np.nan) for n in ("images", "rows"))
    patch_size, uniform = (record[n].values[:, None] for n in ("patch_size", "uniform"))
    distance = patch_size * total["distance"] / rows
    found = {"distance": distance, "relative": distance / uniform}
    found["unnormalised"] = patch_size * total["unnormalised"] / images
    found["common"] = patch_size * total["common"] / rows
    found |= {name: total[name] / images for name in ("prefix_mass", "object_area")}
    return found | {name: total[name] / rows for name in ("patches", "object_mass")}


def estimate(record: xr.Dataset, statistic: Callable[[dict[str, np.ndarray]], float]) -> Estimate:
    """A statistic of what :func:`heads_of` returns with its interval over images.

    Select the taps that it speaks of. ``lambda heads: np.nanmin(heads["relative"])`` is one.
    """
    return jackknife(record["head_sums"].values, lambda sums: statistic(heads_of(record, sums)))


def _side(maps: Tensor, prefix: int) -> int:
    """Side of the patch grid of attention maps with some tokens before the patches."""
    if maps.dim() != 4 or maps.shape[2] != maps.shape[3]:
        wanted = "it must be (images, heads, tokens, tokens)"
        raise TapError(f"a tensor of shape {tuple(maps.shape)} is no attention map; {wanted}")
    side = math.isqrt(maps.shape[2] - prefix)
    if side**2 != maps.shape[2] - prefix:
        tokens = f"{maps.shape[2]} tokens, {prefix} of them before the patches"
        raise TapError(f"{tokens}, are no square grid")
    return side


def _coverage(boxes: Tensor, side: int, patch_size: float) -> Tensor:
    """How much of every patch lies inside an image's box: (n, patches), 0 to 1."""
    start = torch.arange(side, device=boxes.device) * patch_size
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)

    def overlap(low, high):
        inside = torch.minimum(high, start + patch_size) - torch.maximum(low, start)
        return (inside / patch_size).clamp(min=0)

    return (overlap(y0, y1)[:, :, None] * overlap(x0, x1)[:, None]).flatten(1)
