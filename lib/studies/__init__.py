"""Studies: at one scale, the images that are measured and the network that plays each role.

To add one, write an entry of :data:`STUDIES`, and where its networks are neither the lab's nor
public checkpoints a module beside these.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lib import records
from lib.studies import lab, photographs, public
from lib.studies.lab import Lab
from lib.studies.photographs import Photographs
from lib.studies.study import Study


class Entry(NamedTuple):
    """A study of the book.

    title   : at the head of a column
    purpose : one sentence
    load    : makes it of its name and purpose
    """

    title: str
    purpose: str
    load: Callable[[str, str], Study]


def _tiny(size, recipe, **options) -> Callable[[str, str], Study]:
    roles = photographs.first_roles(recipe, size.depth)
    return partial(Photographs, roles=roles, size=size, **options)


def _public(name: str, title: str) -> Entry:
    path = Path(__file__).with_name(f"{name}.toml")
    return Entry(title, public.read(path).purpose, lambda name, purpose: public.read(path))


STUDIES = {
    "lab": Entry(
        "lab", "Procedural scenes and small matched networks trained on them by this book", Lab
    ),
    "lab-third-seed": Entry(
        "lab, third seed",
        "The lab with a ViT and a ResNet from a third seed in the places of the first",
        partial(Lab, roles=lab.THIRD_SEED),
    ),
    "lab-long": Entry(
        "lab, five times as long",
        "The lab with ViTs trained on five times as many scenes; the others had converged",
        partial(Lab, roles=lab.LONG),
    ),
    "lab-faint": Entry(
        "lab, faint textures",
        "The lab with harder scenes, whose textures have less contrast, down to none at all",
        partial(Lab, roles=lab.FAINT, task="faint textures"),
    ),
    "lab-masked": Entry(
        "lab, masked autoencoders",
        "The lab with ViTs that learned without labels, by painting hidden patches",
        partial(Lab, roles=lab.MASKED),
    ),
    "lab-second": Entry(
        "lab, second edition",
        "The lab with networks trained by Muon, with replicates of every arm",
        partial(Lab, roles=lab.SECOND),
    ),
    "photographs": Entry(
        "photographs",
        "Tiny-ImageNet at 64 pixels and networks of the lab's size trained on it by this book",
        partial(Photographs, roles=photographs.second_roles()),
    ),
    "tiny-imagenet-small": Entry(
        "Tiny-ImageNet, small",
        "A quarter of Tiny-ImageNet at half the size, and networks of the lab's sizes: for a CPU",
        _tiny(
            photographs.SMALL,
            photographs.CroppingRecipe(images=480_000, distinct=24_000, batch_size=48, area=0.5),
            of_each_class=125,
            trained_on=120,
            probe_parameters={"n_images": 4800, "shots": 5},
        ),
    ),
    "tiny-imagenet": Entry(
        "Tiny-ImageNet",
        "Photographs of 200 classes and matched networks of ten million parameters",
        _tiny(
            photographs.LARGE,
            dataclasses.replace(photographs.RECIPE, images=9_600_000, batch_size=480, pad=8),
        ),
    ),
    "imagenet-small": _public("imagenet-small", "ImageNet, small"),
    "imagenet": _public("imagenet", "ImageNet"),
    "imagenet-paper": _public("imagenet-paper", "ImageNet, the paper's sizes"),
}


def load_study(name: str) -> Study:
    """The study of a name, such as ``"lab"``, or of a TOML file, such as ``"my/networks.toml"``.

    Relative paths of TOML files start in the working directory, or else in the repository.
    """
    if name in STUDIES:
        return STUDIES[name].load(name, STUDIES[name].purpose)
    if not str(name).endswith(".toml"):
        raise ValueError(
            f"there is no study {name!r}; there is {', '.join(STUDIES)}, "
            "or give the path of a TOML file of your own"
        )
    for home in (Path.cwd(), records.ROOT):
        if (path := home / Path(name).expanduser()).is_file():
            return public.read(path)
    raise FileNotFoundError(f"there is no file {name} that would describe a study")
