"""What measuring attention distance costs over the plain forward pass, in time and memory.

ViT-S/16 at 224 px, random weights, minibatches of 32 images, float32 on the CPU. The plain pass
computes attention in one fused kernel and makes no maps; the measured one makes them and contracts
them block by block. Both run in this process in turn; CPU time, so that other work on the machine
hardly matters. Memory is the peak over that at the start, for more and more images::

    python -m benchmarks.attention --out book/results/cost-attention.json
"""

import statistics

import timm
import torch

from benchmarks import shared
from benchmarks.shared import cost
from lib.measurements.attention import AttentionDistance, attention_taps, heads_of
from lib.studies.images import Images
from lib.taps import tapping, unfused_attention


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", pretrained=False).eval()
    x = torch.randn(options.batch, 3, 224, 224)
    forward(model, x, 1)  # warm-up

    rows = []
    for batches in options.batches:
        ratios, extras = {"fused": [], "unfused": []}, []
        for _ in range(options.repeats):
            plain, plain_peak, _ = cost(forward, model, x, batches)
            with unfused_attention(model):
                unfused, _, _ = cost(forward, model, x, batches)
            ours, peak, record = cost(measured, model, x, batches)
            ratios["fused"].append(ours / plain)
            ratios["unfused"].append(ours / unfused)
            extras.append((peak - plain_peak) / 2**20)
        rows.append(
            {
                "images": batches * options.batch,
                "ratio": round(statistics.median(ratios["fused"]), 3),
                "ratio_to_unfused": round(statistics.median(ratios["unfused"]), 3),
                "extra_mib": round(statistics.median(extras)),
                "mean_relative_distance": round(float(heads_of(record)["relative"].mean()), 4),
            }
        )
        print(rows[-1], flush=True)
    what = "attention distance of ViT-S/16 (12 blocks), 224 px, random weights, float32"
    shared.result(what, options, rows)


def parse():
    parser = shared.options(__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4], help="how many of these")
    return parser.parse_args()


def forward(model, x, batches):
    with torch.no_grad():
        for _ in range(batches):
            model(x)


def measured(model, x, batches):
    metric = AttentionDistance()
    n = len(x)
    pixels = torch.zeros(1, 3, *x.shape[2:], dtype=torch.uint8).expand(n, -1, -1, -1)
    images = Images(pixels, torch.zeros(n, dtype=torch.long), torch.zeros(n, 4))
    for _ in range(batches):
        reduced = {}

        def receive(name, value, reduced=reduced):
            reduced[name] = metric.reduce(value, prefix=1)

        with torch.no_grad(), tapping(model, attention_taps, receive):
            model(x)
        metric.update(reduced, images)
    return metric.compute()


if __name__ == "__main__":
    main()
