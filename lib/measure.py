"""One forward pass per network and minibatch, serving every measurement at once."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
import xarray as xr
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm import tqdm

from lib import processes, records
from lib.taps import TapError, tap_names, tapping


class Measurement(Metric):
    """What is kept of some taps: sums over minibatches, in groups that give intervals.

    A kind of it keeps its constructor's arguments under their own names. Its dimensions, beside
    ``tap``, ``other`` and ``group``, have names that no other measurement uses, so that any set of
    measurements shares one pass.

    ``taps`` are as for :func:`lib.taps.tap_names`, or a dictionary of these by role; roles that it
    lacks are not measured.
    """

    groups = 20  # minibatches are dealt to so many; see measure()
    smallest = 1  # images of a minibatch that can be used
    needs: tuple[str, ...] = ()  # of the images, beside their pixels: "labels", "boxes"

    def __init__(self, taps="all"):
        super().__init__()
        self.taps = taps
        self.names: list[str] = []
        self.add_state("batches", torch.tensor(0), dist_reduce_fx="sum")

    @property
    def settings(self) -> dict:
        """The constructor's arguments, on which a record depends."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def reset(self) -> None:
        super().reset()
        self.names = []

    def reduce(self, value: Tensor):
        """What a hook keeps of a tap's value; see also :meth:`reducer`."""
        raise NotImplementedError

    def reducer(self, model: nn.Module, names: Sequence[str], x: Tensor) -> Callable:
        """How the hooks of a network reduce its taps: a function of a tap's name and value.

        ``x`` (1, ...) is an example of the network's input. What is None is not kept.
        """
        return lambda name, value: self.reduce(value)

    def make_room(self, reduced: Mapping, images) -> None:
        """Add the states, once the first minibatch shows their shapes."""

    def add(self, group: int, reduced: Mapping, images) -> None:
        """Add a minibatch to the states of a group."""
        raise NotImplementedError

    def results(self) -> xr.Dataset:
        """What the states come to."""
        raise NotImplementedError

    def room(self, reduced: Mapping, **shapes: tuple[int, ...]) -> None:
        """Add states of zeros, in float64, where the reduced values are."""
        device = home_of_float64(next(iter(reduced.values())).device)
        for name, shape in shapes.items():
            empty = torch.zeros(shape, dtype=torch.float64, device=device)
            self.add_state(name, empty, dist_reduce_fx="sum")

    def size(self, kept) -> int:
        """How many images are in what a hook kept."""
        return len(kept)

    def update(self, reduced: Mapping, images=None, batch: int | None = None) -> None:
        """Add one minibatch: by tap, what the hooks kept.

        Measurements may need the ``images`` themselves. The number of the ``batch`` decides its
        group; by default minibatches are counted.
        """
        sizes = {name: self.size(kept) for name, kept in reduced.items()}
        n = next(iter(sizes.values())) if images is None else len(images)
        if set(sizes.values()) != {n}:
            raise ValueError(f"all taps must see the same {n} images; got {sizes}")
        if not self.names:
            self.names = list(reduced)
            self.make_room(reduced, images)
        if odd := sorted(set(reduced) ^ set(self.names)):
            raise ValueError(f"every minibatch must have the same taps; this differs in {odd}")
        if n < self.smallest:
            least = f"{type(self).__name__}, which needs {self.smallest} or more; it is left out"
            warnings.warn(f"a minibatch of {n} images is too small for {least}", stacklevel=2)
            return
        self.add((int(self.batches) if batch is None else batch) % self.groups, reduced, images)
        self.batches += 1

    def compute(self) -> xr.Dataset:
        if not self.batches:
            least = f"at least one minibatch of {self.smallest} images or more"
            raise ValueError(f"{type(self).__name__} needs {least}, and none was added")
        return self.results()


def home_of_float64(device: torch.device) -> torch.device:
    """Where numbers on a device can be float64: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


def measure(
    study,
    roles: Sequence[str],
    measurements: Sequence[Measurement],
    n_images: int = 1024,
    batch_size: int = 128,
    seed: int = 0,
    device="cpu",
    groups: int = 20,
) -> xr.Dataset:
    """Run the networks of some roles over a study's images and measure them, in float32.

    Parameters
    ----------
    roles, measurements
        Any set of either; all see the same images in the same order. What the measurements' hooks
        keep lives as long as one minibatch.
    n_images, batch_size, seed : int
        A last minibatch may be smaller. Another seed measures on other images.
    groups : int
        Minibatches are dealt to this many groups. Leaving out one after another gives intervals
        without ever repeating an image within a Gram matrix.

    Returns
    -------
    xarray.Dataset
        What the measurements computed, with each tap's ``role``, ``layer`` and whether it is the
        output of a ``block``; its attributes are its provenance. Taken from the cache if nothing
        it depends on has changed. Under ``torchrun`` minibatches are dealt to the processes; every
        process returns the record.
    """
    if n_images < 1 or batch_size < 1:
        raise ValueError(f"cannot measure {n_images} images in batches of {batch_size}")
    if groups < 2:
        raise ValueError(f"intervals need at least 2 groups of minibatches, not {groups}")
    images = study.images(n_images, seed)
    networks = {role: study.model(role) for role in roles}
    x = {role: study.to_input(images.pixels[:1], role) for role in networks}
    facts = {
        "study": study.name,
        "images": records.tensor_hash(images.pixels),
        "n_images": len(images),
        "batch_size": batch_size,
        "seed": seed,
        "weights": {role: records.weights_hash(model) for role, model in networks.items()},
        "measurements": [f"{type(one).__name__}({one.settings})" for one in measurements],
    }
    for one in measurements:
        one.groups = groups
    # Everything that a number depends on. Asking for labels that there are not is an error.
    needs = {need: getattr(images, need) for one in measurements for need in one.needs}
    data = facts["images"], needs, batch_size, groups, torch.device(device).type
    arguments = study, networks, measurements, images, batch_size, device, x
    facts |= study.facts(list(networks)) if hasattr(study, "facts") else {}
    made_by = {"device": records.device_name(device), "code": records.code_hash("lib.measure")}
    attrs = records.provenance(**made_by, **facts)
    compute = functools.partial(_measure, *arguments, attrs)
    keep = records.keeper((networks, x, data, tuple(measurements), measure))
    # A record of the cache may have been made for another study of the same networks and images.
    return processes.together(keep, compute).assign_attrs(attrs)


def _measure(study, networks, measurements, images, batch_size, device, x, attrs):
    share = processes.share(len(images) // batch_size)
    if share.idle:
        return None
    for measurement in measurements:
        measurement.reset()
        measurement.process_group = share.group
    reducers = {}
    for role, model in networks.items():
        with _named(role, model):
            reducers[role] = _reducers(role, model.to(device), measurements, x[role].to(device))
    fired: dict[str, None] = {}  # an ordered set
    numbers = [n for n in range(-(-len(images) // batch_size)) if n in share]
    look = {"unit": "pass", "leave": False} | ({"disable": True} if share.place else {})
    with torch.no_grad(), tqdm(total=len(numbers) * len(networks), **look) as progress:
        for batch in numbers:
            part = images[batch * batch_size : (batch + 1) * batch_size]
            pixels = part.pixels.to(device)
            reduced = [{} for _ in measurements]
            for role, model in networks.items():
                progress.set_description(role)
                chosen = reducers[role]
                receive = functools.partial(_reduce, role, len(part), chosen, reduced, fired)
                if names := [name for one in chosen for name in one]:
                    with _named(role, model), tapping(model, names, receive):
                        model(study.to_input(pixels, role))
                progress.update()
            for measurement, kept in zip(measurements, reduced, strict=True):
                if kept:  # it may want none of these roles' taps
                    measurement.update(kept, part, batch)
    record = xr.merge([one.compute() for one in measurements if one.names], join="outer")
    for axis in {"tap", "other"} & set(record.coords):
        known = set(record[axis].values.tolist())
        record = record.sel({axis: [tap for tap in fired if tap in known]})
    record = _label(record, networks) if "tap" in record.coords else record
    return record.assign_attrs(attrs)


@contextlib.contextmanager
def _named(role, model):
    """Let errors about taps name the role and the network."""
    try:
        yield
    except TapError as error:
        raise TapError(f"{role} ({type(model).__name__}): {error}") from error


def _reducers(role, model, measurements, x) -> list[dict[str, Callable]]:
    """For every measurement, how each tap that it wants of a role's network is reduced."""
    found = []
    for one in measurements:
        taps = one.taps if isinstance(one.taps, Mapping) else {role: one.taps}
        names = tap_names(model, taps[role]) if role in taps else []
        found.append(dict.fromkeys(names, one.reducer(model, names, x) if names else None))
    return found


def _reduce(role, n, reducers, reduced, fired, name, value):
    """Let every measurement that wants a tap keep what it needs of its value."""
    if len(value) != n:
        why = "it mixes images with something else, such as windows; tap a module around it"
        raise TapError(f"tap {name!r} has {len(value)} rows for {n} images: {why}")
    fired[f"{role}/{name}"] = None
    for chosen, kept in zip(reducers, reduced, strict=True):
        if name in chosen and (result := chosen[name](name, value)) is not None:
            kept[f"{role}/{name}"] = result


def _label(record, networks):
    """Split ``vit/blocks.3.attn`` into role and layer, and mark the outputs of blocks."""
    role, layer = zip(*(tap.split("/", 1) for tap in record["tap"].values.tolist()), strict=True)
    outputs = {name: set(tap_names(model, "blocks")) for name, model in networks.items()}
    block = [one in outputs[which] for which, one in zip(role, layer, strict=True)]
    labels = {"role": list(role), "layer": list(layer), "block": block}
    return record.assign_coords({name: ("tap", values) for name, values in labels.items()})
