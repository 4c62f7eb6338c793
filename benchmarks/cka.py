"""What measuring CKA costs: CPU time and memory over the plain forward pass, next to peers.

ViT-S/16 (63 taps) against ResNet-50 (172 taps) at 224 px, one minibatch of 32 images, random
weights, float32 on the CPU. Everything runs in this one process, and the plain forward passes of
the same two networks are timed in turn with each candidate: CPU time, so that other work on the
machine hardly matters. Peers that are not installed are left out::

    pip install --no-deps torch-cka pytorch-cka ckatorch
    python -m benchmarks.cka --out book/results/cost-cka.json
"""

import copy
import importlib
import importlib.metadata
import statistics

import numpy as np
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import shared
from benchmarks.shared import cost
from lib.cka import MinibatchCKA
from lib.taps import tap_names, tapping

# Modules only, no inputs: peers know no others.
VIT = ["norm1", "attn", "norm2", "mlp.act"]
TAPS = {
    "vit": ["patch_embed", "pos_drop", "norm", "blocks.*", *(f"blocks.*.{part}" for part in VIT)],
    "resnet": [
        *("conv1", "bn1", "act1", "maxpool", "layer*.*", "layer*.*.downsample.*"),
        *(f"layer*.*.{part}{i}" for part in ("conv", "bn", "act") for i in (1, 2, 3)),
    ],
}


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models = {
        "vit": timm.create_model("vit_small_patch16_224", pretrained=False).eval(),
        # Residual branches that start at zero would be constant, and CKA with them undefined.
        "resnet": timm.create_model("resnet50", pretrained=False, zero_init_last=False).eval(),
    }
    names = {role: tap_names(model, TAPS[role]) for role, model in models.items()}
    images = smooth_images(options.batch)
    truth = reference(models, names, images)

    candidates = {"this book": (this_book, None), **peers(models, names, images, options)}
    forward(models, names, images)  # warm-up
    rows = []
    for name, (run, reason) in candidates.items():
        if run is None:
            rows.append({"name": name, "skipped": reason})
            continue
        print(f"{name} …", flush=True)
        rows.append({"name": name, **measure(run, models, names, images, truth, options.repeats)})
        print(rows[-1], flush=True)
    print(table(rows))
    what = "ViT-S/16 (63 taps) x ResNet-50 (172 taps), 224 px, random weights, float32"
    shared.result(what, options, rows)


def parse():
    parser = shared.options(__doc__)
    parser.add_argument("--only", nargs="*", help="candidates besides this book")
    return parser.parse_args()


def smooth_images(n):
    """Noise without fine detail, and with a mean colour: images differ about as photographs do."""
    coarse = torch.randn(n, 3, 7, 7) + torch.randn(n, 3, 1, 1) / 2
    return torch.nn.functional.interpolate(coarse, 224, mode="bicubic")


def reference(models, names, images):
    """CKA of the formula of Song et al. on activations in float64, centred beforehand."""
    grams = {role: {} for role in models}
    for role, model in models.items():

        def receive(name, value, role=role):
            x = value.flatten(1).double()
            x -= x.mean(0)
            grams[role][name] = (x @ x.T).fill_diagonal_(0)

        with torch.no_grad(), tapping(model, names[role], receive):
            model(images)
    every = torch.stack([grams[role][name] for role in models for name in names[role]])
    n, sums = len(images), every.sum(2)
    flat, total = every.flatten(1), sums.sum(1)
    hsic = flat @ flat.T + total[:, None] * total / ((n - 1) * (n - 2))
    hsic -= 2 / (n - 2) * sums @ sums.T
    own = hsic.diagonal().sqrt()
    first = len(names["vit"])
    return (hsic / own / own[:, None])[:first, first:].numpy()


# Candidates: each returns CKA (taps of the ViT, taps of the ResNet)


def forward(models, names, images):
    with torch.no_grad():
        for model in models.values():
            model(images)


def this_book(models, names, images):
    metric, kept = MinibatchCKA(), {}
    for role, model in models.items():

        def receive(name, value, role=role):
            kept[f"{role}/{name}"] = metric.reduce(value)

        with torch.no_grad(), tapping(model, names[role], receive):
            model(images)
    metric.update(kept)
    return labelled(
        metric.compute()["cka"].sel(
            tap=[f"vit/{name}" for name in names["vit"]],
            other=[f"resnet/{name}" for name in names["resnet"]],
        )
    )


def torch_cka(package, models, names, images):
    loader = DataLoader(TensorDataset(images), batch_size=len(images))
    comparison = package.CKA(
        models["vit"], models["resnet"], "vit", "resnet", names["vit"], names["resnet"]
    )
    with torch.no_grad():
        comparison.compare(loader, loader)
    result = comparison.export()
    return labelled(result["CKA"], result["model1_layers"], result["model2_layers"], names)


def pytorch_cka(package, models, names, images):
    loader = DataLoader(TensorDataset(images), batch_size=len(images))
    [result] = package.compute_cka(
        models["vit"], models["resnet"], loader, layers=names["vit"],
        model2_layers=names["resnet"], device="cpu", progress=False,
    )  # fmt: skip
    return labelled(result)


def labelled(values, rows=None, columns=None, names=None):
    """The candidate's matrix in the order of our names, by its own labels."""
    values = np.asarray(values, dtype=float)
    if rows is None:
        return values
    return values[
        np.ix_([rows.index(n) for n in names["vit"]], [columns.index(n) for n in names["resnet"]])
    ]


def peers(models, names, images, options):
    """Name: what runs it, or None and why not."""
    known = {
        "torch-cka": ("torch_cka", torch_cka),
        "pytorch-cka": ("cka", pytorch_cka),
        "ckatorch": ("ckatorch", None),
    }
    found = {}
    for name, (module, run) in known.items():
        if options.only is not None and name not in options.only:
            continue
        try:
            version = importlib.metadata.version(name)
            package = importlib.import_module(module)
        except ImportError as error:
            found[name] = None, f"not installed ({error})"
            continue
        label = f"{name} {version}"
        if run is None:
            # Its HSIC compares tokens within each image, so feature maps do not fit.
            found[label] = None, "takes (batch, tokens, width) only, no feature maps"
        else:
            found[label] = (lambda *args, run=run, package=package: run(package, *args)), None
    return found


# Measuring


def measure(run, models, names, images, truth, repeats):
    ratios, extras, seconds = [], [], []
    for repeat in range(repeats):
        plain, plain_peak, _ = cost(forward, models, names, images)
        # Some peers leave their hooks behind.
        ours, peak, values = cost(run, copy.deepcopy(models), names, images)
        ratios.append(ours / plain)
        extras.append((peak - plain_peak) / 2**20)
        seconds.append(ours)
        if repeat == 0 and ratios[0] > 4:
            break
    error = np.abs(values - truth)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_seconds": round(statistics.median(seconds), 2),
        "extra_mib": max(0, round(statistics.median(extras))),
        "max_error": float(np.nanmax(error)),
        "wrong_percent": round(100 * float((~(error < 1e-3)).mean()), 1),
        "undefined": int(np.isnan(values).sum()),
    }


def table(rows):
    lines = [
        "| | CPU time / forward | extra memory (MiB) | largest error | off by > 0.001 |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['name']} | {row['skipped']} | | | |")
        else:
            lines.append(
                f"| {row['name']} | {row['ratio']:.2f} | {row['extra_mib']} | "
                f"{row['max_error']:.1e} | {row['wrong_percent']} % |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
