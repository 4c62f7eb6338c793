"""The networks that this repository trains, built from timm's classes and matched in cost.

Each ends in an 8 x 8 grid, so that a token of one network and a location of another speak of the
same patch of the image. The lab's see 32 x 32 images, in patches of 4 x 4 pixels.
"""

import copy
import dataclasses
from collections import OrderedDict
from functools import partial

import torch
from timm.layers import GroupNormAct, StdConv2d, build_sincos2d_pos_embed
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnetv2 import PreActBottleneck, ResNetV2
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lib.studies import scenes

GRID = 8


@dataclasses.dataclass(frozen=True)
class Size:
    """What the networks of a study have in common; the lab's, unless told otherwise.

    image         : side of the images, in pixels
    classes       : how many there are
    width         : of the ViTs' and the Mixer's tokens
    depth         : how many blocks they have
    heads         : of a ViT's block
    channels      : of the stages of the ResNet
    stem_stride   : of the ResNet's first convolution
    """

    image: int = scenes.SIZE
    classes: int = len(scenes.CLASSES)
    width: int = 96
    depth: int = 8
    heads: int = 6
    channels: tuple[int, int, int] = (64, 128, 256)
    stem_stride: int = 1


LAB = Size()


def vit(size: Size = LAB) -> nn.Module:
    """ViT, read from a class token. The lab's, ViT-96/4, takes about 60 M multiply-adds."""
    return _vit(size, class_token=True, global_pool="token")


def vit_gap(size: Size = LAB) -> nn.Module:
    """The same without a class token, read from the mean of its patch tokens."""
    return _vit(size, class_token=False, global_pool="avg")


def resnet(size: Size = LAB) -> nn.Module:
    """Pre-activation bottleneck ResNet with group normalisation and weight standardisation (BiT).

    Three stages of 3, 4 and 6 units at 32, 16 and 8 pixels, after a 3 x 3 stem that keeps the
    image's size, as ResNets for small images have, or halves that of images of 64 pixels.
    """
    model = ResNetV2(
        layers=(3, 4, 6),
        channels=size.channels,
        num_classes=size.classes,
        norm_layer=partial(GroupNormAct, num_groups=8),
    )
    stem = StdConv2d(3, 64, kernel_size=3, stride=size.stem_stride)
    model.stem = nn.Sequential(OrderedDict(conv=stem))
    return model


def mixer(size: Size = LAB) -> nn.Module:
    """MLP-Mixer of the ViT's width and depth: the same stream, mixed without attention."""
    return MlpMixer(
        img_size=size.image,
        patch_size=size.image // GRID,
        num_blocks=size.depth,
        embed_dim=size.width,
        num_classes=size.classes,
    )


def _vit(size: Size, **readout) -> nn.Module:
    model = VisionTransformer(
        img_size=size.image,
        patch_size=size.image // GRID,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        num_classes=size.classes,
        weight_init="jax",
        **readout,
    )
    # A sine-cosine start for the learned position embedding: from a random start these small ViTs
    # stay at chance for tens of thousands of images.
    position = build_sincos2d_pos_embed([GRID, GRID], dim=size.width)
    with torch.no_grad():
        model.pos_embed[:, model.num_prefix_tokens :] = 0.5 * position
    return model


class BlockWithoutSkips(Block):
    """A ViT block that hands on what its attention and its MLP make, and nothing of its input.

    ``skip`` is the share of its input that it still hands on: training may fade it out.
    """

    skip, skipless = 0.0, True

    def forward(self, x, attn_mask=None, is_causal=False):
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.skip * x + self.drop_path1(self.ls1(attended))
        return self.skip * x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class UnitWithoutSkip(PreActBottleneck):
    """A residual unit that hands on what its convolutions make, and nothing of its input."""

    skip, skipless = 0.0, True

    def forward(self, x):
        made = self.conv1(self.norm1(x))
        made = self.conv2(self.norm2(made))
        return self.skip * x + self.drop_path(self.conv3(self.norm3(made)))


def without_skips(model: nn.Module, block: int) -> nn.Module:
    """A copy of a ViT or pre-activation ResNet without the skip connections of one block.

    ``block`` counts blocks or residual units from 0. The weights are the same and have the same
    names: train the copy for the paper's experiment, or measure it as it is to see what the cut
    does to a network that was trained with the skip.
    """
    model = copy.deepcopy(model)
    blocks = [module for module in model.modules() if type(module) in (Block, PreActBottleneck)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks whose skips could be removed")
    if not 0 <= block < len(blocks):
        raise ValueError(f"there is no block {block}; they go from 0 to {len(blocks) - 1}")
    chosen = blocks[block]
    if getattr(chosen, "downsample", None) is not None:
        raise ValueError(f"the shortcut of unit {block} is a projection, not a skip: take another")
    chosen.__class__ = BlockWithoutSkips if isinstance(chosen, Block) else UnitWithoutSkip
    return model


def blocks_without_skips(model: nn.Module) -> list[int]:
    """Which blocks or residual units of a network lost their skips, counted from 0."""
    kinds = (Block, PreActBottleneck)  # those without are of their kind
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    return [number for number, block in enumerate(blocks) if hasattr(block, "skipless")]


ARCHITECTURES = {"vit": vit, "vit_gap": vit_gap, "resnet": resnet, "mixer": mixer}
# Networks without the skips of one block: the intact one, and which of its blocks.
CUTS = {
    "vit_no_skip_early": ("vit", lambda size: 1),
    "vit_no_skip_middle": ("vit", lambda size: size.depth // 2),
    "vit_no_skip_late": ("vit", lambda size: size.depth - 2),
    "resnet_no_skip_middle": ("resnet", lambda size: 6),
}


def family(architecture: str) -> str:
    """The architecture, with all its skip connections."""
    return CUTS[architecture][0] if architecture in CUTS else architecture


def cut(architecture: str, size: Size = LAB) -> int | None:
    """The block or residual unit whose skips an architecture misses; None for intact ones."""
    return CUTS[architecture][1](size) if architecture in CUTS else None


def build(architecture: str, seed: int, size: Size = LAB) -> nn.Module:
    """A network with random weights, the same for the same seed, in evaluation mode."""
    if family(architecture) not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *CUTS])
        raise ValueError(f"there is no architecture {architecture!r}; there are {known}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[family(architecture)](size).eval()
    block = cut(architecture, size)
    return model if block is None else without_skips(model, block)


def multiply_adds(model: nn.Module, size: int = scenes.SIZE) -> int:
    """Multiply-adds of one forward pass of one image, counted by torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


def work_until(model: nn.Module, layers, size: int = scenes.SIZE) -> dict[str, float]:
    """Share of a forward pass's multiply-adds that are done when each of some modules is done."""
    modules, done = dict(model.named_modules()), {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        handles = [
            modules[name].register_forward_hook(
                lambda *_, name=name: done.update({name: counter.get_total_flops()})
            )
            for name in layers
        ]
        try:
            model(torch.zeros(1, 3, size, size))
        finally:
            for handle in handles:
                handle.remove()
        total = counter.get_total_flops()
    return {name: done[name] / total for name in layers}
