"""Studies: at one scale, which images are measured and which network plays which role.

Chapters speak of roles (``vit``, ``resnet``, ``vit_untrained``) and never of checkpoints. The
networks of some studies are trained by this repository; those of the others are public checkpoints,
named in a TOML file that anyone can copy and edit.
"""

import dataclasses
import difflib
import functools
import json
import os
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from lib import records
from lib.studies import hub, images, networks, pictures, scenes, tiny_imagenet, training
from lib.studies.masked import MaskedRecipe
from lib.studies.scenes import TASKS
from lib.studies.training import CroppingRecipe, Recipe

CHECKPOINTS = Path(__file__).parent / "weights"
PUBLIC = Path(__file__).parent
RUNS = records.ROOT / "runs"
TEST_IMAGES = 4096
UNTRAINED = "_untrained"
TUNING = Recipe(images=16_000, distinct=16_000, lr=3e-4, warmup_steps=50, seed=7)
TUNED_TO = ("object", "fine textures", "colour")


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


def _parts_of_training(name: str, recipe: Recipe) -> dict[str, Role]:
    """A role's network as it was on the way: after 3, 10 and 30 % of its steps."""
    return {
        f"{name}_after_{share:02}": Role(
            name, dataclasses.replace(recipe, until=share / 100), f"{name} at {share} % of its way"
        )
        for share in (3, 10, 30)
    }


class Study:
    """What all studies have in common: networks with roles, and a twin before training of each."""

    name: str
    roles: dict
    cards: ClassVar[dict[str, dict]] = {}  # of networks that were trained here

    def __repr__(self) -> str:
        return f"Study {self.name!r} with the roles {', '.join(self.roles)}"

    def has(self, *names: str) -> bool:
        """Whether the study has all of some roles; ``<role>_untrained`` is there if the role is."""
        return all(name.removesuffix(UNTRAINED) in self.roles for name in names)

    def those(self, *names: str) -> list[str]:
        """Those of some roles that can be measured, in the order given."""
        return [name for name in names if self.has(name)]

    def role(self, name: str):
        """The role of a name; ``<role>_untrained`` is the same network before its training."""
        base = name.removesuffix(UNTRAINED)
        if base not in self.roles:
            near = difflib.get_close_matches(base, self.roles, n=1) or list(self.roles)[:1]
            raise ValueError(
                f"the study {self.name!r} has no role {name!r} (is it {near[0]!r} you mean?); "
                f"`python -m lib studies` lists them, and each is also there as <role>{UNTRAINED}"
            )
        return self.roles[base]

    def share(self, name: str) -> float:
        """How much of all training images a role had, as its card says, or else its name."""
        family, _, percent = name.partition("_data_")
        if {family, name} <= self.cards.keys():
            own, all_of_them = (self.cards[role]["recipe"]["distinct"] for role in (name, family))
            return own / all_of_them
        return int(percent) / 100 if percent else 1.0


class Trained(Study):
    """A study whose networks are trained by this repository, each by a recipe of its own.

    A kind of it gives ``images``, ``to_input`` and ``training_data``.
    """

    classes: Sequence[str]
    size = networks.LAB

    @property
    def option(self) -> str:
        """What names the study on the command line of ``train``."""
        return f"--study {self.name} "

    @property
    def checkpoints(self) -> Path:
        """Where the weights are kept that come with the book."""
        return CHECKPOINTS / self.name

    def weights(self, name: str, folder=None) -> Path:
        """The file of a role's weights, in the study's folder or another; its card is beside it."""
        return Path(folder or self.checkpoints) / f"{name}.safetensors"

    def training_data(self, role: Role, device) -> tuple:
        """What a role is trained on, and the images of its curve and of its card."""
        raise NotImplementedError

    def model(self, name: str) -> nn.Module:
        """The network that plays a role, in evaluation mode."""
        role = self.role(name)
        if name.endswith(UNTRAINED):
            return self._untrained(role)
        path = self.weights(name)
        if not path.exists():
            raise FileNotFoundError(
                f"no weights for the role {name!r} in {path.parent.name}/; "
                f"train them with: python -m lib train {self.option}{name}"
            )
        return training.read_checkpoint(self._untrained(role), path)

    def _untrained(self, role: Role) -> nn.Module:
        model = networks.build(role.architecture, role.recipe.seed, self.size)
        if role.start:
            head = {key: p for key, p in model.state_dict().items() if key.startswith("head.")}
            model.load_state_dict(self.model(role.start).state_dict() | head)
        return model

    def train(self, name: str, folder=RUNS, checkpoints=None, device="cpu") -> dict:
        """Train a role, or go on where its training stopped, and write its checkpoint and card.

        Returns the card. The accuracy on it is that of the 8-bit weights that are kept.
        """
        role = self.role(name)
        if name.endswith(UNTRAINED):
            raise ValueError(f"{name!r} is not trained; that is the point of it")
        recipe, folder = role.recipe, Path(folder) / self.name / name
        model = self._untrained(role)
        data, val, test = self.training_data(role, device)
        to_input = functools.partial(self.to_input, role=name)
        curve = training.train(
            model, recipe, data, (val.pixels, val.labels), folder, device, to_input=to_input
        )
        model.load_state_dict(training.unpack(training.pack(model.cpu().state_dict())))
        score = training.score(model, test.pixels, test.labels, to_input=to_input)
        right = round(score * len(test))
        low, high = training.accuracy_interval(right, len(test))
        card = {
            "study": self.name,
            "role": name,
            "purpose": role.purpose,
            "architecture": role.architecture,
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": networks.multiply_adds(model, self.size.image),
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
        training.write_checkpoint(model, card, self.weights(name, checkpoints))
        shutil.rmtree(folder, ignore_errors=True)
        return card

    def is_trained(self, name: str, checkpoints=None) -> bool:
        """Whether a folder holds a role's weights, trained by the recipe it has now."""
        recipe = json.loads(json.dumps(dataclasses.asdict(self.role(name).recipe)))
        weights = self.weights(name, checkpoints)
        card = weights.with_suffix(".json")
        if not (weights.exists() and card.exists()):
            return False
        return json.loads(card.read_text()).get("recipe") == recipe

    @functools.cached_property
    def cards(self) -> dict[str, dict]:
        """The model cards of the trained roles, by role."""
        paths = {name: self.weights(name).with_suffix(".json") for name in self.roles}
        return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}

    def those(self, *names: str) -> list[str]:
        """Those of some roles that can be measured: it takes weights, unless it is untrained."""
        known = super().those(*names)
        return [name for name in known if name.endswith(UNTRAINED) or name in self.cards]


class Lab(Trained):
    """Procedural scenes and the small matched networks trained on them by this repository."""

    name = "lab"
    option = ""  # the study of commands that name none
    task = "object"
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
        **_parts_of_training("vit", Recipe()),
        **_parts_of_training("resnet", Recipe()),
        **{
            f"{start}_tuned_{task.replace(' ', '_')}": Role(
                architecture, TUNING, f"{start} trained further: {TASKS[task].purpose}", start, task
            )
            for start, architecture in (
                ("vit", "vit"),
                ("vit_other_seed", "vit"),
                ("resnet", "resnet"),
            )
            for task in TUNED_TO
        },
    }

    @property
    def checkpoints(self) -> Path:
        return CHECKPOINTS

    def images(self, n: int, seed: int = 0) -> images.Images:
        """``n`` test scenes that no network was trained on."""
        return images.scene_images(n, "test", seed, self.task)

    def to_input(self, pixels: Tensor, role: str) -> Tensor:
        """uint8 pixels -> what the role's network takes; the same for all networks of the lab."""
        return scenes.to_input(pixels)

    def training_data(self, role: Role, device) -> tuple:
        # Further training is on scenes of another seed, which its start has not seen.
        seed = int(role.start is not None)
        return (
            images.SceneSet(role.recipe.distinct, seed=seed, device=device, task=role.task),
            images.scene_images(1024, "val", task=role.task),
            images.scene_images(TEST_IMAGES, task=role.task),
        )


class LabAnew(Lab):
    """The lab with some networks trained anew: a role that is the lab's has the lab's network."""

    option, checkpoints = Trained.option, Trained.checkpoints

    def weights(self, name: str, folder=None) -> Path:
        shared = self.roles[name] == Lab.roles.get(name)
        return super().weights(name, folder or (CHECKPOINTS if shared else None))


class LabThirdSeed(LabAnew):
    """The lab with a ViT and a ResNet from a third seed in the places of the first."""

    name = "lab-third-seed"
    roles: ClassVar[dict[str, Role]] = {
        # Parts of a training, and further training, are of the first.
        **{
            name: role
            for name, role in Lab.roles.items()
            if role.start is None and role.recipe.until == 1
        },
        "vit": Role("vit", Recipe(seed=2), "the Vision Transformer, from a third seed"),
        "resnet": Role("resnet", Recipe(seed=2), "the convolutional network, from a third seed"),
    }


class LabLong(LabAnew):
    """The lab with ViTs trained on five times as many scenes; the others had learned theirs."""

    name = "lab-long"
    _longer = Recipe(images=800_000, distinct=800_000)
    roles: ClassVar[dict[str, Role]] = {
        "vit": Role("vit", _longer, "the Vision Transformer, trained five times as long"),
        "vit_other_seed": Role(
            "vit", dataclasses.replace(_longer, seed=1), "its twin from another seed: the ceiling"
        ),
        **{name: Lab.roles[name] for name in ("resnet", "resnet_other_seed", "mixer")},
    }


class LabFaint(LabAnew):
    """The lab with harder scenes, whose textures have less contrast, down to none at all."""

    name = "lab-faint"
    task = "faint textures"
    roles: ClassVar[dict[str, Role]] = {
        name: dataclasses.replace(Lab.roles[name], task="faint textures")
        for name in ("vit", "vit_other_seed", "vit_gap", "resnet", "resnet_other_seed")
    }


class LabMasked(LabAnew):
    """The lab with ViTs that learned without labels, by painting what they were not shown."""

    name = "lab-masked"
    roles: ClassVar[dict[str, Role]] = {
        "vit": Role("vit", MaskedRecipe(), "the Vision Transformer, trained without labels"),
        "vit_other_seed": Role(
            "vit", MaskedRecipe(seed=1), "its twin from another seed: the ceiling"
        ),
        **{name: Lab.roles[name] for name in ("resnet", "resnet_other_seed", "mixer")},
    }


class TinyImagenet(Trained):
    """Photographs of 200 classes and matched networks trained on them by this repository.

    Of each class, the first ``of_each_class`` pictures are used: a few, drawn once, for the curves
    and the others for training. Test images are those of the validation set, which is the set's
    last split with labels.
    """

    name = "tiny-imagenet"
    size = networks.Size(
        image=64, classes=200, width=256, depth=12, channels=(208, 416, 832), stem_stride=2, heads=8
    )
    of_each_class, trained_on = 500, 480
    # Of 200 classes, probes need more images than of 16.
    probe_parameters: ClassVar = {"n_images": 8000, "shots": 10}
    recipe = CroppingRecipe(
        images=9_600_000, distinct=96_000, batch_size=480, warmup_steps=1000, pad=8, area=0.35
    )

    @functools.cached_property
    def roles(self) -> dict[str, Role]:
        one, other = self.recipe, dataclasses.replace(self.recipe, seed=1)

        def less(share):
            return dataclasses.replace(one, distinct=round(share * one.distinct))

        return {
            "vit": Role("vit", one, "the Vision Transformer, read from its class token"),
            "vit_other_seed": Role("vit", other, "its twin from another seed: the ceiling"),
            "vit_gap": Role("vit_gap", one, "read from the mean of its tokens, no class token"),
            "resnet": Role("resnet", one, "the convolutional network"),
            "resnet_other_seed": Role("resnet", other, "its twin from another seed"),
            "mixer": Role("mixer", one, "the MLP-Mixer: tokens mixed without attention"),
            "vit_no_skip_middle": Role(
                "vit_no_skip_middle",
                dataclasses.replace(one, fade=0.3),
                f"without the skips of block {self.size.depth // 2}",
            ),
            "resnet_no_skip_middle": Role(
                "resnet_no_skip_middle", one, "without the skip of unit 6"
            ),
            **{
                f"{family}_data_{share:02.0f}": Role(
                    family, less(share / 100), f"trained on {share} % of the photographs"
                )
                for family in ("vit", "resnet")
                for share in (3, 10, 30)
            },
            **_parts_of_training("vit", one),
            **_parts_of_training("resnet", one),
        }

    @functools.cached_property
    def root(self) -> Path:
        return tiny_imagenet.find(data_folder())

    @functools.cached_property
    def test(self) -> tiny_imagenet.Split:
        return tiny_imagenet.read_split(self.root, "val")

    @property
    def classes(self) -> list[str]:
        return self.test.classes

    @functools.cached_property
    def _test_images(self) -> images.Images:
        return tiny_imagenet.read(self.test, self.size.image, self.root.parent)

    def images(self, n: int, seed: int = 0) -> images.Images:
        """``n`` photographs of the validation set, drawn by a seed, in which classes take turns."""
        if n > len(self.test):
            raise ValueError(
                f"Tiny-ImageNet has {len(self.test):,} test images and {n:,} were asked for"
            )
        return self._test_images[pictures.order(self.test, seed)[:n]]

    def to_input(self, pixels: Tensor, role: str) -> Tensor:
        """uint8 pixels -> what the role's network takes; the same for all networks."""
        return tiny_imagenet.to_input(pixels)

    def facts(self, roles) -> dict:
        """What a record says of the pictures."""
        return {"pictures": f"validation set of Tiny-ImageNet-200, {self.size.image} pixels"}

    def training_data(self, role: Role, device) -> tuple:
        pool = tiny_imagenet.read_split(self.root, "train")
        pool = tiny_imagenet.first_of_each_class(pool, self.of_each_class)
        order = pictures.order(pool, seed=0)
        apart = self.trained_on * len(self.classes)
        chosen, curve = order[: role.recipe.distinct], order[apart:]
        everything = tiny_imagenet.read(pool, self.size.image, self.root.parent)
        data = tiny_imagenet.PictureSet(everything[chosen], device)
        return data, everything[curve], self.images(len(self.test))


class TinyImagenetSmall(TinyImagenet):
    """A quarter of Tiny-ImageNet at half the size, and networks of the lab's sizes: for a CPU."""

    name = "tiny-imagenet-small"
    size = dataclasses.replace(networks.LAB, classes=200)
    of_each_class, trained_on = 125, 120
    probe_parameters: ClassVar = {"n_images": 4800, "shots": 5}
    recipe = CroppingRecipe(images=480_000, distinct=24_000, batch_size=48, area=0.5)

    @functools.cached_property
    def roles(self) -> dict[str, Role]:
        used = ("vit", "vit_other_seed", "vit_gap", "resnet", "resnet_other_seed")
        used += ("vit_no_skip_middle", "vit_data_03", "vit_data_10")
        every = super().roles
        return {name: every[name] for name in used}


@dataclasses.dataclass(frozen=True)
class PublicRole:
    """A public checkpoint of a study.

    model   : timm's name of it, or ``hf-hub:user/repository``
    purpose : what it is for
    licence : of its weights
    weights : a file of weights to use instead of the public ones
    seed    : of its untrained twin's random weights
    """

    model: str
    purpose: str = ""
    licence: str = ""
    weights: str | None = None
    seed: int = 0

    @property
    def architecture(self) -> str:
        return self.model


class Public(Study):
    """Public checkpoints of timm, or a reader's own, on photographs.

    Parameters
    ----------
    name : str
    roles : dict of PublicRole
    pictures : dict
        ``folder``, or ``dataset`` with ``root`` and torchvision's options for it; and ``resize``
        (short side, bicubic) and ``crop`` (the middle), in pixels, the same for all networks.
    purpose : str
        One line that says what the study is.
    home : path
        Relative paths of folders and weights start here.
    """

    def __init__(self, name, roles, pictures, purpose="", home=None):
        self.name, self.roles, self.purpose = name, roles, purpose
        self.home = Path(home or Path.cwd())
        self.source = dict(pictures)
        self.resize = self.source.pop("resize", 256)
        self.crop = self.source.pop("crop", 224)
        self._last = {}

    @classmethod
    def read(cls, path) -> "Public":
        """The study that a TOML file describes; the file's name is its name."""
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error
        _known(path, "", table, {"purpose", "images", "roles"})
        pictures, roles = table.get("images", {}), table.get("roles", {})
        if ("folder" in pictures) == ("dataset" in pictures):
            raise ValueError(
                f"{path} needs a table [images] with either folder = ... or dataset = ..."
            )
        if "folder" in pictures:
            _known(path, "images.", pictures, {"folder", "resize", "crop"})
        if not roles:
            raise ValueError(f"{path} needs roles, for instance [roles.vit] with model = ...")
        fields = {field.name for field in dataclasses.fields(PublicRole)}
        for role, entries in roles.items():
            _known(path, f"roles.{role}.", entries, fields)
            if "model" not in entries:
                raise ValueError(f"{path}: the role {role!r} needs model = ..., as timm names it")
        return cls(
            path.stem,
            {role: PublicRole(**entries) for role, entries in roles.items()},
            pictures,
            table.get("purpose", ""),
            path.resolve().parent,
        )

    def use_folder(self, folder) -> None:
        """Take the pictures of a folder instead of the study's own."""
        self.source = {"folder": str(Path(folder).resolve())}

    @functools.cached_property
    def pictures(self) -> pictures.Pictures:
        """The files that images are drawn from."""
        options = dict(self.source)
        if "folder" in options:
            return pictures.in_folder(self._path(options["folder"]))
        root = options.pop("root", None)
        root = data_folder() if root is None else self._path(root)
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
        mean, std = (
            torch.tensor(found.get(key, default), device=pixels.device)[:, None, None]
            for key, default in (("mean", [0.5] * 3), ("std", [0.5] * 3))
        )
        return (pixels.float() / 255 - mean) / std

    def model(self, name: str) -> nn.Module:
        """The network that plays a role, in evaluation mode; downloaded if need be."""
        role = self.role(name)
        weights = role.weights and self._path(role.weights)
        if name.endswith(UNTRAINED):
            return hub.build(role.model, role.seed, self.crop, weights)
        return hub.pretrained(role.model, self.crop, weights)

    def is_here(self, name: str) -> bool:
        """Whether a role's weights are on this machine."""
        role = self.role(name)
        return self._path(role.weights).is_file() if role.weights else hub.is_here(role.model)

    def facts(self, roles) -> dict:
        """What a record says of the networks beside their weights' hash, and of the pictures."""
        played = {name: self.role(name) for name in roles}
        return {
            "networks": {
                name: f"{role.model}, random weights"
                if name.endswith(UNTRAINED)
                else f"{role.model}, weights of {Path(role.weights).name}"
                if role.weights
                else role.model
                for name, role in played.items()
            },
            "pictures": Path(self.source.get("folder") or self.source["dataset"]).name,
            "crop": f"short side {self.resize} (bicubic), middle {self.crop}",
        }

    def _path(self, text) -> Path:
        """A path of the study's file, in which ``~`` and ``$VARIABLES`` stand for what they are."""
        expanded = os.path.expandvars(os.path.expanduser(text))
        if "$" in expanded:
            raise ValueError(f"the study {self.name!r} names {text!r}, and no such variable is set")
        return self.home / expanded


def _known(path, where: str, table, known: set) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {where.rstrip('.')} must be a table")
    if odd := sorted(set(table) - known):
        raise ValueError(
            f"{path}: {where}{odd[0]} means nothing here; known are {', '.join(sorted(known))}"
        )


def data_folder() -> Path:
    """Where torchvision keeps data sets: ``data`` in the repository, or ``$VIT_SEE_DATA``."""
    return Path(os.environ.get("VIT_SEE_DATA", records.ROOT / "data"))


STUDIES = {
    kind.name: kind
    for kind in (
        Lab,
        LabThirdSeed,
        LabLong,
        LabFaint,
        LabMasked,
        TinyImagenetSmall,
        TinyImagenet,
    )
}


def study_names() -> list[str]:
    """The studies that come with the book, smallest first."""
    return [*STUDIES, *sorted((path.stem for path in PUBLIC.glob("*.toml")), key=_SIZES.index)]


_SIZES = ["imagenet-small", "imagenet", "imagenet-paper"]


def load_study(name: str) -> Study:
    """The study of a name, such as ``"lab"``, or of a TOML file, such as ``"my/networks.toml"``.

    Relative paths of TOML files start in the working directory, or else in the repository.
    """
    if name in STUDIES:
        return STUDIES[name]()
    if name in study_names():
        return Public.read(PUBLIC / f"{name}.toml")
    if not str(name).endswith(".toml"):
        raise ValueError(
            f"there is no study {name!r}; there is {', '.join(study_names())}, "
            "or give the path of a TOML file of your own"
        )
    for home in (Path.cwd(), records.ROOT):
        if (path := home / Path(name).expanduser()).is_file():
            return Public.read(path)
    raise FileNotFoundError(f"there is no file {name} that would describe a study")
