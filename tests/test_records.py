"""Records keep their numbers, their labels and where they come from, or are not there at all."""

import linecache
import re

import numpy as np
import pytest
import torch
import xarray as xr
from bs4 import BeautifulSoup
from torch import nn

from lib import records
from lib.records import between, cached, load, save, tensor_hash, weights_hash
from lib.studies.images import Images


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


def test_a_cached_record_is_computed_once_per_description(record, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    calls = []

    def compute():
        calls.append(1)
        return record

    facts = {"a": 1, "b": {"x": [1, 2]}}
    cached(facts, compute)
    assert cached({"b": {"x": [1, 2]}, "a": 1}, compute)["cka"].shape == (5, 5)
    assert len(calls) == 1
    cached({"a": 1, "b": {"x": [2, 1]}}, compute)
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 2

    def broken():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached({"a": 2}, broken)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cell_that_changed_measures_anew(record, tmp_path, monkeypatch):
    """A notebook's own code is no part of the library: the cell as a whole is in the key."""
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    calls = []

    def cell(name, text):
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        names = {"__name__": "__main__", "calls": calls, "record": record, "torch": torch}
        exec(compile(text, name, "exec"), names)
        cached({"a": 1}, names["compute"])
        return len(calls)

    text = "scale = 1\n@torch.no_grad()\ndef compute():\n    calls.append(1)\n    return record\n"
    assert cell("<cell 1>", text) == 1
    assert cell("<cell 2>", text) == 1  # the same cell in another kernel
    assert cell("<cell 3>", text.replace("scale = 1", "scale = 2")) == 2


def test_inputs_differ_with_whatever_a_network_makes_of_images():
    class Fake:
        name = "fake"

        def to_input(self, pixels, role):
            return pixels.float() / self.scale

        scale = 1.0

    def key(study=None, model=None, first=0):
        pixels = torch.arange(first, first + 24, dtype=torch.uint8).view(2, 3, 2, 2)
        network = model or nn.Linear(2, 2)
        if model is None:
            nn.init.ones_(network.weight)
            nn.init.zeros_(network.bias)
        return records.inputs(study or Fake(), {"net": network}, Images(pixels))

    other_weight, other_structure, other_study = nn.Linear(2, 2), nn.Linear(2, 2), Fake()
    nn.init.zeros_(other_weight.weight)
    nn.init.zeros_(other_weight.bias)
    nn.init.ones_(other_structure.weight)
    nn.init.zeros_(other_structure.bias)
    other_structure.extra_repr = lambda: "without its skip"
    other_study.scale = 2.0
    assert key() == key()
    for changed in (
        key(model=other_weight),
        key(model=other_structure),
        key(study=other_study),
        key(first=1),
    ):
        assert changed != key()


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


def test_the_code_is_hashed_without_what_no_number_runs_through(tmp_path, monkeypatch):
    for name in ("cka", "plots", "claims"):
        (tmp_path / f"{name}.py").write_text("1")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))

    def changed(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return records.code_hash.__wrapped__()

    before = records.code_hash.__wrapped__()
    assert changed("plots", "2") == changed("claims", "2") == before
    after = changed("cka", "2")
    assert after != before
    assert changed("taps", "3") != after


# Provenance ---------------------------------------------------------------------------------------


def test_provenance_is_text_and_names_no_machine():
    facts = records.provenance(study="lab", n=3, weights={"vit": "12"}, device="CPU, 1 threads")
    assert all(isinstance(value, str) for value in facts.values())
    assert facts["n"] == "3"
    assert facts["weights"] == "{'vit': '12'}"
    assert {"date", "python", "torch", "timm", "numpy", "torchmetrics", "code"} <= facts.keys()
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
