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
REFUSED = dict.fromkeys(
    ("ResPostBlock", "SwinTransformerV2Block", "SwinTransformerV2CrBlock"), POST_NORM
) | dict.fromkeys(
    ("ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock"), PARALLEL
)


@dataclasses.dataclass(frozen=True)
class SubLayer:
    """One addition z + f(z) of a network."""

    skip: str  # tap of z, on the stream before any normalisation, or behind a projection
    branch: str  # tap of f(z), behind the output projection and the LayerScale
    projected: bool = False  # whether z is a projection of the block's input, not the input itself
    transposed: bool = False  # whether the branch is computed as (n, width, tokens)


def sublayers(model: nn.Module) -> list[SubLayer]:
    """The additions of a pre-norm ViT, Mixer or ResNet (v1 or v2), from input to output.

    Blocks that lost their skip connections have none. A block of another kind is a TapError, saying
    why a post-norm or parallel one has no such ratio.
    """
    modules = dict(model.named_modules())
    found: list[SubLayer] = []
    for name, module in modules.items():
        if (kind := type(module).__name__) in REFUSED:
            raise TapError(f"a {kind} ({name}) has no norm ratio: {REFUSED[kind]}")
    for name in tap_names(model, "blocks"):
        kind = type(block := modules[name])
        if getattr(block, "skipless", False):
            continue
        if kind is Block:
            for norm, branch, scale in (("norm1", "attn", "ls1"), ("norm2", "mlp", "ls2")):
                last = scale if not isinstance(getattr(block, scale), nn.Identity) else branch
                found.append(SubLayer(f"{name}.{norm}{INPUT}", f"{name}.{last}"))
        elif kind is MixerBlock:
            found.append(SubLayer(f"{name}.norm1{INPUT}", f"{name}.mlp_tokens", transposed=True))
            found.append(SubLayer(f"{name}.norm2{INPUT}", f"{name}.mlp_channels"))
        elif kind in (BasicBlock, Bottleneck, PreActBasic, PreActBottleneck):
            last = {BasicBlock: "bn2", Bottleneck: "bn3", PreActBasic: "conv2"}.get(kind, "conv3")
            last = "se" if getattr(block, "se", None) is not None else last
            projected = block.downsample is not None
            skip = f"{name}.downsample" if projected else f"{name}{INPUT}"
            found.append(SubLayer(skip, f"{name}.{last}", projected))
        else:
            known = "Block, MixerBlock, BasicBlock, Bottleneck, PreActBasic and PreActBottleneck"
            known = f"skip and branch are known of the ViT's {known}"
            raise TapError(f"no norm ratio for a {kind.__name__} ({name}): {known}")
    if not found:
        raise TapError(f"no block of this {type(model).__name__} has a skip connection")
    return found


def branch_taps(model: nn.Module) -> list[str]:
    """The taps of every skip and branch of a network."""
    return [tap for layer in sublayers(model) for tap in (layer.skip, layer.branch)]
