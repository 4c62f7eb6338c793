"""What all studies have in common: a study fixes the images and which network plays each role.

Chapters speak of arms (``vit``, ``resnet``) and roles (``vit_untrained``), never of checkpoints.
"""

import dataclasses
import difflib
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn

from lib import intervals, records
from lib.studies import checkpoints, networks, training
from lib.studies.recipes import Recipe

WEIGHTS = Path(__file__).parent / "weights"
RUNS = records.ROOT / "runs"
UNTRAINED = "_untrained"
BASELINES = 10  # untrained networks of an arm: they cost no training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """A network of a study. Its study gives it its name, and what else is left out here.

    name      : in records, tables and file names
    arm       : shared by the replicates of one recipe; the name, if left out
    replicate : 0 is the first seed; arms are paired by it
    trained   : False for a baseline, the same network before its training
    family    : ``"vit"``, ``"vit_gap"``, ``"resnet"``, ``"mixer"``: colours and markers
    share     : of all training images
    cut       : the block or residual unit whose skip connections were removed
    """

    name: str = ""
    arm: str = ""
    replicate: int = 0
    trained: bool = True
    family: str = ""
    share: float = 1.0
    cut: int | None = None


@dataclasses.dataclass(frozen=True)
class TrainedRole(Role):
    """A network that this repository trains; ``family`` and ``cut`` are its architecture's.

    architecture : of :mod:`lib.studies.networks`
    recipe       : how it is trained
    purpose      : what it is for
    start        : the role whose trained network it starts from, with a classifier of its own
    task         : of :data:`lib.studies.scenes.TASKS`
    """

    architecture: str
    recipe: Recipe
    purpose: str
    start: str | None = None
    task: str = "object"

    def __post_init__(self):
        object.__setattr__(self, "family", networks.family(self.architecture))
        object.__setattr__(self, "cut", networks.cut(self.architecture))

    def later(self, seeds: int) -> "TrainedRole":
        """The same from another seed."""
        recipe = dataclasses.replace(self.recipe, seed=self.recipe.seed + seeds)
        return dataclasses.replace(self, recipe=recipe)


def arm(name: str, recipe: Recipe, purpose: str, replicates=1, of="", share=1.0):
    """An arm's roles, by name: ``<name>``, ``<name>_seed_1``, ..., from consecutive seeds.

    ``of`` is their architecture, where that is not the name, and ``share`` that of their images.
    """
    first = TrainedRole(of or name, recipe.of_share(share), purpose, arm=name, share=share)
    return {
        f"{name}_seed_{k}" if k else name: dataclasses.replace(first.later(k), replicate=k)
        for k in range(replicates)
    }


class Study:
    """Images, and networks in roles. A kind of it gives ``images``, ``model`` and ``to_input``."""

    cards: ClassVar[dict[str, dict]] = {}  # of networks that were trained here

    def __init__(self, name: str, roles: dict[str, Role], purpose: str = ""):
        self.name, self.purpose = name, purpose
        self.roles = {
            key: dataclasses.replace(role, name=key, arm=role.arm or key, family=role.family or key)
            for key, role in roles.items()
        }
        # The untrained network of each role, and of each arm's first from further seeds.
        further = {
            f"{role.arm}_seed_{k}": dataclasses.replace(role.later(k), replicate=k)
            for role in self.roles.values()
            for k in range(1, BASELINES)
            if role.replicate == 0 and not self.find(role.arm, k)
        }
        self.baselines = {
            name + UNTRAINED: dataclasses.replace(role, name=name + UNTRAINED, trained=False)
            for name, role in (further | self.roles).items()
        }

    def __repr__(self) -> str:
        return f"Study {self.name!r} with the roles {', '.join(self.roles)}"

    def role(self, name: str):
        """The role of a name; ``<role>_untrained`` is the same network before its training."""
        every = self.roles | self.baselines
        if name not in every:
            near = difflib.get_close_matches(name, every, n=1) or list(every)[:1]
            raise ValueError(
                f"the study {self.name!r} has no role {name!r} (is it {near[0]!r} you mean?); "
                f"`python -m lib studies` lists them, and each is also there as <role>{UNTRAINED}"
            )
        return every[name]

    def find(self, arm: str, replicate: int = 0, trained: bool = True):
        """The role of an arm's replicate, or None; there are ``BASELINES`` untrained ones."""
        every = self.roles if trained else self.baselines
        return next((r for r in every.values() if (r.arm, r.replicate) == (arm, replicate)), None)

    def has(self, name: str) -> bool:
        """Whether there is such a role."""
        return name in self.roles or name in self.baselines

    def those(self, *names: str) -> list[str]:
        """Those of some roles that can be measured, in the order given."""
        return [name for name in names if self.has(name)]


class Trained(Study):
    """A study whose networks are trained by this repository, each by a recipe of its own.

    A kind of it gives ``images``, ``to_input`` and ``training_data(role, device)``: the data a role
    is trained on, and the images of its curve and of its card.
    """

    classes: Sequence[str]
    size = networks.LAB

    @property
    def checkpoints(self) -> Path:
        """Where the study's weights are kept."""
        return WEIGHTS if self.name == "lab" else WEIGHTS / self.name

    def weights(self, name: str, folder=None) -> Path:
        """The file of a role's weights, in the study's folder or another; its card is beside it."""
        return Path(folder or self.checkpoints) / f"{name}.safetensors"

    def model(self, name: str) -> nn.Module:
        """The network that plays a role, in evaluation mode."""
        role = self.role(name)
        if not role.trained:
            return self._untrained(role)
        path = self.weights(name)
        if not path.exists():
            raise FileNotFoundError(
                f"no weights for the role {name!r} in {path.parent.name}/; "
                f"train them with: python -m lib train --study {self.name} {name}"
            )
        return checkpoints.read(self._untrained(role), path)

    def _untrained(self, role: TrainedRole) -> nn.Module:
        model = networks.build(role.architecture, role.recipe.seed, self.size)
        if role.start:
            head = {key: p for key, p in model.state_dict().items() if key.startswith("head.")}
            model.load_state_dict(self.model(role.start).state_dict() | head)
        return model

    def train(self, name: str, folder=RUNS, into=None, device="cpu") -> dict:
        """Train a role, or go on where its training stopped, and write its checkpoint and card.

        Returns the card. The accuracy on it is that of the 8-bit weights that are kept.
        """
        role = self.role(name)
        if not role.trained:
            raise ValueError(f"{name!r} is not trained; that is the point of it")
        folder = Path(folder) / self.name / name
        model = self._untrained(role)
        data, val, test = self.training_data(role, device)
        to_input = functools.partial(self.to_input, role=name)
        held_out = val.pixels, val.labels
        curve = training.train(model, role.recipe, data, held_out, folder, device, to_input)
        model.load_state_dict(checkpoints.unpack(checkpoints.pack(model.cpu().state_dict())))
        right = training.score(model, test.pixels, test.labels, to_input=to_input) * len(test)
        accuracy = intervals.share(round(right), len(test))
        card = {
            "study": self.name,
            "role": role.name,
            "purpose": role.purpose,
            "architecture": role.architecture,
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": networks.multiply_adds(model, self.size.image),
            "recipe": dataclasses.asdict(role.recipe),
            "accuracy": accuracy.value,
            "accuracy_interval": [round(accuracy.low, 4), round(accuracy.high, 4)],
            "test_images": len(test),
            "weights": records.weights_hash(model),
            "seconds": round(curve[-1]["seconds"]),
            "device": records.device_name(device),
            "provenance": records.provenance(),
            "curve": [
                {key: round(point[key], 4) for key in ("images", "loss", "accuracy")}
                for point in curve
            ],
        }
        checkpoints.write(model, card, self.weights(name, into))
        shutil.rmtree(folder, ignore_errors=True)
        return card

    def is_trained(self, name: str, folder=None) -> bool:
        """Whether a folder holds a role's weights, trained by the recipe it has now."""
        recipe, weights = self.role(name).recipe, self.weights(name, folder)
        card = weights.with_suffix(".json")
        if not (weights.exists() and card.exists()):
            return False
        # Fields younger than a card have their defaults there.
        then = dataclasses.asdict(type(recipe)()) | json.loads(card.read_text())["recipe"]
        return then == json.loads(json.dumps(dataclasses.asdict(recipe)))

    @functools.cached_property
    def cards(self) -> dict[str, dict]:
        """The model cards of the trained roles, by role."""
        paths = {name: self.weights(name).with_suffix(".json") for name in self.roles}
        return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}

    def those(self, *names: str) -> list[str]:
        # What was not trained needs no weights.
        return [name for name in names if name in self.baselines or name in self.cards]
