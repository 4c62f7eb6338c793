"""Skip and branch: how much of a block's output its skip connection carries, and how much it adds.

A residual block computes z + f(z): the skip connection carries z, the branch adds f(z). Their norms
and the angle between them, token by token, are those of the paper's Fig. 7 and appendix E. Each z
waits in the hook for its own f (or the other way round) and no longer: what is kept of the two are
a few sums.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lib.intervals import Estimate, jackknife
from lib.measure import Measurement, home_of_float64
from lib.measurements.places import layout
from lib.measurements.sublayers import branch_taps, sublayers

TOKENS = ("class", "patch")
QUANTITIES = ("ratio", "cosine", "branch_cosine", "skip_norm", "branch_norm")
EDGES = 2.0 ** np.linspace(-8, 12, 20 * 16 + 1)  # of the ratio, 16 bins to an octave


class Comparison(NamedTuple):
    """What is kept of a z and its f(z)."""

    images: int
    projected: bool  # whether z is a projection
    sums: Tensor  # (2, 5, 2): class token and patches, QUANTITIES, sum and number of tokens
    histogram: Tensor  # (2, bins) of the ratios
    tokens: Tensor  # (patches, 2): sum and number of the ratios at each; none of feature maps
    branch: str = ""  # tap of the branch, if it is not the tap that fired last


def compare(skip: Tensor, branch: Tensor, prefix=0, class_token=False, projected=False):
    """Norms of z and f(z), their ratio and their cosines, summed over images: a Comparison.

    ``skip`` and ``branch`` are (n, tokens, width), or feature maps (n, channels, h, w), of which
    every location is a token. Of the ``prefix`` tokens before the patches all but a class token are
    left out. A token with f(z) = 0 has an infinite ratio. Ratios and cosines that are undefined
    (0/0) do not count.
    """
    if skip.shape != branch.shape:
        shapes = f"{tuple(skip.shape)} and {tuple(branch.shape)}"
        raise ValueError(f"a skip and its branch have the same shape; got {shapes}")
    axis = 1 if skip.dim() == 4 else -1
    z, f = skip.float(), branch.float()

    def dot(a, b):
        product = torch.linalg.vecdot(a, b, dim=axis).flatten(1)
        return product.to(home_of_float64(product.device), torch.float64)

    zz, zf, ff = dot(z, z), dot(z, f), dot(f, f)
    z_norm, f_norm = zz.sqrt(), ff.sqrt()
    out_norm = (zz + 2 * zf + ff).clamp(min=0).sqrt()  # of z + f
    cosines = (zz + zf) / (z_norm * out_norm), zf / (z_norm * f_norm)
    values = torch.stack([z_norm / f_norm, *cosines, z_norm, f_norm])
    groups = values[..., : int(class_token)], values[..., prefix:]
    sums = torch.stack([_sum_and_count(group.flatten(1)) for group in groups])
    histogram = torch.stack([_histogram(group[0]) for group in groups])
    tokens = _sum_and_count(groups[1][0].T[: 0 if axis == 1 else None])
    return Comparison(len(skip), projected, sums, histogram, tokens)


class NormRatio(Measurement):
    """How long the skip z of every sub-layer is beside what its branch f(z) adds, and their angle.

    For the class token and for patches (or locations) apart: the ratio ‖z‖ / ‖f(z)‖ of the paper's
    Fig. 7, as the mean of the tokens' ratios and, because a few short f(z) make a mean long, as
    their median; the cosine of z with z + f(z), appendix E.2, and of z with f(z); mean norms.

    The median is read from a histogram of the ratios, which adds up over minibatches and processes.
    It is interpolated within its bin, 16 to an octave, from 1/256 to 4096; outside it is 0 or
    infinite.
    """

    def __init__(self, taps=branch_taps):
        super().__init__(taps)

    def reducer(self, model, names, x):
        """Of a skip and its branch, how they compare: the first to fire waits for the other."""
        layers = {tap: layer for layer in sublayers(model) for tap in (layer.skip, layer.branch)}
        tokens = layout(model)
        waiting: dict[str, Tensor] = {}

        def reduce(name, value):
            layer = layers[name]
            if name == layer.branch and layer.transposed:
                value = value.mT
            partner = layer.skip if name == layer.branch else layer.branch
            if partner not in waiting:
                waiting[name] = value
                return None
            other = waiting.pop(partner)
            skip, branch = (other, value) if name == layer.branch else (value, other)
            one = compare(skip, branch, tokens.prefix, tokens.class_token, layer.projected)
            return one._replace(branch=layer.branch)

        return reduce

    def size(self, kept) -> int:
        return kept.images

    def update(self, reduced, images=None, batch=None) -> None:
        # A projection may be computed after the branch; the pair is named by its branch.
        split = [(*name.rpartition("/"), one) for name, one in reduced.items()]
        named = {f"{role}{slash}{one.branch or tap}": one for role, slash, tap, one in split}
        super().update(named, images, batch)

    def make_room(self, reduced, images) -> None:
        some, grouped = next(iter(reduced.values())), (self.groups, len(reduced))
        self.projected = [one.projected for one in reduced.values()]
        most = max(len(one.tokens) for one in reduced.values())
        shapes = {name: (*grouped, *getattr(some, name).shape) for name in ("sums", "histogram")}
        self.room({"sums": some.sums}, **shapes, tokens=(len(reduced), most, 2))

    def add(self, group, reduced, images) -> None:
        for place, name in enumerate(self.names):
            one = reduced[name]
            self.sums[group, place] += one.sums
            self.histogram[group, place] += one.histogram
            self.tokens[place, : len(one.tokens)] += one.tokens

    def results(self) -> xr.Dataset:
        """The measured quantities and what their intervals are made of.

        ``residual``, ``residual_low``, ``residual_high`` (branch, token, quantity): estimate and
        95 % interval (jackknife over groups of minibatches) of ``ratio``, ``cosine``,
        ``branch_cosine``, ``skip_norm``, ``branch_norm`` and ``median``, for the ``class`` token
        and for the mean of ``patch`` tokens. Norms in units of the network. ``token_ratio``
        (branch, position): the mean ratio at every patch of a transformer, row by row.
        ``projected`` (branch): whether the skip is a projection. ``residual_sums``,
        ``residual_histogram``: sums per group. A branch is named as its tap.
        """
        sums, histogram = (state.cpu().double().numpy() for state in (self.sums, self.histogram))
        means = jackknife(sums, _mean)
        medians = jackknife(histogram, lambda counts: median(counts)[..., None])
        cells, kinds = ("branch", "token", "quantity"), [*QUANTITIES, "median"]
        variables = {
            f"residual{end}": (cells, np.concatenate([vars(means)[of], vars(medians)[of]], -1))
            for of, end in (("value", ""), ("low", "_low"), ("high", "_high"))
        }
        # fmt: off
        variables |= {
            "token_ratio": (("branch", "position"), _mean(self.tokens.cpu().numpy())),
            "projected": ("branch", self.projected),
            "residual_sums": (("group", "branch", "token", "summed", "sum_and_count"), sums),
            "residual_histogram": (("group", "branch", "token", "bin"), histogram),
        }
        names = {"branch": self.names, "token": list(TOKENS), "quantity": kinds,
                 "summed": list(QUANTITIES), "sum_and_count": ["sum", "count"]}
        # fmt: on
        return xr.Dataset(variables, names)


def median(histogram) -> np.ndarray:
    """Medians of ratios (...) from histograms (..., bins); NaN where nothing was counted."""
    counts = np.asarray(histogram, dtype=float)
    below = np.cumsum(counts, axis=-1)
    half = below[..., -1:] / 2
    place = (below < half).sum(-1, keepdims=True)  # the first bin that reaches the half
    within = np.take_along_axis(counts, place, -1)
    before = np.take_along_axis(below, place, -1) - within
    with np.errstate(invalid="ignore"):
        share = (half - before) / within
    edges = np.log2(EDGES)
    inner = np.clip(place - 1, 0, len(edges) - 2)  # the first bin and the last are open
    value = 2 ** (edges[inner] + share * (edges[inner + 1] - edges[inner]))
    value = np.where(place == 0, 0.0, np.where(place > len(edges) - 1, np.inf, value))
    return np.where(half > 0, value, np.nan)[..., 0]


def _sum_and_count(values: Tensor) -> Tensor:
    """Sum and number (..., 2) of the values (..., n) that are defined."""
    defined = ~values.isnan()
    return torch.stack([values.nan_to_num(0, torch.inf, -torch.inf).sum(-1), defined.sum(-1)], -1)


def _histogram(ratios: Tensor) -> Tensor:
    """Counts in float64 of ratios of any shape, in an open bin, the bins of EDGES, an open bin."""
    ratios = ratios[~ratios.isnan()]
    edges = torch.as_tensor(EDGES, dtype=ratios.dtype, device=ratios.device)
    bins = torch.bucketize(ratios, edges, right=True)
    return torch.bincount(bins, minlength=len(EDGES) + 1).to(ratios.dtype)


def _mean(sums: np.ndarray) -> np.ndarray:
    """Means (...) from sums and counts (..., 2); NaN where nothing was counted."""
    total, count = sums[..., 0], sums[..., 1]
    return total / np.where(count > 0, count, np.nan)


# Curves over depth --------------------------------------------------------------------------------

KINDS = dict.fromkeys(("attn", "ls1", "mlp_tokens"), "attention")
KINDS |= dict.fromkeys(("mlp", "ls2", "mlp_channels"), "mlp")


class Curves:
    """What a record says about sub-layers, as curves over depth.

    ``curves("vit", "attention", "class")`` is the norm ratio of the class token at every attention,
    from input to output. Sub-layers are ``"attention"`` (a Mixer's token mixing takes its place)
    and ``"mlp"``, ``"all"`` of them in order, or the ``"unit"`` of a ResNet.

    ``record`` has the variables of :class:`NormRatio`. In ``cast`` are other roles to play some
    roles, for instance ``{"vit": "vit_untrained"}``.
    """

    def __init__(self, record: xr.Dataset, cast: dict[str, str] | None = None):
        self._cast = cast or {}
        self._roles, layers = np.array([b.split("/", 1) for b in record["branch"].values]).T
        self._kinds = np.array([KINDS.get(layer.rpartition(".")[2], "unit") for layer in layers])
        self._projected = record["projected"].values
        self._values = record["residual"].values
        self._quantities = record["quantity"].values.tolist()

    def __call__(self, role: str, sublayer="all", token="patch", quantity="ratio") -> np.ndarray:
        """One value per sub-layer, (depth,)."""
        which = TOKENS.index(token), self._quantities.index(quantity)
        return self._values[self._where(role, sublayer), *which]

    def projected(self, role: str) -> np.ndarray:
        """Which of a role's skips are projections: bool (depth,)."""
        return self._projected[self._where(role, "all")]

    def _where(self, role, sublayer):
        role = self._cast.get(role, role)
        wanted = ("attention", "mlp", "unit") if sublayer == "all" else (sublayer,)
        where = np.flatnonzero((self._roles == role) & np.isin(self._kinds, wanted))
        if not len(where):
            known = ", ".join(dict.fromkeys(self._roles.tolist()))
            what = "no sub-layer" if sublayer == "all" else f"no {sublayer}"
            raise ValueError(f"{what} of {role!r} was measured; measured were {known}")
        return where


def estimate(record, statistic: Callable[[Curves], float], cast=None) -> Estimate:
    """A statistic of a record's curves with its interval over images; ``cast`` as for Curves."""
    curves = Curves(record, cast)

    def of_sums(sums, histogram):
        part = copy.copy(curves)
        part._values = np.concatenate([_mean(sums), median(histogram)[..., None]], axis=-1)
        return float(statistic(part))

    return jackknife((record["residual_sums"].values, record["residual_histogram"].values), of_sums)
