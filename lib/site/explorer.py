"""The explorer's data: CKA maps between all taps of all networks, for a page that shows any cell.

A script file and not JSON, because a page that is opened from a folder may load scripts but fetch
nothing. Per pair of taps it holds the estimate and its interval in hundredths, one byte each.
"""

import ast
import base64
import json
import re

import numpy as np
import seaborn as sns
import xarray as xr

from lib import plots
from lib.site import run

SCRIPTS = run.ROOT / "book" / "_scripts"
CHAPTER = "02-representation-structure"
# Those of the chapter, in its order: the cache knows a measurement by them.
ROLES = (
    *("vit", "vit_gap", "resnet", "mixer", "vit_other_seed", "resnet_other_seed"),
    *("vit_untrained", "vit_gap_untrained", "resnet_untrained", "mixer_untrained"),
)
UNDEFINED = -128  # hundredths are kept within -127 and 127

# What the parts of a tap's name are called; for others their own name has to do.
WORDS = {
    "": "output",
    ":input": "input",
    "attn": "attention",
    "ls1": "attention, scaled",
    "ls2": "MLP, scaled",
    "mlp": "MLP",
    "norm": "last norm",
    "norm1": "first norm",
    "norm2": "second norm",
    "norm3": "third norm",
    "norm2:input": "stream between its branches",
    "mlp.fc2:input": "hidden layer of the MLP",
    "mlp_tokens": "token mixing",
    "mlp_channels": "channel mixing",
    "mlp_channels.fc2:input": "hidden layer of the channel mixing",
    "downsample": "projection",
    "stem.conv": "stem, convolution",
    "stem.pool": "stem, pooling",
}


def layer_name(layer: str) -> str:
    """A tap in words, blocks counted as the modules are: ``"block 3, attention"``."""
    place = re.match(r"(?:stages\.(\d+)\.blocks|layer(\d+)|blocks)\.(\d+)(?:\.|(?=:)|$)", layer)
    rest = layer[place.end() :] if place else layer
    numbered = re.fullmatch(r"(conv|bn|act)(\d)", rest)
    kinds = {"conv": "convolution", "bn": "norm", "act": "activation"}
    words = f"{kinds[numbered[1]]} {numbered[2]}" if numbered else WORDS.get(rest, rest)
    if not place:
        return words
    stage = place[1] or place[2]
    where = f"block {place[3]}" if stage is None else f"stage {stage} unit {place[3]}"
    return f"{where}, {words}"


def script(record: xr.Dataset) -> str:
    """A record of :class:`lib.cka.MinibatchCKA` as a script that hands it to the explorer.

    ``values`` holds ``cka``, ``low`` and ``high`` of every tap with those up to itself, row by
    row, in hundredths as signed bytes.
    """
    roles = list(dict.fromkeys(record["role"].values.tolist()))
    data = {
        "study": record.attrs["study"],
        "images": int(record.attrs["n_images"]),
        "colours": sns.color_palette(plots.CKA_COLOURS, 101).as_hex(),
        "roles": [
            {
                "name": plots.name(role),
                "first": int(np.flatnonzero(record["role"].values == role)[0]),
                "layers": [layer_name(name) for name in _of(record, role, "layer")],
                "blocks": np.flatnonzero(_of(record, role, "block")).tolist(),
            }
            for role in roles
        ],
        "undefined": UNDEFINED,
    }
    pairs = np.tril_indices(record.sizes["tap"])
    values = np.stack([_hundredths(record[name].values[pairs]) for name in ("cka", "low", "high")])
    data["values"] = base64.b64encode(values.tobytes()).decode()
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"(globalThis.explorerStudies ??= []).push({text});\n"


def _of(record, role, coordinate):
    return record[coordinate].values[record["role"].values == role]


def _hundredths(values: np.ndarray) -> np.ndarray:
    rounded = np.clip(np.round(100 * values.astype(np.float64)), -127, 127)
    return np.where(np.isnan(rounded), UNDEFINED, rounded).astype(np.int8)


def parameters() -> dict:
    """What the chapter's parameters cell sets."""
    chapter = run.CHAPTERS / f"{CHAPTER}.ipynb"
    values = run.parameters_of(chapter)
    return {name: ast.literal_eval(value) for name, value in values.items()}


def measured(**changes) -> xr.Dataset:
    """What the chapter on representation structure measures; from the cache once it has run so."""
    from lib.cka import MinibatchCKA
    from lib.measure import measure
    from lib.studies import load_study

    values = parameters() | changes
    study = load_study(values.pop("study"))
    return measure(study, study.those(*ROLES), [MinibatchCKA()], **values)


def write(record: xr.Dataset) -> None:
    """Write the explorer's data of a record."""
    target = SCRIPTS / f"explorer-{record.attrs['study']}.js"
    text = script(record)
    target.write_text(text, encoding="utf-8")
    print(f"{target.name}: {record.sizes['tap']} taps, {len(text) / 1e6:.1f} MB")
