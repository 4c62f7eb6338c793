"""Tiny-ImageNet-200: photographs of 200 classes, 64 x 64 pixels, with a box around each object.

Read as its publisher packs it, or as an unpacked ImageFolder. Pictures have the same numbers in
both, so that a study trained on the one can be measured on the other.
"""

import collections
import csv
import dataclasses
import functools
import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive

from lib.studies import pictures
from lib.studies.images import Images
from lib.studies.pictures import Pictures

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
PUBLISHED, UNPACKED = "tiny-imagenet-200", "tiny-imagenet"
SIDE = 64  # of the published pictures, in pixels
MEAN = (0.480, 0.448, 0.398)  # of the training pictures' channels, 0 to 1
DEVIATION = (0.277, 0.269, 0.282)


@dataclasses.dataclass(frozen=True)
class Split(Pictures):
    """The pictures of a split, class by class, as they are numbered within their class.

    boxes : float32 (n, 4), the object's ``x0, y0, x1, y1``, edges included; NaN where unknown
    """

    boxes: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: list[int]) -> "Split":
        """Some of the pictures, by their places."""
        paths, labels = ([column[place] for place in which] for column in (self.paths, self.labels))
        return Split(self.where, paths, labels, self.classes, self.boxes[which])


def find(folder) -> Path:
    """The data set in a data folder; downloaded there from its publisher if it is not yet."""
    folder = Path(folder).expanduser()
    for name in (PUBLISHED, UNPACKED):
        if (folder / name / "train").is_dir():
            return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):  # of several processes one downloads
        if not (folder / PUBLISHED / "train").is_dir():
            with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
                try:
                    download_and_extract_archive(URL, part, md5=MD5)
                    os.replace(Path(part) / PUBLISHED, folder / PUBLISHED)
                except (OSError, RuntimeError, EOFError, ValueError) as error:
                    raise OSError(
                        f"Tiny-ImageNet is not in {folder} and could not be downloaded "
                        f"({' '.join(str(error).split())[:100]}): put the publisher's folder "
                        f"{PUBLISHED}/ there, unpacked from {URL}"
                    ) from error
    return folder / PUBLISHED


def read_split(root, name: str) -> Split:
    """A split, ``"train"`` or ``"val"``, of the set in ``root``, in either layout."""
    root = Path(root)
    published = (root / "wnids.txt").is_file()
    rows = list(_published(root, name) if published else _unpacked(root, name))
    if not rows:
        raise FileNotFoundError(
            f"{root / name} holds no pictures of Tiny-ImageNet; it should have {name}/CLASS/*.jpg, "
            f"or be the publisher's folder {PUBLISHED}/"
        )
    names = _names(root, published)
    wnids = sorted({wnid for wnid, *_ in rows})
    if unknown := [wnid for wnid in wnids if wnid not in names]:
        raise ValueError(f"{root} has pictures of {unknown[0]}, which its list of classes lacks")
    numbers = {wnid: label for label, wnid in enumerate(names)}
    rows.sort(key=lambda row: (numbers[row[0]], int(row[1].stem.rpartition("_")[2])))
    # Boxes count pixels from 0 and include the last.
    edge = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return Split(
        str(root),
        [path for _, path, _ in rows],
        [numbers[wnid] for wnid, *_ in rows],
        list(names.values()),
        torch.tensor([box for *_, box in rows], dtype=torch.float32) + edge,
    )


def _published(root: Path, name: str):
    """(class, path, box) of each picture in the publisher's layout."""
    if name == "val":
        folder, tables = root / "val" / "images", [root / "val" / "val_annotations.txt"]
    else:
        tables = sorted((root / name).glob("*/*_boxes.txt"))
    for table in tables:
        for row in table.read_text().splitlines():
            *first, x0, y0, x1, y1 = row.split("\t")
            wnid = first[1] if name == "val" else table.parent.name
            place = folder if name == "val" else table.parent / "images"
            yield wnid, place / first[0], [float(value) for value in (x0, y0, x1, y1)]


def _unpacked(root: Path, name: str):
    """(class, path, box) of each picture in an ImageFolder with ``boxes.csv`` beside it."""
    with open(root / "boxes.csv", newline="") as file:
        boxes = {row[0]: [float(value) for value in row[1:5]] for row in list(csv.reader(file))[1:]}
    unknown = [float("nan")] * 4
    for path in (root / name).glob("*/*.jpg"):
        yield path.parent.name, path, boxes.get(path.relative_to(root).as_posix(), unknown)


def _names(root: Path, published: bool) -> dict[str, str]:
    """Short names of the classes, by what WordNet calls them, in sorted order."""
    if published:
        wnids = (root / "wnids.txt").read_text().split()
        lines = (root / "words.txt").read_text(encoding="utf-8").splitlines()
    else:
        lines = (root / "classes.tsv").read_text(encoding="utf-8").splitlines()[1:]
        wnids = [line.split("\t")[0] for line in lines]
    words = dict(line.split("\t")[:2] for line in lines)
    return {wnid: words[wnid].split(",")[0].strip() for wnid in sorted(wnids)}


def first_of_each_class(split: Split, n: int) -> Split:
    """The ``n`` first pictures of every class."""
    places = collections.defaultdict(list)
    for place, label in enumerate(split.labels):
        places[label].append(place)
    fewest = min(len(places[label]) for label in range(len(split.classes)))
    if fewest < n:
        raise ValueError(
            f"{n} pictures of every class are needed and {split.where} has {fewest} of some: "
            "the data set is incomplete"
        )
    return split[[place for found in places.values() for place in found[:n]]]


def read(split: Split, side: int, cache=None) -> Images:
    """All pictures of a split, scaled to ``side`` x ``side``, with labels and boxes.

    ``cache`` is a folder in which their pixels are kept, uint8 in one file per selection.
    """
    labels, boxes = torch.tensor(split.labels), split.boxes * (side / SIDE)
    if cache is None or not os.access(cache, os.W_OK):
        return Images(_decode(split.paths, side), labels, boxes)
    names = "".join(f"{path.name} {path.stat().st_size}\n" for path in split.paths)
    key = hashlib.sha256(f"{side} {names}".encode()).hexdigest()[:12]
    path = Path(cache) / f"{UNPACKED}-{len(split)}-at-{side}-{key}.npy"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.part")
        with open(partial, "wb") as file:
            np.save(file, _decode(split.paths, side).numpy())
        os.replace(partial, path)
    return Images(torch.from_numpy(np.load(path)), labels, boxes)


def _decode(paths: list[Path], side: int) -> Tensor:
    """Pixels (n, 3, side, side) of picture files."""

    def one(path):
        try:
            return pictures.read_one(path, side, side)
        except Exception as error:  # decoders raise whatever they stumble over
            raise ValueError(
                f"{path} cannot be read ({pictures.reason(error)}): unpack the data set again"
            ) from error

    pixels = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for place, picture in enumerate(pool.map(one, paths)):
            pixels[place] = picture
    return pixels


def to_input(pixels: Tensor) -> Tensor:
    """uint8 pixels (n, 3, h, w) -> float32 of mean about 0 and deviation about 1, per channel."""
    mean, deviation = _constants(pixels.device)
    return (pixels.float() / 255 - mean) / deviation


@functools.cache
def _constants(device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, device=device)[:, None, None] for v in (MEAN, DEVIATION))


class PictureSet:
    """Pictures in memory, on a device: ``PictureSet(images)[indices]`` gives pixels and labels."""

    def __init__(self, images: Images, device="cpu"):
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.pixels.device)
        return self.pixels[indices], self.labels[indices]
