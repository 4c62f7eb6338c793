"""The look of the book's figures: one style, fixed scales, colours that everyone can tell apart."""

import base64
import html
import io

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from IPython.display import HTML

from lib.records import between

CKA_COLOURS = "rocket"  # perceptually uniform; always shown from 0 to 1
PALETTE = sns.color_palette("colorblind")
FAMILIES = {
    "vit": ("ViT", PALETTE[0]),
    "vit_gap": ("mean-pooled ViT", PALETTE[9]),
    "resnet": ("ResNet", PALETTE[1]),
    "mixer": ("Mixer", PALETTE[2]),
}
MARKERS = "os^Dv"  # curves are told apart by them as well, and not by colour alone
SEEDS = ["", ", other seed", ", third seed", ", fourth seed", ", fifth seed"]
_study = None  # whose roles are drawn


def use_style(study=None) -> None:
    """Set the book's style for all figures of a chapter, which show roles of a study."""
    global _study
    _study = study
    rc = {"figure.dpi": 90, "savefig.dpi": 90, "figure.constrained_layout.use": True}
    rc |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium"}
    rc |= {"legend.frameon": False, "font.size": 10}
    sns.set_theme("notebook", style="ticks", palette=PALETTE, rc=rc)


def name(role: str) -> str:
    """What a role is called in figures: ``"ViT, untrained"``."""
    if (one := _role(role)) is None:
        return FAMILIES[role][0] if role in FAMILIES else role
    words = FAMILIES[one.family][0] if one.family in FAMILIES else one.family
    if one.cut is not None:
        words += f" without skips in {one.cut}"
    elif one.share < 1:
        words += f", {100 * one.share:.0f} % of the images"
    elif one.arm != one.family:
        words = one.arm
    return words + SEEDS[one.replicate] + ", untrained" * (not one.trained)


def colour(role: str):
    """The colour of a role's family."""
    family = one.family if (one := _role(role)) else role
    return FAMILIES.get(family, ("", "black"))[1]


def cka(record: xr.Dataset, *pairs: tuple[str, str], blocks: bool = False, columns: int = 3):
    """CKA maps of pairs of roles, layers from input (lower left) to output, all on one scale.

    A panel for each pair: the first role's layers upwards, the second's to the right. Blank if the
    record lacks one of them. With ``blocks``, of the outputs of blocks only.
    """
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    size = 2.25 * columns + 0.7, 2.4 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, (up, right) in zip(axes.flat, pairs, strict=False):
        axis.set_xlabel(name(right), size="small")
        axis.set_ylabel(name(up), size="small")
        if {up, right} <= set(record["role"].values.tolist()):
            heat(axis, values := between(record, up, right, blocks=blocks))
            _mark_blocks(axis.xaxis, values["other"].values, blocks)
            _mark_blocks(axis.yaxis, values["tap"].values, blocks)
    for axis in axes.flat[len(pairs) :]:
        axis.set_axis_off()
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), CKA_COLOURS)
    figure.colorbar(scale, ax=axes, label="CKA", shrink=0.8, aspect=25)
    return figure


def heat(axis, values) -> None:
    """A map (rows, columns) of values from 0 to 1, the first row lowest; grey where undefined."""
    look = {"cmap": CKA_COLOURS, "origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    axis.imshow(values, vmin=0, vmax=1, **look)
    axis.set_facecolor("0.8")


def show() -> None:
    """Show a figure, with words in the panels in which there was nothing to draw."""
    axes = [a for a in plt.gcf().axes if a.axison and a.get_label() != "<colorbar>"]
    blank = [axis for axis in axes if not np.isfinite(axis.dataLim.get_points()).all()]
    for axis in blank:
        _words(axis, "not measured\nhere")
    if blank == axes:
        plt.close()
        nothing("networks that this study lacks")
    plt.show()


def line(axis, role: str, x, values, style: str = "-", **look) -> None:
    """A role's curve in its colour and with its name; an Estimate's has its interval as a band."""
    look = {"color": colour(role), "label": name(role), "ms": 4} | look
    axis.plot(x, getattr(values, "value", values), style, **look)
    if hasattr(values, "low"):
        axis.fill_between(x, values.low, values.high, color=look["color"], alpha=0.15, lw=0)


def frame(axis, cell: int, side: int, size: int = 1, **look) -> None:
    """A frame around a cell of a square grid, in an image with ``size`` pixels a cell."""
    corner = (cell % side * size - 0.5, cell // side * size - 0.5)
    axis.add_patch(plt.Rectangle(corner, size, size, fill=False, **look))


def titles(axes, words) -> None:
    """Small titles of a row of panels."""
    for axis, title in zip(axes, words, strict=True):
        axis.set_title(title, size="small")


def legend_below(axis, columns: int) -> None:
    """One legend for all panels, below them, of what one of them shows."""
    lines = axis.get_legend_handles_labels()
    axis.figure.legend(*lines, loc="outside lower center", ncols=columns, fontsize="small")


def nothing(why: str):
    """A line in the place of a figure that this study cannot have."""
    figure, axis = plt.subplots(figsize=(4, 0.6))
    axis.set_axis_off()
    _words(axis, f"not measured here: {why}")
    return figure


def _words(axis, words):
    axis.text(0.5, 0.5, words, ha="center", va="center", color="0.4", transform=axis.transAxes)


def inline(figure, alt: str) -> HTML:
    """A figure as an HTML image with its alternative text inside, for another page to show."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return HTML(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">')


def short(layer: str) -> str:
    """``blocks.3`` -> 3, ``stages.1.blocks.0`` -> 1.0, ``layer2.1`` -> 2.1"""
    return ".".join(part.lstrip("layer") for part in layer.split(".") if part[-1].isdigit())


def shades(n: int) -> list:
    """``n`` colours from dark to light, for an ordered set of curves; they survive grey."""
    return sns.color_palette("flare_r", n)


def _mark_blocks(axis, layers, blocks: bool) -> None:
    """Ticks at some blocks' outputs, numbered as the modules are, stages apart."""
    ends = [i for i, layer in enumerate(layers) if blocks or layer.rpartition(".")[2].isdigit()]
    if len(ends) < 2:
        return
    chosen = [ends[i] for i in np.linspace(0, len(ends) - 1, 4).round().astype(int)]
    axis.set_ticks(chosen)
    axis.set_ticklabels([short(layers[i]) for i in chosen], rotation=0, size="small")
    axis.set_tick_params(length=2, pad=1)


def _role(name: str):
    return _study.role(name) if _study and _study.has(name) else None
