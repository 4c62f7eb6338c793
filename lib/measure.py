"""One forward pass per network and minibatch, serving every measurement at once."""

import functools
from collections.abc import Mapping, Sequence

import torch
import xarray as xr
from tqdm import tqdm

from lib import processes, records
from lib.taps import tap_names, tapping


def measure(
    study,
    roles: Sequence[str],
    measurements: Sequence,
    n_images: int = 1024,
    batch_size: int = 128,
    seed: int = 0,
    device="cpu",
) -> xr.Dataset:
    """Run the networks of some roles over a study's images and measure them.

    Parameters
    ----------
    study : study
        From :func:`lib.studies.load_study`, or anything with its methods.
    roles : sequence of str
        Which networks; all see the same images in the same order.
    measurements : sequence of measurement
        Metrics with ``taps``, ``reduce(value)`` and ``update(reduced=..., batch=...)``, such as
        :class:`lib.cka.MinibatchCKA`. What their hooks keep lives as long as one minibatch. If a
        measurement also needs the images, its ``reduce_images(images)`` is given the minibatch of
        them, and what that returns is ``reduced["images"]``. If it has to
        see several taps together, it has ``reducer(model)`` in the place of ``reduce``: asked once
        for every forward pass, that returns a function of a tap's name and value, whose result is
        kept unless it is None. ``taps`` may be a dictionary by role: roles that are not in it are
        none of that measurement's.
    n_images, batch_size : int
        A last minibatch may be smaller.
    seed : int
        Another seed measures on other images.
    device : torch device
        Networks are measured in float32 wherever they run.

    Returns
    -------
    xarray.Dataset
        What the measurements computed, with each tap's ``role``, ``layer`` and whether it is the
        output of a ``block``; its attributes are its provenance. Taken from the cache if nothing
        it depends on has changed.

    Under ``torchrun`` minibatches are dealt to the processes and the measurements' states added up;
    every process returns the record.
    """
    roles = list(dict.fromkeys(roles))
    if n_images < 1 or batch_size < 1:
        raise ValueError(f"cannot measure {n_images} images in batches of {batch_size}")
    images = study.images(n_images, seed)
    networks = {role: study.model(role) for role in roles}
    inputs = records.inputs(study, networks, images)
    facts = {
        "study": study.name,
        "images": inputs["images"],
        "n_images": len(images),
        "batch_size": batch_size,
        "seed": seed,
        "weights": inputs["weights"],
        "measurements": [_describe(measurement) for measurement in measurements],
    }
    if hasattr(study, "facts"):
        facts |= study.facts(roles)
    return processes.together(
        functools.partial(records.cached, facts | inputs | {"roles": roles}),
        lambda: _measure(study, networks, measurements, images, batch_size, device, facts),
    )


def _measure(study, networks, measurements, images, batch_size, device, facts):
    share = processes.share(len(images) // batch_size)
    if share.idle:
        return None
    for model in networks.values():
        model.to(device)
    for measurement in measurements:
        measurement.reset()
        measurement.process_group = share.group
    wanted = {
        role: [_tap_names(model, measurement.taps, role) for measurement in measurements]
        for role, model in networks.items()
    }
    fired: dict[str, None] = {}  # an ordered set
    mine = sum(batch in share for batch in range(-(-len(images) // batch_size)))
    look = {"total": mine * len(networks), "unit": "pass", "leave": False}
    look |= {"disable": True} if share.place else {}  # one bar is enough
    with torch.no_grad(), tqdm(**look) as progress:
        for batch, pixels in enumerate(images.batches(batch_size)):
            if batch not in share:
                continue
            pixels = pixels.to(device)
            here = slice(batch * batch_size, batch * batch_size + len(pixels))
            reduced = [_reduce_images(measurement, images, here) for measurement in measurements]
            for role, model in networks.items():
                progress.set_description(role)
                reducers = [_reducer(measurement, model) for measurement in measurements]
                receive = functools.partial(_reduce, reducers, wanted[role], reduced, fired, role)
                every = dict.fromkeys(name for names in wanted[role] for name in names)
                with tapping(model, list(every), receive):
                    model(study.to_input(pixels, role))
                progress.update()
            for measurement, kept in zip(measurements, reduced, strict=True):
                measurement.update(reduced=kept, batch=batch)

    record = xr.merge([measurement.compute() for measurement in measurements], join="outer")
    if "tap" in record.coords:
        for axis in {"tap", "other"} & set(record.dims):
            known = set(record[axis].values.tolist())
            record = record.sel({axis: [tap for tap in fired if tap in known]})
        record = _label(record, networks)
    record.attrs = records.provenance(device=records.device_name(device), **facts)
    return record


def _tap_names(model, taps, role):
    """The taps a measurement wants of a role's network."""
    if not isinstance(taps, Mapping):
        return tap_names(model, taps)
    return tap_names(model, taps[role]) if role in taps else []


def _reduce_images(measurement, images, here):
    """What a measurement keeps of a minibatch's images, if it wants any of it."""
    if not hasattr(measurement, "reduce_images"):
        return {}
    return {"images": measurement.reduce_images(images[here])}


def _reducer(measurement, model):
    """How a measurement reduces the taps of one forward pass: a function of name and value."""
    if hasattr(measurement, "reducer"):
        return measurement.reducer(model)
    return lambda name, value: measurement.reduce(value)


def _reduce(reducers, wanted, reduced, fired, role, name, value):
    """Let every measurement that wants a tap keep what it needs of its value."""
    fired[f"{role}/{name}"] = None
    for reduce, names, kept in zip(reducers, wanted, reduced, strict=True):
        if name in names and (result := reduce(name, value)) is not None:
            kept[f"{role}/{name}"] = result


def _label(record, networks):
    """Split ``vit/blocks.3.attn`` into role and layer, and mark the outputs of blocks."""
    role, layer = zip(*(tap.split("/", 1) for tap in record["tap"].values.tolist()), strict=True)
    outputs = {name: set(tap_names(model, "blocks")) for name, model in networks.items()}
    block = [one in outputs[which] for which, one in zip(role, layer, strict=True)]
    return record.assign_coords(
        role=("tap", list(role)), layer=("tap", list(layer)), block=("tap", block)
    )


def _describe(measurement) -> str:
    settings = getattr(measurement, "settings", {})
    return f"{type(measurement).__name__}({settings})"
