"""Findings on the structure of representations: within a network and across networks.

Claims on Figures 1 and 2 and appendices G and H of the paper, from CKA between all taps.
"""

import numpy as np

from lib.findings.claims import Claim
from lib.findings.similarity import (
    Maps,
    diagonal_contrast,
    kind_contrast,
    low_high,
    of_maps,
    stage_contrast,
    two_block_contrast,
)


def uniformity_gap(maps: Maps) -> float:
    """Mean CKA of the lowest with the highest third of blocks, ViT minus ResNet."""
    return low_high(maps["vit", "vit"]) - low_high(maps["resnet", "resnet"])


def midpoint_fit(maps: Maps) -> float:
    """Best fit of the ResNet's middle unit to ViT blocks below depth 0.45, minus to those above."""
    cross = maps["vit", "resnet"]
    depth = np.linspace(0, 1, len(cross))
    fit = cross[:, cross.shape[1] // 2]
    return float(fit[depth < 0.45].max() - fit[depth >= 0.45].max())


def last_third_deficit(maps: Maps) -> float:
    """Best fit of the middle third of ViT blocks to any ResNet unit, minus that of the last."""
    best = maps["vit", "resnet"].max(1)
    third = max(1, round(len(best) / 3))
    return float(best[third:-third].mean() - best[-third:].mean())


def mixer_kinship(maps: Maps) -> float:
    """Mean CKA of the Mixer with the ViT minus that with the ResNet."""
    return float(maps["mixer", "vit"].mean() - maps["mixer", "resnet"].mean())


MAPS = [
    Claim(
        "E01-uniform",
        "Lower and higher layers are more alike in a ViT than in a ResNet.",
        "Fig. 1",
        of_maps(uniformity_gap),
        "mean CKA of the lowest with the highest third of blocks, ViT minus ResNet,",
        0.0,
        ("vit", "resnet"),
    ),
    Claim(
        "E01-stages",
        "A ResNet's map falls into squares at its stages.",
        "Fig. 1",
        of_maps(lambda maps: stage_contrast(maps["resnet", "resnet"], maps.layers("resnet"))),
        "CKA within minus across stages, beyond that of other cuts,",
        0.0,
        ("resnet",),
    ),
    Claim(
        "E01-grid",
        "A ViT's map of all layers shows a grid.",
        "Fig. 1",
        of_maps(
            lambda maps: kind_contrast(maps.all("vit", "vit"), maps.layers("vit", blocks=False))
        ),
        "CKA between taps of the residual stream minus that of stream with branch",
        0.0,
        ("vit",),
    ),
    Claim(
        "E02-midpoint",
        "The middle unit of a ResNet fits the lower blocks of a ViT best.",
        "Fig. 2",
        of_maps(midpoint_fit),
        "best CKA of the ResNet's middle unit with ViT blocks below depth 0.45, minus above,",
        0.0,
        ("vit", "resnet"),
    ),
    Claim(
        "E02-last-third",
        "The last third of a ViT resembles a ResNet's layers less than its middle third does.",
        "Fig. 2",
        of_maps(last_third_deficit),
        "best CKA with any ResNet unit, middle third of ViT blocks minus last third,",
        0.0,
        ("vit", "resnet"),
    ),
    Claim(
        "E21-diagonal",
        "Two ViTs agree best at equal relative depth.",
        "appendix G",
        of_maps(lambda maps: diagonal_contrast(maps["vit", "vit_gap"])),
        "CKA at equal depth minus elsewhere, ViT against mean-pooled ViT,",
        0.0,
        ("vit", "vit_gap"),
        ours=True,
    ),
    Claim(
        "E22-blocks",
        "An MLP-Mixer falls into two parts, early and late, more than a ViT does.",
        "appendix H",
        of_maps(
            lambda maps: (
                two_block_contrast(maps["mixer", "mixer"]) - two_block_contrast(maps["vit", "vit"])
            )
        ),
        "CKA within minus across two parts at the best cut, Mixer minus ViT,",
        0.0,
        ("mixer", "vit"),
    ),
    Claim(
        "E22-kinship",
        "An MLP-Mixer is closer to a ViT than to a ResNet.",
        "appendix H",
        of_maps(mixer_kinship),
        "mean CKA of Mixer with ViT minus Mixer with ResNet",
        0.0,
        ("mixer", "vit", "resnet"),
    ),
]
