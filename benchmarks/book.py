"""What all of the book's measurements together cost over the plain forward passes.

The lab's four networks, or four of usual size, float32 on the CPU. All measurements share one
pass, with the settings of the chapter that asks for most of each. The plain passes of the same
networks over the same images are timed in turn with it, in this process: CPU time, so that other
work on the machine hardly matters. Receptive fields take gradients, of a few images, and are timed
apart::

    python -m benchmarks.book --out book/results/cost-book.json
    python -m benchmarks.book --large --images 128 --more 256 --out book/results/cost-large.json
"""

import contextlib
import functools
import os
import statistics
import tempfile
import time

import timm
import torch
import xarray as xr

from benchmarks import shared
from benchmarks.shared import cost
from lib.cka import MinibatchCKA
from lib.measure import measure
from lib.measurements.attention import AttentionDistance, attention_taps
from lib.measurements.heads import HeadCKA, head_taps
from lib.measurements.localisation import Localisation
from lib.measurements.norm_ratio import NormRatio, branch_taps
from lib.measurements.probes import Probes
from lib.measurements.receptive_field import measure_receptive_fields
from lib.studies.images import Images
from lib.studies.lab import Lab
from lib.taps import tap_names

ROLES = ("vit", "vit_gap", "resnet", "mixer")
PLACES = ("vit", "vit_gap", "resnet")  # whose tokens chapter 05 asks about
PROBES = "linear probes"
FIELDS = {
    "vit": ["blocks.*", "blocks.*.attn", "blocks.*.mlp"],
    "resnet": ["stages.*.blocks.*", "stages.*.blocks.*.conv3"],
}


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    study = (Large if options.large else Drawn)(max(options.images, options.more))
    plain(study, options.batch, options.batch)  # warm-up

    totals, parts = [], []
    for _ in range(options.repeats):
        floor, _, _ = cost(plain, study, options.images, options.batch)
        total, _, clock = cost(measured, study, measurements(study), options.images, options.batch)
        totals.append(total / floor)
        parts.append({name: seconds / floor for name, seconds in clock.items()})
        print(f"{totals[-1]:.2f} times the plain passes ({floor:.1f} s)", flush=True)
    rows = [
        {"name": name, "ratio": round(statistics.median(part[name] for part in parts), 3)}
        for name in parts[0]
    ]
    for row in rows:
        print(f"{row['ratio']:8.3f}  {row['name']}")

    _, least, _ = cost(plain, study, options.batch, options.batch)
    memory = []
    for n in (options.images, options.more):
        few = {name: one for name, one in measurements(study).items() if name != PROBES}
        _, peak, _ = cost(measured, study, few, n, options.batch)
        memory.append({"images": n, "extra_mib": max(0, round((peak - least) / 2**20))})
        print(memory[-1], flush=True)

    images, channels = 64, 2
    seconds, _, _ = cost(fields, study, images, channels)
    shared.result(
        study.what,
        options,
        rows,
        images=options.images,
        ratio=round(statistics.median(totals), 3),
        ratios=[round(ratio, 3) for ratio in totals],
        memory=memory,
        probes_kib_per_image=round(kept_by_probes(study, options.batch) / 2**10),
        fields={"images": images, "channels": channels, "ratio": round(seconds / floor, 3)},
    )


def parse():
    parser = shared.options(__doc__, batch=64)
    parser.add_argument(
        "--large", action="store_true", help="networks of usual size, random weights, at 224 pixels"
    )
    parser.add_argument("--images", type=int, default=1024, help="(default: 1024)")
    parser.add_argument("--more", type=int, default=4096, help="for memory (default: 4096)")
    return parser.parse_args()


class Drawn(Lab):
    """The lab with its images and networks in memory, so that making them is not timed."""

    what = "ViT, mean-pooled ViT, ResNet and Mixer of the lab, 32 px, float32"
    grid = 8

    def __init__(self, n: int):
        super().__init__()
        self.drawn = super().images(n)
        self.networks = {role: super(Drawn, self).model(role) for role in ROLES}

    def images(self, n, seed=0):
        return self.drawn[:n]

    def model(self, name):
        return self.networks[name]


class Large:
    """Networks of usual size: what they have learned and what they see costs no time."""

    name = "large"
    what = "ViT-S/16, the same mean-pooled, ResNet-50, Mixer-S/16, random weights, 224 px, float32"
    grid = 7  # of the ResNet's last stage

    def __init__(self, n: int):
        noise = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8, generator=noise)
        boxes = torch.tensor([[50.0, 50.0, 150.0, 150.0]]).expand(n, 4)
        self.drawn = Images(pixels, torch.arange(n) % 4, boxes)
        vit = "vit_small_patch16_224"
        models = {
            "vit": timm.create_model(vit),
            "vit_gap": timm.create_model(vit, class_token=False, global_pool="avg"),
            "resnet": timm.create_model("resnetv2_50"),
            "mixer": timm.create_model("mixer_s16_224"),
        }
        self.networks = {role: models[role].eval() for role in ROLES}

    images, model = Drawn.images, Drawn.model

    def to_input(self, pixels, role):
        return pixels.float() / 127.5 - 1


def measurements(study) -> dict:
    """All measurements of the chapters, by name."""
    blocks = {role: tap_names(study.model(role), "blocks")[::-1] for role in PLACES}
    probed = {role: names[:: -(-len(names) // 8)] for role, names in blocks.items()}
    return {
        "CKA of all layers": MinibatchCKA(),
        "attention distance": AttentionDistance(dict.fromkeys(("vit", "vit_gap"), attention_taps)),
        "CKA of heads": HeadCKA(dict.fromkeys(("vit", "resnet"), head_taps)),
        "norm ratio": NormRatio(dict.fromkeys(("vit", "resnet"), branch_taps)),
        "localisation": Localisation(dict.fromkeys(PLACES, "blocks"), grid=study.grid),
        PROBES: Probes(probed, grid=study.grid, shots=10),
    }


# What is timed


def plain(study, n, batch):
    with torch.no_grad():
        for pixels in study.images(n).batches(batch):
            for role in ROLES:
                study.model(role)(study.to_input(pixels, role))


def measured(study, chosen, n, batch) -> dict[str, float]:
    """CPU seconds by measurement, and of the passes that they share, with taps."""
    clock = dict.fromkeys(chosen, 0.0)
    for name, measurement in chosen.items():
        time_it(clock, name, measurement)
    start = time.process_time()
    with no_cache():
        measure(study, ROLES, list(chosen.values()), n, batch)
    return {"passes with taps": time.process_time() - start - sum(clock.values()), **clock}


def fields(study, images, channels):
    with no_cache():
        measure_receptive_fields(study, FIELDS, images, channels)
    for model in study.networks.values():
        model.float()


def kept_by_probes(study, batch) -> float:
    """Bytes of features for each image."""
    probes = measurements(study)[PROBES]
    with no_cache(), contextlib.suppress(ValueError):  # too few images to fit any
        measure(study, PLACES, [probes], batch, batch)
    return probes.kept / batch


def time_it(clock, name, measurement) -> None:
    """Let a measurement add the CPU time of what it does to a clock; its result is dropped."""

    def watched(function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                clock[name] += time.process_time() - start

        return timed

    make = watched(measurement.reducer)  # which looks for the places of tokens
    measurement.reducer = lambda *args: watched(make(*args))
    measurement.update = watched(measurement.update)
    compute = watched(measurement.compute)
    measurement.compute = lambda: (compute(), xr.Dataset())[1]


@contextlib.contextmanager
def no_cache():
    before = os.environ.get("VIT_SEE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VIT_SEE_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["VIT_SEE_CACHE"]
            if before is not None:
                os.environ["VIT_SEE_CACHE"] = before


if __name__ == "__main__":
    main()
