"""How far attention looks, and what single heads see.

An attention map says, for every token that asks (the query), how much it takes from every token
that answers (the keys). Maps are contracted to a few numbers per image and head while they exist:
no (images, heads, tokens, tokens) tensor outlives its block.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from scipy import stats
from torch import Tensor, nn
from torchmetrics import Metric

from lib.cka import MinibatchCKA, alignment, centred_gram, jackknife_margin
from lib.studies.images import Images
from lib.taps import MOST_PREFIX_TOKENS, TapError

# Heads sorted by distance say something only if their distances differ by at least this factor.
NEEDED_SPREAD = 2.0
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
    prefix = getattr(model, "num_prefix_tokens", None)
    maps = r"blocks\.\d+\.attn\.attn_drop"
    names = [name for name, _ in model.named_modules() if re.fullmatch(maps, name)]
    if not names or grid is None or prefix is None:
        raise TapError(
            f"{kind} has no attention of every token to every other, so its attention has no "
            "distance: measure it of Vision Transformers only"
        )
    if grid[0] != grid[1] or prefix > MOST_PREFIX_TOKENS:
        raise TapError(
            f"{kind} has {prefix} class and register tokens and {grid[0]} x {grid[1]} patches; "
            f"the grid must be square, with at most {MOST_PREFIX_TOKENS} tokens before it"
        )
    return names


def cell_distances(side: int) -> Tensor:
    """Distances (side^2, side^2), in patches, between the centres of the cells of a square grid."""
    row, column = (torch.arange(side**2) // side).float(), (torch.arange(side**2) % side).float()
    return torch.hypot(row[:, None] - row, column[:, None] - column)


def uniform_distance(side: int, patch_size: float = 1.0, window: int | None = None) -> float:
    """The distance, in pixels, of a head that looks at all patches alike.

    Parameters
    ----------
    side : int
        Of the square grid of patches.
    patch_size : float
        In pixels.
    window : int, optional
        Odd. Look only at the ``window`` x ``window`` patches around the query, as far as they lie
        within the image.
    """
    distance = cell_distances(side).double()
    seen = torch.ones_like(distance)
    if window is not None:
        rows = torch.arange(side**2) // side
        columns = torch.arange(side**2) % side
        near = [(axis[:, None] - axis).abs() <= window // 2 for axis in (rows, columns)]
        seen = (near[0] & near[1]).double()
    return float(patch_size * ((seen * distance).sum(1) / seen.sum(1)).mean())


class AttentionDistance(Metric):
    """Mean attention distance of every head, and what else tells how it looks (the paper's Fig. 3).

    The distance is that from a query's patch to the patches it takes from, weighted by attention,
    averaged over queries and images, in pixels of the image. Attention to class and register tokens
    has no distance. It is left out and reported apart, and the remaining weights are scaled to sum
    to 1: otherwise a head that gives half its mass to the class token would seem half as far.

    Parameters
    ----------
    taps : function, dict by role, str or list of str
        What :func:`lib.measure.measure` taps: attention maps (n, heads, tokens, tokens). By
        default :func:`attention_taps`, which refuses networks that have none.
    groups : int
        Minibatches are dealt to this many groups, which are kept apart for intervals.

    Examples
    --------
    >>> record = measure(study, ["vit"], [AttentionDistance()])      # doctest: +SKIP
    >>> record["distance"].sel(tap="vit/blocks.0.attn.attn_drop")    # doctest: +SKIP
    """

    full_state_update = True  # forward() would deal every minibatch to the first group
    is_differentiable = False

    def __init__(self, taps=attention_taps, groups: int = 20):
        super().__init__()
        if groups < 2:
            raise ValueError(f"intervals need at least 2 groups of minibatches, not {groups}")
        self.taps = taps
        self.groups = groups
        self.names: list[str] = []
        self.patch_sizes: list[float] = []
        self.sides: list[int] = []
        self.add_state("seen", torch.zeros(groups, dtype=torch.long), dist_reduce_fx="sum")

    @property
    def settings(self) -> dict:
        """What a record of this measurement depends on."""
        return {"taps": _written(self.taps), "groups": self.groups}

    def reset(self) -> None:
        """Forget all minibatches, and which taps they had."""
        super().reset()
        self.names, self.patch_sizes, self.sides = [], [], []

    def reduce(self, value: Tensor) -> dict[str, Tensor]:
        """What a hook keeps of attention maps (n, heads, tokens, tokens): no map, only its sums.

        Distances are in patches. ``keys`` (n, heads, patches) is how much every patch is looked at.
        """
        side, prefix = _grid(value)
        value = value if value.dtype in (torch.float32, torch.float64) else value.float()
        maps = value[:, :, prefix:, prefix:]
        mass = maps.sum(-1)
        elsewhere = value[:, :, prefix:, :prefix].sum(-1)
        off = (mass + elsewhere - 1).abs().max()
        if not off < 1e-2:
            raise TapError(
                f"the rows of an attention map must sum to 1, and here one is off by {off:.2g}: "
                "this is no softmax over tokens"
            )
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

    def reduce_images(self, images: Images) -> Images:
        """What is kept of the images: all of it, for as long as the minibatch lasts."""
        return images

    def update(
        self,
        activations: Mapping[str, Tensor] | None = None,
        *,
        images: Images | None = None,
        reduced: Mapping | None = None,
        batch: int | None = None,
    ) -> None:
        """Add one minibatch: attention maps by name, and the images they belong to.

        Or ``reduced``, what :meth:`reduce` made of the maps, with the images under ``"images"``.
        ``batch`` is the minibatch's number, which decides its group; by default they are counted.
        """
        if reduced is None:
            if activations is None or images is None:
                raise ValueError("give update() attention maps and the images they belong to")
            reduced = {name: self.reduce(value) for name, value in activations.items()}
        else:
            reduced = dict(reduced)
            images = reduced.pop("images")
        sizes = {name: len(parts["keys"]) for name, parts in reduced.items()}
        if wrong := [name for name, size in sizes.items() if size != len(images)]:
            raise ValueError(
                f"there are {len(images)} images, and {wrong[0]!r} has attention maps of "
                f"{sizes[wrong[0]]}: attention inside windows has no distance here"
            )
        if not self.names:
            self._make_room(reduced, images.pixels.shape[-1])
        if set(reduced) != set(self.names):
            odd = sorted(set(reduced) ^ set(self.names))
            raise ValueError(f"every minibatch must have the same taps; this differs in {odd}")
        group = int(self.seen.argmin()) if batch is None else batch % self.groups
        for place, name in enumerate(self.names):
            parts = dict(reduced[name])
            keys = parts.pop("keys")
            parts["common"] = keys @ cell_distances(self.sides[place]).mean(0).to(keys)
            covered = _coverage(images.boxes, self.sides[place], self.patch_sizes[place]).to(keys)
            parts["object_mass"] = torch.einsum("nhj,nj->nh", keys, covered)
            parts["object_area"] = covered.mean(1, keepdim=True).expand(len(keys), keys.shape[1])
            parts["images"] = torch.ones_like(parts["rows"])
            sums = torch.stack([parts[quantity].double().sum(0).cpu() for quantity in SUMS])
            state = getattr(self, f"sums_{place}")
            state[group] += sums.to(state.device)
        self.seen[group] += len(images)

    def _make_room(self, reduced, size) -> None:
        self.names = list(reduced)
        for place, parts in enumerate(reduced.values()):
            heads, patches = parts["keys"].shape[1:]
            self.sides.append(math.isqrt(patches))
            self.patch_sizes.append(size / self.sides[-1])
            empty = torch.zeros(self.groups, len(SUMS), heads, dtype=torch.float64)
            self.add_state(f"sums_{place}", empty, dist_reduce_fx="sum")

    def compute(self) -> xr.Dataset:
        """The heads' distances and what their intervals are made of.

        Returns
        -------
        xarray.Dataset
            Of every ``tap`` and ``head`` (NaN where a network has fewer heads): ``distance`` in
            pixels with its 95 % interval, ``distance_low`` and ``distance_high``; the same
            ``unnormalised``, with the mass on class and register tokens counted as distance 0;
            ``prefix_mass``, that mass; ``patches``, how many patches a query looks at, the inverse
            of the sum of squared weights; ``common``, the distance if every query of an image took
            what its average query takes, so that a head with the same distance aims at places and
            not at what is near; ``object_mass``, the share of attention that falls on
            the box around the image's object, and ``object_area``, the share of the image it
            covers. Of every tap: ``uniform``, the distance of uniform attention, and
            ``patch_size``, in pixels. ``sums`` (group, tap, quantity, head): see
            :func:`estimate`.
        """
        if not self.names:
            raise ValueError("attention distance needs at least one minibatch, and none was added")
        used = (self.seen > 0).cpu()
        states = [getattr(self, f"sums_{place}").cpu()[used] for place in range(len(self.names))]
        heads = max(state.shape[-1] for state in states)
        padded = [F.pad(state, (0, heads - state.shape[-1]), value=torch.nan) for state in states]
        sums = torch.stack(padded, dim=1).numpy()
        uniform = [
            uniform_distance(side, patch)
            for side, patch in zip(self.sides, self.patch_sizes, strict=True)
        ]
        record = xr.Dataset(
            {
                "sums": (("group", "tap", "quantity", "head"), sums),
                "uniform": ("tap", uniform),
                "patch_size": ("tap", self.patch_sizes),
            },
            coords={"tap": self.names, "quantity": list(SUMS), "head": np.arange(heads)},
        )
        means = {name: (("tap", "head"), value) for name, value in heads_of(record).items()}
        _, low, high = estimate(record, lambda heads: heads["distance"])
        means |= {"distance_low": (("tap", "head"), low), "distance_high": (("tap", "head"), high)}
        return record.assign(means)


def heads_of(record: xr.Dataset, sums: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What is known of every head (tap, head), from sums over images (tap, quantity, head).

    ``distance``, ``unnormalised``, ``common``, ``prefix_mass``, ``patches``, ``object_mass`` and
    ``object_area`` as in :meth:`AttentionDistance.compute`, and ``relative``, the distance divided
    by that of uniform attention.
    """
    sums = record["sums"].values.astype(float).sum(0) if sums is None else sums
    total = dict(zip(record["quantity"].values.tolist(), np.moveaxis(sums, -2, 0), strict=True))
    images, rows = (np.where(total[n] > 0, total[n], np.nan) for n in ("images", "rows"))
    patch_size, uniform = (record[n].values[:, None] for n in ("patch_size", "uniform"))
    distance = patch_size * total["distance"] / rows
    return {
        "distance": distance,
        "relative": distance / uniform,
        "unnormalised": patch_size * total["unnormalised"] / images,
        "common": patch_size * total["common"] / rows,
        "prefix_mass": total["prefix_mass"] / images,
        "patches": total["patches"] / rows,
        "object_mass": total["object_mass"] / rows,
        "object_area": total["object_area"] / images,
    }


def estimate(
    record: xr.Dataset, statistic: Callable[[dict[str, np.ndarray]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of heads with its interval over images (jackknife over groups of minibatches).

    Parameters
    ----------
    record : xarray.Dataset
        From :class:`AttentionDistance`. Select the taps that the statistic speaks of.
    statistic : callable
        Of what :func:`heads_of` returns, for instance
        ``lambda heads: np.nanmin(heads["relative"])``.

    Returns
    -------
    value, low, high
    """
    groups = record["sums"].values.astype(float)

    def of(sums):
        return np.asarray(statistic(heads_of(record, sums)))

    value, margin = of(groups.sum(0)), jackknife_margin(groups, of)
    return value, value - margin, value + margin


def most_local(heads: dict[str, np.ndarray]) -> float:
    """The least distance of any head, relative to uniform attention."""
    return float(np.nanmin(heads["relative"]))


def departure(heads: dict[str, np.ndarray]) -> float:
    """How far the head that is furthest from uniform attention is from it, relative to it."""
    return float(np.nanmax(np.abs(heads["relative"] - 1)))


def spread(heads: dict[str, np.ndarray]) -> float:
    """The greatest distance of any head divided by the least."""
    return float(np.nanmax(heads["distance"]) / np.nanmin(heads["distance"]))


# Heads as representations -------------------------------------------------------------------------


def head_contexts(value: Tensor, heads: int) -> Tensor:
    """What every head brings together at every patch: (heads, n, patches, width).

    Class and register tokens are left out. ``value`` (n, tokens, heads * width) is the tensor
    before the attention's output projection, in which timm has merged the heads: the tap
    ``blocks.*.attn.norm:input``, or ``blocks.*.attn.proj:input`` where there is no such norm.
    """
    if value.dim() != 3 or value.shape[-1] % heads:
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} is no context of {heads} heads: tap the input "
            "of the attention's projection (n, tokens, heads * width)"
        )
    tokens = value.shape[1]
    patches = value[:, tokens - math.isqrt(tokens) ** 2 :]
    return patches.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3)


class HeadCKA(MinibatchCKA):
    """CKA of any set of heads with any layer of another network (the paper's Fig. 5).

    A linear kernel of concatenated heads is the sum of their kernels, and so are its HSICs. One
    pass over single heads therefore answers for all subsets of them: see :func:`subset_cka`.

    As a baseline, pixels are averaged over windows of patches around every place, from one patch
    to the whole image: what heads would see that looked around without any choice.

    Parameters
    ----------
    taps : dict by role, str or list of str
        Taps (n, tokens, heads * width) are cut into heads (:func:`head_contexts`); feature maps
        (n, channels, h, w) are compared as they are.
    heads : int
        Of the tapped attention.
    patch_size : int
        In pixels, for the baseline.
    groups : int
        As in :class:`lib.cka.MinibatchCKA`.
    """

    def __init__(self, taps, heads: int, patch_size: int, groups: int = 20):
        super().__init__(taps, groups=groups)
        self.heads = heads
        self.patch_size = patch_size

    @property
    def settings(self) -> dict:
        """What a record of this measurement depends on."""
        return super().settings | {"heads": self.heads, "patch_size": self.patch_size}

    def reduce(self, value: Tensor) -> Tensor:
        """Centred Gram matrices: (heads, n, n) of contexts, (n, n) of a feature map."""
        if value.dim() == 4:
            return super().reduce(value)
        return torch.stack([centred_gram(one) for one in head_contexts(value, self.heads)])

    def reduce_images(self, images: Images) -> dict[str, Tensor]:
        """Centred Gram matrices of pixels averaged over windows of patches, by width of window."""
        patches = F.pixel_unshuffle(images.pixels.float(), self.patch_size)
        windows = range(1, 2 * patches.shape[-1], 2)
        return {f"pixels/{k}": centred_gram(window_means(patches, k)) for k in windows}

    def update(self, activations=None, *, reduced=None, batch=None) -> None:
        """Add one minibatch, as :meth:`lib.cka.MinibatchCKA.update` does."""
        if reduced is None:
            reduced = {name: self.reduce(x) for name, x in (activations or {}).items()}
        reduced = dict(reduced)
        singles = dict(reduced.pop("images", {}))
        for name, grams in reduced.items():
            singles |= {name: grams} if grams.dim() == 2 else _numbered(name, grams)
        super().update(reduced=singles, batch=batch)

    def compute(self) -> xr.Dataset:
        """What every CKA of sets of heads can be had from.

        Returns
        -------
        xarray.Dataset
            ``head_hsic`` (group, part, other_part): sums per group of minibatches. Parts are heads
            (``role/tap/head``), layers (``role/tap``) and the baseline (``pixels/window``).
        """
        record = super().compute()[["hsic"]]
        return record.rename(hsic="head_hsic", tap="part", other="other_part")


def window_means(patches: Tensor, window: int) -> Tensor:
    """Means (n, c, side, side) over the windows around every place, as far as they lie inside."""
    return F.avg_pool2d(patches, window, 1, window // 2, count_include_pad=False)


def sliding_windows(distance: Sequence[float], size: int) -> list[np.ndarray]:
    """Sets of ``size`` heads, from the most local to the most global, each one head further."""
    order = np.argsort(distance)
    return [order[first : first + size] for first in range(len(order) - size + 1)]


def subset_cka(
    hsic: np.ndarray, subsets: Sequence[Sequence[int]], others: Sequence[int]
) -> np.ndarray:
    """CKA (subsets, others) of concatenated parts with other parts.

    Parameters
    ----------
    hsic : array (parts, parts)
        Sum over groups of :meth:`HeadCKA.compute`'s ``head_hsic``.
    subsets : sequence of sequences of int
        Places of the parts that are taken together.
    others : sequence of int
        Places of the parts they are compared with.
    """
    together = np.zeros((len(subsets) + len(others), len(hsic)))
    for row, members in enumerate([*subsets, *([other] for other in others)]):
        together[row, list(members)] = 1
    return alignment(together @ hsic @ together.T)[: len(subsets), len(subsets) :]


def rank_correlation(distance: Sequence[float], similarity: np.ndarray) -> float:
    """Spearman's correlation of distance with similarity (subsets, layers), the largest of layers.

    -1 if every layer is the less similar to a subset the further its heads look.
    """
    return max(float(stats.spearmanr(distance, column).statistic) for column in similarity.T)


def _numbered(name: str, grams: Tensor) -> dict[str, Tensor]:
    return {f"{name}/{number}": gram for number, gram in enumerate(grams)}


def _grid(maps: Tensor) -> tuple[int, int]:
    """Side of the patch grid of attention maps, and how many tokens stand before the patches."""
    if maps.dim() != 4 or maps.shape[2] != maps.shape[3]:
        raise TapError(
            f"a tensor of shape {tuple(maps.shape)} is no attention map; it must be "
            "(images, heads, tokens, tokens)"
        )
    side = math.isqrt(maps.shape[2])
    prefix = maps.shape[2] - side**2
    if prefix > MOST_PREFIX_TOKENS:
        raise TapError(
            f"{maps.shape[2]} tokens are no square grid of patches with at most "
            f"{MOST_PREFIX_TOKENS} class and register tokens"
        )
    return side, prefix


def _coverage(boxes: Tensor, side: int, patch_size: float) -> Tensor:
    """How much of every patch lies inside an image's box: (n, patches), 0 to 1."""
    start = torch.arange(side, device=boxes.device) * patch_size
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)

    def overlap(low, high):
        inside = torch.minimum(high, start + patch_size) - torch.maximum(low, start)
        return (inside / patch_size).clamp(min=0)

    return (overlap(y0, y1)[:, :, None] * overlap(x0, x1)[:, None]).flatten(1)


def _written(taps) -> object:
    """Taps as they stand in a record: a function by its name."""
    if isinstance(taps, Mapping):
        return {role: _written(some) for role, some in taps.items()}
    return taps.__name__ if callable(taps) else taps
