"""Where in the image the tokens of a tap lie: order, axes, and tokens that have no place.

A network declares some of it. The rest is tested, by changing one square of an image after another
and seeing which token changes most.
"""

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor, nn

from lib.taps import TapError, collect, tap_names

CORNERS = (0, 7), (7, 0), (1, 5), (5, 2)  # rows and columns of an image cut into 8 x 8 squares


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tap's value lays out the image."""

    prefix: int = 0  # tokens before those that have a place: class token and registers
    class_token: bool = False  # whether the first of them is a class token
    channels_last: bool = False  # whether a feature map is (n, h, w, channels)

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Separate the tokens that have a place in the image from those that have none.

        Of tokens (n, tokens, width), or a feature map, whose tokens are its locations: cells
        (n, side * side, width), row by row from the image's upper left corner, and others
        (n, k, width). k is 0 for a feature map and without a class token or registers.
        """
        shape = f"a tensor of shape {tuple(value.shape)}"
        if value.dim() == 3:
            cells, others = value[:, self.prefix :], value[:, : self.prefix]
        elif value.dim() == 4:
            cells = value.flatten(1, 2) if self.channels_last else value.flatten(2).mT
            others = cells[:, :0]
        else:
            advice = "tap tokens (n, tokens, width) or feature maps"
            raise TapError(f"{shape} has no places in the image: {advice}")
        if math.isqrt(cells.shape[1]) ** 2 != cells.shape[1]:
            prefix = f"{self.prefix} tokens before the patches"
            raise TapError(f"{shape} with {prefix} has no square grid of places")
        return cells, others


def layout(model: nn.Module) -> Layout:
    """The layout of tokens that a network declares: timm's names, torchvision's ViT."""
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:  # torchvision's has no such number
        prefix = int(isinstance(getattr(model, "class_token", None), nn.Parameter))
    # A register is no class token: timm's models say which they have.
    has = getattr(model, "has_class_token", getattr(model, "cls_token", True) is not None)
    return Layout(int(prefix), bool(prefix and has), getattr(model, "output_fmt", "") == "NHWC")


def layouts(model: nn.Module, taps: Sequence[str], x: Tensor) -> dict[str, Layout]:
    """The layout of every tap, tested by changing one square of an image after another.

    ``x`` (1, channels, size, size) is an image as the network takes it.

    A TapError is raised if the cell that changes most is not where the image was changed: then the
    network keeps its tokens in another order than that of their places. Deep layers may answer to a
    change anywhere, so behind a first block that passed the test the layout may stay as it was.
    """
    size, changed = x.shape[-1], x.repeat(1 + len(CORNERS), 1, 1, 1)
    wide, starts = max(1, size // 8), [[k * size // 8 for k in corner] for corner in CORNERS]
    for image, (row, column) in zip(changed[1:], starts, strict=True):
        area = image[:, row : row + wide, column : column + wide]
        area.copy_(area.flip(-1, -2).roll(1, 0) + 1)
    centres = [[(start + wide / 2) / size for start in corner] for corner in starts]
    try:
        first = tap_names(model, "blocks")[0]
        values = collect(model, changed, [first, *taps])
    except TapError:  # the network has no such list, or one that cannot be tapped
        first, values = taps[0], collect(model, changed, taps)
    found, known, most = {}, None, 0
    # What a first block's attention adds, which comes before its output, may answer from anywhere.
    for name, value in ({first: values[first]} | values).items():
        hits = _hits(layout(model), value, centres, (wide / 2 + 1.5) / size)
        best = max(hits, key=hits.get, default=None)
        if known in hits and len(known.split(value[:1])[0][0]) <= most:
            best = known
        elif hits and hits[best] >= 3:
            known = best if name == first else known
        elif hits and known and len(best.split(value[:1])[0][0]) <= most:
            best = next((one for one in reversed(found.values()) if one in hits), best)
        elif name in taps:
            why = "another place than the changed one changes most" if hits else "there is no grid"
            tokens = f"the tokens of tap {name!r} of {type(model).__name__}"
            made = f"it makes {tuple(value.shape)} of {len(changed)} images"
            raise TapError(f"where {tokens} lie in the image is not known: {made}; {why}")
        else:
            continue
        found[name], most = best, len(best.split(value[:1])[0][0])
    return {name: found[name] for name in taps}


def _hits(declared: Layout, value: Tensor, centres, reach: float) -> dict[Layout, int]:
    """By layout that a tensor's shape allows: at how many changes the right cell moves most.

    ``centres`` are those of the changed squares, in shares of the image's side; ``reach`` is half
    the side of a square, and a pixel and a half more, for a kernel may reach beyond it.
    """
    hits: dict[Layout, int] = {}
    if value.dim() not in (3, 4) or len(value) != 1 + len(centres):
        return hits
    for one in _candidates(declared, value):
        cells = one.split(value.double())[0]
        side = math.isqrt(cells.shape[1])
        moved = (cells[1:] - cells[:1]).norm(dim=-1).argmax(1).tolist()
        hits[one] = sum(
            all(
                abs((at + 0.5) / side - centre) <= reach + 0.5 / side  # they overlap
                for at, centre in zip(divmod(cell, side), square, strict=True)
            )
            for cell, square in zip(moved, centres, strict=True)
        )
    return hits


def _candidates(declared: Layout, value: Tensor) -> list[Layout]:
    """Layouts that a tensor's shape allows, the declared one first."""
    if value.dim() == 4:
        square = {False: value.shape[2] == value.shape[3], True: value.shape[1] == value.shape[2]}
        orders = dict.fromkeys((declared.channels_last, False, True))
        return [Layout(channels_last=last) for last in orders if square[last]]
    # A single token, as behind CaiT's last blocks, is a class token and no grid.
    rest = {value.shape[1] - side**2 for side in range(2, math.isqrt(value.shape[1]) + 1)}
    prefixes = [p for p in (declared.prefix, *sorted(rest - {declared.prefix})) if p in rest]
    return [Layout(p, declared.class_token and p > 0) for p in prefixes if p <= 16]
