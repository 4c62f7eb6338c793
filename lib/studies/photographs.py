"""Photographs of Tiny-ImageNet-200 and matched networks trained on them by this repository.

200 classes, 64 x 64 pixels, with a box around each object. Read as its publisher packs it, or as an
unpacked ImageFolder: pictures have the same numbers in both, so that a study trained on the one can
be measured on the other.
"""

import csv
import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import normalize

from lib.studies import lab, networks, pictures
from lib.studies.images import Images
from lib.studies.pictures import Pictures
from lib.studies.recipes import CroppingRecipe
from lib.studies.study import Trained, TrainedRole, arm

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
PUBLISHED, UNPACKED = "tiny-imagenet-200", "tiny-imagenet"
SIDE = 64  # of the pictures, in pixels
MEAN = (0.480, 0.448, 0.398)  # of the training pictures' channels, 0 to 1
DEVIATION = (0.277, 0.269, 0.282)
OF_EACH_CLASS, TRAINED_ON = 500, 480  # training pictures; those left are for the curves

_plain = CroppingRecipe(
    images=1_599_984, distinct=96_000, batch_size=48, warmup_steps=1000, area=0.35
)
ROLES = {
    **arm("vit", _plain, lab.READ_FROM_TOKEN, 3),
    **arm("resnet", _plain, lab.CONVOLUTIONAL, 3),
    **arm("vit_gap", _plain, lab.READ_FROM_MEAN, 2),
    **arm("vit_cutmix", replace(_plain, cutmix=True), "trained on mixed images", 2, of="vit"),
    **arm("vit_muon", replace(_plain, optimiser="muon"), "trained by Muon", 2, of="vit"),
    **arm("vit_no_skip_middle", replace(_plain, fade=0.3), "without the skips of block 4", 2),
    **lab.less_data("vit", _plain, (3, 10), 2, "photographs"),
    **arm("mixer", _plain, lab.MIXER),
}


class Photographs(Trained):
    """Tiny-ImageNet, and networks trained on it.

    Test images are those of the validation set: the publisher's test set has no labels.
    """

    size = networks.Size(image=SIDE, classes=200)
    # For chapters with linear probes, which need more images of 200 classes than of 16.
    probe_parameters = {"n_images": 8000, "shots": 10}  # noqa: RUF012

    @functools.cached_property
    def root(self) -> Path:
        return find(pictures.data_folder())

    @functools.cached_property
    def test(self) -> Pictures:
        return read_split(self.root, "val")

    @property
    def classes(self) -> list[str]:
        return self.test.classes

    @functools.cached_property
    def _test_images(self) -> Images:
        return read(self.test, self.root.parent)

    def images(self, n: int, seed: int = 0) -> Images:
        """``n`` photographs of the validation set, drawn by a seed, in which classes take turns."""
        if n > len(self.test):
            raise ValueError(
                f"Tiny-ImageNet has {len(self.test):,} test images and {n:,} were asked for"
            )
        return self._test_images[pictures.order(self.test, seed)[:n]]

    def to_input(self, pixels: Tensor, role: str) -> Tensor:
        """uint8 pixels -> float32 of mean about 0 and deviation about 1, for all networks."""
        return normalize(pixels.float() / 255, MEAN, DEVIATION)

    def facts(self, roles) -> dict:
        """The pictures, for records."""
        return {"pictures": f"validation set of Tiny-ImageNet-200, {SIDE} pixels"}

    def training_data(self, role: TrainedRole, device) -> tuple:
        split = read_split(self.root, "train")
        if len(split) != OF_EACH_CLASS * len(split.classes):
            raise ValueError(
                f"{split.where} has {len(split):,} training pictures and should have "
                f"{OF_EACH_CLASS} of each of {len(split.classes)} classes: unpack it again"
            )
        order = pictures.order(split, seed=0)
        everything = read(split, self.root.parent)
        chosen = everything[order[: role.recipe.distinct]]
        data = TensorDataset(chosen.pixels.to(device), chosen.labels.to(device))
        held_out = everything[order[TRAINED_ON * len(split.classes) :]]
        return data, held_out, self.images(len(self.test))


def find(folder: Path) -> Path:
    """The data set in a data folder; downloaded there from its publisher if it is not yet."""
    for name in (PUBLISHED, UNPACKED):
        if (folder / name / "train").is_dir():
            return folder / name
    pictures.download(
        "Tiny-ImageNet",
        folder,
        lambda part: download_and_extract_archive(URL, part, md5=MD5),
        lambda: os.stat(folder / PUBLISHED / "train"),
        f"put the publisher's folder {PUBLISHED}/ there, unpacked from {URL}",
    )
    return folder / PUBLISHED


def read_split(root: Path, name: str) -> Pictures:
    """A split, ``"train"`` or ``"val"``, of the set in ``root``: class by class, as numbered."""
    published = (root / "wnids.txt").is_file()
    rows = list(_published(root, name) if published else _unpacked(root, name))
    if not rows:
        raise FileNotFoundError(
            f"{root / name} holds no pictures of Tiny-ImageNet: put {name}/CLASS/*.jpg there, or "
            f"use the publisher's folder {PUBLISHED}/"
        )
    names = _names(root, published)
    if unknown := sorted({wnid for wnid, *_ in rows} - names.keys()):
        raise ValueError(f"{root} has pictures of {unknown[0]}, which its list of classes lacks")
    numbers = {wnid: label for label, wnid in enumerate(names)}
    rows.sort(key=lambda row: (numbers[row[0]], int(row[1].stem.rpartition("_")[2])))
    wnids, paths, boxes = zip(*rows, strict=True)
    # Boxes count pixels from 0 and include the last.
    edges = torch.tensor(boxes, dtype=torch.float32) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    labels = [numbers[wnid] for wnid in wnids]
    return Pictures(str(root), list(paths), labels, list(names.values()), edges)


def _published(root: Path, name: str):
    """(class, path, box) of each picture in the publisher's layout."""
    val = name == "val"
    for table in sorted((root / name).glob("val_annotations.txt" if val else "*/*_boxes.txt")):
        for row in table.read_text().splitlines():
            *first, x0, y0, x1, y1 = row.split("\t")
            wnid = first[1] if val else table.parent.name
            yield wnid, table.parent / "images" / first[0], [*map(float, (x0, y0, x1, y1))]


def _unpacked(root: Path, name: str):
    """(class, path, box) of each picture in an ImageFolder with ``boxes.csv`` beside it."""
    with open(root / "boxes.csv", newline="") as file:
        boxes = {row[0]: [*map(float, row[1:5])] for row in list(csv.reader(file))[1:]}
    for path in (root / name).glob("*/*.jpg"):
        box = boxes.get(path.relative_to(root).as_posix(), [float("nan")] * 4)
        yield path.parent.name, path, box


def _names(root: Path, published: bool) -> dict[str, str]:
    """Short names of the classes, by their numbers in WordNet, in sorted order."""
    table = root / ("words.txt" if published else "classes.tsv")
    lines = table.read_text(encoding="utf-8").splitlines()
    words = dict(line.split("\t")[:2] for line in lines)
    # All of WordNet, or a line of titles and the classes.
    wnids = (root / "wnids.txt").read_text().split() if published else list(words)[1:]
    return {wnid: words[wnid].split(",")[0].strip() for wnid in sorted(wnids)}


def read(split: Pictures, cache: Path) -> Images:
    """All pictures of a split, with labels and boxes; pixels are kept in the folder ``cache``."""
    names = "".join(f"{path.name} {path.stat().st_size}\n" for path in split.paths)
    key = hashlib.sha256(f"{SIDE} {names}".encode()).hexdigest()[:12]
    path = cache / f"{UNPACKED}-{len(split)}-at-{SIDE}-{key}.npy"
    if path.exists():
        pixels = torch.from_numpy(np.load(path))
    else:
        pixels = _decode(split.paths)
        if os.access(cache, os.W_OK):
            partial = path.with_suffix(f".{os.getpid()}.part")
            with open(partial, "wb") as file:
                np.save(file, pixels.numpy())
            os.replace(partial, path)
    return Images(pixels, torch.tensor(split.labels), split.boxes)


def _decode(paths: list[Path]) -> Tensor:
    """Pixels (n, 3, side, side) of picture files."""
    pixels = torch.empty(len(paths), 3, SIDE, SIDE, dtype=torch.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = pool.map(lambda path: pictures.attempt(path, SIDE, SIDE), paths)
        for place, (path, picture) in enumerate(zip(paths, found, strict=True)):
            if isinstance(picture, str):
                raise ValueError(f"{path} cannot be read ({picture}): unpack the data set again")
            pixels[place] = picture
    return pixels
