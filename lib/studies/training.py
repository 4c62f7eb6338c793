"""One training loop for every network of a study, on any device, that can be interrupted."""

import dataclasses
import functools
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib.studies import scenes
from lib.studies.recipes import Recipe
from lib.taps import unfused_attention

CURVE_POINTS = 50
SAVES = 20


def train(
    model: nn.Module, recipe: Recipe, data, held_out, folder, device="cpu",
    to_input=scenes.to_input, stop_after: int | None = None,
) -> list[dict]:  # fmt: skip
    """Train a network in place, or go on where an interrupted training of it stopped.

    Parameters
    ----------
    data : indexable by a tensor of indices
        Gives ``(uint8 pixels, labels)``; of length ``recipe.distinct``.
    held_out : (uint8 pixels, labels)
        Scored along the way for the curve; nothing is selected on it.
    folder : path
        Where the state is kept while training lasts.
    to_input : callable
        Makes the network's input of uint8 pixels.
    stop_after : int, optional
        Stop, resumably, after this many steps.

    Returns the curve, a list of dicts: ``images`` seen, training ``loss``, held-out ``accuracy``,
    ``seconds`` taken.
    """
    if len(data) != recipe.distinct:
        raise ValueError(f"the recipe wants {recipe.distinct} distinct images, got {len(data)}")
    if recipe.distinct % recipe.batch_size:
        raise ValueError("the number of distinct images must be a multiple of the batch size")
    state = _State(recipe.learner(model).to(device), recipe, Path(folder) / "state.pt", device)
    point, save = (max(1, recipe.steps // count) for count in (CURVE_POINTS, SAVES))
    end = recipe.end if stop_after is None else min(recipe.end, stop_after)
    model, progress = state.model, tqdm(total=recipe.end, initial=state.step, unit="step")
    # On a CPU the fused kernel's backward pass is the slower one.
    with unfused_attention(model), progress:
        model.train()
        while state.step < end:
            pixels, labels = data[_order(recipe, state.step)]
            state.take(pixels.to(device), labels.to(device), to_input)
            if state.step % point == 0 or state.step == recipe.end:
                recipe.prepare(model, data, to_input)
                state.add_point(score(model, *held_out, device, to_input))
                progress.set_postfix(accuracy=f"{state.curve[-1]['accuracy']:.3f}")
            if state.step % save == 0 or state.step == end:
                state.save()
            progress.update()
    return state.curve


class _State:
    """All that a training needs to go on: weights, optimisers, the step and the curve so far."""

    KEPT = ("step", "curve", "loss_sum", "since", "seconds")

    def __init__(self, model: nn.Module, recipe: Recipe, path: Path, device):
        self.model, self.recipe, self.path = model, recipe, path
        self.optimisers = recipe.optimisers(model)
        self.fading = [module for module in model.modules() if hasattr(module, "skipless")]
        self.step, self.curve, self.loss_sum, self.since, self.seconds = 0, [], 0.0, 0, 0.0
        if path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
            if state["recipe"] != dataclasses.asdict(recipe):
                raise ValueError(f"{path} belongs to another recipe; delete it to start again")
            for part, saved in zip([model, *self.optimisers], state["parts"], strict=True):
                part.load_state_dict(saved)
            vars(self).update({name: state[name] for name in self.KEPT})
        self.began = time.monotonic() - self.seconds

    def save(self) -> None:
        self.seconds = time.monotonic() - self.began
        state = {name: getattr(self, name) for name in self.KEPT}
        state["recipe"] = dataclasses.asdict(self.recipe)
        state["parts"] = [part.state_dict() for part in (self.model, *self.optimisers)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def take(self, pixels: Tensor, labels: Tensor, to_input) -> None:
        """One step, on uint8 images (n, 3, h, w) and their labels (n,)."""
        recipe, model = self.recipe, self.model
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = recipe.rate(self.step)
        for block in self.fading:
            block.skip = recipe.skip(self.step)
        pixels = recipe.augmented(pixels, self.step)
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
            loss = recipe.loss(model, to_input(pixels), labels, self.step)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.loss_sum, self.since = self.loss_sum + loss.item(), self.since + 1
        self.step += 1

    def add_point(self, accuracy: float) -> None:
        """Add to the curve: the loss is the mean since the last point."""
        point = {"images": self.step * self.recipe.batch_size, "loss": self.loss_sum / self.since}
        self.curve.append(point | {"accuracy": accuracy, "seconds": time.monotonic() - self.began})
        self.loss_sum, self.since = 0.0, 0


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


def _order(recipe: Recipe, step: int) -> Tensor:
    """Indices of a step's images, of which every epoch shows each once, in an order of its own."""
    epoch, start = divmod(step * recipe.batch_size, recipe.distinct)
    within = torch.arange(recipe.batch_size)
    if epoch == 0:  # only batches are shuffled: a set drawn on demand is drawn piece by piece
        batches = _permutation(recipe.distinct // recipe.batch_size, recipe.seed, epoch)
        return batches[start // recipe.batch_size] * recipe.batch_size + within
    return _permutation(recipe.distinct, recipe.seed, epoch)[start + within]


@functools.lru_cache(maxsize=1)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    stream = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n, generator=stream)
