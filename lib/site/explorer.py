"""The explorer's data: CKA maps between all taps of all networks, for a page that shows any cell.

A study's maps are kept as two arrays of signed bytes, the estimate and half of its interval, in
hundredths, for every tap with those up to itself, row by row.
"""

import base64
import json
import re
from pathlib import Path

import numpy as np

CHAPTER = "02-representation-structure"
ARMS = ("vit", "vit_gap", "resnet", "mixer")  # the chapter's: its measurement is in the cache
UNDEFINED = -128  # hundredths are kept within -127 and 127

# What the parts of a tap's name are called; for others their own name has to do.
WORDS = {
    "": "output", ":input": "input", "downsample": "projection",
    "attn": "attention", "ls1": "attention, scaled", "mlp": "MLP", "ls2": "MLP, scaled",
    "norm": "last norm", "norm1": "first norm", "norm2": "second norm", "norm3": "third norm",
    "norm2:input": "stream between its branches", "mlp.fc2:input": "hidden layer of the MLP",
    "mlp_tokens": "token mixing", "mlp_channels": "channel mixing",
    "mlp_channels.fc2:input": "hidden layer of the channel mixing",
    "stem.conv": "stem, convolution", "stem.pool": "stem, pooling",
} | {
    f"{kind}{n}": f"{word} {n}"
    for kind, word in (("conv", "convolution"), ("bn", "norm"), ("act", "activation"))
    for n in range(10)
}  # fmt: skip


def layer_name(layer: str) -> str:
    """A tap in words, blocks counted as the modules are: ``"block 3, attention"``."""
    place = re.match(r"(?:stages\.(\d+)\.blocks|layer(\d+)|blocks)\.(\d+)(?:\.|(?=:)|$)", layer)
    if not place:
        return WORDS.get(layer, layer)
    stage, rest = place[1] or place[2], layer[place.end() :]
    where = f"block {place[3]}" if stage is None else f"stage {stage} unit {place[3]}"
    return f"{where}, {WORDS.get(rest, rest)}"


def save(record, path: Path) -> None:
    """Write what the explorer shows of a record of :class:`lib.cka.MinibatchCKA`."""
    import seaborn as sns

    from lib import plots

    roles, layers = record["role"].values, record["layer"].values
    about = {
        "study": record.attrs["study"],
        "images": int(record.attrs["n_images"]),
        "colours": sns.color_palette(plots.CKA_COLOURS, 101).as_hex(),
        "undefined": UNDEFINED,
        "roles": [
            {
                "name": plots.name(role),
                "first": int(np.flatnonzero(roles == role)[0]),
                "layers": [layer_name(name) for name in layers[roles == role]],
                "blocks": np.flatnonzero(record["block"].values[roles == role]).tolist(),
            }
            for role in dict.fromkeys(roles.tolist())
        ],
    }
    pairs = np.tril_indices(len(roles))
    low, estimate, high = (record[name].values[pairs] for name in ("low", "cka", "high"))
    kept = {"estimate": _hundredths(estimate), "margin": _hundredths((high - low) / 2)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=json.dumps(about, ensure_ascii=False), **kept)


def _hundredths(values: np.ndarray) -> np.ndarray:
    rounded = np.clip(np.round(100 * values.astype(np.float64)), -127, 127)
    return np.where(np.isnan(rounded), UNDEFINED, rounded).astype(np.int8)


def script(path: Path) -> str:
    """A study's maps as a script: a page that is opened from a folder can load no other data."""
    with np.load(path) as kept:
        data = json.loads(str(kept["about"]))
        values = kept["estimate"].tobytes() + kept["margin"].tobytes()
    data["values"] = base64.b64encode(values).decode()
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"globalThis.explorerStudy({text});\n"


def measured(**changes):
    """The measurement of the chapter on representation structure, from the cache if it has run."""
    from lib.cka import MinibatchCKA
    from lib.findings import claims
    from lib.measure import measure
    from lib.site import CHAPTERS, run
    from lib.studies import load_study

    values = run.parameters_of(CHAPTERS / f"{CHAPTER}.ipynb") | changes
    study = load_study(values.pop("study"))
    return measure(study, claims.networks(study, *ARMS), [MinibatchCKA()], **values)
