"""Public checkpoints of timm, or a reader's own, on photographs: studies that TOML files describe.

Anyone can copy such a file and edit it.
"""

import dataclasses
import functools
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from lib.studies import hub, images, pictures
from lib.studies.study import UNTRAINED, Role, Study

Pixels = Annotated[int, msgspec.Meta(ge=1)]
# Of the fields of a table, those that no file sets.
GIVEN = {"name", "trained", "options"}


@dataclasses.dataclass(frozen=True)
class PublicRole(Role):
    """A public checkpoint of a study: a table ``[roles.NAME]`` of its file.

    model   : timm's name of it, or ``hf-hub:user/repository``
    purpose : what it is for
    licence : of its weights
    weights : a file of weights to use instead of the public ones
    seed    : of the random weights of its baseline
    """

    model: str
    purpose: str = ""
    licence: str = ""
    weights: str | None = None
    seed: int = 0

    def later(self, seeds: int) -> "PublicRole":
        """The same from another seed."""
        return dataclasses.replace(self, seed=self.seed + seeds)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the pictures of a study come from: the table ``[images]`` of its file.

    folder  : of pictures
    dataset : or a data set of torchvision, in the folder ``root``
    resize  : short side, bicubic, in pixels
    crop    : the middle, in pixels, the same for all networks
    options : torchvision's for the data set, beside these in the file
    """

    folder: str | None = None
    dataset: str | None = None
    root: str | None = None
    resize: Pixels = 256
    crop: Pixels = 224
    options: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if (self.folder is None) == (self.dataset is None):
            raise ValueError("give either folder = ... or dataset = ...")
        if self.crop > self.resize:
            raise ValueError(f"crop is {self.crop}: make it at most resize, which is {self.resize}")


@dataclasses.dataclass
class _File:
    images: dict
    roles: Annotated[dict[str, dict], msgspec.Meta(min_length=1)]
    purpose: str = ""


def read(path) -> "Public":
    """The study that a TOML file describes; the file's name is its name."""
    path = Path(path)
    try:
        # Editors of some systems begin a file with a mark of its encoding.
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    file = _checked(path, "", table, _File)
    ours = {key: file.images[key] for key in _keys(Source) if key in file.images}
    source = _checked(path, "images", ours if "dataset" in ours else file.images, Source)
    options = {key: file.images[key] for key in file.images.keys() - ours.keys()}
    roles = {}
    for name, entries in file.roles.items():
        if not re.fullmatch(rf"[\w.-]+(?<!{UNTRAINED})", name):
            raise ValueError(
                f"{path}: roles.{name} is no name of a role: expected are letters, digits, _, - "
                f"and dots, and not the end {UNTRAINED}, which is a baseline's"
            )
        roles[name] = _checked(path, f"roles.{name}", entries, PublicRole)
    source = dataclasses.replace(source, options=options)
    return Public(path.stem, roles, source, file.purpose, path.resolve().parent)


def _keys(kind) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.name not in GIVEN]


def _checked(path: Path, key: str, table: dict, kind):
    """A table as a dataclass; what is wrong with it is one sentence of file, key and cure."""
    try:
        found = msgspec.convert(table, kind)
        for odd in table.keys() - set(_keys(kind)):
            raise msgspec.ValidationError(f"`{odd}` means nothing here")
        return found
    except msgspec.ValidationError as error:
        wrong, _, place = str(error).partition(" - at `$")
        place = (key + place.rstrip("`")).strip(".") or "the file"
        wrong = wrong.replace("`object`", "a table").replace("`array`", "an array")
        known = ", ".join(_keys(kind))
        raise ValueError(f"{path}: {place}: {wrong}; known are {known}") from error


class Public(Study):
    """Public checkpoints on photographs. Relative paths of its file start in ``home``."""

    def __init__(self, name: str, roles: dict, source: Source, purpose: str = "", home=None):
        super().__init__(name, roles, purpose)
        self.source, self.home = source, Path(home or Path.cwd())
        self._last = {}

    def use_folder(self, folder) -> None:
        """Take the pictures of a folder instead of the study's own."""
        folder = str(Path(folder).resolve())
        self.source = dataclasses.replace(self.source, folder=folder, dataset=None)
        self._last = {}
        vars(self).pop("pictures", None)

    @functools.cached_property
    def pictures(self) -> pictures.Pictures:
        """The files that images are drawn from."""
        source = self.source
        if source.folder:
            return pictures.in_folder(self._path(source.folder))
        root = self._path(source.root) if source.root else pictures.data_folder()
        return pictures.of_torchvision(source.dataset, root, **source.options)

    @property
    def classes(self) -> list[str]:
        return self.pictures.classes

    def images(self, n: int, seed: int = 0) -> images.Images:
        """``n`` pictures drawn by a seed, see :func:`lib.studies.pictures.read`."""
        if (n, seed) not in self._last:  # a chapter asks for the same ones several times
            size = self.source.resize, self.source.crop
            self._last = {(n, seed): pictures.read(self.pictures, n, seed, *size)}
        return self._last[n, seed]

    def to_input(self, pixels: Tensor, role: str) -> Tensor:
        """uint8 pixels -> float32, normalised as the role's network was trained."""
        found = hub.config(self.role(role).model)
        mean, std = (found.get(key, [0.5] * 3) for key in ("mean", "std"))
        return normalize(pixels.float() / 255, mean, std)

    def model(self, name: str) -> nn.Module:
        """The network that plays a role, in evaluation mode; downloaded if need be."""
        role = self.role(name)
        weights = role.weights and self._path(role.weights)
        if not role.trained:
            return hub.build(role.model, role.seed, self.source.crop, weights)
        return hub.pretrained(role.model, self.source.crop, weights)

    def is_here(self, name: str) -> bool:
        """Whether a role's weights are on this machine."""
        role = self.role(name)
        return self._path(role.weights).is_file() if role.weights else hub.is_here(role.model)

    def facts(self, roles) -> dict:
        """The networks and the pictures, for records."""

        def of(role):
            if not role.trained:
                return f"{role.model}, random weights"
            named = f", weights of {Path(role.weights).name}" if role.weights else ""
            return role.model + named

        source = self.source
        return {
            "networks": {name: of(self.role(name)) for name in roles},
            "pictures": Path(source.folder or source.dataset).name,
            "crop": f"short side {source.resize} (bicubic), middle {source.crop}",
        }

    def _path(self, text) -> Path:
        """A path of the study's file, with ``~`` and ``$VARIABLES`` expanded."""
        expanded = os.path.expandvars(os.path.expanduser(text))
        if "$" in expanded:
            raise ValueError(f"the study {self.name!r} names {text!r}, and no such variable is set")
        return self.home / expanded
