"""Records keep their numbers, their labels and where they come from, or are not there at all."""

import importlib
import re
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from bs4 import BeautifulSoup
from torch import nn

from lib import records
from lib.records import between, cached, load, save, tensor_hash, weights_hash


@pytest.fixture
def record():
    """Two networks, ``a`` of three taps and ``b`` of two, whose cells say where they are."""
    tap = ["a/stem", "a/blocks.0", "a/blocks.1", "b/blocks.0", "b/head"]
    cells = np.add.outer(10.0 * np.arange(5), np.arange(5.0))  # 10 * row + column
    cells[4, 4] = np.nan
    return xr.Dataset(
        {
            "cka": (("tap", "other"), cells),
            "hsic": (("group", "tap", "other"), np.stack([cells, cells / 3])),
            "images": ("group", np.array([64, 16])),
        },
        coords={
            "tap": tap,
            "other": tap,
            "role": ("tap", ["a", "a", "a", "b", "b"]),
            "layer": ("tap", [name.split("/")[1] for name in tap]),
            "block": ("tap", [False, True, True, True, False]),
        },
        attrs={"study": "fake", "seed": "0", "weights": "{'a': '12ab'}"},
    )


# Files --------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_to_seven_digits(record, tmp_path):
    path = tmp_path / "new" / "folder" / "record.nc"
    save(record, path)
    back = load(path)
    assert list(path.parent.iterdir()) == [path]
    assert back.attrs == record.attrs
    assert dict(back.sizes) == dict(record.sizes)
    for name in ("tap", "other", "role", "layer", "block"):
        assert back[name].values.tolist() == record[name].values.tolist()
    assert back["block"].dtype == bool
    for name in ("cka", "hsic"):
        assert back[name].dtype == np.float32
        assert back[name].dims == record[name].dims
        np.testing.assert_array_equal(back[name], record[name].astype(np.float32))
    assert np.isnan(back["cka"][4, 4])
    assert back["images"].values.tolist() == [64, 16]
    assert record["cka"].dtype == np.float64  # the one in memory is as it was
    path.unlink()  # everything is in memory, the file is closed
    assert float(back["cka"][1, 2]) == 12


def test_saving_again_gives_the_same_record(record, tmp_path):
    save(record, tmp_path / "one.nc")
    once = load(tmp_path / "one.nc")
    save(once, tmp_path / "two.nc")
    xr.testing.assert_identical(once, load(tmp_path / "two.nc"))


def test_records_are_small(tmp_path):
    square = np.random.default_rng(0).random((200, 200))
    names = [f"role/blocks.{i}" for i in range(200)]
    save(
        xr.Dataset({"cka": (("tap", "other"), square)}, coords={"tap": names, "other": names}),
        tmp_path / "record.nc",
    )
    assert (tmp_path / "record.nc").stat().st_size < 200 * 200 * 4 + 30_000


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False])
def test_a_record_is_complete_or_absent(record, tmp_path, monkeypatch, error, there):
    path = tmp_path / "record.nc"
    if there:
        save(record, path)
        before = path.read_bytes()

    def half(self, target, **_):
        with open(target, "wb") as file:
            file.write(b"half")
        raise error("disk full")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", half)
    with pytest.raises(error):
        save(record * 2, path)
    assert list(tmp_path.iterdir()) == ([path] if there else [])
    if there:
        assert path.read_bytes() == before


CELL = """
import random
import xarray

scale = {scale}

def helper(x):
    return {helper}

def make(k):
    def inner(x):
        return k * helper(x)
    return inner

inner = make({closure})

def compute(x, times={default}, *, more={keyword}):
    value = float(inner(x).sum()) * scale * times + more
    return xarray.Dataset({{"value": value, "drawn": random.random()}})
"""
PLAIN = {"scale": "2", "helper": "x + 1", "closure": "3", "default": "1", "keyword": "0"}


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """What a chapter's cell computes in a fresh kernel: a value, and a number drawn by chance."""
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))

    def run(x=1.0, options=(), **changes):
        space = {"__name__": "__main__"}
        exec(CELL.format(**PLAIN | changes), space)
        return cached(space["compute"], torch.full((2,), x), **dict(options))

    return run


def test_a_function_is_computed_once(cell, tmp_path):
    first, again = cell(), cell()
    xr.testing.assert_identical(first, again)  # also the number drawn by chance
    assert float(first["value"]) == 24
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("what", "change", "expected"),
    [
        ("argument", {"x": 2.0}, 36),
        ("option", {"options": {"times": 2}}, 48),
        ("global variable", {"scale": "3"}, 36),
        ("function that is called", {"helper": "x + 3"}, 48),
        ("closure", {"closure": "1"}, 8),
        ("default", {"default": "10"}, 240),
        ("default of a keyword", {"keyword": "1"}, 25),
    ],
)
def test_whatever_changes_a_function_computes_it_anew(cell, what, change, expected):
    before, after = cell(), cell(**change)
    assert float(before["value"]) == 24
    assert float(after["value"]) == expected, f"a change of the {what} went unnoticed"


def test_what_cannot_be_hashed_is_computed_every_time(record, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    stream = np.random.default_rng(0)
    for thing in (record, stream, np.array([object()]), (1, {"x": torch.Generator()})):
        with pytest.raises(records.Unknown, match="holds cannot be told"):
            records.digest(thing)
        first, again = (cached(lambda _: xr.Dataset({"x": stream.random()}), thing) for _ in "ab")
        assert first["x"] != again["x"]
    assert not list(tmp_path.iterdir())


def test_a_failure_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        cached(lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


class Own(nn.Module):
    """A reader's network with settings of every kind."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.inner = nn.Identity()
        for name, value in settings.items():
            setattr(self.inner, name, value)


@pytest.mark.parametrize(
    "one_and_other",
    [
        ({"heads": 4}, {"heads": 6}),
        ({"skip": True}, {"skip": False}),
        ({"scale": 0.5}, {"scale": 0.25}),
        ({"grid": (7, 7)}, {"grid": (7, 8)}),
        ({"mode": {"a": [1]}}, {"mode": {"a": [2]}}),
        ({"act": torch.relu}, {"act": torch.tanh}),
        ({"act": nn.functional.gelu}, {"act": nn.functional.silu}),
        ({"act": lambda x: x + 1}, {"act": lambda x: x + 2}),
        ({"mask": torch.ones(3)}, {"mask": torch.zeros(3)}),
        ({"extra_repr": lambda: "a"}, {"extra_repr": lambda: "b"}),
    ],
    ids=lambda pair: next(iter(pair[0])),
)
def test_settings_of_networks_are_told_apart(one_and_other):
    one, other = (records.digest(Own(**settings)) for settings in one_and_other)
    assert one == records.digest(Own(**one_and_other[0]))
    assert one != other


def test_a_network_is_the_same_in_training_mode_and_with_other_weights_another():
    model = Own()
    before = records.digest(model)
    assert records.digest(model.train()) == records.digest(model.eval()) == before
    with torch.no_grad():
        model.layer.bias[0] += 1
    assert records.digest(model) != before
    model.layer.bias.data[0] -= 1
    model.register_forward_hook(lambda *_: None)
    assert records.digest(model) != before


# Parts of a record --------------------------------------------------------------------------------


def test_between_takes_rows_and_columns_in_that_order(record):
    part = between(record, "a", "b")
    assert part.dims == ("tap", "other")
    assert part.values.tolist() == [[3, 4], [13, 14], [23, 24]]
    assert part["tap"].values.tolist() == ["stem", "blocks.0", "blocks.1"]
    assert part["other"].values.tolist() == ["blocks.0", "head"]
    assert set(part.coords) == {"tap", "other"}
    assert between(record, "b", "a").values.tolist() == [[30, 31, 32], [40, 41, 42]]
    assert between(record, "a", "a").values.tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]


def test_between_can_keep_the_ends_of_blocks_only(record):
    assert between(record, "a", "b", blocks=True).values.tolist() == [[13], [23]]
    assert between(record, "b", "a", blocks=True).values.tolist() == [[31, 32]]


def test_between_takes_other_variables_and_keeps_their_axes(record):
    part = between(record, "a", "b", variable="hsic")
    assert part.dims == ("group", "tap", "other")
    np.testing.assert_allclose(part[1] * 3, between(record, "a", "b"))


def test_between_leaves_out_taps_that_were_compared_with_nothing(record):
    alone = xr.Dataset(
        {"distance": ("tap", [7.0])},
        coords={
            "tap": ["a/attn"],
            "role": ("tap", ["a"]),
            "layer": ("tap", ["attn"]),
            "block": ("tap", [False]),
        },
    )
    both = xr.merge([record, alone], join="outer", compat="no_conflicts").sel(
        tap=["a/attn", *record["tap"].values]
    )
    xr.testing.assert_equal(between(both, "a", "b"), between(record, "a", "b"))


def test_between_names_the_roles_there_are(record):
    for pair in (("a", "c"), ("c", "a")):
        with pytest.raises(ValueError, match=r"^this record has no role 'c'; it has a, b$"):
            between(record, *pair)


# Hashes -------------------------------------------------------------------------------------------


def test_a_hash_depends_on_values_shape_type_and_order():
    x = torch.arange(24.0).reshape(2, 3, 4)
    changed = x.clone()
    changed[1, 2, 3] = changed[1, 2, 3].nextafter(torch.tensor(24.0))
    others = [changed, x.reshape(6, 4), x.double(), x.int(), -x, x.flip(0), x[:1], x.flatten()]
    hashes = [tensor_hash(value) for value in (x, *others)]
    assert all(re.fullmatch(r"[0-9a-f]{12}", value) for value in hashes)
    assert len(set(hashes)) == len(hashes)
    zeros = torch.zeros(2)  # the same bytes as two integers
    assert tensor_hash(zeros) != tensor_hash(zeros.int())
    assert tensor_hash(x, changed) != tensor_hash(changed, x)
    assert tensor_hash(x, x) != tensor_hash(torch.cat([x, x])) != tensor_hash(x)


def test_a_hash_does_not_depend_on_how_a_tensor_lies_in_memory():
    x = torch.arange(120.0).reshape(2, 3, 4, 5)
    wide = torch.zeros(2, 3, 4, 9)
    wide[..., 2:7] = x
    for same in (
        x.clone(),
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(0, 3).contiguous().transpose(0, 3),
        wide[..., 2:7],
        x.requires_grad_(),
    ):
        assert tensor_hash(same) == tensor_hash(torch.arange(120.0).reshape(2, 3, 4, 5))


def test_every_type_and_shape_has_a_hash():
    values = [torch.tensor(1), torch.tensor(True), torch.zeros(0), torch.ones(2).bfloat16()]
    values += [torch.ones(2).half(), torch.tensor([1, 0], dtype=torch.uint8)]
    assert len({tensor_hash(value) for value in values}) == len(values)


def test_a_hash_of_weights_depends_on_every_value_and_every_name():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))

    original = network()
    expected = weights_hash(original)
    assert weights_hash(network()) == expected
    assert weights_hash(network().train(not original.training)) == expected

    bias, buffer, swapped = network(), network(), network()
    with torch.no_grad():
        bias[2].bias[1] += 1e-7
        buffer[1].running_mean[0] += 1e-7
    swapped[0], swapped[2] = swapped[2], swapped[0]
    renamed = nn.Sequential(*network(), nn.Identity())
    renamed[3], renamed[2] = renamed[2], renamed[3]
    hashes = {weights_hash(net) for net in (original, bias, buffer, swapped, renamed)}
    assert len(hashes) == 5


MEASURING = ("lib.measure", "lib.cka", "lib.measurements.probes", "lib.measurements.heads")
MEASURING += ("lib.measurements.norm_ratio", "lib.measurements.receptive_field")


@pytest.mark.parametrize("module", MEASURING)
def test_only_what_a_measurement_runs_through_is_in_its_hash(module):
    """So that another study, another claim or another page has nothing measured again."""
    importlib.import_module(module)
    found = records._imported(module)
    assert module in found
    assert "lib.taps" in found
    rooms = {name.split(".")[1] for name in found}
    assert rooms <= {"cka", "intervals", "measure", "measurements", "taps"}


def test_a_hash_of_code_follows_its_imports(tmp_path, monkeypatch):
    before = records.code_hash("lib.cka")
    text = (records.ROOT / "lib" / "intervals.py").read_text("utf-8") + "\n# another line\n"
    (tmp_path / "intervals.py").write_text(text)
    monkeypatch.setattr(sys.modules["lib.intervals"], "__file__", str(tmp_path / "intervals.py"))
    assert records.code_hash("lib.cka") != before
    monkeypatch.undo()
    assert records.code_hash("lib.cka") == before


# Provenance ---------------------------------------------------------------------------------------


def test_provenance_is_text_and_names_no_machine():
    facts = records.provenance(study="lab", n=3, weights={"vit": "12"}, device="CPU, 1 threads")
    assert all(isinstance(value, str) for value in facts.values())
    assert facts["n"] == "3"
    assert facts["weights"] == "{'vit': '12'}"
    assert {"python", "torch", "timm", "numpy", "torchmetrics"} <= facts.keys()
    assert not any("/" in value for value in facts.values())
    assert records.versions()["torch"] == torch.__version__.split("+")[0]


def test_provenance_is_shown_as_a_table():
    hashes = {f"vit_{number}": "0123456789ab" for number in range(9)}
    facts = records.provenance(n_images=3, weights=hashes, measurements=["CKA({'taps': 'blocks'})"])
    rows = BeautifulSoup(records.as_table(facts).data, "html.parser").find_all("tr")
    table = {row.th.text: row.td.text for row in rows}
    assert table["n images"] == "3"
    assert table["weights"] == ", ".join(f"{name}: {one}" for name, one in hashes.items())
    assert table["measurements"] == "CKA({taps: blocks})"


def test_devices_have_names():
    n = torch.get_num_threads()
    assert records.device_name("cpu") == (f"CPU, {n} threads" if n > 1 else "CPU, 1 thread")
