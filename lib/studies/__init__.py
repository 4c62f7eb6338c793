"""Studies: at one scale, the images that are measured and the network that plays each role.

To add one, write an entry of :data:`STUDIES`, and where its networks are neither the lab's nor
public checkpoints a module beside these. PyTorch is imported only when a study is loaded: the site
shows titles, and is built without it.
"""

import dataclasses
import importlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """A study of the book.

    title   : at the head of a column
    purpose : one sentence
    load    : makes the :class:`lib.studies.study.Study` of its name and purpose
    """

    title: str
    purpose: str
    load: Callable


def _of(module: str, make: Callable) -> Callable:
    return lambda *named: make(importlib.import_module(f"lib.studies.{module}"), *named)


def _lab(roles: str, **options) -> Callable:
    return _of("lab", lambda lab, *named: lab.Lab(*named, getattr(lab, roles), **options))


def _public(name: str, title: str) -> Entry:
    path = Path(__file__).with_name(f"{name}.toml")
    purpose = tomllib.loads(path.read_text("utf-8"))["purpose"]
    return Entry(title, purpose, _of("public", lambda public, *_: public.read(path)))


def _tiny(size: str, recipe: dict, **options) -> Callable:
    def make(photographs, *named):
        networks = getattr(photographs, size)
        changed = dataclasses.replace(photographs.RECIPE, **recipe)
        roles = photographs.first_roles(changed, networks.depth)
        return photographs.Photographs(*named, roles, networks, **options)

    return _of("photographs", make)


STUDIES = {
    "lab": Entry(
        "lab", "Procedural scenes and small matched networks trained on them by this book",
        _lab("ROLES"),
    ),
    "lab-third-seed": Entry(
        "lab, third seed",
        "The lab with a ViT and a ResNet from a third seed in the places of the first",
        _lab("THIRD_SEED"),
    ),
    "lab-long": Entry(
        "lab, five times as long",
        "The lab with ViTs trained on five times as many scenes; the others had converged",
        _lab("LONG"),
    ),
    "lab-faint": Entry(
        "lab, faint textures",
        "The lab with harder scenes, whose textures have less contrast, down to none at all",
        _lab("FAINT", task="faint textures"),
    ),
    "lab-masked": Entry(
        "lab, masked autoencoders",
        "The lab with ViTs that learned without labels, by painting hidden patches",
        _lab("MASKED"),
    ),
    "lab-second": Entry(
        "lab, second edition",
        "The lab with networks trained by Muon, with replicates of every arm",
        _lab("SECOND"),
    ),
    "photographs": Entry(
        "photographs",
        "Tiny-ImageNet at 64 pixels and networks of the lab's size trained on it by this book",
        _of("photographs", lambda photographs, *named: photographs.Photographs(
            *named, photographs.second_roles())),
    ),
    "tiny-imagenet-small": Entry(
        "Tiny-ImageNet, small",
        "A quarter of Tiny-ImageNet at half the size, and networks of the lab's sizes: for a CPU",
        _tiny("SMALL", {"images": 480_000, "distinct": 24_000, "warmup_steps": 300, "area": 0.5},
              of_each_class=125, trained_on=120, probe_parameters={"n_images": 4800, "shots": 5}),
    ),
    "tiny-imagenet": Entry(
        "Tiny-ImageNet",
        "Photographs of 200 classes and matched networks of ten million parameters",
        _tiny("LARGE", {"images": 9_600_000, "batch_size": 480, "pad": 8}),
    ),
    "imagenet-small": _public("imagenet-small", "ImageNet, small"),
    "imagenet": _public("imagenet", "ImageNet"),
    "imagenet-paper": _public("imagenet-paper", "ImageNet, the paper's sizes"),
}  # fmt: skip


def load_study(name: str):
    """The study of a name, such as ``"lab"``, or of a TOML file, such as ``"my/networks.toml"``."""
    if name in STUDIES:
        return STUDIES[name].load(name, STUDIES[name].purpose)
    if not str(name).endswith(".toml"):
        raise ValueError(
            f"there is no study {name!r}; there is {', '.join(STUDIES)}, "
            "or give the path of a TOML file of your own"
        )
    return _of("public", lambda public: public.read(find_file(name)))()


def find_file(name: str) -> Path:
    """The TOML file of a path that starts in the working directory, or else in the repository."""
    for home in (Path.cwd(), Path(__file__).parents[2]):
        if (path := home / Path(name).expanduser()).is_file():
            return path
    raise FileNotFoundError(f"there is no file {name} that would describe a study")
