"""Locality: how far heads reach, what single heads resemble, how wide layers see (E03 to E07)."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from scipy import stats

from lib.findings.claims import Claim, Judgement, judge
from lib.intervals import Estimate, jackknife
from lib.measurements import attention, receptive_field
from lib.measurements.heads import sliding_windows, subset_cka
from lib.measurements.receptive_field import dominance, radius, widening

# Heads are put in order by their distances only if the furthest is at least so many times as far as
# the nearest. Agreed on before anything was measured.
NEEDED_SPREAD = 2.0
TWO_LOWEST, TWO_LAST = slice(0, 2), slice(-2, None)


def of_role(record: xr.Dataset, role: str, taps: slice = slice(None)) -> xr.Dataset:
    """The part of a record about some of a role's taps, counted from input to output."""
    return record.isel(tap=np.flatnonzero(record["role"].values == role)[taps])


def number(record: xr.Dataset, role: str, of: Callable, taps: slice = slice(None)) -> float:
    """A number about a part of a record; NaN if the role was not measured."""
    part = of_role(record, role, taps)
    return float(of(part)) if part.sizes["tap"] else np.nan


# How far heads reach: records of AttentionDistance ------------------------------------------------


def most_local(heads: dict[str, np.ndarray]) -> float:
    """The least distance of any head, relative to uniform attention."""
    return float(np.nanmin(heads["relative"]))


def departure(heads: dict[str, np.ndarray]) -> float:
    """How far the head that is furthest from uniform attention is from it, relative to it."""
    return float(np.nanmax(np.abs(heads["relative"] - 1)))


def spread(heads) -> float:
    """The greatest distance of any head divided by the least."""
    return float(np.nanmax(heads["distance"]) / np.nanmin(heads["distance"]))


def _of_heads(taps: slice, statistic: Callable) -> Callable:
    """A statistic of the heads of some blocks of the ViT as one of a record."""
    return lambda record, cast: attention.estimate(of_role(record, cast["vit"], taps), statistic)


def less_data(few: str, amount: str) -> Claim:
    """The claim about the heads of a ViT that had less data, for the arm that had so little."""

    def statistic(record, cast):
        pair = [of_role(record, cast[arm], TWO_LOWEST)["tap"].values for arm in (few, "vit")]
        n, both = len(pair[0]), record.sel(tap=np.concatenate(pair))
        return attention.estimate(
            both,
            lambda heads: np.nanmin(heads["relative"][:n]) - np.nanmin(heads["relative"][n:]),
        )

    meaning = (
        f"least relative distance in the two lowest blocks, with {amount} of the images minus all,"
    )
    sentence = "Trained on less data, a ViT looks less at what is near."
    return Claim("E04-data", sentence, "Fig. 4", statistic, meaning, 0.0, (few, "vit"))


# What single heads resemble: records of HeadCKA ---------------------------------------------------


def parts(record: xr.Dataset, role: str) -> list[int]:
    """Places of a role's heads or layers among the parts of a record; ``"pixels"`` is one too."""
    names = record["part"].values.tolist()
    return [place for place, name in enumerate(names) if name.startswith(f"{role}/")]


def pairs(record: xr.Dataset, role: str) -> tuple[list[float], list[list[int]]]:
    """Neighbouring pairs of first-block heads, from local to global: mean distances, and parts."""
    distance = of_role(record, role, slice(1))["distance"].values.ravel()
    distance = distance[~np.isnan(distance)]  # other networks may have more heads
    windows, own = sliding_windows(distance, 2), parts(record, role)
    return [distance[w].mean() for w in windows], [[own[head] for head in w] for w in windows]


def head_cka(record: xr.Dataset, sets: Sequence[Sequence[int]], role: str) -> np.ndarray:
    """CKA (sets, layers) of sets of parts with the layers of a role."""
    return subset_cka(record["head_hsic"].values.astype(float).sum(0), sets, parts(record, role))


def rank_correlation(distance: Sequence[float], similarity: np.ndarray) -> float:
    """Spearman's correlation of distance with similarity (subsets, layers), the largest of layers.

    -1 if every layer is the less similar to a subset the further its heads look.
    """
    return max(float(stats.spearmanr(distance, column).statistic) for column in similarity.T)


def _slope(record, cast):
    (distance, sets), layers = pairs(record, cast["vit"]), parts(record, cast["resnet"])
    found = jackknife(
        record["head_hsic"].values,
        lambda hsic: rank_correlation(distance, subset_cka(hsic, sets, layers)),
    )
    return Estimate(*np.clip(dataclasses.astuple(found), -1, 1).tolist())


def judge_heads(record: xr.Dataset, study, roles) -> list[Judgement]:
    """The evidence on all claims about heads.

    That on E05-slope decides nothing where the heads' distances are too close to sort heads by.
    """
    *found, slope = judge(HEADS, record, study, roles)
    factor = spread(of_role(record, "vit", slice(1)))
    if not slope.missing and factor < NEEDED_SPREAD:
        why = f"the heads' distances differ by a factor of {factor:.2f} only; it takes "
        slope = dataclasses.replace(slope, missing=f"{why}{NEEDED_SPREAD:g}")
    return [*found, slope]


# How wide layers see: records of receptive fields -------------------------------------------------


def layers(record: xr.Dataset, role: str, ending: str | tuple[str, ...] = "") -> list[str]:
    """Taps of a network's blocks, or of one branch of each by its ending, input to output."""
    names = of_role(record, role)["tap"].values.tolist()
    if ending:
        return [name for name in names if name.endswith(ending)]
    return [name for name in names if name.rpartition(".")[2].isdigit()]


def along(record, role, score: Callable, ending="", then: Callable = np.array) -> Estimate:
    """A score of the fields of a network's blocks or branches.

    ``score`` is of a field, its centre and the side of a cell, for instance :func:`half`; ``then``
    of the scores (taps,), which by default are left as they are.
    """
    names = layers(record, role, ending)
    own = record.sel(tap=names)
    cells = dict(zip(names, own["cell"].values.tolist(), strict=True))
    return receptive_field.estimate(
        own, lambda found: then([score(*found[name], cell) for name, cell in cells.items()])
    )


def holding(share: float) -> Callable:
    """Radius, in pixels, of the circle around a location that holds a share of its field."""
    return lambda field, centre, cell: radius(field, centre, share)


half, nine_tenths = holding(0.5), holding(0.9)


def upper_half(record: xr.Dataset, role: str, ending: str) -> Estimate:
    """How far the own patch leads, mean over one branch of the upper half of the blocks."""
    return along(record, role, dominance, ending, lambda leads: np.mean(leads[len(leads) // 2 :]))


def _wider(record, cast):
    both = [layers(record, cast[arm]) for arm in ("vit", "resnet")]
    return receptive_field.estimate(
        record.sel(tap=[*both[0], *both[1]]),
        lambda found: widening(*([radius(*found[name]) for name in names] for names in both)),
    )


# fmt: off
HEADS = [  # the last one is subject to NEEDED_SPREAD
    Claim("E03-local", "Some heads of the lowest blocks look at what is near.", "Fig. 3",
          _of_heads(TWO_LOWEST, most_local), "least distance of a head of the two lowest blocks, "
          "relative to uniform attention,", 0.5, ("vit",), below=True),
    Claim("E03-spread", "Training moves heads of the first block away from the uniform distance.",
          "Fig. 3", _of_heads(slice(1), departure), "largest deviation of a head of the first "
          "block, relative to uniform attention,", 0.05, ("vit",), ours=True),
    Claim("E03-global", "The heads of the last blocks all look far.", "Fig. 3",
          _of_heads(TWO_LAST, most_local), "least distance of a head of the two last blocks, "
          "relative to uniform attention,", 0.8, ("vit",)),
    less_data("vit_data_03", "3 %"),
    Claim("E05-slope", "The nearer a first-block head looks, the more it resembles a ResNet's "
          "first units.", "Fig. 5", _slope, "rank correlation of distance with CKA, neighbouring "
          "pairs of heads, largest of five units,", -0.5, ("vit", "resnet"), below=True),
]
FIELDS = [
    Claim("E06-wide", "In the lower half a ViT sees more widely than a ResNet of equal relative "
          "depth.", "Fig. 6", _wider, "least excess of the ViT's radius of 90 % of the field over "
          "the ResNet's, in pixels,", 0.0, ("vit", "resnet")),
    Claim("E06-centre", "At every depth a ViT's token answers most to its own patch.", "Fig. 6",
          lambda record, cast: along(record, cast["vit"], dominance, then=min), "share of the "
          "field in the own patch minus the strongest other, least over blocks,", 0.0, ("vit",)),
    Claim("E07-attention", "Without the skip, later attention layers no longer answer most to "
          "their own patch.", "appendix C",
          lambda record, cast: upper_half(record, cast["vit"], ".attn"), "own patch minus "
          "strongest other, mean over attention branches of the upper half,", 0.0, ("vit",),
          below=True),
    Claim("E07-mlp", "Without the skip, later MLPs still answer most to their own patch.",
          "appendix C", lambda record, cast: upper_half(record, cast["vit"], ".mlp"), "own patch "
          "minus strongest other, mean over MLP branches of the upper half,", 0.0, ("vit",)),
]
