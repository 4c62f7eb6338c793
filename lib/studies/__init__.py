"""Studies: at one scale, the images that are measured and the network that plays each role.

To add one, write an entry of :data:`STUDIES`, and where its networks are neither the lab's nor
public checkpoints a module beside these. PyTorch is imported only when a study is loaded: the site
shows titles, and is built without it.
"""

import importlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """A study of the book.

    title   : at the head of a column
    purpose : one sentence
    load    : makes it of its name and purpose; None where only its results are kept
    """

    title: str
    purpose: str
    load: Callable | None = None


def _of(module: str, make: Callable) -> Callable:
    return lambda **named: make(importlib.import_module(f"lib.studies.{module}"), **named)


def _public(name: str, title: str) -> Entry:
    path = Path(__file__).with_name(f"{name}.toml")
    purpose = tomllib.loads(path.read_text("utf-8"))["purpose"]
    return Entry(title, purpose, _of("public", lambda public, **_: public.read(path)))


STUDIES = {
    "lab": Entry(
        "lab",
        "Procedural scenes and small matched networks trained on them",
        _of("lab", lambda lab, **named: lab.Lab(**named)),
    ),
    "lab-third-seed": Entry("lab, third seed", "A ViT and a ResNet from a third seed"),
    "lab-long": Entry("lab, five times as long", "ViTs trained on five times as many scenes"),
    "lab-faint": Entry("lab, faint textures", "Scenes whose textures may have no contrast"),
    "lab-masked": Entry("lab, masked autoencoders", "ViTs that learned by painting hidden patches"),
    "lab-second": Entry(
        "lab, second edition",
        "Procedural scenes and networks trained on them by Muon, with replicates of every arm",
        _of("lab", lambda lab, **named: lab.Lab(roles=lab.SECOND, **named)),
    ),
    "photographs": Entry(
        "photographs",
        "Tiny-ImageNet at 64 pixels and networks of the lab's size trained on it by this book",
        _of("photographs", lambda own, **named: own.Photographs(roles=own.ROLES, **named)),
    ),
    "tiny-imagenet-small": Entry("Tiny-ImageNet, small", "A quarter of it at half the size"),
    "imagenet-small": _public("imagenet-small", "ImageNet, small"),
    "imagenet": _public("imagenet", "ImageNet"),
    "imagenet-paper": _public("imagenet-paper", "ImageNet, the paper's sizes"),
}


def load_study(name: str):
    """The study of a name, such as ``"lab"``, or of a TOML file, such as ``"my/networks.toml"``."""
    if entry := STUDIES.get(name):
        if entry.load:
            return entry.load(name=name, purpose=entry.purpose)
        raise ValueError(
            f"of the study {name!r} only the results are kept, in book/results/{name}/, and its "
            "networks are not: load 'lab' instead"
        )
    if not str(name).endswith(".toml"):
        known = ", ".join(name for name, entry in STUDIES.items() if entry.load)
        raise ValueError(
            f"there is no study {name!r}; there is {known}, "
            "or give the path of a TOML file of your own"
        )
    return _of("public", lambda public: public.read(find_file(name)))()


def find_file(name: str) -> Path:
    """The TOML file of a path that starts in the working directory, or else in the repository."""
    for home in (Path.cwd(), Path(__file__).parents[2]):
        if (path := home / Path(name).expanduser()).is_file():
            return path
    raise FileNotFoundError(f"there is no file {name} that would describe a study")
