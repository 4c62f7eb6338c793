"""Findings on scale: what less data, depth and further training change.

Claims on Figures 12 and 13 and appendix G of the paper (E16 to E19), from CKA between equal blocks
and from linear probes.
"""

from collections.abc import Callable

import numpy as np
import xarray as xr

from lib.findings.claims import Claim, NotMeasurable
from lib.findings.similarity import Maps, of_maps, thirds
from lib.intervals import Estimate, mean_of


def loss(maps: Maps, fewer: str, full: str = "vit", reference: str = "vit+1") -> np.ndarray:
    """CKA with a full-data network that less data, or less training, costs each block (blocks,).

    The reference has another seed. So has the full-data network whose CKA with it is the ceiling:
    both pairs differ in their initial weights.
    """
    return np.diagonal(maps[full, reference]) - np.diagonal(maps[fewer, reference])


def mean_loss(third: int, *arms: str) -> Callable[[xr.Dataset, dict], Estimate]:
    """Mean :func:`loss` of a third of the blocks, the first (0) to the last (2), of a record."""
    return of_maps(lambda maps: float(thirds(loss(maps, *arms))[third].mean()))


def late_loss(fewer: str) -> Callable[[xr.Dataset, dict], Estimate]:
    """Mean :func:`loss` of the last third of the blocks minus that of the first, of a record."""
    return of_maps(
        lambda maps: float(np.diff([part.mean() for part in thirds(loss(maps, fewer))[::2]])[0])
    )


def drift(maps: Maps, tuned: str, before: str = "vit") -> np.ndarray:
    """Distance of each block from itself before further training: 1 - CKA (blocks,)."""
    return 1 - np.diagonal(maps[before, tuned])


def early_drift(maps: Maps) -> float:
    return float(thirds(drift(maps, "vit_tuned_colour"))[0].max())


def distant_drift(maps: Maps) -> float:
    distant, related = drift(maps, "vit_tuned_colour"), drift(maps, "vit_tuned_fine_textures")
    return float(thirds(distant - related)[2].mean())


def right(record: xr.Dataset, role: str, readout: str = "mean of patches") -> np.ndarray:
    """Whether the probes of each block of a network read each image's class rightly.

    1 and 0 (blocks, draws, images); NaN if the network does not have the read-out.
    """
    if "right" not in record:
        raise NotMeasurable("needs labels")
    outputs = record["block"] & (record["role"] == role)
    return record["right"].sel(tap=outputs, readout=readout).values


def middle(record: xr.Dataset, role: str, readout: str = "mean of patches") -> np.ndarray:
    """:func:`right`, mean over the middle third of the blocks (draws, images)."""
    return thirds(right(record, role, readout))[1].mean(0)


def gain(more: str, less: str) -> Callable[[xr.Dataset, dict], Estimate]:
    """Accuracy of the probes of the middle third of blocks, of one arm minus another."""
    return lambda record, cast: mean_of(middle(record, cast[more]) - middle(record, cast[less]))


# fmt: off
DATA = [
    claim
    for end, fewer, share, less, little in (
        ("", "vit_data_10", "10 %", "less", "little"),
        ("-03", "vit_data_03", "3 %", "very little", "very little"),
    )
    for claim in (
        Claim(f"E16-late{end}", f"What {less} data costs a ViT, it costs in the later blocks.",
              "Fig. 12", late_loss(fewer), "loss of CKA with a full-data ViT, trained on "
              f"{share}, last third of blocks minus first,", 0.0, (fewer, "vit", "vit+1")),
        Claim(f"E16-early{end}", f"The early blocks of a ViT need {little} data.", "Fig. 12",
              mean_loss(0, fewer), f"loss of CKA with a full-data ViT, trained on {share}, first "
              "third of blocks,", 0.1, (fewer, "vit", "vit+1"), below=True),
    )
]
PROBES = [
    Claim(key, sentence, "Fig. 13", gain("vit", less),
          f"probe accuracy of the middle third of {words}", 0.0, ("vit", less))
    for key, sentence, less, words in (
        ("E17-middle", "More data makes the middle of a ViT more useful.", "vit_data_10",
         "blocks, all data minus 10 %,"),
        ("E17-middle-03", "More data than very little makes the middle of a ViT more useful.",
         "vit_data_03", "blocks, all data minus 3 %,"),
        ("E18-middle", "In the middle a ViT knows more than a ResNet at the same depth.", "resnet",
         "blocks or units, ViT minus ResNet,"),
    )
]
TUNED = [
    Claim("E19-early", "Trained further on another task, the early blocks of a ViT stay as they "
          "are.", "appendix G", of_maps(early_drift), "largest 1 - CKA of the first third of "
          "blocks with themselves before, colour task,", 0.05, ("vit", "vit_tuned_colour"),
          below=True),
    Claim("E19-distant", "The late blocks move more the more distant the task.", "appendix G",
          of_maps(distant_drift), "1 - CKA of the last third of blocks with themselves before, "
          "colour minus textures,", 0.0, ("vit", "vit_tuned_colour", "vit_tuned_fine_textures")),
]
