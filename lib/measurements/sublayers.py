"""The additions z + f(z) of residual networks: which taps are skips, and which are branches."""

import dataclasses

from timm.models.mlp_mixer import MixerBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnetv2 import PreActBasic, PreActBottleneck
from timm.models.vision_transformer import Block
from torch import nn

from lib.taps import INPUT, TapError, tap_names

POST_NORM = (
    "its branch ends in a normalisation, which fixes ‖f(z)‖ whatever the branch computes, so the "
    "ratio would only say how long z is"
)
PARALLEL = "attention and MLP are added to the same z at once, so neither has a skip of its own"
REFUSED = {
    "ResPostBlock": POST_NORM,
    "SwinTransformerV2Block": POST_NORM,
    "SwinTransformerV2CrBlock": POST_NORM,
    "ParallelScalingBlock": PARALLEL,
    "DiffParallelScalingBlock": PARALLEL,
    "ParallelThingsBlock": PARALLEL,
}


@dataclasses.dataclass(frozen=True)
class SubLayer:
    """One addition z + f(z) of a network.

    skip       : tap of z, on the stream before any normalisation, or behind a projection
    branch     : tap of f(z), behind the output projection and the LayerScale
    projected  : whether z is a projection of the block's input instead of the input itself
    transposed : whether the branch is computed as (n, width, tokens)
    """

    skip: str
    branch: str
    projected: bool = False
    transposed: bool = False


def sublayers(model: nn.Module) -> list[SubLayer]:
    """The additions of a pre-norm ViT, Mixer or ResNet (v1 or v2), from input to output.

    Blocks that lost their skip connections have none.

    Raises
    ------
    TapError
        If a block is of another kind, saying why a post-norm or parallel one has no such ratio.
    """
    modules = dict(model.named_modules())
    found: list[SubLayer] = []
    for name, module in modules.items():
        if (kind := type(module).__name__) in REFUSED:
            raise TapError(f"a {kind} ({name}) has no norm ratio: {REFUSED[kind]}")
    for name in tap_names(model, "blocks"):
        block = modules[name]
        kind = type(block)
        if getattr(block, "skipless", False):
            continue
        if kind is Block:
            attention, mlp = (
                scale if not isinstance(getattr(block, scale), nn.Identity) else branch
                for branch, scale in (("attn", "ls1"), ("mlp", "ls2"))
            )
            found += [
                SubLayer(f"{name}.norm1{INPUT}", f"{name}.{attention}"),
                SubLayer(f"{name}.norm2{INPUT}", f"{name}.{mlp}"),
            ]
        elif kind is MixerBlock:
            found += [
                SubLayer(f"{name}.norm1{INPUT}", f"{name}.mlp_tokens", transposed=True),
                SubLayer(f"{name}.norm2{INPUT}", f"{name}.mlp_channels"),
            ]
        elif kind in (BasicBlock, Bottleneck, PreActBasic, PreActBottleneck):
            last = {BasicBlock: "bn2", Bottleneck: "bn3", PreActBasic: "conv2"}.get(kind, "conv3")
            last = "se" if getattr(block, "se", None) is not None else last
            projected = block.downsample is not None
            skip = f"{name}.downsample" if projected else f"{name}{INPUT}"
            found.append(SubLayer(skip, f"{name}.{last}", projected))
        else:
            raise TapError(
                f"no norm ratio for a {kind.__name__} ({name}): skip and branch are known of the "
                "ViT's Block, MixerBlock, BasicBlock, Bottleneck, PreActBasic and PreActBottleneck"
            )
    if not found:
        raise TapError(f"no block of this {type(model).__name__} has a skip connection")
    return found


def branch_taps(model: nn.Module) -> list[str]:
    """The taps of every skip and branch of a network."""
    return [tap for layer in sublayers(model) for tap in (layer.skip, layer.branch)]
