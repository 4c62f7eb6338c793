"""Images to measure on, with what is known about them."""

import torch
from torch import Tensor

from lib.studies import scenes


class Images:
    """Images in memory.

    pixels : uint8 (n, 3, h, w), RGB
    labels : int64 (n,); asking for them is an error where they are unknown
    boxes  : float32 (n, 4), the object's ``x0, y0, x1, y1`` in pixels; NaN where unknown
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None = None, boxes: Tensor | None = None):
        self.pixels = pixels
        self._labels = labels
        self.boxes = torch.full((len(pixels), 4), torch.nan) if boxes is None else boxes

    @property
    def labels(self) -> Tensor:
        if self._labels is None:
            told = "these images have no labels, and this measurement needs some: "
            raise ValueError(told + "sort the pictures into one subfolder per class")
        return self._labels

    @property
    def labelled(self) -> bool:
        """Whether class labels are known."""
        return self._labels is not None

    @property
    def boxed(self) -> bool:
        """Whether it is known where the objects of all images are."""
        return not bool(self.boxes.isnan().any())

    def __getitem__(self, which) -> "Images":
        """Some of the images, by a slice or by indices."""
        labels = None if self._labels is None else self._labels[which]
        return Images(self.pixels[which], labels, self.boxes[which])

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, size: int):
        """Consecutive batches of pixels; the last one may be smaller."""
        return self.pixels.split(size)


def scene_images(n: int, split: str = "test", seed: int = 0, task: str = "object") -> Images:
    """The first ``n`` scenes of a split."""
    drawn = scenes.draw(range(n), split, seed, task)
    return Images(drawn.images, drawn.labels, drawn.boxes)


class SceneSet:
    """A fixed set of distinct scenes, drawn when first asked for and then kept (3 kB each).

    ``SceneSet(n)[indices]`` gives ``(uint8 (k, 3, 32, 32), int64 (k,))`` on the given device.
    """

    def __init__(self, n: int, split="train", seed: int = 0, device="cpu", task="object"):
        self.drawn_as = split, seed, task
        self.pixels = torch.empty(n, 3, scenes.SIZE, scenes.SIZE, dtype=torch.uint8, device=device)
        self.labels = torch.empty(n, dtype=torch.long, device=device)
        self.drawn = torch.zeros(-(-n // scenes.CHUNK), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        chunks = torch.unique(indices // scenes.CHUNK)
        for chunk in chunks[~self.drawn[chunks]].tolist():
            place = slice(chunk * scenes.CHUNK, (chunk + 1) * scenes.CHUNK)
            drawn = scenes.draw(range(len(self))[place], *self.drawn_as)
            self.pixels[place], self.labels[place] = drawn.images, drawn.labels
            self.drawn[chunk] = True
        indices = indices.to(self.pixels.device)
        return self.pixels[indices], self.labels[indices]
