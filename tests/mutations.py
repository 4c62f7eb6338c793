"""Small faults, put into the library one at a time: does a test notice?

    python tests/mutations.py              all of them
    python tests/mutations.py cka taps     those of some modules
    python tests/mutations.py --list       what there is

Every fault is a line that somebody could have written. It is put into a copy of the repository, in
which the tests of its module run, and, if they are silent, all tests of the library. A fault that
survives is a missing test.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lib", "tests", "benchmarks", "chapters", "book")
SLOW = ("test_site.py", "test_execute.py", "test_environment.py", "test_processes.py")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One piece of a module, which occurs there once, and what takes its place."""

    module: str
    what: str
    right: str
    wrong: str


FAULTS = [
    # CKA
    Fault("cka", "biased where unbiased", 'estimator == "biased":\n        return gram', 'estimator:\n        return gram'),
    Fault("cka", "U-centring divides by n - 1", "/ (n - 2) - rows", "/ (n - 1) - rows"),
    Fault("cka", "the diagonal is kept", "    gram.fill_diagonal_(0)\n    rows", "    rows"),
    Fault("cka", "minibatches weigh alike", "self.hsic[group] += n * hsic", "self.hsic[group] += hsic"),
    Fault("cka", "HSIC without its factor", "(n * (n - 3) if", "(n * (n - 1) if"),
    Fault("cka", "too small a minibatch", "SMALLEST_BATCH = 4", "SMALLEST_BATCH = 2"),
    Fault("cka", "negative HSIC taken as positive", "np.where(own > 0, own, np.nan)", "np.abs(own)"),
    Fault("intervals", "jackknife without g - 1", "np.var(left_out, axis=0) * (g - 1)", "np.var(left_out, axis=0)"),
    Fault("intervals", "jackknife keeps the group", "statistic(*(total - part[k] for", "statistic(*(part[k] for"),
    Fault("intervals", "not a number is an empty group", "(part != 0)", "np.nan_to_num(part)"),
    Fault("intervals", "draws have no variance", "/ draws if draws > 1 else 0.0", "* 0.0"),
    Fault("cka", "constant layers are not noticed", "        gram.zero_()\n", "        pass\n"),
    # Taps
    Fault("taps", "values keep their graph", "value if graph else value.detach()", "value"),
    Fault("taps", "silence is no error", "raise TapError(f\"tap {missing[0]!r} did", "print(f\"tap {missing[0]!r} did"),
    Fault("taps", "firing twice is no error", "if name in fired:", "if False:"),
    Fault("taps", "hooks stay", "                handle.remove()\n", "                pass\n"),
    Fault("taps", "the LayerScale is left out", "part = scale if scale and", "part = branch if scale and"),
    Fault("taps", "the model stays in evaluation mode", "module.training = training", "module.training = False"),
    Fault("taps", "attention stays unfused", "module.fused_attn = fused\n", "pass\n"),
    Fault("taps", "a glob reaches deeper", 'r"[^.]+")', 'r".+")'),
    # Measuring
    Fault("measure", "one image too few", "images[batch * batch_size : (batch", "images[batch * batch_size + 1 : (batch"),
    Fault("measure", "windows are taken for images", "if len(value) != n:", "if False:"),
    Fault("measure", "labels are no part of the key", "data = facts[\"images\"], needs,", "data = facts[\"images\"],"),
    Fault("measure", "all minibatches in one group", "batch) % self.groups", "batch) * 0"),
    Fault("measure", "the seed is no part of the key", "images = study.images(n_images, seed)", "images = study.images(n_images, 0)"),
    Fault("measure", "measurements are not reset", "        measurement.reset()\n", ""),
    Fault("records", "taps without likeness are compared", "return np.isin(record[\"tap\"].values, record[\"other\"].values)", "return np.full(record.sizes[\"tap\"], True)"),
    Fault("records", "a reader's code is no part of the key", "            yield from _written(_source(value), seen)\n", "            pass\n"),
    Fault("records", "closures are no part of the key", "thing.__kwdefaults__, free, used", "thing.__kwdefaults__, used"),
    Fault("records", "settings of networks are no part of the key", "(name, type(one), _settings(one))", "(name, type(one))"),
    Fault("records", "what cannot be hashed is hashed by its kind", "        raise Unknown(f\"what a {type(value)", "        return\n        raise Unknown(f\"what a {type(value)"),
    Fault("records", "every study is in the key of a measurement", "if name in found | INERT:", "todo |= {\"lib.studies\"} - found\n        if name in found | INERT:"),
    Fault("records", "half a record is kept", "temporary.unlink(missing_ok=True)", "pass"),
    Fault("records", "weights are hashed by name", 'f"{key}{tensor_hash(state[key])}"', 'f"{key}"'),
    # Attention
    Fault("measurements/attention", "rows and columns of cells swapped", "torch.hypot(row[:, None] - row, column[:, None] - column)", "torch.hypot(row[:, None] - column, column[:, None] - row)"),
    Fault("measurements/attention", "distance from key to query", '"nhij,ij->nhi"', '"nhji,ij->nhi"'),
    Fault("measurements/attention", "class token not dropped", "maps = value[:, :, prefix:, prefix:]", "maps = value[:, :, :-prefix or None, :-prefix or None]"),
    Fault("measurements/attention", "not renormalised", "(moment * scale).mean(-1)", "moment.mean(-1)"),
    Fault("measurements/attention", "in patches, not pixels", "distance = patch_size * total", "distance = total"),
    Fault("measurements/heads", "heads unsorted", "order = np.argsort(distance)", "order = np.arange(len(distance))"),
    Fault("measurements/attention", "rows need not sum to 1", "if not off < 1e-2:", "if False:"),
    Fault("measurements/heads", "heads interleaved", "unflatten(-1, (heads, -1)).permute(2, 0, 1, 3)", "unflatten(-1, (-1, heads)).permute(3, 0, 1, 2)"),
    # Receptive fields
    Fault("measurements/receptive_field", "signed gradients", "gradient.abs().mean(1)", "gradient.mean(1)"),
    Fault("measurements/receptive_field", "one location off", "middle = (side // 2 - 1, side // 2)", "middle = (side // 2, side // 2 + 1)"),
    Fault("measurements/receptive_field", "centre half a pixel off", "(self.cell - 1) / 2", "self.cell / 2"),
    Fault("measurements/receptive_field", "one channel for all images", "number = (first + image) * channels + draw", "number = 0 * image + draw"),
    Fault("measurements/receptive_field", "half a patch off", "(np.arange(-reach, reach + 1) - 0.5)", "np.arange(-reach, reach + 1)"),
    # Skip and branch
    Fault("measurements/sublayers", "missing LayerScale", "scale if not isinstance(getattr(block, scale), nn.Identity) else branch", "branch"),
    Fault("measurements/norm_ratio", "ratio upside down", "[z_norm / f_norm,", "[f_norm / z_norm,"),
    Fault("measurements/norm_ratio", "registers are patches", "values[..., prefix:]", "values[..., int(class_token):]"),
    Fault("measurements/norm_ratio", "wrong axis of a feature map", "axis = 1 if skip.dim() == 4 else -1", "axis = -1"),
    Fault("measurements/norm_ratio", "cosine with the branch", "(zz + zf) / (z_norm * out_norm)", "zf / (z_norm * f_norm)"),
    # Tokens and places
    Fault("measurements/places", "columns before rows", "value.flatten(2).mT", "value.mT.flatten(2).mT"),
    Fault("measurements/places", "a register is a class token", "bool(prefix and has)", "bool(prefix)"),
    Fault("measurements/places", "any order of tokens will do", "if hits and hits[best] >= 3:", "if hits:"),
    Fault("measurements/places", "any order after any tap", "known = best if name == first else known", "known = best"),
    Fault("measurements/places", "a class token is a grid", "in range(2, math", "in range(1, math"),
    Fault("measurements/places", "class token not dropped", "value[:, self.prefix :], value", "value[:, : -self.prefix or None], value"),
    Fault("measurements/localisation", "biased own HSIC", "+ every - 2 / (n - 2)", "+ every - 2 / n"),
    Fault("measurements/localisation", "the control is no control", "grams.roll((1, 1), (1, 2))", "grams.roll((0, 0), (1, 2))"),
    Fault("measurements/localisation", "minibatches weigh alike there", "weight = 1 / (n - 3)", "weight = 1 / (n * (n - 3))"),
    Fault("measurements/localisation", "border is interior", "inside[1:-1, 1:-1] = True", "inside[:] = True"),
    Fault("measurements/localisation", "hits count the worst", "-np.inf, maps).argmax(-1)", "np.inf, maps).argmin(-1)"),
    # Probes
    Fault("measurements/probes", "penalty picked on the fitted images", "merit(read(held_out.features, *maps).movedim(-2, 0), held_out.targets)", "merit(read(fit.features, *maps).movedim(-2, 0), fit.targets)"),
    Fault("measurements/probes", "one NaN is not noticed", "if not x.isfinite().all():", "if x[..., 0, :].isnan().any():"),
    Fault("measurements/probes", "test images among the fitted", "test[torch.cat(draws)] = False", "test[draws[0]] = False"),
    Fault("measurements/probes", "draws share images", "members[draw * shots : (draw + 1) * shots]", "members[:shots]"),
    Fault("measurements/probes", "the bias is forgotten", "+ bias.unsqueeze(-3)", "+ 0 * bias.unsqueeze(-3)"),
    Fault("measurements/probes", "weakest penalty of equals", "len(penalties) - 1 - int(merits.flip(0).argmax())", "int(merits.argmax())"),
    Fault("measurements/probes", "weights of standardised features", ") / deviation.mT", ")"),
    # Claims
    Fault("findings/claims", "sides swapped", "return CONTRADICTED if self.below else SUPPORTED", "return SUPPORTED if self.below else CONTRADICTED"),
    Fault("findings/claims", "replicates have no say", "if len(set(verdicts)) > 1:", "if False:"),
    Fault("findings/claims", "baselines have no say", "if before == [SUPPORTED] == verdicts[:1]", "if False"),
    # Data and training
    Fault("studies/scenes", "splits share scenes", "seed * len(SPLITS) + SPLITS.index(split)", "seed * len(SPLITS)"),
    Fault("studies/scenes", "boxes without their last pixel", "SIZE - hit.flip(1)", "SIZE - 1 - hit.flip(1)"),
    Fault("studies/scenes", "faint textures are not faint", "low=faintest", "low=0.4"),
    Fault("studies/masked", "the network is shown all patches", "torch.take_along_dim(tokens[:, prefix:], which[..., None], 1)", "tokens[:, prefix:]"),
    Fault("studies/masked", "what is shown is painted too", "hidden = order[:, shown:, None]", "hidden = order[..., None]"),
    Fault("studies/masked", "painted at other places", "places = order[:, :shown, None]", "places = order[:, -shown:, None]"),
    Fault("studies/masked", "the same patches at every step", "self.stream(step)", "self.stream(0)"),
    Fault("studies/masked", "the classifier is not fitted", "model.head.weight.copy_(weights.mT)", "pass"),
    Fault("studies/training", "the learner is not prepared", "recipe.prepare(model, data, to_input)", "pass"),
    Fault("studies/recipes", "no warm-up", "warm = min(1.0, (step + 1) / self.warmup_steps)", "warm = 1.0"),
    Fault("studies/training", "resumed from the start", 'KEPT = ("step", "curve"', 'KEPT = ("curve"'),
    Fault("studies/recipes", "a part of a training is the whole", "return round(self.until * self.steps)", "return self.steps"),
    Fault("studies/recipes", "skips never fade", "return max(0.0, 1 - step / (self.fade * self.steps)) if self.fade else 0.0", "return 1.0 if self.fade else 0.0"),
    Fault("studies/study", "baselines of one seed", "replace(role.later(k), replicate=k)\n            for", "replace(role, replicate=k)\n            for"),
    Fault("studies/recipes", "labels of one image only", "images, labels = v2.CutMix(num_classes=model.num_classes)(images, labels)", "images, _ = v2.CutMix(num_classes=model.num_classes)(images, labels)"),
    Fault("studies/checkpoints", "one scale for all channels", "value.flatten(1).abs().amax(1).clamp(", "value.abs().amax().expand(len(value)).clamp("),
    Fault("studies/public", "old pictures in a new folder", 'vars(self).pop("pictures", None)', "pass"),
    Fault("studies/pictures", "hidden folders are classes", 'part.startswith(".") or part in LEFT_BEHIND', "part in LEFT_BEHIND"),
    Fault("studies/networks", "one skip stays", "return self.skip * x + self.drop_path2", "return x + self.drop_path2"),
    Fault("studies/images", "boxes do not follow the images", "self.boxes[which])", "self.boxes)"),
    Fault("processes", "every process does everything", "return batch % self.of == self.place", "return True"),
    Fault("studies/pictures", "pictures lie on their side", "ImageOps.exif_transpose(image)", "image"),
    Fault("studies/pictures", "grey of 16 bits stays grey", '.astype(np.uint8)).convert("RGB")', ".astype(np.uint8))"),
]  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="only the faults of these modules")
    parser.add_argument(
        "--own", action="store_true", help="run each module's own tests only, not all in the end"
    )
    parser.add_argument("--list", action="store_true", help="list the faults, run nothing")
    args = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if not args.modules or fault.module in args.modules]
    if args.list:
        print("\n".join(f"{fault.module:16} {fault.what}" for fault in chosen))
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = copy_to(Path(folder))
        for fault in chosen:
            began = time.monotonic()
            caught = by_whom(fault, copy, args.own)
            survivors += [] if caught else [fault]
            verdict = f"caught by {caught}" if caught else "SURVIVES"
            seconds = time.monotonic() - began
            print(f"{fault.module:16} {fault.what:40} {verdict} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are caught")
    return int(bool(survivors))


def copy_to(folder: Path) -> Path:
    """A copy of the repository, as far as its tests need it."""
    for part in FOLDERS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return folder


def by_whom(fault: Fault, copy: Path, own_only: bool) -> str:
    """The first test that fails with a fault in the copy, or nothing."""
    path = copy / "lib" / f"{fault.module}.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(put(fault, text), encoding="utf-8")
    try:
        own = copy / "tests" / f"test_{fault.module.rpartition('/')[2]}.py"
        if own.exists() and (failed := first_failure(copy, [own])):
            return failed
        failed = "" if own_only and own.exists() else first_failure(copy, all_but(own))
    finally:
        path.write_text(text, encoding="utf-8")
    if failed and first_failure(copy, [copy / "tests" / failed]):
        raise SystemExit(f"{failed} fails in the copy without any fault")
    return failed


def all_but(own: Path) -> list[Path]:
    """The tests of the library beside those of one module."""
    tests = sorted(own.parent.glob("test_*.py"))
    return [test for test in tests if test != own and test.name not in SLOW]


def put(fault: Fault, text: str) -> str:
    """A module's text with a fault in it."""
    if text.count(fault.right) != 1:
        raise SystemExit(
            f"the fault {fault.what!r} is out of date: lib/{fault.module}.py holds "
            f"{fault.right!r} {text.count(fault.right)} times; mend it in {Path(__file__).name}"
        )
    return text.replace(fault.right, fault.wrong)


def first_failure(copy: Path, tests: list) -> str:
    """The first of some tests, or of what else pytest is given, that fails in a copy, or nothing."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VIT_SEE_CACHE": str(copy / "cache"),
    }
    done = subprocess.run(
        [*command, *map(str, tests)], cwd=copy, env=environment, capture_output=True, text=True
    )
    if done.returncode in (0, 5):
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not lines:
        raise SystemExit(f"pytest did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return lines[0].split(maxsplit=1)[1].partition(" - ")[0].rpartition("/")[2]


if __name__ == "__main__":
    sys.exit(main())
