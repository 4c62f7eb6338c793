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
ROLES = {
    "vit": ("ViT", PALETTE[0]),
    "vit_gap": ("mean-pooled ViT", PALETTE[9]),
    "resnet": ("ResNet", PALETTE[1]),
    "mixer": ("Mixer", PALETTE[2]),
}
MARKERS = "os^Dv"  # curves are told apart by them as well, and not by colour alone
TWINS = {"_untrained": ", untrained", "_other_seed": ", other seed", "_third_seed": ", third seed"}


def use_style() -> None:
    """Set the book's style for all figures of a chapter."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=PALETTE,
        rc={
            "figure.dpi": 90,
            "savefig.dpi": 90,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "font.size": 10,
        },
    )


def name(role: str) -> str:
    """What a role is called in figures: ``"ViT, untrained"``."""
    for suffix, words in TWINS.items():
        if role.endswith(suffix):
            return name(role.removesuffix(suffix)) + words
    return ROLES[role][0] if role in ROLES else role


def colour(role: str):
    """A role's colour; its twins have the same."""
    return ROLES[_family(role)][1] if _family(role) in ROLES else "black"


def marker(role: str) -> str:
    """A role's mark; its twins have the same."""
    known = list(ROLES)
    family = _family(role)
    return MARKERS[known.index(family) % len(MARKERS)] if family in known else "x"


def _family(role: str) -> str:
    for suffix in TWINS:
        role = role.removesuffix(suffix)
    return role


def cka(record: xr.Dataset, *pairs: tuple[str, str], blocks: bool = False, columns: int = 3):
    """CKA maps of pairs of roles, layers from input (lower left) to output, all on one scale.

    Parameters
    ----------
    record : xarray.Dataset
        With the variable ``cka``, from :func:`lib.measure.measure`.
    pairs : tuples of two roles
        One panel each: the first role's layers upwards, the second's to the right.
    blocks : bool
        Show the outputs of blocks only, instead of every tap.
    columns : int
        Panels in a row.

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.25 * columns + 0.7, 2.4 * rows), squeeze=False
    )
    for axis, (up, right) in zip(axes.flat, pairs, strict=False):
        values = between(record, up, right, blocks=blocks)
        axis.imshow(
            values,
            vmin=0,
            vmax=1,
            cmap=CKA_COLOURS,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_facecolor("0.8")  # undefined cells
        axis.set_xlabel(name(right), size="small")
        axis.set_ylabel(name(up), size="small")
        _mark_blocks(axis.xaxis, values["other"].values, blocks)
        _mark_blocks(axis.yaxis, values["tap"].values, blocks)
    for axis in axes.flat[len(pairs) :]:
        axis.set_axis_off()
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), CKA_COLOURS)
    figure.colorbar(scale, ax=axes, label="CKA", shrink=0.8, aspect=25)
    return figure


def inline(figure, alt: str) -> HTML:
    """A figure as an HTML image with its alternative text inside, for another page to show."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return HTML(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">')


def _mark_blocks(axis, layers, blocks: bool) -> None:
    """Ticks at some blocks' outputs, numbered as the modules are, stages apart."""
    outputs = [(place, layer) for place, layer in enumerate(layers) if blocks or _is_output(layer)]
    if len(outputs) < 2:
        return
    chosen = [outputs[i] for i in np.linspace(0, len(outputs) - 1, 4).round().astype(int)]
    axis.set_ticks([place for place, _ in chosen])
    axis.set_ticklabels([short(layer) for _, layer in chosen], rotation=0, size="small")
    axis.set_tick_params(length=2, pad=1)


def _is_output(layer: str) -> bool:
    return layer.rpartition(".")[2].isdigit()


def short(layer: str) -> str:
    """``blocks.3`` -> 3, ``stages.1.blocks.0`` -> 1.0, ``layer2.1`` -> 2.1"""
    return ".".join(part.lstrip("layer") for part in layer.split(".") if part[-1].isdigit())


def nothing(why: str):
    """What stands in the place of a figure that this study cannot have: a line that says why."""
    figure, axis = plt.subplots(figsize=(4, 0.6))
    axis.set_axis_off()
    axis.text(0.5, 0.5, f"not measured here: {why}", ha="center", va="center", color="0.4")
    return figure


def depth_lines(axis, values: dict[str, np.ndarray], margins: dict | None = None) -> None:
    """Curves over relative depth (0 input, 1 output), one per role; untrained twins dashed.

    Marks tell families apart, and stand at some of the points only.
    """
    for role, value in values.items():
        depth = np.linspace(0, 1, len(value))
        style = "--" if role.endswith("_untrained") else ":" if "seed" in role else "-"
        look = {"marker": marker(role), "ms": 4, "markevery": max(1, len(value) // 6)}
        axis.plot(depth, value, style, color=colour(role), label=name(role), **look)
        if margins:
            low, high = value - margins[role], value + margins[role]
            axis.fill_between(depth, low, high, color=colour(role), alpha=0.15, lw=0)
    axis.set(xlabel="relative depth (0 = first block, 1 = last)", xlim=(0, 1))
    axis.legend(fontsize="small")


def shades(n: int) -> list:
    """``n`` colours from dark to light, for an ordered set of curves; they survive grey."""
    return sns.color_palette("flare_r", n)


def sorted_heads(axis, record: xr.Dataset, labels: list[str]) -> None:
    """Attention distances of heads, sorted within each tap of a record, with their intervals."""
    for place, (label, colour) in enumerate(zip(labels, shades(len(labels)), strict=True)):
        part = record.isel(tap=place).sortby(record["distance"].isel(tap=place))
        distance = part["distance"].values
        margin = np.abs(np.stack([part["distance_low"], part["distance_high"]]) - distance)
        rank = np.arange(1, len(distance) + 1)
        style = "-" + MARKERS[place % len(MARKERS)]
        axis.errorbar(rank, distance, margin, fmt=style, color=colour, label=label, ms=4, capsize=2)
