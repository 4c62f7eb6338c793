"""Linear probes: what can be read from a layer's tokens by a linear map, the network left as it is.

Classes are read by least squares on targets of +1 and -1, the object's place by least squares on
its centre. Both have a closed form, so thousands of probes (every token of every layer, the paper's
Fig. 11) take seconds.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from lib.measure import Measurement
from lib.measurements.localisation import coarsen
from lib.measurements.places import Layout, layouts

PENALTIES = tuple(8.0**power for power in range(7))
READOUTS = ("class token", "mean of patches", "mean of all", "first patch")
ARRANGEMENTS = ("patches side by side", "mean of patches")
# fmt: off
AXES = {"right": ("tap", "draw", "readout", "image"), "token_right": ("tap", "draw", "image"),
        "token_accuracy": ("tap", "draw", "probe_cell"), "penalty": ("tap", "draw", "probe"),
        "centre": ("tap", "arrangement", "image", "axis")}
# fmt: on


class Part(NamedTuple):
    """Features (..., n, width) of n images and what is to be read from them, (n, outputs)."""

    features: Tensor
    targets: Tensor


def ridge(fit: Part, penalties) -> tuple[Tensor, Tensor]:
    """Linear maps that minimise squared error + penalty x squared weights, one for every penalty.

    They are weights (..., width, penalties, outputs) and biases (..., penalties, outputs) for
    features as they are. The penalty is on the weights of standardised features, of mean 0 and
    variance 1 over the images of the fit, and not on the bias. (The code this follows appends a
    constant feature of 100 instead, which penalises the bias by a ten-thousandth.)
    """
    mean = fit.features.mean(-2, keepdim=True)
    x = fit.features - mean
    deviation = x.square().mean(-2, keepdim=True).sqrt()
    # What is no more than rounding is no feature.
    deviation = torch.where(deviation > 4 * torch.finfo(x.dtype).eps * mean.abs(), deviation, 1)
    x /= deviation
    y = fit.targets.to(x.dtype)
    y_mean = y.mean(-2, keepdim=True)
    y = (y - y_mean).expand(*x.shape[:-1], -1)
    # With K = X X', (X'X + p)^-1 X'Y = X' (K + p)^-1 Y: take the smaller of the two matrices.
    wide = x.shape[-1] > x.shape[-2]
    gram, right = (x @ x.mT, y) if wide else (x.mT @ x, x.mT @ y)
    one = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    weights = torch.cat([torch.linalg.solve(gram + p * one, right) for p in penalties], dim=-1)
    weights = (x.mT @ weights if wide else weights) / deviation.mT
    shape = (len(penalties), y.shape[-1])
    bias = y_mean - (mean @ weights).unflatten(-1, shape).squeeze(-3)
    return weights.unflatten(-1, shape), bias


def read(features: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """What :func:`ridge`'s maps make of features (..., m, width): (..., m, penalties, outputs)."""
    return (features @ weights.flatten(-2)).unflatten(-1, bias.shape[-2:]) + bias.unsqueeze(-3)


def read_out(
    fit: Part, held_out: Part, features: Tensor, merit: Callable, penalties=PENALTIES
) -> tuple[Tensor, float]:
    """Read targets by the ridge whose penalty does best on training images that were held out.

    Of ``features`` (..., m, width) the outputs (..., m, outputs), and the penalty. Leading axes
    ``(tokens, n, width)`` have a probe each, all with the same penalty. ``merit`` is of outputs and
    targets (..., n, outputs), more is better; of equal ``penalties``, in increasing order, the
    strongest is taken.
    """
    maps = ridge(fit, penalties)
    merits = merit(read(held_out.features, *maps).movedim(-2, 0), held_out.targets)
    merits = merits.reshape(len(penalties), -1).mean(1)
    best = len(penalties) - 1 - int(merits.flip(0).argmax())
    return read(features, *maps)[..., best, :], penalties[best]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of images (..., n, classes) whose largest output is the target's."""
    return (outputs.argmax(-1) == targets.argmax(-1)).float().mean(-1)


def negative_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Minus the mean squared error over images and outputs (..., n, outputs)."""
    return -(outputs - targets).square().mean((-2, -1))


def signs(labels: Tensor, classes: int) -> Tensor:
    """Labels (n,) -> targets (n, classes): +1 for an image's class, -1 for all others."""
    return 2.0 * F.one_hot(labels, classes) - 1


def few_shot(labels: Tensor, shots: int, draws: int, seed: int = 0) -> list[Tensor]:
    """Indices of ``shots`` images of every class, several times; no two draws share an image."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = {int(label): order[labels[order] == label] for label in labels.unique()}
    rarest = min(by_class, key=lambda label: len(by_class[label]))
    if len(by_class[rarest]) <= shots * draws:
        raise ValueError(
            f"{draws} draws of {shots} images per class, and images to test on, need more than "
            f"{shots * draws} of each, and there are only {len(by_class[rarest])} of class "
            f"{rarest} among {len(labels)}: measure more images, or lower shots or draws"
        )
    return [
        torch.cat([members[draw * shots : (draw + 1) * shots] for members in by_class.values()])
        for draw in range(draws)
    ]


class Probes(Measurement):
    """What can be read from the tapped layers: the image's class and the object's place.

    ``shots`` images of every class are drawn several times, never the same ones. Each draw fits its
    probes for the class, and the next draw's images choose their penalty. Probes for the place are
    fitted on all draws but the last, which chooses theirs. All other images test all probes.

    Finer grids are averaged down to ``grid`` x ``grid`` tokens. Where a finer grid has fewer
    channels than ``width``, neighbouring locations are first laid side by side as channels, as far
    as they fit: the paper's device for the early stages of ResNets.

    Features are kept until the probes are fitted, in float32, of all tokens, and may not need more
    than ``budget`` bytes. 2048 images of 64 tokens of width 96 are 50 MB per tap. So measure one
    network at a time.
    """

    needs = ("labels", "boxes")

    def __init__(
        self, taps="blocks", grid=None, width=None, shots=10, draws=3, seed=0, budget=2 * 2**30
    ):
        super().__init__(taps)
        if draws < 2:
            raise ValueError(f"the spread over draws needs at least 2 of them, not {draws}")
        self.grid, self.width, self.budget = grid, width, budget
        self.shots, self.draws, self.seed = shots, draws, seed
        for state in ("order", "labels", "centres"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def reduce(self, value: Tensor, where: Layout = Layout()) -> Tensor:  # noqa: B008
        """What a hook keeps of an activation: (n, 2 + tokens, width), float32.

        The class token (NaN if there is none), the mean of all tokens, and the patch tokens.
        """
        if self.width and self.grid and value.dim() == 4:
            value = value.movedim(-1, 1) if where.channels_last else value
            value, where = into_channels(value, self.width, self.grid), Layout()
        cells, others = where.split(value.float())
        count = others.shape[1] + cells.shape[1]
        everything = (others.sum(1, keepdim=True) + cells.sum(1, keepdim=True)) / count
        first = others[:, :1] if where.class_token else torch.full_like(everything, torch.nan)
        return torch.cat([first, everything, coarsen(cells, self.grid)], dim=1).cpu()

    def reducer(self, model, names, x):
        found = layouts(model, names, x)
        return lambda name, value: self.reduce(value, found[name])

    def update(self, reduced, images=None, batch=None) -> None:
        self.number = int(self.batches) if batch is None else batch
        super().update(reduced, images, batch)

    def make_room(self, reduced, images) -> None:
        self.kept = 0
        for place in range(len(self.names)):
            self.add_state(f"features_{place}", [], dist_reduce_fx="cat")

    def add(self, group, reduced, images) -> None:
        self.kept += sum(x.nbytes for x in reduced.values())
        if self.kept > self.budget:
            budget = f"the budget of {self.budget / 2**30:.2g} GiB"
            advice = "probe one network at a time, fewer taps or fewer images, or raise budget"
            taps = f"the features of {len(self.names)} taps"
            raise ValueError(f"{taps} need more than {budget}: {advice}")
        for place, name in enumerate(self.names):
            getattr(self, f"features_{place}").append(reduced[name])
        (x0, y0, x1, y1), n = images.boxes.unbind(1), len(images)
        self.order.append(torch.full((n,), self.number))
        self.labels.append(images.labels.cpu())
        self.centres.append(torch.stack([x0 + x1, y0 + y1], dim=1).cpu() / 2)

    def results(self) -> xr.Dataset:
        """Fit and test all probes.

        ``right`` (tap, draw, readout, image): whether the class of a test image was read rightly, 1
        or 0, NaN for a read-out that the network does not have. ``token_right`` (tap, draw, image):
        the share of the single-token probes that read it rightly. ``token_accuracy`` (tap, draw,
        probe_cell): the share of images each of them read rightly. All are NaN for features that
        are not finite. ``penalty`` (tap, draw, readout or single tokens): as chosen. ``centre``
        (tap, arrangement, image, axis): the object's centre as read from the layer, in pixels;
        ``true_centre`` (image, axis).
        """
        # Several processes have dealt the minibatches among them.
        order = torch.argsort(_together(self.order), stable=True)
        labels, centres = _together(self.labels)[order], _together(self.centres)[order]
        dealt = not torch.equal(order, torch.arange(len(order)))
        draws = few_shot(labels, self.shots, self.draws, self.seed)
        test = torch.ones(len(labels), dtype=torch.bool)
        test[torch.cat(draws)] = False
        test = test.nonzero()[:, 0]
        per_tap = []
        for place, name in enumerate(self.names):
            # Tokens first, so that each has its matrix of features.
            features = _together(getattr(self, f"features_{place}"))
            features = (features[order] if dealt else features).transpose(0, 1)
            if not features[1:].isfinite().all():
                warnings.warn(f"features of {name} are not finite: not probed", stacklevel=2)
            objects = _find_objects(features, centres, draws, test)
            per_tap.append({**_probe_classes(features, labels, draws, test), "centre": objects})
        arrays = {k: (dims, np.stack([one[k] for one in per_tap])) for k, dims in AXES.items()}
        arrays["true_centre"] = (("image", "axis"), centres[test].numpy())
        coords = {"tap": self.names, "readout": list(READOUTS), "arrangement": list(ARRANGEMENTS)}
        coords |= {"probe": [*READOUTS, "single tokens"], "axis": ["x", "y"]}
        return xr.Dataset(arrays, coords)


def into_channels(value: Tensor, width: int, grid: int) -> Tensor:
    """Lay squares of neighbouring locations of (n, c, h, h) side by side as channels.

    They are the largest that fit into a cell of the grid and make at most ``width`` channels.
    """
    channels, side = value.shape[1:3]
    cell = max(1, side // grid)
    fitting = (k for k in range(1, cell + 1) if cell % k == 0 and channels * k * k <= width)
    return F.pixel_unshuffle(value, max(fitting, default=1))


def _probe_classes(features, labels, draws, test) -> dict[str, np.ndarray]:
    """All probes of one tap for the class, from its features (2 + tokens, n, width)."""
    targets = signs(labels, int(labels.max()) + 1)
    # In the order of READOUTS, and all single tokens.
    inputs = [features[0], features[2:].mean(0), features[1], features[2], features[2:]]
    found = {name: [] for name in AXES if name != "centre"}
    for fitted, held_out in zip(draws, [*draws[1:], draws[0]], strict=True):
        hits, chosen = [], []
        for x in inputs:
            if not x.isfinite().all():
                hits.append(torch.full((*x.shape[:-2], len(test)), torch.nan))
                chosen.append(math.nan)
                continue
            fit, held = (Part(x[..., i, :], targets[i]) for i in (fitted, held_out))
            penalties = PENALTIES
            if x.dim() == 3:
                # To choose the penalty that all tokens share, the diagonal of their grid is enough.
                some = slice(None, None, math.isqrt(len(x)) + 1)
                few, few_held = (Part(part.features[some], part.targets) for part in (fit, held))
                penalties = [read_out(few, few_held, few_held.features, accuracy)[1]]
            outputs, best = read_out(fit, held, x[..., test, :], accuracy, penalties)
            hits.append((outputs.argmax(-1) == labels[test]).float())
            chosen.append(best)
        parts = torch.stack(hits[:-1]), hits[-1].mean(0), hits[-1].mean(1), chosen
        for one, part in zip(found.values(), parts, strict=True):
            one.append(np.asarray(part))
    return {name: np.stack(values) for name, values in found.items()}


def _find_objects(features, centres, draws, test) -> np.ndarray:
    """The object's centre as read from one tap, from its features (2 + tokens, n, width)."""
    fitted, held_out = torch.cat(draws[:-1]), draws[-1]
    found = []
    for x in (features[2:].transpose(0, 1).flatten(1), features[2:].mean(0)):
        if not (x.isfinite().all() and centres.isfinite().all()):
            found.append(torch.full((len(test), 2), torch.nan))
            continue
        fit, held = (Part(x[i], centres[i]) for i in (fitted, held_out))
        found.append(read_out(fit, held, x[test], negative_error)[0])
    return torch.stack(found).numpy()


def _together(state) -> Tensor:
    """A list state as one tensor; after a reduction over processes it is one already."""
    return state if isinstance(state, Tensor) else torch.cat(state)
