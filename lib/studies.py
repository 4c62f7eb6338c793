"""Studies: at one scale, which images are measured and which network plays which role.

Chapters speak of roles (``vit``, ``resnet``, ``vit_untrained``) and never of checkpoints.
"""

import dataclasses
import difflib
import functools
import json
import shutil
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from lib import images, models, records, scenes, training
from lib.scenes import TASKS
from lib.training import Recipe

CHECKPOINTS = Path(__file__).parent / "checkpoints"
RUNS = records.ROOT / "runs"
TEST_IMAGES = 4096
UNTRAINED = "_untrained"
TUNING = Recipe(images=16_000, distinct=16_000, lr=3e-4, warmup_steps=50, seed=7)


@dataclasses.dataclass(frozen=True)
class Role:
    """A network of a study: its architecture, how it was trained, and what it is for.

    A role with a ``start`` is that role's network trained further, on a ``task`` of its own and
    with a new classifier.
    """

    architecture: str
    recipe: Recipe
    purpose: str
    start: str | None = None
    task: str = "object"


class Lab:
    """Procedural scenes and the small matched networks trained on them by this repository."""

    name = "lab"
    classes = scenes.CLASSES
    roles: ClassVar[dict[str, Role]] = {
        "vit": Role("vit", Recipe(), "the Vision Transformer, read from its class token"),
        "vit_other_seed": Role("vit", Recipe(seed=1), "its twin from another seed: the ceiling"),
        "vit_gap": Role("vit_gap", Recipe(), "read from the mean of its tokens, no class token"),
        "resnet": Role("resnet", Recipe(), "the convolutional network"),
        "resnet_other_seed": Role("resnet", Recipe(seed=1), "its twin from another seed"),
        "mixer": Role("mixer", Recipe(), "the MLP-Mixer: tokens mixed without attention"),
        "vit_no_skip_early": Role(
            "vit_no_skip_early", Recipe(fade=0.3), "without the skips of block 1"
        ),
        "vit_no_skip_middle": Role(
            "vit_no_skip_middle", Recipe(fade=0.3), "without the skips of block 4"
        ),
        "vit_no_skip_late": Role(
            "vit_no_skip_late", Recipe(fade=0.3), "without the skips of block 6"
        ),
        "resnet_no_skip_middle": Role(
            "resnet_no_skip_middle", Recipe(), "without the skip of unit 6"
        ),
        "vit_data_03": Role("vit", Recipe(distinct=4_800), "trained on 3 % of the scenes"),
        "vit_data_10": Role("vit", Recipe(distinct=16_000), "trained on 10 % of the scenes"),
        "vit_data_30": Role("vit", Recipe(distinct=48_000), "trained on 30 % of the scenes"),
        "resnet_data_03": Role("resnet", Recipe(distinct=4_800), "trained on 3 % of the scenes"),
        "resnet_data_10": Role("resnet", Recipe(distinct=16_000), "trained on 10 % of the scenes"),
        "resnet_data_30": Role("resnet", Recipe(distinct=48_000), "trained on 30 % of the scenes"),
        **{
            f"{start}_tuned_{task.replace(' ', '_')}": Role(
                architecture, TUNING, f"{start} trained further: {TASKS[task].purpose}", start, task
            )
            for start, architecture in (
                ("vit", "vit"),
                ("vit_other_seed", "vit"),
                ("resnet", "resnet"),
            )
            for task in TASKS
        },
    }

    def __repr__(self) -> str:
        return f"Study {self.name!r} with the roles {', '.join(self.roles)}"

    def images(self, n: int, seed: int = 0) -> images.Images:
        """``n`` test scenes that no network was trained on."""
        return images.scene_images(n, "test", seed)

    def to_input(self, pixels: Tensor, role: str) -> Tensor:
        """uint8 pixels -> what the role's network takes; the same for all networks of the lab."""
        return scenes.to_input(pixels)

    def role(self, name: str) -> Role:
        """The role of a name; ``<role>_untrained`` is the same network before its training."""
        base = name.removesuffix(UNTRAINED)
        if base not in self.roles:
            near = difflib.get_close_matches(base, self.roles, n=1) or ["vit"]
            raise ValueError(
                f"the study {self.name!r} has no role {name!r} (is it {near[0]!r} you mean?); "
                f"`python -m lib studies` lists them, and each is also there as <role>{UNTRAINED}"
            )
        return self.roles[base]

    def model(self, name: str) -> nn.Module:
        """The network that plays a role, in evaluation mode."""
        role = self.role(name)
        if name.endswith(UNTRAINED):
            return self._untrained(role)
        path = CHECKPOINTS / f"{name}.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"no weights for the role {name!r} in {CHECKPOINTS.name}/; "
                f"train them with: python -m lib train {name}"
            )
        return training.read_checkpoint(self._untrained(role), path)

    def _untrained(self, role: Role) -> nn.Module:
        model = models.build(role.architecture, role.recipe.seed)
        if role.start:
            head = {key: p for key, p in model.state_dict().items() if key.startswith("head.")}
            model.load_state_dict(self.model(role.start).state_dict() | head)
        return model

    def train(self, name: str, folder=RUNS, checkpoints=CHECKPOINTS, device="cpu") -> dict:
        """Train a role, or go on where its training stopped, and write its checkpoint and card.

        Returns the card. The accuracy on it is that of the 16-bit weights that are kept.
        """
        role = self.role(name)
        if name.endswith(UNTRAINED):
            raise ValueError(f"{name!r} is not trained; that is the point of it")
        recipe, folder = role.recipe, Path(folder) / self.name / name
        model = self._untrained(role)
        # Further training is on scenes of another seed, which its start has not seen.
        seed = int(role.start is not None)
        data = images.SceneSet(recipe.distinct, seed=seed, device=device, task=role.task)
        val = images.scene_images(1024, "val", task=role.task)
        curve = training.train(model, recipe, data, (val.pixels, val.labels), folder, device)

        test = images.scene_images(TEST_IMAGES, task=role.task)
        model = model.cpu().half().float()
        right = round(training.score(model, test.pixels, test.labels) * len(test))
        low, high = training.accuracy_interval(right, len(test))
        card = {
            "study": self.name,
            "role": name,
            "purpose": role.purpose,
            "architecture": role.architecture,
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": models.multiply_adds(model),
            "recipe": dataclasses.asdict(recipe),
            "accuracy": right / len(test),
            "accuracy_interval": [round(low, 4), round(high, 4)],
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
        training.write_checkpoint(model, card, Path(checkpoints) / f"{name}.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        return card

    def is_trained(self, name: str, checkpoints=CHECKPOINTS) -> bool:
        """Whether a folder holds a role's weights, trained by the recipe it has now."""
        recipe = json.loads(json.dumps(dataclasses.asdict(self.role(name).recipe)))
        weights = Path(checkpoints) / f"{name}.safetensors"
        card = weights.with_suffix(".json")
        if not (weights.exists() and card.exists()):
            return False
        return json.loads(card.read_text()).get("recipe") == recipe

    @functools.cached_property
    def cards(self) -> dict[str, dict]:
        """The model cards of the trained roles, by role."""
        paths = {name: CHECKPOINTS / f"{name}.json" for name in self.roles}
        return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}


STUDIES = {"lab": Lab}


def load_study(name: str) -> Lab:
    """The study of a name: ``"lab"``."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; there is {', '.join(STUDIES)}")
    return STUDIES[name]()
