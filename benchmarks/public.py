"""What measuring the public checkpoints costs, derived from counts: nothing of it is measured.

Multiply-adds of a forward pass and of the Gram matrices of its taps, and the memory of weights,
Gram matrices and two of the largest activation, counted on networks without numbers in them
(PyTorch's meta device), for one picture of 224 pixels in minibatches of 256. Images per second are
what they allow at a given throughput: 10 TFLOP/s for a GPU, and for a CPU core what one core
of this machine reaches in a plain forward pass of a ViT-S/16, which alone is timed::

    python -m benchmarks.public --out book/results/cost-public.json
"""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import shared
from lib.studies import STUDIES, hub, load_study
from lib.studies.public import Public
from lib.taps import tapping

TAPS = ("blocks", "all")


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    core = core_rate() / 1e9
    rows = [cost(name, taps, options.batch) for name in models() for taps in TAPS]
    for row in rows:
        work = row["forward"] + row["gram"]
        row["images_per_s_gpu"] = float(f"{options.tflops * 1e3 / work:.3g}")
        row["images_per_s_core"] = float(f"{core / work:.3g}")
        print(row, flush=True)
    what = (
        "derived from counts, not measured: GFLOP per picture of 224 px, GiB, pictures per second"
    )
    shared.result(what, options, rows, gpu_tflops=options.tflops, core_gflops=round(core, 1))


def parse():
    parser = shared.options(__doc__, batch=256, repeats=1)
    parser.add_argument(
        "--tflops", type=float, default=10, help="that a GPU achieves in float32 (default: 10)"
    )
    return parser.parse_args()


def models() -> list[str]:
    """The checkpoints of the public studies, as timm names them: one of each architecture."""
    names = [name for name, entry in STUDIES.items() if entry.load]
    studies = [study for study in map(load_study, names) if isinstance(study, Public)]
    known = sorted((role.model for study in studies for role in study.roles.values()), reverse=True)
    return sorted({model.partition(".")[0]: model for model in known}.values())


def cost(name: str, taps: str = "all", batch: int = 256) -> dict:
    """GFLOP per picture of a network and of its taps' Gram matrices, and GiB; none is computed."""
    with torch.device("meta"):
        model, image = hub.build(name), torch.zeros(1, 3, 224, 224)
    widths = []
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        tapping(model, taps, lambda _, value: widths.append(value.numel())),
    ):
        model(image)
    weights = sum(p.numel() for p in model.parameters())
    numbers = 4 * weights + 8 * len(widths) * batch**2 + 2 * 4 * max(widths) * batch
    return {
        "model": name,
        "taps": taps,
        "count": len(widths),
        "forward": round(counter.get_total_flops() / 1e9, 2),
        "gram": round(2 * batch * sum(widths) / 1e9, 2),
        "memory_gib": round(numbers / 2**30, 2),
    }


def core_rate(name="vit_small_patch16_224", batch=8, repeats=3) -> float:
    """FLOP per second of CPU time that a plain forward pass reaches here."""
    model, x = hub.build(name), torch.randn(batch, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        with torch.no_grad():
            model(x)
        best = min(best, time.process_time() - start)
    return counter.get_total_flops() / best


if __name__ == "__main__":
    main()
