"""Findings on skip connections: what they carry, and what their absence does.

Claims on Figures 7 and 8 and appendix E of the paper. A *ratio* is the norm ratio of skip and
branch; differences of ratios are in doublings.
"""

from collections.abc import Callable

import numpy as np

from lib.findings.claims import Claim, NotMeasurable
from lib.findings.similarity import across, of_maps
from lib.intervals import UNKNOWN, Estimate
from lib.measurements import norm_ratio
from lib.measurements.norm_ratio import Curves


def of_curves(statistic: Callable[[Curves], float]) -> Callable[[object, dict], Estimate]:
    """A statistic of curves over depth as one of a record, with its interval over images.

    Unknown if a role of the cast was not measured.
    """

    def estimate(record, cast):
        measured = {branch.split("/", 1)[0] for branch in record["branch"].values.tolist()}
        if not set(cast.values()) <= measured:
            return UNKNOWN
        return norm_ratio.estimate(record, statistic, cast)

    return estimate


def by_block(curves: Curves, token: str, quantity: str = "ratio") -> np.ndarray:
    """Mean over attention and MLP of each block of the ViT, (blocks,); ratios in doublings."""
    values = [curves("vit", sublayer, token, quantity) for sublayer in ("attention", "mlp")]
    return np.mean(values if quantity == "cosine" else np.log2(values), axis=0)


def halves(curve: np.ndarray, skip_first: bool = True) -> np.ndarray:
    """Means over the first and the second half of a curve over blocks, (2,).

    Of the class token the first block is left out: there it is a learned constant, as short or
    long as it was made.
    """
    half = len(curve) // 2
    return np.array([curve[int(skip_first) : half].mean(), curve[half:].mean()])


def rise(curve: np.ndarray, skip_first: bool = True) -> float:
    """By how much a curve over blocks is higher in the second half."""
    return float(np.diff(halves(curve, skip_first))[0])


def class_over_patches(curves: Curves, quantity: str = "ratio", skip_first: bool = True):
    """By how much the class token's ratio lies above the patches', early and late (2,)."""
    above = by_block(curves, "class", quantity) - by_block(curves, "patch", quantity)
    return halves(above, skip_first)


def crossing(curves: Curves, quantity: str = "ratio", skip_first: bool = True) -> float:
    """How far the class token's ratio lies above the patches' early, and below them late.

    The smaller of the two, so that it is positive only if the curves cross.
    """
    early, late = class_over_patches(curves, quantity, skip_first)
    return float(min(early, -late))


def above_resnet(curves: Curves, quantity: str = "median") -> float:
    """Median over the ViT's sub-layers of how far its patches' ratio exceeds the ResNet's.

    At equal relative depth; the ResNet's curve is interpolated between its units, without those
    whose skip is a projection; NaN if all are. Of medians, because a ResNet's branch adds nothing
    at all where every channel is cut off by its ReLU: one such location makes the mean infinite.
    """
    vit, resnet = (np.log2(curves(arm, quantity=quantity)) for arm in ("vit", "resnet"))
    identity = ~curves.projected("resnet")
    if not identity.any():
        return np.nan
    depth = np.linspace(0, 1, len(resnet))[identity]
    return float(np.median(vit - np.interp(np.linspace(0, 1, len(vit)), depth, resnet[identity])))


def class_changes_late(curves: Curves) -> float:
    return -rise(by_block(curves, "class"))


def class_changes_by_mlp(curves: Curves) -> float:
    attention, mlp = (np.log2(curves("vit", sub, "class")) for sub in ("attention", "mlp"))
    return float(halves(attention - mlp)[1])


def patches_align(curves: Curves) -> float:
    return rise(by_block(curves, "patch", "cosine"), skip_first=False)


def patches_aligned(curves: Curves) -> float:
    """The patches' cosine of z with z + f(z) in the last block, mean of attention and MLP."""
    return float(by_block(curves, "patch", "cosine")[-1])


def class_turns(curves: Curves) -> float:
    return -rise(by_block(curves, "class", "cosine"))


# Networks without the skips of a block ------------------------------------------------------------


def partition(evidence, cast: dict[str, str]) -> Estimate:
    """Mean CKA of the blocks before the cut with those from it on, intact minus cut.

    ``evidence`` is a record of CKA and the study of its networks, which tells where the cut is.
    """
    record, study = evidence
    _refuse_chance(study, cast[CUT])
    block = study.role(cast[CUT]).cut
    of = of_maps(lambda maps: across(maps["vit", "vit"], block) - across(maps[CUT, CUT], block))
    return of(record, cast)


def accuracy_lost(evidence, cast: dict[str, str]) -> Estimate:
    """Accuracy, intact minus cut, with Newcombe's interval for a difference of proportions."""
    _, study = evidence
    _refuse_chance(study, cast[CUT])
    if not set(cast.values()) <= study.cards.keys():
        return UNKNOWN  # an untrained network has no accuracy to lose
    p, q = (accuracy(study, role) for role in cast.values())
    lost = p.value - q.value
    below, above = (
        np.hypot(p.value - p.low, q.high - q.value),
        np.hypot(p.high - p.value, q.value - q.low),
    )
    return Estimate(lost, lost - below, lost + above)


def accuracy(study, role: str) -> Estimate:
    """The accuracy on a network's card, with its Wilson interval."""
    return Estimate(study.cards[role]["accuracy"], *study.cards[role]["accuracy_interval"])


def learned(study, role: str) -> bool:
    """Whether a network is better than twice chance: below, there is nothing to call a drop."""
    return accuracy(study, role).high > 2 / len(study.classes)


def _refuse_chance(study, role):
    if study.role(role).trained and not learned(study, role):
        raise NotMeasurable("without these skips the network did not learn")


CUT = "vit_no_skip_middle"

# fmt: off
CURVES = [
    Claim("E08-crossing", "Early, the class token is carried by the skips more than the patches "
          "are; late, less.", "Fig. 7", of_curves(crossing), "class token's over patches' norm "
          "ratio, in doublings: the smaller of how far above in the first half of the blocks and "
          "how far below in the second,", 0.0, ("vit",)),
    Claim("E08-above-resnet", "The skips of a ViT carry more, relative to the branches, than those "
          "of a ResNet.", "Fig. 7", of_curves(above_resnet), "norm ratio of patches over that of "
          "the ResNet's locations at equal depth, in doublings, median over depths,", 0.0,
          ("vit", "resnet")),
    Claim("E09-class-late", "The class token is changed late.", "Fig. E.1",
          of_curves(class_changes_late), "class token's norm ratio in the first over that in the "
          "second half, in doublings,", 0.0, ("vit",)),
    Claim("E09-class-mlp", "What changes the class token late is mostly the MLP.", "Fig. E.1",
          of_curves(class_changes_by_mlp), "class token's norm ratio at attentions over that at "
          "MLPs of the second half, in doublings,", 0.0, ("vit",)),
    Claim("E10-patches-rise", "The direction of patch tokens is changed less and less with depth.",
          "Fig. E.2", of_curves(patches_align), "cosine of skip and output for patches, second "
          "half of the blocks minus first,", 0.0, ("vit",)),
    Claim("E10-patches-end", "In the end it is hardly changed at all.", "Fig. E.2",
          of_curves(patches_aligned), "cosine of skip and output for patches in the last block",
          0.9, ("vit",)),
    Claim("E10-class-falls", "The direction of the class token is changed more and more with "
          "depth.", "Fig. E.2", of_curves(class_turns), "cosine of skip and output for the class "
          "token, first half of the blocks minus second,", 0.0, ("vit",)),
]
WITHOUT_SKIPS = [
    Claim("E11-partition", "Without the skips of a middle block, the layers before and after it "
          "are unlike.", "Fig. 8", partition, "mean CKA of blocks before the cut with those after, "
          "intact minus cut,", 0.1, ("vit", CUT)),
    Claim("E11-accuracy", "Without the skips of a middle block, a ViT is less accurate.", "Fig. 8",
          accuracy_lost, "accuracy, intact minus cut,", 0.0, ("vit", CUT)),
]
