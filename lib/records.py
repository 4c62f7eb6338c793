"""Records: measured results with labelled axes and their provenance, kept in small files.

A record is an ``xarray.Dataset`` whose attributes say where its numbers come from. Records are
cached by what they depend on, so a chapter that is run again takes seconds, and one whose weights,
images or code have changed is measured anew.
"""

import ast
import functools
import hashlib
import os
import platform
import re
import sys
import types
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "timm", "torchvision", "numpy", "torchmetrics")
# Code that stores and shows numbers, and cannot change one.
INERT = {"lib", "lib.records", "lib.processes", "lib.plots"}
# What changes no more than a value's rounding, or is no setting.
NO_SETTINGS = {"training", "fused_attn", "pretrained_cfg", "default_cfg"}
DESCRIPTIVE = {"__module__", "__doc__", "__dict__", "__weakref__", "__qualname__"}


class Unknown(TypeError):
    """A value that no key can be made of."""


def cache_folder() -> Path:
    """Where records are cached: ``.cache`` at the repository's root, or ``$VIT_SEE_CACHE``."""
    return Path(os.environ.get("VIT_SEE_CACHE", ROOT / ".cache"))


def cached(function, *arguments, **options) -> xr.Dataset:
    """``function(*arguments, **options)``, from the cache if nothing it depends on has changed.

    The key is a hash of the arguments, of the function's source and of everything that it refers
    to: the library's modules by their source, global variables by their values, networks by their
    weights and settings. What cannot be hashed is computed anew every time.
    """
    try:
        key = digest((function, arguments, options, versions()))
    except Unknown:
        return function(*arguments, **options)
    return keep(key, functools.partial(function, *arguments, **options))


def keep(key: str, compute) -> xr.Dataset:
    """The record of ``compute()``, from the cache's file of that key if there is one."""
    path = cache_folder() / f"{key}.nc"
    if path.exists():
        try:
            return load(path)
        except (OSError, ValueError):
            path.unlink()  # half a file, from a full disk or another version: measure again
    record = compute()
    try:
        save(record, path)
    except OSError as error:
        warnings.warn(
            f"the record could not be kept in {path.parent} ({error.strerror}); set VIT_SEE_CACHE "
            "to a folder that can be written",
            stacklevel=2,
        )
        return record
    return load(path)  # what was written, so that the first run prints what every later one does


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
    """Which taps (tap,) of a square record are compared with others."""
    return np.isin(record["tap"].values, record["other"].values)


def provenance(**facts) -> dict[str, str]:
    """Attributes of a record: the given facts and the versions of what made it."""
    versioned = {"python": platform.python_version(), **versions()}
    return versioned | {name: str(value) for name, value in facts.items()}


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
    return {package: metadata.version(package).split("+")[0] for package in PACKAGES}


def device_name(device="cpu") -> str:
    """What a device is called: ``"NVIDIA H100 80GB HBM3"``, ``"CPU, 2 threads"``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"{torch.device(device).type.upper()}, {n} thread{'s' * (n > 1)}"


# Hashes of what a number depends on ---------------------------------------------------------------


def digest(value) -> str:
    """Hash of a value and of everything that it refers to.

    Raises
    ------
    Unknown
        For objects of packages other than those of this book: what they hold cannot be told.
    """
    return _sha256("\n".join(_written(value, set())), 24)


def code_hash(*modules: str) -> str:
    """Hash of modules of this library and of all that they import from it."""
    files = sorted(set().union(*(_imported(module) for module in modules)))
    return _sha256("".join(Path(sys.modules[name].__file__).read_text("utf-8") for name in files))


def tensor_hash(*tensors: torch.Tensor) -> str:
    """Hash of the values and shapes of tensors, the same on every device."""
    digested = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digested.update(f"{tuple(array.shape)}{array.dtype}".encode())
        digested.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digested.hexdigest()[:12]


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of everything a model's state dict holds."""
    state = model.state_dict()
    return _sha256("".join(f"{key}{tensor_hash(state[key])}" for key in sorted(state)))


def structure(model: torch.nn.Module) -> dict:
    """What a network computes beside its weights: its modules' classes and their settings."""
    return {
        name: (
            type(module),
            {
                key: value
                for key, value in vars(module).items()
                if key not in NO_SETTINGS
                # Parameters, buffers and modules have places of their own; hooks can do anything.
                and (not key.startswith("_") or (key.endswith("_hooks") and value))
            },
        )
        for name, module in model.named_modules()
    }


def _written(value, seen: set):
    """A value in pieces of text, whatever it is."""
    yield type(value).__qualname__
    if value is None or isinstance(
        value, bool | int | float | complex | str | bytes | Path | slice
    ):
        yield repr(value)
    elif isinstance(value, torch.Tensor):
        yield tensor_hash(value)
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.shape}{value.dtype}{_sha256(np.ascontiguousarray(value).tobytes())}"
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _written(part, seen)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _written(key, seen)
            yield from _written(part, seen)
    elif isinstance(value, functools.partial):
        yield from _written((value.func, value.args, value.keywords), seen)
    elif isinstance(value, torch.nn.Module) and not hasattr(value, "settings"):
        yield weights_hash(value)
        yield from _written(structure(value), seen)
    elif isinstance(value, torch.dtype | torch.device | torch.Size):
        yield str(value)
    elif isinstance(value, types.ModuleType):
        yield code_hash(value.__name__) if value.__name__.startswith("lib") else value.__name__
    elif isinstance(value, types.MethodType):
        yield from _written((value.__func__, value.__self__), seen)
    elif isinstance(value, types.CodeType):
        yield from _written((value.co_code, value.co_consts, value.co_names), seen)
    elif isinstance(value, property | classmethod | staticmethod):
        yield from _written(getattr(value, "fget", None) or value.__func__, seen)
    elif isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        yield from _source(value, seen)
    elif hasattr(value, "settings") or type(value).__module__.startswith(("lib.", "__main__")):
        yield from _written((type(value), getattr(value, "settings", vars(value))), seen)
    elif " at 0x" not in (text := repr(value)):
        yield text
    else:
        raise Unknown(f"what a {type(value).__qualname__} holds cannot be told")


def _source(thing, seen: set):
    """A function or class: of this library its module, of a package its name, else all of it."""
    module = getattr(thing, "__module__", None) or ""
    yield f"{module}.{thing.__qualname__}"
    if module.startswith("lib."):
        yield code_hash(module)
    elif thing not in seen and (module not in sys.modules or _is_the_readers(module)):
        seen.add(thing)
        if isinstance(thing, type):
            parts = {k: v for k, v in vars(thing).items() if k not in DESCRIPTIVE}
            yield from _written((thing.__mro__[1:], parts), seen)
        elif isinstance(thing, types.FunctionType):
            free = [cell.cell_contents for cell in thing.__closure__ or ()]
            used = [thing.__globals__[n] for n in _names(thing.__code__) if n in thing.__globals__]
            yield from _written((thing.__code__, thing.__defaults__, free, used), seen)


def _names(code: types.CodeType) -> list[str]:
    """Names that a function and those within it may take from their module."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return sorted({*code.co_names}.union(*map(_names, inner)))


def _is_the_readers(module: str) -> bool:
    """Whether a module is neither a package's nor Python's own."""
    file = getattr(sys.modules[module], "__file__", None) or ""
    own = module == "__main__" or bool(file)
    return own and "site-packages" not in file and not file.startswith(sys.base_prefix)


@functools.cache
def _imported(module: str) -> frozenset:
    """Names of a module of this library and of those that it imports, directly or not."""
    if module in INERT:
        return frozenset()
    found = {module}
    for node in ast.walk(ast.parse(Path(sys.modules[module].__file__).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lib":
            parts = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name for name in [node.module, *parts] if name in sys.modules}
    return frozenset({module}.union(*(_imported(name) for name in found - {module})))


def _sha256(data: str | bytes, digits: int = 12) -> str:
    data = data.encode() if isinstance(data, str) else data
    return hashlib.sha256(data).hexdigest()[:digits]
