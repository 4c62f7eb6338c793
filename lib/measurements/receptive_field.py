"""Effective receptive fields: which pixels a location of a layer answers to (the paper's Fig. 6).

The field of a location is the absolute gradient of its channels with respect to the pixels,
averaged over channels, colours and images (Luo et al., 2016). The gradient of the *sum* of the
channels would be something else: channels of opposite sign cancel in it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.func import functional_call

from lib import records
from lib.intervals import Estimate, jackknife
from lib.measurements.places import layouts
from lib.taps import tap_names, tapping


@torch.enable_grad()
def receptive_field(
    model, x: Tensor, taps="blocks", channels=4, groups=16, seed=0, batch_size=32, device="cpu"
) -> xr.Dataset:
    """Effective receptive fields of the central location of some layers.

    ``x`` (n, colours, size, size) are images as the network takes them. Of every image ``channels``
    are drawn. A backward pass serves all images of a minibatch at once, and every image has its own
    channel in it: 64 images and 4 channels are 256 gradients per tap for the price of four backward
    passes. ``groups`` of images are kept apart for intervals; the graph of ``batch_size`` images is
    held in memory at once.

    Returns
    -------
    xarray.Dataset
        ``field`` (group, tap, y, x): sums over images, in a frame in which the location is at
        ``centre`` (tap), in pixels, on both axes. A grid with an even number of cells has no
        central one: the four around the centre take turns, each laid over the others. ``cell``
        (tap): the distance between neighbouring locations, in pixels.
    """
    if x.dim() != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(f"images must be square, (n, colours, size, size); got {tuple(x.shape)}")
    if channels < 1 or groups < 1:
        raise ValueError(f"cannot draw {channels} channels for {groups} groups of images")
    groups, fields = min(groups, len(x)), {}
    model, x = model.to(device), x.to(device)
    where = layouts(model, tap_names(model, taps), x[:1])
    weights = {name: weight.detach() for name, weight in model.named_parameters()}  # no gradients
    for first in range(0, len(x), batch_size):
        part = x[first : first + batch_size].detach().clone().requires_grad_()
        cells: dict[str, Tensor] = {}

        def receive(name, value, cells=cells):
            # A clone, as the model may go on to change the value in place.
            cells[name] = where[name].split(value.clone())[0]

        with tapping(model, taps, receive, graph=True):
            functional_call(model, weights, (part,))
        for name, value in cells.items():
            if name not in fields:
                fields[name] = _Field(name, value, x.shape[-1], groups, seed)
            fields[name].add(value, part, first, channels)
    sums = _in_one_frame([field.sums.numpy() for field in fields.values()])
    variables = {"field": (("group", "tap", "y", "x"), np.stack(sums, axis=1))}
    for name in ("centre", "cell"):
        variables[name] = ("tap", [getattr(field, name) for field in fields.values()])
    return xr.Dataset(variables, {"tap": list(fields)})


def _in_one_frame(fields: list[np.ndarray]) -> list[np.ndarray]:
    """Fields (..., size, size) with zeros behind them, up to the largest size."""
    frame = max(field.shape[-1] for field in fields)
    pads = [(0, 0)] * (fields[0].ndim - 2)
    return [np.pad(f, [*pads, *[(0, frame - f.shape[-1])] * 2]) for f in fields]


class _Field:
    """The fields of one tap, summed over images."""

    def __init__(self, name, value, size, groups, seed):
        side = round(value.shape[1] ** 0.5)
        if size % side:
            uneven = f"the {side} x {side} locations of {name!r} do not divide {size} pixels evenly"
            raise ValueError(f"{uneven}, so it is not known where its centre lies")
        self.side, self.cell, even = side, size // side, side % 2 == 0
        middle = (side // 2 - 1, side // 2) if even else (side // 2,)
        self.places = list(itertools.product(middle, middle))
        frame = size + self.cell if even else size
        self.centre = side // 2 * self.cell + (self.cell - 1) / 2
        stream = torch.Generator().manual_seed(seed)
        self.channels = torch.randperm(value.shape[2], generator=stream)
        self.sums = torch.zeros(groups, frame, frame, dtype=torch.float64)

    def add(self, value: Tensor, x: Tensor, first: int, channels: int) -> None:
        """Add the fields of some images; ``first`` is the number of the first of them."""
        image = torch.arange(len(x))
        for draw in range(channels):
            number = (first + image) * channels + draw
            # Within a group, images take turns as well.
            turns = first + image + channels * ((first + image) // len(self.sums)) + draw
            place = [self.places[turn % len(self.places)] for turn in turns.tolist()]
            location = torch.tensor([row * self.side + column for row, column in place])
            channel = self.channels[number % len(self.channels)]
            chosen = value[image, location, channel].sum()
            [gradient] = torch.autograd.grad(chosen, x, retain_graph=True)
            field = gradient.abs().mean(1).double().cpu() / channels
            for one, (row, column) in enumerate(place):
                y, x0 = ((self.side // 2 - at) * self.cell for at in (row, column))
                height, width = field.shape[1:]
                group = self.sums[(first + one) % len(self.sums)]
                group[y : y + height, x0 : x0 + width] += field[one]


def measure_receptive_fields(
    study, taps: Mapping, n_images=64, channels=4, seed=0, device="cpu", own: Mapping | None = None
) -> xr.Dataset:
    """Receptive fields of a study's networks, from the cache if nothing has changed.

    In float64 where the device has it: a unit that rounding switches on or off changes what is seen
    through it altogether, so that in float32 the third digit would depend on the machine.

    ``taps`` are by role. Of networks that the study does not have, under further names in ``taps``,
    ``own`` gives the role whose input a network takes, and the network. The result is that of
    :func:`receptive_field`, with taps named ``role/layer``, and coordinates ``role`` and ``layer``.
    """
    images = study.images(n_images, seed)
    precision = torch.float32 if torch.device(device).type == "mps" else torch.float64
    parts = []
    for role in taps:
        takes, model = (own or {}).get(role) or (role, study.model(role))
        x = study.to_input(images.pixels, takes).to(precision)
        model = model.to(precision)
        names = tap_names(model, taps[role])
        part = records.cached(receptive_field, model, x, names, channels, seed=seed, device=device)
        layers = part["tap"].values.tolist()
        labels = {"layer": ("tap", layers), "role": ("tap", [role] * len(layers))}
        parts.append(part.assign_coords(tap=[f"{role}/{name}" for name in layers], **labels))
    fields = _in_one_frame([part["field"].values for part in parts])
    parts = [
        part.drop_vars("field").assign(field=(part["field"].dims, field))
        for part, field in zip(parts, fields, strict=True)
    ]
    return xr.concat(parts, "tap")


# What the fields say ------------------------------------------------------------------------------


def radius(field: np.ndarray, centre: float, share: float = 0.9) -> float:
    """Radius, in pixels, of the circle around the location that holds a share of the field.

    ``field`` is (y, x), of any scale; between the distances of pixels it is interpolated. NaN if
    the location answers to no pixel.
    """
    y, x = (np.arange(size) - centre for size in field.shape)
    distance = np.hypot(y[:, None], x).ravel()
    # All pixels at one distance come in together.
    steps, which = np.unique(distance.round(6), return_inverse=True)
    mass = np.bincount(which, weights=field.ravel())
    held, steps = np.cumsum(mass[mass > 0]), steps[mass > 0]
    if not len(held):
        return np.nan
    return float(np.interp(share * held[-1], held, steps))


def patch_shares(field: np.ndarray, centre: float, patch_size: float) -> np.ndarray:
    """Shares (2 k + 1, 2 k + 1) of the field in squares, of which the middle is the location's.

    They sum to 1. Pixels that are cut by a square's edge count in part.
    """
    shares = field / field.sum()
    for axis, size in enumerate(field.shape):
        pixel = np.arange(size) - centre
        reach = int(np.ceil((np.abs(pixel).max() + 0.5) / patch_size - 0.5))
        start = (np.arange(-reach, reach + 1) - 0.5) * patch_size
        inside = np.minimum(pixel + 0.5, start[:, None] + patch_size)
        inside = (inside - np.maximum(pixel - 0.5, start[:, None])).clip(min=0)
        shares = np.moveaxis(np.tensordot(inside, shares, (1, axis)), 0, axis)
    return shares


def dominance(field: np.ndarray, centre: float, patch_size: float) -> float:
    """Share of the field in the location's own patch minus that in the strongest other patch."""
    shares = patch_shares(field, centre, patch_size)
    middle = tuple(size // 2 for size in shares.shape)
    own = shares[middle]
    shares[middle] = 0
    return float(own - shares.max())


def widening(vit: Sequence[float], resnet: Sequence[float]) -> float:
    """Least excess of the ViT's radii over the ResNet's at equal relative depth, lower half.

    ``vit`` and ``resnet`` are radii of blocks and units, input to output; the k-th of n ends at
    depth k / n. Between units the ResNet's radius is interpolated.
    """
    depth, units = (np.arange(1, len(radii) + 1) / len(radii) for radii in (vit, resnet))
    excess = np.asarray(vit) - np.interp(depth, units, resnet)
    return float(excess[depth <= 0.5].min())


def estimate(record: xr.Dataset, statistic: Callable[[dict], np.ndarray]) -> Estimate:
    """A statistic of fields and centres by tap, ``{tap: (field, centre)}``, with its interval.

    For instance ``lambda fields: radius(*fields["vit/blocks.0"])``, over images.
    """
    names, centres = record["tap"].values.tolist(), record["centre"].values.tolist()

    def of(fields):
        return statistic(dict(zip(names, zip(fields, centres, strict=True), strict=True)))

    return jackknife(record["field"].values, of)
