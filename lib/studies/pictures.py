"""Photographs: picture files are found, some are chosen, and all are read into one crop.

Every network of a comparison sees the same crop, or places in one would not correspond to places
in another. What cannot be read is replaced by another picture, and reported once.
"""

import collections
import dataclasses
import inspect
import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from lib.studies.images import Images

SPLITS = {"train", "val", "test", "validation"}
LONGEST = 20  # times the short side; a longer strip would fill the memory when it is enlarged


class Unusable(ValueError):
    """Why a picture that can be decoded is left out all the same."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Picture files, and their classes where these are known.

    where   : what messages call the place
    paths   : the files
    labels  : a number per file, or None
    classes : a name per number
    """

    where: str
    paths: list[Path]
    labels: list[int] | None
    classes: list[str]


def in_folder(folder) -> Pictures:
    """Pictures in torchvision's ImageFolder layout, or in a folder without classes.

    In ``folder/class/any/where.jpg`` the first subfolder is the class, and classes are numbered in
    alphabetical order. If any picture lies directly in the folder, none has a label.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to take pictures from")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
    )
    if not paths:
        raise FileNotFoundError(
            f"there are no pictures in {folder}; it should hold {', '.join(IMG_EXTENSIONS[:3])}, "
            "... files, in one subfolder per class if classes are known"
        )
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) == 1 for part in parts):
        return Pictures(str(folder), paths, None, [])
    classes = sorted({part[0] for part in parts})
    if set(classes) <= SPLITS:
        raise ValueError(f"{folder} holds {' and '.join(classes)}: name one of them")
    number = {name: label for label, name in enumerate(classes)}
    return Pictures(str(folder), paths, [number[part[0]] for part in parts], classes)


def of_torchvision(dataset: str, root, **options) -> Pictures:
    """Pictures of a data set that torchvision knows, which it downloads if it may.

    Parameters
    ----------
    dataset : str
        A class of :mod:`torchvision.datasets` that keeps its pictures as files, such as
        ``"Imagenette"``, or ``"ImageNet"``, whose archives have to be in ``root`` already.
    root : path
        The data set is complete there or absent, whatever interrupts a download.
    **options
        For torchvision, for instance ``split="val"``.
    """
    kind = getattr(torchvision.datasets, dataset, None)
    if kind is None:
        raise ValueError(
            f"torchvision has no data set {dataset!r}; Imagenette is one, and ImageNet"
        )
    root = Path(root).expanduser()
    try:
        found = _in_root(kind, root, options)
    except TypeError as error:
        raise ValueError(f"torchvision's {dataset} does not take these options: {error}") from error
    samples = getattr(found, "samples", None) or getattr(found, "_samples", None)
    if not samples:
        raise ValueError(
            f"torchvision's {dataset} does not keep its pictures as files; "
            "Imagenette and ImageNet do"
        )
    paths, labels = zip(*samples, strict=True)
    classes = [name if isinstance(name, str) else name[0] for name in found.classes]
    return Pictures(f"{dataset} in {root}", [Path(path) for path in paths], list(labels), classes)


def _in_root(kind, root: Path, options: dict):
    if "download" not in inspect.signature(kind).parameters:
        return kind(root, **options)
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / ".lock"):  # of several processes one downloads
        try:
            return kind(root, **options)
        except RuntimeError:
            pass  # not there yet
        with tempfile.TemporaryDirectory(dir=root, prefix=".part-") as part:
            try:
                kind(part, download=True, **options)
            except (OSError, RuntimeError, EOFError) as error:
                raise OSError(
                    f"torchvision could not download {kind.__name__} into {root} "
                    f"({_line(error)}): try again, or name a folder of pictures instead"
                ) from error
            for made in Path(part).iterdir():
                if made.is_dir():  # archives are not needed any more
                    os.replace(made, root / made.name)
        return kind(root, **options)


def read(pictures: Pictures, n: int, seed: int = 0, resize: int = 256, crop: int = 224) -> Images:
    """Read ``n`` pictures: short side to ``resize`` (bicubic), then the ``crop`` in the middle.

    The pictures are drawn by the seed, and classes take turns, so that any number of images is
    spread over the classes as evenly as can be. The first ``n`` of a longer draw are the same.
    They are held in memory as uint8: 150 kB each at 224 pixels, 750 MB for 5,000.

    Grey, palette, CMYK and 16-bit pictures become RGB, what is transparent becomes white, and
    pictures that a camera has turned are turned back. A picture that cannot be read is left out
    with a warning that counts them, and the next one drawn takes its place.

    Returns
    -------
    Images
        With labels if the pictures have classes, and without boxes.
    """
    waiting = order(pictures, seed)
    pixels = torch.empty(n, 3, crop, crop, dtype=torch.uint8)
    kept: list[int] = []
    skipped: dict[str, list[Path]] = collections.defaultdict(list)

    def attempt(place):
        try:
            return read_one(pictures.paths[place], resize, crop)
        except Exception as error:  # decoders raise whatever they stumble over
            return reason(error)

    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        while len(kept) < n and waiting:
            batch, waiting = waiting[: n - len(kept)], waiting[n - len(kept) :]
            for place, result in zip(batch, pool.map(attempt, batch), strict=True):
                if isinstance(result, str):
                    skipped[result].append(pictures.paths[place])
                else:
                    pixels[len(kept)] = result
                    kept.append(place)

    report = "; ".join(
        f"{len(paths)} {reason} ({paths[0].name}{', ...' if len(paths) > 1 else ''})"
        for reason, paths in skipped.items()
    )
    if len(kept) < n:
        raise ValueError(
            f"{pictures.where} has {len(kept):,} pictures that can be read, and {n:,} were asked "
            f"for: ask for fewer{f' (skipped: {report})' if report else ''}"
        )
    if report:
        warnings.warn(
            f"{sum(map(len, skipped.values()))} of the pictures could not be used, and others of "
            f"{pictures.where} take their place: {report}",
            stacklevel=2,
        )
    labels = None
    if pictures.labels is not None:
        labels = torch.tensor([pictures.labels[place] for place in kept], dtype=torch.long)
    return Images(pixels, labels)


def order(pictures: Pictures, seed: int) -> list[int]:
    """All pictures in an order drawn by the seed, in which classes take turns."""
    stream = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(pictures.paths), generator=stream).tolist()
    if pictures.labels is None:
        return drawn
    turn, counts = {}, collections.Counter()
    for place in drawn:
        label = pictures.labels[place]
        turn[place] = counts[label]
        counts[label] += 1
    return sorted(drawn, key=turn.get)


def read_one(path: Path, resize: int, crop: int) -> torch.Tensor:
    """A picture (3, crop, crop), uint8: short side to ``resize``, the middle of it."""
    if not path.stat().st_size:
        raise Unusable("empty")
    with Image.open(path) as image:
        image.load()
        image = _in_colour(ImageOps.exif_transpose(image))
    if max(image.size) > LONGEST * min(image.size):
        raise Unusable(f"more than {LONGEST} times as long as wide")
    image = F.resize(image, resize, InterpolationMode.BICUBIC)
    return torch.from_numpy(np.array(F.center_crop(image, crop))).permute(2, 0, 1)


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        grey = np.asarray(image).astype(np.int64) // 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unusable("in floating point, with no known range")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why a picture was skipped, in words that are the same for the same kind of trouble."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture of a known format"
    if isinstance(error, PermissionError | FileNotFoundError):
        return "not readable by this user"
    if isinstance(error, Image.DecompressionBombError):
        return "larger than is safe to decode"
    if isinstance(error, Unusable):
        return str(error)
    return "truncated" if "truncated" in str(error) else "damaged"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
