"""Single heads as representations: which layers of another network they resemble.

A linear kernel of concatenated heads is the sum of their kernels, and so are its HSICs. One pass
over single heads therefore answers for all subsets of them.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from lib.cka import MinibatchCKA, alignment, centred_gram
from lib.measurements.places import layouts
from lib.taps import tap_names


def head_taps(model: nn.Module) -> list[str]:
    """The heads' contexts of a ViT's first block; of another network its first five units."""
    attention = "blocks.0.attn"
    if not hasattr(dict(model.named_modules()).get(attention), "num_heads"):
        return tap_names(model, "blocks")[:5]
    # timm merges the heads before the output projection, or before the normalisation ahead of it.
    norm = getattr(model.get_submodule(attention), "norm", None)
    return [f"{attention}.{'proj' if norm is None else 'norm'}:input"]


def head_contexts(value: Tensor, heads: int, prefix: int = 0) -> Tensor:
    """What every head brings together at every patch: (heads, n, patches, width).

    ``value`` (n, tokens, heads * width) is the tensor before the attention's output projection.
    The ``prefix`` tokens before the patches are left out.
    """
    if value.dim() != 3 or value.shape[-1] % heads:
        advice = "tap the input of the attention's projection (n, tokens, heads * width)"
        shape = f"a tensor of shape {tuple(value.shape)}"
        raise ValueError(f"{shape} is no context of {heads} heads: {advice}")
    return value[:, prefix:].unflatten(-1, (heads, -1)).permute(2, 0, 1, 3)


class HeadCKA(MinibatchCKA):
    """CKA of any set of heads with any layer of another network (the paper's Fig. 5).

    As a baseline, pixels are averaged over windows of patches around every place, from one patch
    to the whole image: what heads would compute that took from around themselves without choice.
    Contexts (:func:`head_taps`) are cut into heads, feature maps are compared as they are.
    """

    grid = 0  # side of the ViT's, for the baseline

    def __init__(self, taps=head_taps):
        super().__init__(taps)

    def reset(self) -> None:
        super().reset()
        self.grid = 0

    def reducer(self, model, names, x):
        """Centred Gram matrices: (heads, n, n) of contexts, (n, n) of a feature map."""
        if not names[0].endswith(":input"):
            return lambda name, value: self.reduce(value)
        block = names[0].partition(".attn.")[0]
        heads = model.get_submodule(f"{block}.attn").num_heads
        prefix = layouts(model, [block], x)[block].prefix

        def reduce(name, value):
            self.grid = round((value.shape[1] - prefix) ** 0.5)
            return torch.stack([self.reduce(c) for c in head_contexts(value, heads, prefix)])

        return reduce

    def update(self, reduced, images=None, batch=None) -> None:
        singles = {}
        for name, grams in reduced.items():
            heads = {f"{name}/{number}": gram for number, gram in enumerate(grams)}
            singles |= {name: grams} if grams.dim() == 2 else heads
        if self.grid:
            pixels = images.pixels.to(next(iter(singles.values())).device, torch.float32)
            patches = F.pixel_unshuffle(pixels, pixels.shape[-1] // self.grid)
            for window in range(1, 2 * self.grid, 2):
                singles[f"pixels/{window}"] = centred_gram(window_means(patches, window))
        super().update(singles, images, batch)

    def results(self) -> xr.Dataset:
        """What every CKA of sets of heads can be had from.

        ``head_hsic`` (group, part, other_part): sums per group of minibatches. Parts are heads
        (``role/tap/head``), layers (``role/tap``) and the baseline (``pixels/window``).
        """
        record = super().results()[["hsic"]]
        return record.rename(hsic="head_hsic", tap="part", other="other_part")


def window_means(patches: Tensor, window: int) -> Tensor:
    """Means (n, c, side, side) over the windows around every place, as far as they lie inside."""
    return F.avg_pool2d(patches, window, 1, window // 2, count_include_pad=False)


def sliding_windows(distance: Sequence[float], size: int) -> list[np.ndarray]:
    """Sets of ``size`` heads, from the most local to the most global, each one head further."""
    order = np.argsort(distance)
    return [order[first : first + size] for first in range(len(order) - size + 1)]


def subset_cka(
    hsic: np.ndarray, subsets: Sequence[Sequence[int]], others: Sequence[int]
) -> np.ndarray:
    """CKA (subsets, others) of concatenated parts with other parts, given by their places.

    ``hsic`` (parts, parts) is the sum over groups of ``head_hsic``.
    """
    together = np.zeros((len(subsets) + len(others), len(hsic)))
    for row, members in enumerate([*subsets, *([other] for other in others)]):
        together[row, list(members)] = 1
    return alignment(together @ hsic @ together.T)[: len(subsets), len(subsets) :]
