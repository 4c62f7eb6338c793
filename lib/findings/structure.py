"""Findings on the structure of representations: within a network and across networks.

Claims on Figures 1 and 2 and appendices G and H of the paper, from CKA between all taps.
"""

import numpy as np

from lib.findings import similarity as of
from lib.findings.claims import Claim
from lib.findings.similarity import Maps, of_maps, thirds


def uniformity_gap(maps: Maps) -> float:
    return of.low_high(maps["vit", "vit"]) - of.low_high(maps["resnet", "resnet"])


def midpoint_fit(maps: Maps) -> float:
    cross = maps["vit", "resnet"]
    fit, depth = cross[:, cross.shape[1] // 2], np.linspace(0, 1, len(cross))
    return float(fit[depth < 0.45].max() - fit[depth >= 0.45].max())


def last_third_deficit(maps: Maps) -> float:
    _, middle, last = thirds(maps["vit", "resnet"].max(1))
    return float(middle.mean() - last.mean())


def two_parts(maps: Maps) -> float:
    mixer, vit = (of.two_block_contrast(maps[arm, arm]) for arm in ("mixer", "vit"))
    return mixer - vit


# fmt: off
MAPS = [
    Claim("E01-uniform", "Lower and higher layers are more alike in a ViT than in a ResNet.",
          "Fig. 1", of_maps(uniformity_gap), "mean CKA of the lowest with the highest third of "
          "blocks, ViT minus ResNet,", 0.0, ("vit", "resnet")),
    Claim("E01-stages", "A ResNet's map falls into squares at its stages.", "Fig. 1",
          of_maps(lambda maps: of.stage_contrast(maps["resnet", "resnet"], maps.layers("resnet"))),
          "CKA within minus across stages, beyond that of other cuts,", 0.0, ("resnet",)),
    Claim("E01-grid", "A ViT's map of all layers shows a grid.", "Fig. 1",
          of_maps(lambda maps: of.kind_contrast(maps.all("vit", "vit"), maps.layers("vit", False))),
          "CKA between taps of the residual stream minus that of stream with branch", 0.0,
          ("vit",)),
    Claim("E02-midpoint", "The middle unit of a ResNet fits the lower blocks of a ViT best.",
          "Fig. 2", of_maps(midpoint_fit), "best CKA of the ResNet's middle unit with ViT blocks "
          "below depth 0.45, minus above,", 0.0, ("vit", "resnet")),
    Claim("E02-last-third", "The last third of a ViT resembles a ResNet's layers less than its "
          "middle third does.", "Fig. 2", of_maps(last_third_deficit), "best CKA with any ResNet "
          "unit, middle third of ViT blocks minus last third,", 0.0, ("vit", "resnet")),
    Claim("E21-diagonal", "Two ViTs agree best at equal relative depth.", "appendix G",
          of_maps(lambda maps: of.diagonal_contrast(maps["vit", "vit_gap"])),
          "CKA at equal depth minus elsewhere, ViT against mean-pooled ViT,", 0.0,
          ("vit", "vit_gap"), ours=True),
    Claim("E22-blocks", "An MLP-Mixer falls into two parts, early and late, more than a ViT does.",
          "appendix H", of_maps(two_parts), "CKA within minus across two parts at the best cut, "
          "Mixer minus ViT,", 0.0, ("mixer", "vit")),
    Claim("E22-kinship", "An MLP-Mixer is closer to a ViT than to a ResNet.", "appendix H",
          of_maps(lambda maps: float(maps["mixer", "vit"].mean() - maps["mixer", "resnet"].mean())),
          "mean CKA of Mixer with ViT minus Mixer with ResNet", 0.0, ("mixer", "vit", "resnet")),
]
