"""Masked autoencoding: a ViT learns without labels, by painting the patches it is not shown.

As in "Masked Autoencoders Are Scalable Vision Learners" (He et al., CVPR 2022): the network sees a
few patches of an image, and a small decoder, thrown away afterwards, paints the others from what it
made of these.
"""

import dataclasses

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lib.studies.recipes import Recipe
from lib.taps import collect


@dataclasses.dataclass(frozen=True)
class MaskedRecipe(Recipe):
    """For a ViT that learns by painting hidden patches.

    shown      : share of an image's patches that the network sees
    fitted_on  : how many of the training images a classifier is fitted on for each score
    """

    shown: float = 0.25
    fitted_on: int = 2048

    def learner(self, model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return MaskedAutoencoder(model)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Error of the patches painted; of an image's patches others are shown at every step."""
        order = torch.rand(len(images), model.patches, generator=self.stream(step)).argsort(1)
        return model.error(images, order.to(images.device), round(self.shown * model.patches))

    def prepare(self, model: nn.Module, data, to_input) -> None:
        """Fit a classifier to what the network makes of whole training images."""
        pixels, labels = data[torch.arange(min(self.fitted_on, self.distinct))]
        fit_classifier(model.encoder, pixels, labels, to_input)


class MaskedAutoencoder(nn.Module):
    """A ViT and a decoder of one block that paints the patches which the ViT is not shown.

    Called with images it is the ViT itself.
    """

    def __init__(self, encoder: VisionTransformer):
        super().__init__()
        width, grid = encoder.embed_dim, encoder.patch_embed.grid_size
        side = encoder.patch_embed.patch_size[0]
        self.encoder, self.patches = encoder, grid[0] * grid[1]
        self.unfold = nn.PixelUnshuffle(side)
        position = encoder.pos_embed[0, encoder.num_prefix_tokens :].detach().clone()
        self.register_buffer("position", position, persistent=False)
        self.hidden = nn.Parameter(torch.zeros(width))
        self.enter = nn.Linear(width, width)
        self.block = Block(width, encoder.blocks[0].attn.num_heads)
        self.paint = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * side**2))

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def error(self, images: Tensor, order: Tensor, shown: int) -> Tensor:
        """Mean squared error of the hidden patches, each scaled to mean 0 and variance 1.

        1 is what painting each patch in its mean colour costs. ``order`` (n, patches) has a
        permutation for each image, whose first ``shown`` patches are shown.
        """
        seen = self.enter(self._encode(images, order[:, :shown]))
        everywhere = (self.hidden + self.position).to(seen.dtype).expand(len(images), -1, -1)
        places = order[:, :shown, None].expand_as(seen)
        tokens = everywhere.scatter_add(1, places, seen - self.hidden.to(seen.dtype))
        hidden = order[:, shown:, None]
        painted = self.paint(torch.take_along_dim(self.block(tokens), hidden, 1)).float()
        target = torch.take_along_dim(self.unfold(images).flatten(2).mT, hidden, 1)
        return F.mse_loss(painted, F.layer_norm(target, target.shape[-1:]))

    def _encode(self, images: Tensor, which: Tensor) -> Tensor:
        """The ViT's last tokens (n, k, width) of the patches (n, k) that alone it is shown."""
        prefix = self.encoder.num_prefix_tokens

        def only(drop, arguments, tokens):
            patches = torch.take_along_dim(tokens[:, prefix:], which[..., None], 1)
            return torch.cat([tokens[:, :prefix], patches], 1)

        # timm drops patches here, between the position embedding and the first block.
        handle = self.encoder.patch_drop.register_forward_hook(only)
        try:
            return self.encoder.forward_features(images)[:, prefix:]
        finally:
            handle.remove()


@torch.no_grad()
def fit_classifier(model: VisionTransformer, pixels: Tensor, labels: Tensor, to_input) -> None:
    """Replace a ViT's linear classifier by the ridge regression on its input (in place).

    Of labels (n,) as +1 and -1 on standardised features of uint8 images (n, 3, h, w); the penalty
    is a thousandth of the images, and the bias has none.
    """
    read = "head:input"
    parts = [collect(model, to_input(part), read)[read] for part in pixels.split(256)]
    features = torch.cat(parts).double()
    mean = features.mean(0)
    # A feature that is the same for all images is left alone.
    deviation = features.std(0, correction=0).clamp(min=1e-9)
    x = (features - mean) / deviation
    y = (2.0 * F.one_hot(labels, model.num_classes) - 1).to(x)
    penalty = len(x) / 1000 * torch.eye(x.shape[1]).to(x)
    weights = torch.linalg.solve(x.mT @ x + penalty, x.mT @ (y - y.mean(0))) / deviation[:, None]
    model.head.weight.copy_(weights.mT)
    model.head.bias.copy_(y.mean(0) - mean @ weights)
