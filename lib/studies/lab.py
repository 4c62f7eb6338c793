"""The lab: procedural scenes and the small matched networks trained on them by this repository."""

import dataclasses

from torch import Tensor

from lib.studies import images, scenes
from lib.studies.masked import MaskedRecipe
from lib.studies.recipes import Recipe
from lib.studies.study import Trained, TrainedRole, arm

TEST_IMAGES = 4096
TUNING = Recipe(images=16_000, distinct=16_000, lr=3e-4, warmup_steps=50, seed=7)
TUNED_TO = ("object", "fine textures", "colour")
PARTS = (3, 10, 30)  # percents of the steps of a training, and of the images
READ_FROM_TOKEN = "the Vision Transformer, read from its class token"
READ_FROM_MEAN = "read from the mean of its tokens, no class token"
CONVOLUTIONAL = "the convolutional network"
MIXER = "the MLP-Mixer: tokens mixed without attention"


def parts_of_training(name: str, recipe: Recipe) -> dict[str, TrainedRole]:
    """A role's network as it was on the way, after some percents of its steps."""
    return {
        f"{name}_after_{share:02}": TrainedRole(
            name, dataclasses.replace(recipe, until=share / 100), f"{name} at {share} % of its way"
        )
        for share in PARTS
    }


def less_data(of: str, recipe: Recipe, percents, replicates=1, what="scenes"):
    """Arms trained on some percents of the images."""
    found = {}
    for percent in percents:
        purpose = f"trained on {percent} % of the {what}"
        found |= arm(f"{of}_data_{percent:02}", recipe, purpose, replicates, of, percent / 100)
    return found


def tuned(start: str, architecture: str, replicate: int = 0) -> dict[str, TrainedRole]:
    """A role's network trained further, on each task."""
    found = {}
    for task in TUNED_TO:
        end = f"tuned_{task.replace(' ', '_')}"
        purpose = f"{start} trained further: {scenes.TASKS[task].purpose}"
        kind = {"arm": f"{architecture}_{end}", "replicate": replicate}
        found[f"{start}_{end}"] = TrainedRole(architecture, TUNING, purpose, start, task, **kind)
    return found


def other_seed(architecture: str, purpose: str) -> dict[str, TrainedRole]:
    """The second replicate, as the first edition names it."""
    role = TrainedRole(architecture, Recipe(seed=1), purpose, arm=architecture, replicate=1)
    return {f"{architecture}_other_seed": role}


ROLES = {
    **arm("vit", Recipe(), READ_FROM_TOKEN),
    **other_seed("vit", "its twin from another seed: the ceiling"),
    **arm("vit_gap", Recipe(), READ_FROM_MEAN),
    **arm("resnet", Recipe(), CONVOLUTIONAL),
    **other_seed("resnet", "its twin from another seed"),
    **arm("mixer", Recipe(), MIXER),
    **arm("vit_no_skip_early", Recipe(fade=0.3), "without the skips of block 1"),
    **arm("vit_no_skip_middle", Recipe(fade=0.3), "without the skips of block 4"),
    **arm("vit_no_skip_late", Recipe(fade=0.3), "without the skips of block 6"),
    **arm("resnet_no_skip_middle", Recipe(), "without the skip of unit 6"),
    **less_data("vit", Recipe(), PARTS),
    **less_data("resnet", Recipe(), PARTS),
    **parts_of_training("vit", Recipe()),
    **parts_of_training("resnet", Recipe()),
    **tuned("vit", "vit"),
    **tuned("vit_other_seed", "vit", 1),
    **tuned("resnet", "resnet"),
}

_vit = Recipe(images=80_000, distinct=80_000, optimiser="muon")
# At this number of scenes a ResNet is about as accurate as a ViT of 80,000.
_resnet = Recipe(images=51_200, distinct=51_200, optimiser="muon")
_fading = dataclasses.replace(_vit, fade=0.3)
_masked = MaskedRecipe(images=160_000, distinct=160_000, optimiser="muon")

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
    """Scenes, and networks trained on them."""

    classes = scenes.CLASSES

    def __init__(self, name="lab", roles=ROLES, purpose=""):
        super().__init__(name, roles, purpose)

    def images(self, n: int, seed: int = 0) -> images.Images:
        """``n`` test scenes that no network was trained on."""
        return images.scene_images(n, "test", seed)

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
