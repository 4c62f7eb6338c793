"""Public checkpoints of timm, or a reader's own, on photographs: studies that TOML files describe.

Anyone can copy such a file and edit it.
"""

import dataclasses
import functools
import os
import re
import tomllib
from pathlib import Path

import msgspec
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from lib.studies import hub, images, pictures
from lib.studies.study import UNTRAINED, Role, Study


@dataclasses.dataclass(frozen=True)
class PublicRole(Role):
    """A public checkpoint of a study.

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


class _File(msgspec.Struct, forbid_unknown_fields=True):
    images: dict
    roles: dict[str, dict]
    purpose: str = ""


class _Images(msgspec.Struct, forbid_unknown_fields=True):
    folder: str | None = None
    dataset: str | None = None
    root: str | None = None
    resize: int = 256
    crop: int = 224


class _Role(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    model: str
    purpose: str = ""
    licence: str = ""
    weights: str | None = None
    seed: int = 0
    arm: str = ""
    replicate: int = 0
    family: str = ""


def read(path) -> "Public":
    """The study that a TOML file describes; the file's name is its name."""
    path = Path(path)
    try:
        # Editors of some systems begin a file with a mark of its encoding.
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    file = _checked(path, "", table, _File)
    if ("folder" in file.images) == ("dataset" in file.images):
        raise ValueError(f"{path}: images needs either folder = ... or dataset = ...")
    known = dict(file.images)
    if "dataset" in known:  # whose other options are torchvision's
        known = {key: known[key] for key in _Images.__struct_fields__ if key in known}
    found = _checked(path, "images", known, _Images)
    if not 0 < found.crop <= found.resize:
        raise ValueError(
            f"{path}: images.crop is {found.crop}, and expected is at least 1 and at most "
            f"images.resize, which is {found.resize}"
        )
    if not file.roles:
        raise ValueError(f"{path}: roles needs one at least, for instance [roles.vit]")
    roles = {}
    for name, entries in file.roles.items():
        if not re.fullmatch(r"[\w.-]+", name) or name.endswith(UNTRAINED):
            raise ValueError(
                f"{path}: roles.{name} is no name of a role: expected are letters, digits, _, - "
                f"and dots, and not the end {UNTRAINED}, which is a baseline's"
            )
        entry = _checked(path, f"roles.{name}", entries, _Role)
        roles[name] = PublicRole(**msgspec.structs.asdict(entry))
    return Public(path.stem, roles, file.images, file.purpose, path.resolve().parent)


def _checked(path: Path, key: str, table: dict, kind):
    """A table as a struct; what is wrong with it is one sentence of file, key and expectation."""
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        wrong, _, place = str(error).partition(" - at `$")
        place = (key + place.rstrip("`")).strip(".") or "the file"
        wrong = wrong.replace("`object`", "a table").replace("`array`", "an array")
        if unknown := wrong.partition("Object contains unknown field ")[2]:
            wrong = f"{unknown} means nothing here"
        known = ", ".join(kind.__struct_fields__)
        raise ValueError(f"{path}: {place}: {wrong}; known are {known}") from error


class Public(Study):
    """Public checkpoints on photographs.

    Parameters
    ----------
    name : str
    roles : dict of PublicRole
    pictures : dict
        ``folder``, or ``dataset`` with ``root`` and torchvision's options for it; and ``resize``
        (short side, bicubic) and ``crop`` (the middle), in pixels, the same for all networks.
    purpose : str
        One line about the study.
    home : path
        Relative paths of folders and weights start here.
    """

    def __init__(self, name, roles, pictures, purpose="", home=None):
        super().__init__(name, roles, purpose)
        self.home = Path(home or Path.cwd())
        self.source = dict(pictures)
        self.resize = self.source.pop("resize", 256)
        self.crop = self.source.pop("crop", 224)
        self._last = {}

    def use_folder(self, folder) -> None:
        """Take the pictures of a folder instead of the study's own."""
        self.source = {"folder": str(Path(folder).resolve())}
        self._last = {}
        vars(self).pop("pictures", None)

    @functools.cached_property
    def pictures(self) -> pictures.Pictures:
        """The files that images are drawn from."""
        options = dict(self.source)
        if "folder" in options:
            return pictures.in_folder(self._path(options["folder"]))
        root = options.pop("root", None)
        root = pictures.data_folder() if root is None else self._path(root)
        return pictures.of_torchvision(options.pop("dataset"), root, **options)

    @property
    def classes(self) -> list[str]:
        return self.pictures.classes

    def images(self, n: int, seed: int = 0) -> images.Images:
        """``n`` pictures drawn by a seed, see :func:`lib.studies.pictures.read`."""
        if (n, seed) not in self._last:  # a chapter asks for the same ones several times
            self._last = {(n, seed): pictures.read(self.pictures, n, seed, self.resize, self.crop)}
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
            return hub.build(role.model, role.seed, self.crop, weights)
        return hub.pretrained(role.model, self.crop, weights)

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

        return {
            "networks": {name: of(self.role(name)) for name in roles},
            "pictures": Path(self.source.get("folder") or self.source["dataset"]).name,
            "crop": f"short side {self.resize} (bicubic), middle {self.crop}",
        }

    def _path(self, text) -> Path:
        """A path of the study's file, with ``~`` and ``$VARIABLES`` expanded."""
        expanded = os.path.expandvars(os.path.expanduser(text))
        if "$" in expanded:
            raise ValueError(f"the study {self.name!r} names {text!r}, and no such variable is set")
        return self.home / expanded
