"""Photographs: picture files are found, some are chosen, and all are read into one crop.

Every network of a comparison sees the same crop, or places in one would not correspond to places
in another. A picture that cannot be read is replaced by another, and reported once.
"""

import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
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
RANGELESS = {"F": "floating point", "I": "32-bit integers"}


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


def data_folder() -> Path:
    """Where torchvision keeps data sets: ``data`` in the repository, or ``$VIT_SEE_DATA``."""
    return Path(os.environ.get("VIT_SEE_DATA", records.ROOT / "data")).expanduser()


def in_folder(folder) -> Pictures:
    """Pictures in torchvision's ImageFolder layout, or in a folder without classes.

    In ``folder/class/any/where.jpg`` the first subfolder is the class, and classes are numbered in
    alphabetical order. If any picture lies directly in the folder, none has a label. Hidden files
    and folders are left out, and folders that an operating system or a file server makes.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to take pictures from")

    def wanted(path: str) -> bool:
        parts = Path(path).relative_to(folder).parts
        left = any(part.startswith(".") or part in LEFT_BEHIND for part in parts)
        return path.lower().endswith(IMG_EXTENSIONS) and not left

    # The folder itself as the only class: torchvision walks it.
    found = make_dataset(str(folder), {"": 0}, is_valid_file=wanted, allow_empty=True)
    paths = sorted(Path(path) for path, _ in found)
    if not paths:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise FileNotFoundError(
            f"there are no pictures in {folder}: put some there ({kinds}), one subfolder per class"
        )
    if folder in {path.parent for path in paths}:
        return Pictures(str(folder), paths, None, [])
    of = [path.relative_to(folder).parts[0] for path in paths]
    classes = sorted(set(of))
    if set(classes) <= SPLITS:
        raise ValueError(f"{folder} holds {' and '.join(classes)}: name one of them")
    return Pictures(str(folder), paths, [classes.index(name) for name in of], classes)


def of_torchvision(dataset: str, root, **options) -> Pictures:
    """Pictures of a data set of torchvision, which downloads it into ``root`` if it may.

    ``dataset`` is a class of :mod:`torchvision.datasets` that keeps its pictures as files, such as
    ``"Imagenette"``, or ``"ImageNet"``, whose archives have to be in ``root`` already; ``options``
    are torchvision's, for instance ``split="val"``.
    """
    kind = getattr(torchvision.datasets, dataset, None)
    if kind is None:
        raise ValueError(f"torchvision has no {dataset!r}; Imagenette is a data set, and ImageNet")
    root = Path(root).expanduser()
    try:
        if "download" in inspect.signature(kind).parameters:
            cure = "try again, or name a folder of pictures instead"
            make = functools.partial(kind, download=True, **options)
            download(dataset, root, make, lambda: kind(root, **options), cure)
        found = kind(root, **options)
    except TypeError as error:
        raise ValueError(f"torchvision's {dataset} does not take these options: {error}") from error
    samples = getattr(found, "samples", None) or getattr(found, "_samples", None)
    if not samples:
        raise ValueError(f"torchvision's {dataset} keeps no picture files, as Imagenette does")
    paths, labels = zip(*samples, strict=True)
    classes = [name if isinstance(name, str) else name[0] for name in found.classes]
    return Pictures(f"{dataset} in {root}", [*map(Path, paths)], list(labels), classes)


def download(what: str, root: Path, make, check, cure: str) -> None:
    """Make a data set in a folder, completely or not at all; of several processes one does.

    ``make`` downloads it into the folder it is given, and ``check`` raises an error where the data
    set is not in ``root`` yet.
    """
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / ".lock"), tempfile.TemporaryDirectory(dir=root) as part:
        with contextlib.suppress(RuntimeError, FileNotFoundError):
            return check()
        try:
            make(part)
        except (OSError, RuntimeError, EOFError) as error:
            why = " ".join(str(error).split())[:150] or type(error).__name__
            raise OSError(f"{what} could not be downloaded into {root} ({why}): {cure}") from error
        for made in Path(part).iterdir():
            if made.is_dir():  # archives are not needed any more
                os.replace(made, root / made.name)


def read(pictures: Pictures, n: int, seed: int = 0, resize: int = 256, crop: int = 224) -> Images:
    """Read ``n`` pictures: short side to ``resize`` (bicubic), then the ``crop`` in the middle.

    They are the first ``n`` in the seed's :func:`order` that can be read. One warning counts those
    that cannot, and another those that equal an earlier one. They are held in memory as uint8,
    150 kB each at 224 pixels, with labels if the pictures have classes.
    """
    waiting = order(pictures, seed)
    pixels = torch.empty(n, 3, crop, crop, dtype=torch.uint8)
    kept, skipped = [], collections.defaultdict(list)
    with warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        while len(kept) < n and waiting:
            batch, waiting = waiting[: n - len(kept)], waiting[n - len(kept) :]
            results = pool.map(lambda k: attempt(pictures.paths[k], resize, crop), batch)
            for place, result in zip(batch, results, strict=True):
                if isinstance(result, str):
                    skipped[result].append(pictures.paths[place].name)
                else:
                    pixels[len(kept)] = result
                    kept.append(place)
    _report(pictures.where, pixels[: len(kept)], n, skipped)
    labels = None if pictures.labels is None else torch.tensor(pictures.labels)[kept]
    return Images(pixels, labels)


def _report(where: str, pixels: torch.Tensor, n: int, skipped: dict[str, list[str]]) -> None:
    """Warn of pictures that were skipped and of equal ones; raise if too few are left."""
    kinds = [(f"{len(names)} {reason}", names) for reason, names in skipped.items()]
    kinds = [f"{what} ({names[0]}{', ...' if names[1:] else ''})" for what, names in kinds]
    left, why = f"{sum(map(len, skipped.values()))} of the pictures", "; ".join(kinds)
    if len(pixels) < n:
        raise ValueError(
            f"{where} has {len(pixels):,} pictures that can be read, and {n:,} were asked for: "
            f"ask for fewer{f' (skipped: {why})' if why else ''}"
        )
    if why:
        told = f"{left} could not be used, and others of {where} take their place: {why}"
        warnings.warn(told, stacklevel=3)
    if again := n - len({picture.numpy().tobytes() for picture in pixels}):
        told = f"{again} of {n} pictures of {where} equal another of them: similarities of "
        warnings.warn(f"{told}representations come out too high", stacklevel=3)


def order(pictures: Pictures, seed: int) -> list[int]:
    """All pictures in an order drawn by the seed, in which classes take turns.

    So any number of images is spread over the classes as evenly as can be.
    """
    stream = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(pictures.paths), generator=stream).tolist()
    labels = pictures.labels or range(len(drawn))
    turns = collections.defaultdict(itertools.count)
    return sorted(drawn, key=lambda place: next(turns[labels[place]]))


def attempt(path: Path, resize: int, crop: int) -> torch.Tensor | str:
    """A picture (3, crop, crop), uint8, the middle of it at a short side of ``resize`` pixels.

    Or why it cannot be had, in words that are the same for the same kind of trouble. Grey, palette,
    CMYK and 16-bit pictures become RGB, transparent parts become white, and pictures that a camera
    has turned are turned back.
    """
    try:
        if not path.stat().st_size:
            return "empty"
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
        if image.mode in RANGELESS:
            return f"in {RANGELESS[image.mode]}, with no known range"
        if max(image.size) > LONGEST * min(image.size):
            return f"more than {LONGEST} times as long as wide"
        image = F.resize(_in_colour(image), resize, InterpolationMode.BICUBIC)
        return F.pil_to_tensor(F.center_crop(image, crop))
    except UnidentifiedImageError:
        return "no picture of a known format"
    except (PermissionError, FileNotFoundError):
        return "not readable by this user"
    except Image.DecompressionBombError:
        return "larger than is safe to decode"
    except Exception as error:  # decoders raise whatever they stumble over
        return "truncated" if "truncated" in str(error) else "damaged"


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # of grey, which Pillow would clip to 8
        grey = np.asarray(image).astype(np.int64) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")
