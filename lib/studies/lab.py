"""The lab: procedural scenes and the small matched networks trained on them by this repository.

A variant of it is a table of roles; what a variant shares with the lab is the lab's network.
"""

import dataclasses
from pathlib import Path

from torch import Tensor

from lib.studies import images, scenes, study
from lib.studies.masked import MaskedRecipe
from lib.studies.recipes import Recipe
from lib.studies.study import Trained, TrainedRole, arm

TEST_IMAGES = 4096
TUNING = Recipe(images=16_000, distinct=16_000, lr=3e-4, warmup_steps=50, seed=7)
TUNED_TO = ("object", "fine textures", "colour")


def parts_of_training(name: str, recipe: Recipe) -> dict[str, TrainedRole]:
    """A role's network as it was on the way: after 3, 10 and 30 % of its steps."""
    return {
        f"{name}_after_{share:02}": TrainedRole(
            name, dataclasses.replace(recipe, until=share / 100), f"{name} at {share} % of its way"
        )
        for share in (3, 10, 30)
    }


def less_data(of: str, recipe: Recipe, percents, replicates=1, what="scenes"):
    """Arms trained on some percents of the images."""
    found = {}
    for percent in percents:
        purpose = f"trained on {percent} % of the {what}"
        name = f"{of}_data_{percent:02}"
        found |= arm(name, recipe, purpose, replicates, of, percent / 100)
    return found


def tuned(start: str, architecture: str, replicate: int) -> dict[str, TrainedRole]:
    """A role's network trained further, on each task."""
    return {
        f"{start}_tuned_{(words := task.replace(' ', '_'))}": TrainedRole(
            architecture,
            TUNING,
            f"{start} trained further: {scenes.TASKS[task].purpose}",
            start,
            task,
            arm=f"{architecture}_tuned_{words}",
            replicate=replicate,
        )
        for task in TUNED_TO
    }


def other_seed(architecture: str, recipe: Recipe, purpose: str) -> TrainedRole:
    """The second replicate, as the first edition names it."""
    recipe = dataclasses.replace(recipe, seed=1)
    return TrainedRole(architecture, recipe, purpose, arm=architecture, replicate=1)


CEILING = "its twin from another seed: the ceiling"
READ_FROM_TOKEN = "the Vision Transformer, read from its class token"
READ_FROM_MEAN = "read from the mean of its tokens, no class token"
CONVOLUTIONAL = "the convolutional network"
MIXER = "the MLP-Mixer: tokens mixed without attention"

ROLES = {
    **arm("vit", Recipe(), READ_FROM_TOKEN),
    "vit_other_seed": other_seed("vit", Recipe(), CEILING),
    **arm("vit_gap", Recipe(), READ_FROM_MEAN),
    **arm("resnet", Recipe(), CONVOLUTIONAL),
    "resnet_other_seed": other_seed("resnet", Recipe(), "its twin from another seed"),
    **arm("mixer", Recipe(), MIXER),
    **arm("vit_no_skip_early", Recipe(fade=0.3), "without the skips of block 1"),
    **arm("vit_no_skip_middle", Recipe(fade=0.3), "without the skips of block 4"),
    **arm("vit_no_skip_late", Recipe(fade=0.3), "without the skips of block 6"),
    **arm("resnet_no_skip_middle", Recipe(), "without the skip of unit 6"),
    **less_data("vit", Recipe(), (3, 10, 30)),
    **less_data("resnet", Recipe(), (3, 10, 30)),
    **parts_of_training("vit", Recipe()),
    **parts_of_training("resnet", Recipe()),
    **tuned("vit", "vit", 0),
    **tuned("vit_other_seed", "vit", 1),
    **tuned("resnet", "resnet", 0),
}

_shared = {name: ROLES[name] for name in ("resnet", "resnet_other_seed", "mixer")}
_long = Recipe(images=800_000, distinct=800_000)

THIRD_SEED = {
    # Parts of a training, and further training, are of the first.
    **{name: role for name, role in ROLES.items() if not role.start and role.recipe.until == 1},
    **arm("vit", Recipe(seed=2), "the Vision Transformer, from a third seed"),
    **arm("resnet", Recipe(seed=2), "the convolutional network, from a third seed"),
}
LONG = {
    **arm("vit", _long, "the Vision Transformer, trained five times as long"),
    "vit_other_seed": other_seed("vit", _long, CEILING),
    **_shared,
}
FAINT = {
    name: dataclasses.replace(ROLES[name], task="faint textures")
    for name in ("vit", "vit_other_seed", "vit_gap", "resnet", "resnet_other_seed")
}
MASKED = {
    **arm("vit", MaskedRecipe(), "the Vision Transformer, trained without labels"),
    "vit_other_seed": other_seed("vit", MaskedRecipe(), CEILING),
    **_shared,
}

RESNET_SCENES = 51_200  # at which a ResNet is about as accurate as a ViT of 80,000
_vit = Recipe(images=80_000, distinct=80_000, optimiser="muon")
_resnet = dataclasses.replace(_vit, images=RESNET_SCENES, distinct=RESNET_SCENES)
_fading = dataclasses.replace(_vit, fade=0.3)
_masked = MaskedRecipe(images=80_000, distinct=80_000, optimiser="muon")

SECOND = {
    **arm("vit", _vit, READ_FROM_TOKEN, 5),
    **arm("vit_gap", _vit, READ_FROM_MEAN, 5),
    **arm("resnet", _resnet, CONVOLUTIONAL, 5),
    **arm("vit_no_skip_middle", _fading, "without the skips of block 4", 2),
    **arm("resnet_no_skip_middle", _resnet, "without the skip of unit 6", 2),
    **less_data("vit", _vit, (1, 3, 10), 2),
    **less_data("resnet", _resnet, (3, 10), 2),
    **arm("mixer", _vit, MIXER, 2),
    **arm("vit_masked", _masked, "trained without labels", 2, of="vit"),
    **arm("vit_adamw", Recipe(), "trained by AdamW", 2, of="vit"),
    **arm("resnet_adamw", Recipe(), "trained by AdamW", 2, of="resnet"),
}


class Lab(Trained):
    """Scenes, and networks trained on them.

    Parameters
    ----------
    name, purpose : str
    roles : dict of TrainedRole
    task : str
        That images are drawn for; of :data:`lib.studies.scenes.TASKS`.
    """

    classes = scenes.CLASSES

    def __init__(self, name="lab", purpose="", roles=ROLES, task="object"):
        super().__init__(name, roles, purpose)
        self.task = task
        self._own = {key for key, role in roles.items() if role != ROLES.get(key)}

    @property
    def checkpoints(self) -> Path:
        return study.WEIGHTS if self.name == "lab" else super().checkpoints

    def weights(self, name: str, folder=None) -> Path:
        return super().weights(name, folder or (None if name in self._own else study.WEIGHTS))

    def images(self, n: int, seed: int = 0) -> images.Images:
        """``n`` test scenes that no network was trained on."""
        return images.scene_images(n, "test", seed, self.task)

    def to_input(self, pixels: Tensor, role: str) -> Tensor:
        """uint8 pixels -> the networks' input, the same for all networks of the lab."""
        return scenes.to_input(pixels)

    def training_data(self, role: TrainedRole, device) -> tuple:
        # Further training is on scenes of another seed, which its start has not seen.
        seed = int(role.start is not None)
        return (
            images.SceneSet(role.recipe.distinct, seed=seed, device=device, task=role.task),
            images.scene_images(1024, "val", task=role.task),
            images.scene_images(TEST_IMAGES, task=role.task),
        )
