"""One recipe that trains every network of a study, on any device, and can be interrupted.

AdamW or Muon, linear warm-up, cosine to zero, gradient clipping, bfloat16 autocast.
"""

import dataclasses
import functools
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from lib.studies import scenes
from lib.studies.networks import BlockWithoutSkips, UnitWithoutSkip
from lib.taps import unfused_attention

CURVE_POINTS = 50
SAVES = 20


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
        matrices = block_matrices(model) if self.optimiser == "muon" else []
        rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        adamw = torch.optim.AdamW(
            rest, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
        )
        return [adamw, Muon(matrices, self.lr, self.weight_decay)] if matrices else [adamw]

    def augmented(self, pixels: Tensor, step: int) -> Tensor:
        """What the network is shown of a step's images: themselves."""
        return pixels

    def stream(self, step: int) -> torch.Generator:
        """Random numbers of a step, which depend on the seed and the step alone."""
        return torch.Generator().manual_seed((self.seed * 100_003 + step) * 2 + 1)

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

    pad  : how far a crop may reach over the image's edge, in pixels; 0 there
    area : the smallest crop's share of the image's area; crops are scaled to the image's size
    flip : whether every other image is mirrored
    """

    pad: int = 4
    area: float = 1.0
    flip: bool = True

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


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers and convolutions inside a network's blocks or stages."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if {"blocks", "block", "stages"} & set(name.split(".")) and parameter.ndim > 1
    ]


def crop(pixels: Tensor, x: Tensor, y: Tensor, extent: Tensor, mirrored: Tensor) -> Tensor:
    """Squares of images (n, c, h, h), uint8, scaled to the images' size by linear interpolation.

    ``x``, ``y`` (n,) are the upper left corners in pixels, ``extent`` (n,) the sides, and
    ``mirrored`` (n,) says which crops are turned left to right. Beyond the image it is black.
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


def train(
    model: nn.Module,
    recipe: Recipe,
    data,
    held_out,
    folder,
    device="cpu",
    stop_after=None,
    to_input=scenes.to_input,
) -> list[dict]:
    """Train a network in place; go on where an interrupted training stopped.

    Parameters
    ----------
    model : nn.Module
        A freshly initialised network; its weights are replaced when there is something to resume.
    recipe : Recipe
        With the ``learner`` that it makes of the network.
    data : indexable by a tensor of indices
        Gives ``(uint8 pixels, labels)``; of length ``recipe.distinct``.
    held_out : (uint8 pixels, labels)
        Scored along the way for the curve; nothing is selected on it.
    folder : path
        Where the state is kept while training lasts.
    stop_after : int, optional
        Stop, resumably, after this many steps.
    to_input : callable
        Makes the network's input of uint8 pixels.

    Returns
    -------
    list of dict
        The curve: ``images`` seen, training ``loss``, held-out ``accuracy``, ``seconds`` taken.
    """
    if len(data) != recipe.distinct:
        raise ValueError(f"the recipe wants {recipe.distinct} distinct images, got {len(data)}")
    if recipe.distinct % recipe.batch_size:
        raise ValueError("the number of distinct images must be a multiple of the batch size")
    path = Path(folder) / "state.pt"
    model = recipe.learner(model).to(device)
    optimisers = recipe.optimisers(model)
    start, curve, loss_sum, since = 0, [], 0.0, 0
    settings = dataclasses.asdict(recipe)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        if state["recipe"] != settings:
            raise ValueError(f"{path} belongs to another recipe; delete it to start again")
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        start, curve, loss_sum, since = (state[k] for k in ("step", "curve", "loss_sum", "since"))
    began = time.monotonic() - (state.get("seconds", 0.0) if start else 0.0)

    def save(step):
        state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers]}
        state |= {"recipe": settings, "step": step, "curve": curve}
        state |= {"loss_sum": loss_sum, "since": since, "seconds": time.monotonic() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, path)

    end = recipe.end if stop_after is None else min(recipe.end, stop_after)
    point = max(1, recipe.steps // CURVE_POINTS)
    keep = max(1, recipe.steps // SAVES)
    device_type = torch.device(device).type
    cut = [m for m in model.modules() if isinstance(m, BlockWithoutSkips | UnitWithoutSkip)]
    with unfused_attention(model):  # on a CPU the fused kernel's backward pass is the slower one
        model.train()
        progress = tqdm(range(start, end), initial=start, total=recipe.end, unit="step")
        step = start
        try:
            for step in progress:
                pixels, labels = data[_order(recipe, step)]
                for optimiser in optimisers:
                    for group in optimiser.param_groups:
                        group["lr"] = recipe.rate(step)
                for block in cut:
                    block.skip = recipe.skip(step)
                pixels = recipe.augmented(pixels.to(device), step)
                with torch.autocast(device_type, dtype=torch.bfloat16):
                    loss = recipe.loss(model, to_input(pixels), labels.to(device), step)
                model.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                for optimiser in optimisers:
                    optimiser.step()
                loss_sum, since = loss_sum + loss.item(), since + 1
                if (step + 1) % point == 0 or step + 1 == recipe.end:
                    recipe.prepare(model, data, to_input)
                    accuracy = score(model, *held_out, device, to_input)
                    seen = (step + 1) * recipe.batch_size
                    curve.append(
                        {
                            "images": seen,
                            "loss": loss_sum / since,
                            "accuracy": accuracy,
                            "seconds": time.monotonic() - began,
                        }
                    )
                    loss_sum, since = 0.0, 0
                    progress.set_postfix(accuracy=f"{accuracy:.3f}")
                if (step + 1) % keep == 0 or step + 1 == end:
                    save(step + 1)
        finally:
            progress.close()
    return curve


def score(
    model: nn.Module, pixels: Tensor, labels: Tensor, device="cpu", to_input=scenes.to_input
) -> float:
    """Share of images classified right, in evaluation mode and float32."""
    return float((predict(model, pixels, device, to_input) == labels.cpu()).float().mean())


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, device="cpu", to_input=scenes.to_input) -> Tensor:
    """Predicted classes (n,) of uint8 images (n, 3, h, w); the model's mode is left as it was."""
    training = model.training
    model.eval()
    parts = [model(to_input(part.to(device))).argmax(1).cpu() for part in pixels.split(256)]
    model.train(training)
    return torch.cat(parts)


def accuracy_interval(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy."""
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    return interval.low, interval.high


def write_checkpoint(model: nn.Module, card: dict, path: Path) -> None:
    """Write weights in 8 bits and then, beside them, their model card (JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file(pack(model.state_dict()), partial)
    os.replace(partial, path)
    partial.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path.with_suffix(".json"))


def read_checkpoint(model: nn.Module, path: Path) -> nn.Module:
    """Load written weights into a float32 model, strictly."""
    model.load_state_dict(unpack(load_file(path)))
    return model


def pack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with a scale per output channel (``<name>.scale``), all else in 16 bits."""
    packed = {}
    for name, value in weights.items():
        value = value.detach().cpu().float()
        if value.ndim > 1 and len(value) > 1:
            scale = value.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
            packed[f"{name}.scale"] = scale
            packed[name] = (value / _per_channel(scale, value)).round().to(torch.int8)
        else:
            packed[name] = value.half().contiguous()
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights that :func:`pack` wrote."""
    return {
        name: value.float() * _per_channel(packed[f"{name}.scale"], value)
        if value.dtype == torch.int8
        else value.float()
        for name, value in packed.items()
        if not name.endswith(".scale")
    }


def _per_channel(scale: Tensor, weights: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weights.ndim - 1))


def _order(recipe: Recipe, step: int) -> Tensor:
    """Indices of a step's images.

    In the first epoch neighbours stay together and only the batches are shuffled, so that a set
    which is drawn on demand is drawn piece by piece; from then on every image is.
    """
    epoch, start = divmod(step * recipe.batch_size, recipe.distinct)
    within = torch.arange(recipe.batch_size)
    if epoch == 0:
        batches = _permutation(recipe.distinct // recipe.batch_size, recipe.seed, epoch)
        return batches[start // recipe.batch_size] * recipe.batch_size + within
    return _permutation(recipe.distinct, recipe.seed, epoch)[start + within]


@functools.lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    stream = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n, generator=stream)
