"""Places: what a token tells of its patch, of the class and of the object's place (E12 to E15)."""

import dataclasses
import math
from collections.abc import Callable, Collection

import numpy as np
import xarray as xr

from lib.findings.claims import Claim, NotMeasurable
from lib.findings.locality import of_role
from lib.intervals import UNKNOWN, Estimate, mean_of
from lib.measurements import localisation
from lib.measurements.localisation import contrast, estimate
from lib.measurements.places import layouts
from lib.taps import collect


def shared_grid(study, roles: Collection[str], most: int) -> int:
    """The finest grid, of at most ``most`` cells a side, for tokens and locations of all roles."""
    pixels = study.images(1).pixels
    sides = {pixels.shape[-1]}
    for role in roles:
        model, x = study.model(role), study.to_input(pixels, role)
        values = collect(model, x, "blocks")
        where = layouts(model, list(values), x)
        sides |= {math.isqrt(where[tap].split(y)[0].shape[1]) for tap, y in values.items()}
    return localisation.common_grid(sides, most)


def last(record: xr.Dataset, *roles: str) -> xr.Dataset:
    """The part of a record about the last block or unit of some roles, one tap each."""
    own = [np.flatnonzero(record["role"].values == role)[-1] for role in roles]
    return record.isel(tap=own)


# Where: records of Localisation -------------------------------------------------------------------


def hits(record: xr.Dataset, role: str, interior: bool = False) -> Estimate:
    """Share of the last block's tokens whose map peaks at their own patch, with its bounds."""
    found = localisation.estimate_hits(last(record, role), interior)
    return Estimate(*(part.item() for part in dataclasses.astuple(found)))


def _more_hits(record, cast):
    vit, resnet = (hits(record, cast[arm]) for arm in ("vit", "resnet"))
    return Estimate(vit.value - resnet.value, vit.low - resnet.high, vit.high - resnet.low)


def ahead(record: xr.Dataset, one: str, other: str) -> Estimate:
    """How much more contrast one role's last block has than another's."""
    if not {one, other} <= set(record["role"].values.tolist()):
        return UNKNOWN
    return estimate(last(record, one, other), lambda maps: contrast(maps)[0] - contrast(maps)[1])


# What: records of Probes --------------------------------------------------------------------------


def probed(record: xr.Dataset, role: str) -> xr.Dataset:
    """The part of a record about those blocks of a role that were probed."""
    return of_role(record, role).dropna("tap", subset=["token_accuracy"])


def right(record: xr.Dataset, role: str, readout: str, tap: int = -1) -> xr.DataArray:
    """Whether a block's probes read each test image rightly: (draw, image).

    ``readout`` is one of those of :mod:`lib.measurements.probes`, or ``"one token"``: the share of
    the single-token probes that do.
    """
    if "token_right" not in record:
        raise NotMeasurable("needs labels")
    part = probed(record, role).isel(tap=tap)
    return part["token_right"] if readout == "one token" else part["right"].sel(readout=readout)


def accuracy(record: xr.Dataset, role: str, readout: str, tap: int = -1) -> Estimate:
    """How well a block of a role is read; unknown if that was not measured."""
    known = "token_right" in record and role in record["role"].values
    return mean_of(right(record, role, readout, tap)) if known else UNKNOWN


def errors(record: xr.Dataset, role: str, arrangement: str) -> np.ndarray:
    """Distances (taps, images), in pixels, at which a role's blocks place the object's centre.

    NaN where the images have no boxes; of no block if nothing was probed.
    """
    if "centre" not in record:
        return np.empty((0, 1))
    found = probed(record, role)["centre"].sel(arrangement=arrangement)
    return pixel_error(found, record["true_centre"])


def _better(one: str, readout: str, other: str, other_readout: str) -> Callable:
    """Accuracy of one arm's last block minus another's, each read in its way."""
    return lambda record, cast: mean_of(
        right(record, cast[one], readout) - right(record, cast[other], other_readout)
    )


def _tie(record, cast):
    """The difference of two ViTs, read as they were trained to be read, without its sign."""
    signed = _better("vit", "class token", "vit_gap", "mean of patches")(record, cast)
    value, margin = abs(signed.value), signed.high - signed.value
    return Estimate(value, max(0.0, value - margin), value + margin)


def r_squared(found, true) -> float:
    """Share of the variance of the true centres (n, 2) that the found ones explain.

    1 is perfect, 0 as good as always guessing the mean, negative worse than that.
    """
    found, true = np.asarray(found, dtype=float), np.asarray(true, dtype=float)
    return float(1 - ((found - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum())


def pixel_error(found, true) -> np.ndarray:
    """Distances (..., n) between found (..., n, 2) and true centres (n, 2), in pixels."""
    return np.hypot(*np.moveaxis(np.asarray(found) - np.asarray(true), -1, 0))


# fmt: off
MAPS = [
    Claim("E12-own-patch", "Most interior tokens of a ViT's last block are more like their own "
          "patch than like any other.", "Fig. 9",
          lambda record, cast: hits(record, cast["vit"], interior=True), "share of interior tokens "
          "whose map peaks at their own patch, ViT, last block,", 0.5, ("vit",)),
    Claim("E12-edges", "Tokens at the edge of the image are like other patches at the edge as "
          "well.", "Fig. 9", lambda record, cast: estimate(last(record, cast["vit"]),
          lambda maps: localisation.edge_contrast(maps)[0]), "CKA of edge tokens with "
          "edge patches minus interior ones as far, ViT, last block,", 0.0, ("vit",)),
    Claim("E12-sharper", "The last block of a ViT localises better than the last unit of a "
          "ResNet.", "Fig. 9", _more_hits, "share of all tokens whose map peaks at their own "
          "patch, ViT minus ResNet,", 0.0, ("vit", "resnet")),
    Claim("E13-pooling", "A ViT that is read from the mean of its tokens localises less than one "
          "that is read from a class token.", "Fig. 10",
          lambda record, cast: ahead(record, cast["vit"], cast["vit_gap"]), "CKA with the own "
          "patch minus with others, last block, class token minus mean-pooled,", 0.0,
          ("vit", "vit_gap")),
    Claim("X9-last-block", "The last block of a ViT gives up more of what is where than any block "
          "before it.", "Ghiasi et al., 2022", lambda record, cast: estimate(
          of_role(record, cast["vit"]), lambda maps: localisation.last_loss(contrast(maps))),
          "loss of CKA with the own patch over others, last block minus the most of another,", 0.0,
          ("vit",), ours=True),
]
PROBES = [
    Claim("E14-gap", "A single token says more about the class in a mean-pooled ViT than in one "
          "with a class token.", "Fig. 11", _better("vit_gap", "one token", "vit", "one token"),
          "mean accuracy of single patch tokens, last block, mean-pooled minus class token,", 0.05,
          ("vit_gap", "vit")),
    Claim("E14-resnet", "A single location of a ResNet says more about the class than a token of a "
          "ViT with a class token.", "Fig. 11", _better("resnet", "one token", "vit", "one token"),
          "mean accuracy of single locations, last unit, minus single patch tokens, last block,",
          0.05, ("resnet", "vit")),
    Claim("E15-tie", "Read as they were trained to be read, the two ViTs are equally good.",
          "Fig. 11", _tie, "difference in accuracy, class token against mean of the mean-pooled "
          "ViT, last block,", 0.05, ("vit", "vit_gap"), below=True),
    Claim("E15-plateau", "The mean of the patch tokens of a ViT with a class token ends below that "
          "token.", "Fig. 11", _better("vit", "class token", "vit", "mean of patches"),
          "accuracy of class token minus mean of patch tokens, last block,", 0.0, ("vit",)),
    Claim("E15-first", "In a mean-pooled ViT, one token ends nearly as good as the mean of all.",
          "Fig. 11", _better("vit_gap", "mean of patches", "vit_gap", "first patch"),
          "accuracy of the mean minus that of the first token, mean-pooled ViT, last block,", 0.05,
          ("vit_gap",), below=True),
]
