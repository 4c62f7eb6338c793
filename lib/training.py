"""One recipe that trains every network of a study, on any device, and can be interrupted.

AdamW, linear warm-up, cosine to zero, gradient clipping, bfloat16 autocast. All roles of a study
share it; what differs between two roles is what their names say.
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

from lib import scenes
from lib.models import BlockWithoutSkips, UnitWithoutSkip
from lib.taps import unfused_attention

CURVE_POINTS = 50
SAVES = 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    images     : how many training images it sees in all
    distinct   : how many different images there are among them
    batch_size : images per step
    lr, warmup_steps, weight_decay, clip, betas : of AdamW and its schedule
    fade       : share of the steps over which skip connections that are to be removed fade out;
                 0 trains without them from the start
    seed       : of the initial weights and of the order of the images
    """

    images: int = 160_000
    distinct: int = 160_000
    batch_size: int = 32
    lr: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.05
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    fade: float = 0.0
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.images // self.batch_size

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then cosine to zero."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def skip(self, step: int) -> float:
        """What is left at a step of the skip connections that fade out."""
        return max(0.0, 1 - step / (self.fade * self.steps)) if self.fade else 0.0


def train(
    model: nn.Module, recipe: Recipe, data, held_out, folder, device="cpu", stop_after=None
) -> list[dict]:
    """Train a network in place; go on where an interrupted training stopped.

    Parameters
    ----------
    model : nn.Module
        A freshly initialised network; its weights are replaced when there is something to resume.
    recipe : Recipe
    data : indexable by a tensor of indices
        Gives ``(uint8 pixels, labels)``; of length ``recipe.distinct``.
    held_out : (uint8 pixels, labels)
        Scored along the way for the curve; nothing is selected on it.
    folder : path
        Where the state is kept while training lasts.
    stop_after : int, optional
        Stop, resumably, after this many steps.

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
    model.to(device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    start, curve, loss_sum, since = 0, [], 0.0, 0
    settings = dataclasses.asdict(recipe)
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        if state["recipe"] != settings:
            raise ValueError(f"{path} belongs to another recipe; delete it to start again")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start, curve, loss_sum, since = (state[k] for k in ("step", "curve", "loss_sum", "since"))
    began = time.monotonic() - (state.get("seconds", 0.0) if start else 0.0)

    def save(step):
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
        state |= {"recipe": settings, "step": step, "curve": curve}
        state |= {"loss_sum": loss_sum, "since": since, "seconds": time.monotonic() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, path)

    end = recipe.steps if stop_after is None else min(recipe.steps, stop_after)
    point = max(1, recipe.steps // CURVE_POINTS)
    keep = max(1, recipe.steps // SAVES)
    device_type = torch.device(device).type
    cut = [m for m in model.modules() if isinstance(m, BlockWithoutSkips | UnitWithoutSkip)]
    with unfused_attention(model):  # on a CPU the fused kernel's backward pass is the slower one
        model.train()
        progress = tqdm(range(start, end), initial=start, total=recipe.steps, unit="step")
        step = start
        try:
            for step in progress:
                pixels, labels = data[_order(recipe, step)]
                for group in optimiser.param_groups:
                    group["lr"] = recipe.rate(step)
                for block in cut:
                    block.skip = recipe.skip(step)
                with torch.autocast(device_type, dtype=torch.bfloat16):
                    logits = model(scenes.to_input(pixels.to(device)))
                loss = F.cross_entropy(logits.float(), labels.to(device))
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                optimiser.step()
                loss_sum, since = loss_sum + loss.item(), since + 1
                if (step + 1) % point == 0 or step + 1 == recipe.steps:
                    accuracy = score(model, *held_out, device=device)
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


def score(model: nn.Module, pixels: Tensor, labels: Tensor, device="cpu") -> float:
    """Share of images classified right, in evaluation mode and float32."""
    return float((predict(model, pixels, device) == labels.cpu()).float().mean())


@torch.no_grad()
def predict(model: nn.Module, pixels: Tensor, device="cpu") -> Tensor:
    """Predicted classes (n,) of uint8 images (n, 3, h, w); the model's mode is left as it was."""
    training = model.training
    model.eval()
    parts = [model(scenes.to_input(part.to(device))).argmax(1).cpu() for part in pixels.split(256)]
    model.train(training)
    return torch.cat(parts)


def accuracy_interval(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of an accuracy."""
    interval = stats.binomtest(right, n).proportion_ci(method="wilson")
    return interval.low, interval.high


def write_checkpoint(model: nn.Module, card: dict, path: Path) -> None:
    """Write weights in 16 bits and then, beside them, their model card (JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}
    partial = path.with_name(path.name + ".part")
    save_file(weights, partial)
    os.replace(partial, path)
    partial.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path.with_suffix(".json"))


def read_checkpoint(model: nn.Module, path: Path) -> nn.Module:
    """Load 16-bit weights into a float32 model, strictly."""
    weights = {name: value.float() for name, value in load_file(path).items()}
    model.load_state_dict(weights)
    return model


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
