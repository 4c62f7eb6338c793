"""Records: measured results with labelled axes and their provenance, kept in small files.

A record is an ``xarray.Dataset`` whose attributes say where its numbers come from. Measurements
are cached by what they depend on, so a chapter that is run again takes seconds, and one whose
weights, images or code have changed is measured anew.
"""

import functools
import hashlib
import inspect
import json
import linecache
import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

ROOT = Path(__file__).resolve().parent.parent

# Whoever changes these modules changes no measured number.
_INERT = {
    "__main__",
    "run",
    "claims",
    "results",
    "explorer",
    "masked",
    "plots",
    "board",
    "training",
}
_PACKAGES = ("torch", "timm", "numpy", "torchmetrics")


def cache_folder() -> Path:
    """Where measurements are cached: ``.cache`` at the repository's root, or ``$VIT_SEE_CACHE``."""
    return Path(os.environ.get("VIT_SEE_CACHE", ROOT / ".cache"))


def cached(depends_on: dict, compute) -> xr.Dataset:
    """The record of ``compute()``, from the cache if everything it depends on is unchanged.

    Parameters
    ----------
    depends_on : dict
        JSON-able description of the inputs: hashes of weights and images, settings. The library's
        code and the versions of the numerical packages are added to it, and the cell that defines
        ``compute`` in a notebook.
    compute : callable
        Returns the xarray.Dataset when it has to be measured.
    """
    depends_on = depends_on | {"code": code_hash(), "versions": versions()}
    if compute.__module__ == "__main__":
        depends_on |= {
            "cell": "".join(linecache.getlines(inspect.unwrap(compute).__code__.co_filename))
        }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / f"{key}.nc"
    if path.exists():
        try:
            return load(path)
        except (OSError, ValueError):
            path.unlink()  # half a file, from a full disk or another version: measure again
    save(compute(), path)
    return load(path)  # what was written, so that the first run prints what every later one does


def inputs(study, networks: dict[str, torch.nn.Module], images) -> dict:
    """What all depends on that some networks of a study, by role, make of some images."""
    return {
        "study": study.name,
        "images": tensor_hash(images.pixels),
        "weights": {role: weights_hash(model) for role, model in networks.items()},
        # Equal weights do not make equal networks, nor equal pixels equal inputs.
        "structure": {role: str(model) for role, model in networks.items()},
        "inputs": {role: tensor_hash(study.to_input(images.pixels[:1], role)) for role in networks},
    }


def save(record: xr.Dataset, path) -> None:
    """Write a record as compressed netCDF; the file is complete or absent, never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Seven digits are more than any measurement has.
    encoding = {
        name: {"zlib": True, "complevel": 1, "shuffle": True, "dtype": "float32"}
        for name, values in record.data_vars.items()
        if values.dtype.kind == "f"
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        record.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path) -> xr.Dataset:
    """Read a record into memory."""
    with xr.open_dataset(path, engine="h5netcdf") as record:
        return record.load()


def between(record: xr.Dataset, rows: str, columns: str, *, blocks=False, variable="cka"):
    """The part of a square record that compares two roles, labelled with their layers.

    Parameters
    ----------
    rows, columns : str
        Roles, for instance ``"vit"`` and ``"resnet"``.
    blocks : bool
        Keep the outputs of blocks and residual units only.

    Returns
    -------
    xarray.DataArray (..., tap, other)
    """
    known = list(dict.fromkeys(record["role"].values.tolist()))
    for role in (rows, columns):
        if role not in known:
            raise ValueError(f"this record has no role {role!r}; it has {', '.join(known)}")

    def taps(role):
        keep = compared(record) & (record["role"].values == role)
        return record["tap"][keep & record["block"].values if blocks else keep]

    tap, other = taps(rows), taps(columns)
    part = record[variable].sel(tap=tap.values, other=other.values)
    part = part.drop_vars([name for name in part.coords if name not in ("tap", "other")])
    return part.assign_coords(tap=tap["layer"].values, other=other["layer"].values)


def compared(record: xr.Dataset) -> np.ndarray:
    """Which taps (tap,) of a square record have a likeness to others: not those that rode along."""
    return np.isin(record["tap"].values, record["other"].values)


def provenance(**facts) -> dict[str, str]:
    """Attributes of a record: the given facts, the versions, the machine's kind and the date."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **versions(),
        "code": code_hash(),
        **{name: str(value) for name, value in facts.items()},
    }


def as_table(facts: dict):
    """Provenance as a table (HTML), for the end of a chapter."""
    from IPython.display import HTML

    rows = {
        name.replace("_", " "): re.sub("['\"]", "", str(value).strip("{}[]"))
        for name, value in facts.items()
    }
    with pd.option_context("display.max_colwidth", None):
        return HTML(pd.Series(rows).to_frame().to_html(header=False, border=0))


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {package: metadata.version(package).split("+")[0] for package in _PACKAGES}


def device_name(device="cpu") -> str:
    """What a device is called: ``"NVIDIA H100 80GB HBM3"``, ``"CPU, 2 threads"``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"{torch.device(device).type.upper()}, {n} thread{'s' * (n > 1)}"


@functools.cache
def code_hash() -> str:
    """Hash of the library's source that measurements run through."""
    sources = sorted(p for p in Path(__file__).parent.rglob("*.py") if p.stem not in _INERT)
    return _sha256(b"".join(source.read_bytes() for source in sources))


def tensor_hash(*tensors: torch.Tensor) -> str:
    """Hash of the values and shapes of tensors, the same on every device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(array.shape)}{array.dtype}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of everything a model's state dict holds."""
    state = model.state_dict()
    return _sha256("".join(f"{key}{tensor_hash(state[key])}" for key in sorted(state)).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
