"""Records: measured results with labelled axes and their provenance, kept in small files.

A record is an ``xarray.Dataset`` whose attributes say where its numbers come from. Records are
cached by what they depend on, so a chapter that is run again takes seconds, and one whose weights,
images or code have changed is measured anew.
"""

import ast
import contextlib
import dataclasses
import enum
import functools
import hashlib
import operator
import os
import platform
import re
import sys
import types
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torchmetrics import Metric

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "timm", "torchvision", "numpy", "torchmetrics")
# Code that stores and shows numbers, and cannot change one.
INERT = {"lib", "lib.records", "lib.processes", "lib.plots"}
PLAIN = bool | int | float | complex | str | bytes | Path | slice | range | enum.Enum
PLAIN |= np.dtype | torch.dtype | torch.device
# What changes no more than a value's rounding, or is no setting.
NO_SETTINGS = {"training", "fused_attn", "pretrained_cfg", "default_cfg"}
PARTS = {
    Metric: ("__class__", "settings"),  # a measurement's states are results
    functools.partial: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    types.MethodType: ("__func__", "__self__"),
    types.CodeType: ("co_code", "co_consts", "co_names"),
    property: ("fget", "fset"),
    classmethod: ("__func__",),
    staticmethod: ("__func__",),
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Unknown(TypeError):
    """A value that no key can be made of."""


def cache_folder() -> Path:
    """Where records are cached: ``.cache`` at the repository's root, or ``$VIT_SEE_CACHE``."""
    return Path(os.environ.get("VIT_SEE_CACHE", ROOT / ".cache"))


def cached(function: Callable, *arguments, **options) -> xr.Dataset:
    """``function(*arguments, **options)``, from the cache if nothing it depends on has changed.

    The key is a hash of the arguments, of the function's source and of everything that it refers
    to: the library's modules by their source, global variables by their values, networks by their
    weights and settings. What cannot be hashed is computed anew every time.
    """
    compute = functools.partial(function, *arguments, **options)
    return keeper((function, arguments, options))(compute)


def keeper(everything) -> Callable[[Callable], xr.Dataset]:
    """``keep(compute)`` gives the record that ``everything`` decides: the cached, or computed."""
    try:
        return functools.partial(_keep, digest((everything, versions())))
    except Unknown:
        return operator.call


def _keep(key: str, compute: Callable) -> xr.Dataset:
    path = cache_folder() / f"{key}.nc"
    # Whatever a damaged file makes its reader raise: measure again.
    with contextlib.suppress(Exception):
        return load(path)
    record = compute()
    try:
        save(record, path)
    except OSError as error:
        advice = "set VIT_SEE_CACHE to a folder that can be written"
        why = f"the record could not be kept in {path.parent} ({error}); {advice}"
        warnings.warn(why, stacklevel=2)
        return record
    return load(path)  # what was written, so that the first run prints what every later one does


def save(record: xr.Dataset, path) -> None:
    """Write a record as compressed netCDF; the file is complete or absent, never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Seven digits are more than any measurement has.
    compressed = {"zlib": True, "complevel": 1, "shuffle": True, "dtype": "float32"}
    floats = [name for name, values in record.data_vars.items() if values.dtype.kind == "f"]
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        record.to_netcdf(temporary, engine="h5netcdf", encoding=dict.fromkeys(floats, compressed))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path) -> xr.Dataset:
    """Read a record into memory."""
    with xr.open_dataset(path, engine="h5netcdf") as record:
        return record.load()


def between(record: xr.Dataset, rows: str, columns: str, *, blocks=False, variable="cka"):
    """The part of a square record that compares two roles, labelled with their layers.

    ``rows`` and ``columns`` are roles; the array is (..., tap, other). With ``blocks`` it keeps the
    outputs of blocks and residual units only.
    """
    found = []
    for role in (rows, columns):
        if role not in (known := list(dict.fromkeys(record["role"].values.tolist()))):
            raise ValueError(f"this record has no role {role!r}; it has {', '.join(known)}")
        keep = compared(record) & (record["role"].values == role)
        found.append(record["tap"][keep & record["block"].values if blocks else keep])
    tap, other = found
    part = record[variable].sel(tap=tap.values, other=other.values).reset_coords(drop=True)
    return part.assign_coords(tap=tap["layer"].values, other=other["layer"].values)


def compared(record: xr.Dataset) -> np.ndarray:
    """Which taps (tap,) of a square record are compared with others."""
    return np.isin(record["tap"].values, record["other"].values)


def provenance(**facts) -> dict[str, str]:
    """Attributes of a record: the given facts and the versions of what made it."""
    # Functions by their names: where one lies in memory differs from run to run.
    told = {name: re.sub(r"<function (\S+) at 0x\w+>", r"\1", str(v)) for name, v in facts.items()}
    return {"python": platform.python_version(), **versions()} | told


def as_table(facts: dict):
    """Provenance as a table (HTML), for the end of a chapter."""
    from IPython.display import HTML

    plain = {name: re.sub("['\"]", "", str(value).strip("{}[]")) for name, value in facts.items()}
    rows = {name.replace("_", " "): value for name, value in plain.items()}
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


def digest(value) -> str:
    """Hash of a value and of everything that it refers to.

    Unknown is raised for objects of other packages: what they hold cannot be told.
    """
    return _sha256("\n".join(_written(value, set())), 24)


def _written(value, seen: set):
    """A value in pieces of text, whatever it is."""
    yield type(value).__qualname__
    if value is None or isinstance(value, PLAIN):
        yield repr(value)
    elif isinstance(value, torch.Tensor):
        yield tensor_hash(value)
    elif isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        yield f"{value.shape}{value.dtype}{_sha256(np.ascontiguousarray(value).tobytes())}"
    elif (parts := _parts(value)) is not None:
        yield str(len(parts))
        for part in parts:
            yield from _written(part, seen)
    elif isinstance(value, types.ModuleType):
        yield value.__name__
        if _is_the_books(value.__name__):
            yield code_hash(value.__name__)
        elif _is_the_readers(value.__name__) and getattr(value, "__file__", None):
            yield Path(value.__file__).read_text("utf-8")
    elif isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        module = getattr(value, "__module__", None) or ""
        yield f"{module}.{value.__qualname__}"
        if _is_the_books(module):
            yield code_hash(module)
        elif not _is_the_readers(module):
            yield str(getattr(sys.modules.get(module.partition(".")[0]), "__version__", ""))
        elif value not in seen:
            seen.add(value)
            yield from _written(_source(value), seen)
    else:
        raise Unknown(f"what a {type(value).__qualname__} holds cannot be told")


def _parts(value):
    """What a value is made of, if it is made of parts; of a network, of a measurement as well."""
    for kind, of in PARTS.items():
        if isinstance(value, kind):
            return tuple(getattr(value, name) for name in of)
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, torch.nn.Module):
        modules = [(name, type(one), _settings(one)) for name, one in value.named_modules()]
        return [weights_hash(value), *modules]
    plain, made_by = isinstance(value, type | types.FunctionType), type(value).__module__
    ours = dataclasses.is_dataclass(value) or _is_the_books(made_by) or _is_the_readers(made_by)
    return (type(value), vars(value)) if ours and not plain else None


def _settings(module: torch.nn.Module) -> dict:
    """What a module computes beside its weights and its parts."""
    of = vars(module)
    plain = {n: of[n] for n in of if not n.startswith("_") and n not in NO_SETTINGS}
    # Of the rest, parameters, buffers and modules have places of their own; hooks can do anything.
    return plain | {"hooks": [hook for kind in HOOKS for hook in of[kind].values()]}


def _source(thing) -> tuple:
    """What a reader's own function or class is made of."""
    if isinstance(thing, type):
        # Of names that Python makes itself, methods alone do anything.
        own = {k: v for k, v in vars(thing).items() if not k.startswith("__") or callable(v)}
        return thing.__mro__[1:], {k: v for k, v in own.items() if k != "_abc_impl"}
    if isinstance(thing, types.BuiltinFunctionType):
        return (thing.__self__,)
    if not isinstance(thing, types.FunctionType):
        raise Unknown(f"what {thing.__qualname__} does cannot be told")
    free = [cell.cell_contents for cell in thing.__closure__ or ()]
    used = {n: thing.__globals__.get(n) for n in _names(thing.__code__)}
    return thing.__code__, thing.__defaults__, thing.__kwdefaults__, free, used


def _names(code: types.CodeType) -> list[str]:
    """Names that a function and those within it may take from their module."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return sorted({*code.co_names}.union(*map(_names, inner)))


def _is_the_books(module: str) -> bool:
    return module == "lib" or module.startswith("lib.")


def _is_the_readers(module: str) -> bool:
    """Whether a module is neither of this library, nor a package's, nor Python's own."""
    if module == "__main__" or module not in sys.modules:
        return True
    file = getattr(sys.modules[module], "__file__", None) or sys.base_prefix
    return "-packages" not in file and not file.startswith(sys.base_prefix)


@functools.cache
def _imported(module: str) -> frozenset:
    """Names of a module of this library and of those that it imports, directly or not."""
    found, todo = set(), {module}
    while todo:
        name = todo.pop()
        if name in found | INERT:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(Path(sys.modules[name].__file__).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and _is_the_books(node.module or ""):
                parts = {f"{node.module}.{part.name}" for part in node.names}
                modules = parts & sys.modules.keys()
                # Of a package of which only modules are imported, its own code does not count.
                todo |= modules | ({node.module} if modules < parts else set())
    return frozenset(found)


def _sha256(data: str | bytes, digits: int = 12) -> str:
    data = data.encode() if isinstance(data, str) else data
    return hashlib.sha256(data).hexdigest()[:digits]
