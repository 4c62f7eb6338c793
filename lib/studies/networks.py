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

GRID, WIDTH, DEPTH, HEADS = 8, 96, 8, 6


@dataclasses.dataclass(frozen=True)
class Size:
    """Side of a study's images, in pixels, and the number of their classes."""

    image: int = scenes.SIZE
    classes: int = len(scenes.CLASSES)


LAB = Size()


def vit(size: Size = LAB, class_token: bool = True) -> nn.Module:
    """ViT of 8 blocks, width 96, read from a class token or from the mean of its patch tokens."""
    model = VisionTransformer(
        img_size=size.image,
        patch_size=size.image // GRID,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=size.classes,
        weight_init="jax",
        class_token=class_token,
        global_pool="token" if class_token else "avg",
    )
    # A sine-cosine start for the learned position embedding: from a random start these small ViTs
    # stay at chance for tens of thousands of images.
    position = build_sincos2d_pos_embed([GRID, GRID], dim=WIDTH)
    with torch.no_grad():
        model.pos_embed[:, model.num_prefix_tokens :] = 0.5 * position
    return model


vit_gap = partial(vit, class_token=False)


def resnet(size: Size = LAB) -> nn.Module:
    """Pre-activation bottleneck ResNet with group normalisation and weight standardisation (BiT).

    Three stages of 3, 4 and 6 units at 32, 16 and 8 pixels, after a 3 x 3 stem that keeps the
    size of images of 32 pixels, as ResNets for small images do, and halves that of 64.
    """
    model = ResNetV2(
        layers=(3, 4, 6),
        channels=(64, 128, 256),
        num_classes=size.classes,
        norm_layer=partial(GroupNormAct, num_groups=8),
    )
    stem = StdConv2d(3, 64, kernel_size=3, stride=size.image // (4 * GRID))
    model.stem = nn.Sequential(OrderedDict(conv=stem))
    return model


def mixer(size: Size = LAB) -> nn.Module:
    """MLP-Mixer of the ViT's width and depth: the same stream, mixed without attention."""
    return MlpMixer(
        img_size=size.image,
        patch_size=size.image // GRID,
        num_blocks=DEPTH,
        embed_dim=WIDTH,
        num_classes=size.classes,
    )


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


ARCHITECTURES = {"vit": vit, "vit_gap": vit_gap, "resnet": resnet, "mixer": mixer}
# Networks without the skips of one block: the intact one, and which of its blocks or units.
CUTS = {
    "vit_no_skip_early": ("vit", 1),
    "vit_no_skip_middle": ("vit", 4),
    "vit_no_skip_late": ("vit", 6),
    "resnet_no_skip_middle": ("resnet", 6),
}


def family(architecture: str) -> str:
    """The architecture, with all its skip connections."""
    return CUTS.get(architecture, (architecture, None))[0]


def cut(architecture: str) -> int | None:
    """The block or residual unit whose skips an architecture misses; None for intact ones."""
    return CUTS.get(architecture, (architecture, None))[1]


def build(architecture: str, seed: int, size: Size = LAB) -> nn.Module:
    """A network with random weights, the same for the same seed, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[family(architecture)](size).eval()
    block = cut(architecture)
    return model if block is None else without_skips(model, block)


def multiply_adds(model: nn.Module, size: int = scenes.SIZE) -> int:
    """Multiply-adds of one forward pass of one image, counted by torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2
