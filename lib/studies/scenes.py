"""Procedural scenes: a data set that never runs out and whose ground truth is known.

A scene is one textured object on a cluttered 32 x 32 background. Its class is the object's
shape (4) times the object's texture (4), so either factor alone is right once in four times.
Colour, place and size carry no information about the class.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 32
SHAPES = ("horizontal bar", "vertical bar", "ring", "plus")
TEXTURES = ("horizontal stripes", "vertical stripes", "plaid", "band noise")
CLASSES = tuple(f"{shape}, {texture}" for shape in SHAPES for texture in TEXTURES)
SPLITS = ("train", "val", "test")

# Scenes are drawn in chunks that share one random stream: any scene can be made again by drawing
# its chunk, and the drawing is vectorised.
CHUNK = 128
# A generator is seeded with 32 bits: split and seed take 12 of them, the chunk 20.
CHUNKS = 2**20
SEEDS = 2**12 // len(SPLITS)


class Scenes(NamedTuple):
    """A batch of scenes.

    images  : uint8 (n, 3, 32, 32), RGB
    labels  : int64 (n,), ``shape * 4 + texture``
    boxes   : float32 (n, 4), the object's ``x0, y0, x1, y1`` in pixels, edges included
    centres : float32 (n, 2), the object's ``x, y`` in pixels
    colours : float32 (n, 3), the object's mean colour, 0 to 1
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    centres: Tensor
    colours: Tensor


class Task(NamedTuple):
    """What is asked of a scene.

    purpose     : the question, in words
    wavelengths : of the textures, in pixels
    contrast    : of the textures, from their darkest to their brightest; black to white is 1
    answer      : the labels (n,) of scenes, if not the object's shape and texture
    """

    purpose: str
    wavelengths: tuple[float, float] = (3.4, 5.2)
    contrast: tuple[float, float] = (0.4, 0.8)
    answer: Callable[[Scenes], Tensor] = lambda drawn: drawn.labels


TASKS = {
    "object": Task("shape and texture of the object"),
    "fine textures": Task("the same of objects with finer textures", wavelengths=(2.4, 3.4)),
    "faint textures": Task("the same, of textures that may be too faint", contrast=(0.0, 0.8)),
    "colour": Task(
        "which of red, green and blue the object has much of",
        answer=lambda drawn: ((drawn.colours > 0.5).long() * torch.tensor([1, 2, 4])).sum(1),
    ),
}


def draw(indices, split: str = "train", seed: int = 0, task: str = "object") -> Scenes:
    """Draw scenes by index; the same (split, seed, index) always gives the same scene.

    Splits never share a scene, and another seed gives another, equally distributed set. ``task`` is
    one of TASKS, whose answers are the labels.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; use one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; use one of {', '.join(SPLITS)}")
    indices = torch.as_tensor(indices, dtype=torch.long)
    if not indices.numel():
        raise ValueError("no scene was asked for: give at least one index")
    if (odd := indices[(indices < 0) | (indices >= CHUNKS * CHUNK)]).numel():
        raise ValueError(f"scenes go from 0 to {CHUNKS * CHUNK - 1:,}; got {int(odd[0])}")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seeds of scenes go from 0 to {SEEDS - 1}; got {seed}")
    chunks, position = torch.unique(indices // CHUNK, return_inverse=True)
    drawn = [_draw_chunk(int(chunk), split, seed, TASKS[task]) for chunk in chunks]
    rows = position * CHUNK + indices % CHUNK
    found = Scenes(*(torch.cat(field)[rows] for field in zip(*drawn, strict=True)))
    return found._replace(labels=TASKS[task].answer(found))


def to_input(images: Tensor) -> Tensor:
    """uint8 images (n, 3, h, w) -> float32 input of mean about 0 and deviation about 1."""
    return (images.float() / 255 - 0.5) / 0.25


def _draw_chunk(chunk: int, split: str, seed: int, task: Task) -> Scenes:
    n, number = CHUNK, seed * len(SPLITS) + SPLITS.index(split)
    stream = torch.Generator().manual_seed(number * CHUNKS + chunk)

    uniform = partial(_uniform, stream)
    axis = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    # Colours: the object's mean differs from the background's by at least 0.25 in every channel,
    # in a random direction, so it can be seen and says nothing about the class.
    ground = uniform(n, 3, 1, 1, low=0.4, high=0.6)
    offset = uniform(n, 3, 1, 1, low=0.25, high=0.4)
    up = torch.rand(n, 3, 1, 1, generator=stream) < 0.5
    colour = torch.where(up, ground + offset, ground - offset)

    # Clutter: 1/f^1.3 noise, the spectrum of natural images, and two blobs that carry the same
    # textures as the objects in an outline that is none of theirs.
    canvas = ground + 0.06 * _one_over_f(n, 1.3, stream)
    for _ in range(2):
        centre = uniform(n, 2, 1, 1, low=2, high=SIZE - 2)
        radius = uniform(n, 1, 1, low=2.5, high=4.5)
        blob = _coverage(radius - torch.hypot(x - centre[:, 0], y - centre[:, 1]))
        blob_colour = uniform(n, 3, 1, 1, low=0.2, high=0.8)
        kind = torch.randint(len(TEXTURES), (n,), generator=stream)
        canvas = torch.lerp(canvas, blob_colour + _texture(kind, task, stream), blob[:, None])

    shape = torch.randint(len(SHAPES), (n,), generator=stream)
    texture = torch.randint(len(TEXTURES), (n,), generator=stream)
    centre = SIZE / 2 + uniform(n, 2, 1, 1, low=-4, high=4)
    radius = uniform(n, 1, 1, low=7.5, high=10)
    angle = uniform(n, 1, 1, low=-1, high=1) * math.radians(15)
    mask = _outline(shape, x - centre[:, 0], y - centre[:, 1], radius, angle)
    canvas = torch.lerp(canvas, colour + _texture(texture, task, stream), mask[:, None])

    canvas = canvas + 0.04 * torch.randn(n, 3, SIZE, SIZE, generator=stream)
    images = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
    labels = shape * len(TEXTURES) + texture
    return Scenes(images, labels, _boxes(mask), centre[:, :, 0, 0], colour[:, :, 0, 0])


def _uniform(stream: torch.Generator, *shape: int, low: float, high: float) -> Tensor:
    return torch.rand(*shape, generator=stream) * (high - low) + low


def _one_over_f(n: int, exponent: float, stream: torch.Generator) -> Tensor:
    """Noise (n, 3, 32, 32) of unit deviation whose amplitude falls as 1/f**exponent."""
    # In float64: the last bits of a transform depend on the number of threads.
    spectrum = torch.fft.rfft2(torch.randn(n, 3, SIZE, SIZE, generator=stream).double())
    frequency = torch.hypot(torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)[None])
    frequency[0, 0] = math.inf
    noise = torch.fft.irfft2(spectrum / frequency**exponent, s=(SIZE, SIZE))
    return (noise / noise.std(dim=(2, 3), keepdim=True)).float()


def _texture(kind: Tensor, task: Task, stream: torch.Generator) -> Tensor:
    """Zero-mean grey textures (n, 1, 32, 32) of the kinds named in TEXTURES.

    Each is a sum of plane waves of one wavelength: stripes have one wave, a plaid has two at right
    angles, and band noise has six in random directions, hence none. All have the same variance.
    """
    n, waves, uniform = len(kind), 6, partial(_uniform, stream)
    (shortest, longest), (faintest, strongest) = task.wavelengths, task.contrast
    frequency = 2 * math.pi / uniform(n, 1, low=shortest, high=longest)
    contrast = uniform(n, 1, low=faintest, high=strongest) / 2
    tilt = uniform(n, low=-1, high=1) * math.radians(25)
    phase = uniform(n, waves, low=0, high=2 * math.pi)
    direction = uniform(n, waves, low=0, high=2 * math.pi)
    directed = kind != TEXTURES.index("band noise")
    direction[directed, 0] = tilt[directed] + math.pi / 2
    direction[directed, 1] = tilt[directed]
    weights = torch.zeros(len(TEXTURES), waves)
    weights[0, 0] = weights[1, 1] = 1
    weights[2, :2], weights[3] = math.sqrt(1 / 2), math.sqrt(1 / waves)

    # sin(a + b) = sin(a) cos(b) + cos(a) sin(b): a wave is two outer products, and the sum over
    # waves one small matrix product per scene.
    axis = torch.arange(SIZE) + 0.5
    along_x = (frequency * direction.cos())[..., None] * axis + phase[..., None]
    along_y = (frequency * direction.sin())[..., None] * axis
    amplitude = (contrast * weights[kind])[..., None]
    over_x = torch.cat([amplitude * along_x.sin(), amplitude * along_x.cos()], dim=1)
    over_y = torch.cat([along_y.cos(), along_y.sin()], dim=1)
    return torch.einsum("nwy,nwx->nyx", over_y, over_x)[:, None]


def _outline(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Coverage (n, 32, 32) in 0..1 of the shapes named in SHAPES; all have area 2 radius^2."""
    u = (torch.cos(angle) * dx + torch.sin(angle) * dy).abs()
    v = (torch.cos(angle) * dy - torch.sin(angle) * dx).abs()
    distance = torch.hypot(dx, dy)
    half, arm = radius / 2, radius * (1 - math.sqrt(0.5))
    hole = radius * math.sqrt(1 - 2 / math.pi)
    inside = [
        torch.minimum(radius - u, half - v),
        torch.minimum(radius - v, half - u),
        torch.minimum(radius - distance, distance - hole),
        torch.maximum(torch.minimum(radius - u, arm - v), torch.minimum(radius - v, arm - u)),
    ]
    return _coverage(torch.stack(inside, dim=1)[torch.arange(len(shape)), shape])


def _coverage(inside: Tensor) -> Tensor:
    """Signed distance to an edge, in pixels, positive inside -> anti-aliased coverage in 0..1."""
    return (inside + 0.5).clamp(0, 1)


def _boxes(mask: Tensor) -> Tensor:
    """Tight boxes (n, 4) around the pixels that are at least half covered."""
    columns, rows = mask.amax(1) >= 0.5, mask.amax(2) >= 0.5

    def extent(hit):
        return hit.float().argmax(1), SIZE - hit.flip(1).float().argmax(1)

    (x0, x1), (y0, y1) = extent(columns), extent(rows)
    return torch.stack([x0, y0, x1, y1], dim=1).float()
