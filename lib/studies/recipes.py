"""Recipes: all that decides how a network is trained, but the images and the network itself.

AdamW or Muon, linear warm-up, cosine to zero, gradient clipping.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    images     : how many training images a whole training shows it
    distinct   : how many different images there are among them
    batch_size : images per step
    optimiser  : ``"adamw"``, or ``"muon"`` for the matrices inside blocks and AdamW for the rest
    lr, warmup_steps, weight_decay, clip, betas : of both optimisers and their schedule
    fade       : share of the steps over which skip connections that are to be removed fade out;
                 0 trains without them from the start
    until      : share of the steps after which it ends; the schedule is that of a whole training
    seed       : of the initial weights and of the order of the images
    """

    images: int = 160_000
    distinct: int = 160_000
    batch_size: int = 32
    optimiser: str = "adamw"
    lr: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.05
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    fade: float = 0.0
    until: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.images // self.batch_size

    @property
    def end(self) -> int:
        """The step before which training ends."""
        return round(self.until * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then cosine to zero."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def skip(self, step: int) -> float:
        """What is left at a step of the skip connections that fade out."""
        return max(0.0, 1 - step / (self.fade * self.steps)) if self.fade else 0.0

    def optimisers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Optimisers that between them step every parameter of a network."""
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            inside = {"blocks", "block", "stages"} & set(name.split(".")) and parameter.ndim > 1
            (matrices if inside and self.optimiser == "muon" else rest).append(parameter)
        shared = {"lr": self.lr, "weight_decay": self.weight_decay}
        muon = [Muon(matrices, **shared)] if matrices else []
        return [torch.optim.AdamW(rest, betas=self.betas, **shared), *muon]

    def augmented(self, pixels: Tensor, step: int) -> Tensor:
        """What the network is shown of a step's images: themselves."""
        return pixels

    def stream(self, step: int) -> torch.Generator:
        """Random numbers of a step, which depend on the seed and the step alone."""
        return torch.Generator().manual_seed((self.seed * 100_003 + step) * 2 + 1)

    def of_share(self, share: float) -> "Recipe":
        """The same with a share of the different images, a whole number of batches, as often."""
        batches = round(share * self.distinct / self.batch_size)
        return dataclasses.replace(self, distinct=batches * self.batch_size)

    def learner(self, model: nn.Module) -> nn.Module:
        """What learns: the network, and whatever it takes to train it. Scored as the network."""
        return model

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """What a step makes smaller: the cross-entropy of the images' classes."""
        return F.cross_entropy(model(images).float(), labels)

    def prepare(self, model: nn.Module, data, to_input) -> None:
        """Prepare a learner to be scored: its classifier has been trained along."""


@dataclasses.dataclass(frozen=True)
class CroppingRecipe(Recipe):
    """For images that are seen many times, and never twice the same way.

    pad    : how far a crop may reach over the image's edge, in pixels; 0 there
    area   : the smallest crop's share of the image's area; crops are scaled to the image's size
    flip   : whether every other image is mirrored
    cutmix : whether a rectangle of every image comes from another image of its batch (Yun et al.,
             ICCV 2019): one rectangle a batch, its area uniform, and labels weighed by areas
    """

    pad: int = 4
    area: float = 1.0
    flip: bool = True
    cutmix: bool = False

    def augmented(self, pixels: Tensor, step: int) -> Tensor:
        """Images (n, 3, h, h), uint8, of which each is cropped and mirrored in its own way.

        Drawn by the seed and the step alone, on every device the same.
        """
        n, side = len(pixels), pixels.shape[-1]
        random = torch.rand(4, n, generator=self.stream(step))
        # Whole pixels, so that a crop that is not scaled is not blurred.
        extent = (side * (self.area + (1 - self.area) * random[0]).sqrt()).round()
        first = ((side - extent + 2 * self.pad + 1) * random[1:3]).floor() - self.pad
        mirrored = (random[3] < 0.5) & self.flip
        return crop(pixels, first[0], first[1], extent, mirrored)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, step: int) -> Tensor:
        if self.cutmix:
            with torch.random.fork_rng(devices=[]):
                # Even seeds: the odd ones are the crops'.
                torch.manual_seed(self.stream(step).initial_seed() - 1)
                images, labels = v2.CutMix(num_classes=model.num_classes)(images, labels)
        return super().loss(model, images, labels, step)


class Muon(torch.optim.Muon):
    """torch's Muon, which takes a convolution's weights as a matrix (out, in x height x width).

    Its step is scaled to the size of AdamW's, so that both share a learning rate.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float):
        self.weights = parameters
        views = [nn.Parameter(p.detach().flatten(1)) for p in parameters]
        super().__init__(views, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self):
        for view, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            view.grad = weight.grad.flatten(1)
        super().step()


def crop(pixels: Tensor, x: Tensor, y: Tensor, extent: Tensor, mirrored: Tensor) -> Tensor:
    """Squares of images (n, c, h, h), uint8, scaled to the images' size by linear interpolation.

    ``x``, ``y`` (n,) are the upper left corners in pixels, ``extent`` (n,) the sides, and
    ``mirrored`` (n,) marks crops that are turned left to right. Beyond the image it is black.
    """
    side = pixels.shape[-1]
    zoom = extent / side
    # An image goes from -1 to 1.
    shift = [(2 * corner + extent) / side - 1 for corner in (x, y)]
    zero = torch.zeros_like(zoom)
    rows = (zoom * torch.where(mirrored, -1.0, 1.0), zero, shift[0], zero, zoom, shift[1])
    theta = torch.stack(rows, dim=1).view(-1, 2, 3).to(pixels.device)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, align_corners=False).round().to(torch.uint8)
