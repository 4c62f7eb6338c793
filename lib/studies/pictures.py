"""Photographs: picture files are found, some are chosen, and all are read into one crop.

Every network of a comparison sees the same crop, or places in one would not correspond to places
in another. A picture that cannot be read is replaced by another, and reported once.
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
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from lib import records
from lib.studies.images import Images

SPLITS = {"train", "val", "test", "validation"}
LEFT_BEHIND = {"@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle", "lost+found"}  # by systems
LONGEST = 20  # times the short side; a longer strip would fill the memory when it is enlarged


class Unusable(ValueError):
    """Why a picture that can be decoded is left out all the same."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Picture files, and their classes where these are known.

    where   : the place, for messages
    paths   : the files
    labels  : a number per file, or None
    classes : a name per number
    boxes   : float32 (n, 4), the object's ``x0, y0, x1, y1`` in pixels, edges included, or None
    """

    where: str
    paths: list[Path]
    labels: list[int] | None
    classes: list[str]
    boxes: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: list[int]) -> "Pictures":
        """Some of the pictures, by their places."""
        paths, labels = (
            column and [column[place] for place in which] for column in (self.paths, self.labels)
        )
        boxes = None if self.boxes is None else self.boxes[which]
        return dataclasses.replace(self, paths=paths, labels=labels, boxes=boxes)


def data_folder() -> Path:
    """Where torchvision keeps data sets: ``data`` in the repository, or ``$VIT_SEE_DATA``."""
    return Path(os.environ.get("VIT_SEE_DATA", records.ROOT / "data"))


def in_folder(folder) -> Pictures:
    """Pictures in torchvision's ImageFolder layout, or in a folder without classes.

    In ``folder/class/any/where.jpg`` the first subfolder is the class, and classes are numbered in
    alphabetical order. If any picture lies directly in the folder, none has a label. Hidden files
    and folders are left out, and folders that an operating system or a file server makes.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to take pictures from")

    def parts(path) -> tuple[str, ...]:
        return Path(path).relative_to(folder).parts

    def wanted(path) -> bool:
        left = any(part.startswith(".") or part in LEFT_BEHIND for part in parts(path))
        return path.lower().endswith(IMG_EXTENSIONS) and not left

    # The folder itself as the only class: torchvision walks it.
    found = make_dataset(str(folder), {"": 0}, is_valid_file=wanted, allow_empty=True)
    paths = sorted(Path(path) for path, _ in found)
    if not paths:
        raise FileNotFoundError(
            f"there are no pictures in {folder}; it should hold {', '.join(IMG_EXTENSIONS[:3])}, "
            "... files, in one subfolder per class if classes are known"
        )
    if any(len(parts(path)) == 1 for path in paths):
        return Pictures(str(folder), paths, None, [])
    classes = sorted({parts(path)[0] for path in paths})
    if set(classes) <= SPLITS:
        raise ValueError(f"{folder} holds {' and '.join(classes)}: name one of them")
    number = {name: label for label, name in enumerate(classes)}
    return Pictures(str(folder), paths, [number[parts(path)[0]] for path in paths], classes)


def of_torchvision(dataset: str, root, **options) -> Pictures:
    """Pictures of a data set of torchvision, which downloads it if it may.

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
        if "download" in inspect.signature(kind).parameters:
            download(
                dataset, root, lambda part: kind(part, download=True, **options),
                lambda: kind(root, **options), "try again, or name a folder of pictures instead",
            )  # fmt: skip
        found = kind(root, **options)
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


def download(what: str, root: Path, make, check, cure: str) -> None:
    """Make a data set in a folder, completely or not at all; of several processes one does.

    ``make`` downloads it into the folder it is given, and ``check`` raises a RuntimeError where the
    data set is not in ``root`` yet.
    """
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / ".lock"):
        try:
            return check()
        except RuntimeError:
            pass
        with tempfile.TemporaryDirectory(dir=root, prefix=".part-") as part:
            try:
                make(part)
            except (OSError, RuntimeError, EOFError) as error:
                why = " ".join(str(error).split())[:150] or type(error).__name__
                raise OSError(
                    f"{what} could not be downloaded into {root} ({why}): {cure}"
                ) from error
            for made in Path(part).iterdir():
                if made.is_dir():  # archives are not needed any more
                    os.replace(made, root / made.name)


def read(pictures: Pictures, n: int, seed: int = 0, resize: int = 256, crop: int = 224) -> Images:
    """Read ``n`` pictures: short side to ``resize`` (bicubic), then the ``crop`` in the middle.

    The pictures are drawn by the seed, and classes take turns, so that any number of images is
    spread over the classes as evenly as can be. The first ``n`` of a longer draw are the same.
    They are held in memory as uint8: 150 kB each at 224 pixels, 750 MB for 5,000.

    Grey, palette, CMYK and 16-bit pictures become RGB, transparent parts become white, and
    pictures that a camera has turned are turned back. A picture that cannot be read is left out
    with a warning that counts them, and the next one drawn takes its place. Another warning counts
    pictures that equal an earlier one.

    Returns
    -------
    Images
        With labels if the pictures have classes, and without boxes.
    """
    if crop > resize:
        raise ValueError(f"crop is {crop} and should be at most resize, which is {resize}")
    waiting = order(pictures, seed)
    pixels = torch.empty(n, 3, crop, crop, dtype=torch.uint8)
    kept: list[int] = []
    skipped: dict[str, list[Path]] = collections.defaultdict(list)
    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        while len(kept) < n and waiting:
            batch, waiting = waiting[: n - len(kept)], waiting[n - len(kept) :]
            paths = [pictures.paths[place] for place in batch]
            results = pool.map(lambda path: attempt(path, resize, crop), paths)
            for place, path, result in zip(batch, paths, results, strict=True):
                if isinstance(result, str):
                    skipped[result].append(path)
                else:
                    pixels[len(kept)] = result
                    kept.append(place)
    _report(pictures.where, pixels[: len(kept)], n, skipped)
    labels = None
    if pictures.labels is not None:
        labels = torch.tensor([pictures.labels[place] for place in kept], dtype=torch.long)
    return Images(pixels, labels)


def _report(where: str, pixels: torch.Tensor, n: int, skipped: dict[str, list[Path]]) -> None:
    """Warn of pictures that were skipped and of equal ones; raise if too few are left."""
    report = "; ".join(
        f"{len(paths)} {reason} ({paths[0].name}{', ...' if len(paths) > 1 else ''})"
        for reason, paths in skipped.items()
    )
    if len(pixels) < n:
        raise ValueError(
            f"{where} has {len(pixels):,} pictures that can be read, and {n:,} were asked "
            f"for: ask for fewer{f' (skipped: {report})' if report else ''}"
        )
    if report:
        warnings.warn(
            f"{sum(map(len, skipped.values()))} of the pictures could not be used, and others of "
            f"{where} take their place: {report}",
            stacklevel=3,
        )
    if again := n - len({picture.numpy().tobytes() for picture in pixels}):
        warnings.warn(
            f"{again} of {n} pictures of {where} equal another of them: similarities of "
            "representations come out too high",
            stacklevel=3,
        )


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


def attempt(path: Path, resize: int, crop: int) -> torch.Tensor | str:
    """A picture (3, crop, crop), uint8, the middle of it at a short side of ``resize`` pixels.

    Or why it cannot be had, in words that are the same for the same kind of trouble.
    """
    try:
        return _read_one(path, resize, crop)
    except UnidentifiedImageError:
        return "no picture of a known format"
    except (PermissionError, FileNotFoundError):
        return "not readable by this user"
    except Image.DecompressionBombError:
        return "larger than is safe to decode"
    except Unusable as error:
        return str(error)
    except Exception as error:  # decoders raise whatever they stumble over
        return "truncated" if "truncated" in str(error) else "damaged"


def _read_one(path: Path, resize: int, crop: int) -> torch.Tensor:
    if not path.stat().st_size:
        raise Unusable("empty")
    with Image.open(path) as image:
        image.load()
        image = _in_colour(ImageOps.exif_transpose(image))
    if max(image.size) > LONGEST * min(image.size):
        raise Unusable(f"more than {LONGEST} times as long as wide")
    image = F.resize(image, resize, InterpolationMode.BICUBIC)
    return F.pil_to_tensor(F.center_crop(image, crop))


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I"):
        kind = "floating point" if image.mode == "F" else "32-bit integers"
        raise Unusable(f"in {kind}, with no known range")
    if image.mode.startswith("I;16"):  # of grey, which Pillow would clip to 8
        grey = np.asarray(image).astype(np.int64) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")
