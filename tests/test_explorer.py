"""The explorer's data are the record's, and its words are the taps'."""

import ast
import base64
import json

import nbformat
import numpy as np
import pytest
import xarray as xr

from lib.findings import claims
from lib.site import CHAPTERS, RESULTS, board, explorer, run
from lib.site.commands import main

LAYERS = {"vit": ["blocks.0", "blocks.0.attn"], "resnet": ["layer1.0.bn2", "layer1.0", "norm"]}
BLOCKS = [True, False, False, True, False]


@pytest.fixture
def record():
    taps = [f"{role}/{layer}" for role, layers in LAYERS.items() for layer in layers]
    rng = np.random.default_rng(0)
    square = rng.uniform(-0.3, 1, (5, 5))
    square = (square + square.T) / 2
    square[4] = square[:, 4] = np.nan
    margin = np.abs(square) / 7
    square[0, 0], margin[0, 0] = 1.0, 3.0  # an interval that is wider than the scale
    pairs = ("tap", "other")
    return xr.Dataset(
        {"cka": (pairs, square), "low": (pairs, square - margin), "high": (pairs, square + margin)},
        coords={
            "tap": taps,
            "other": taps,
            "role": ("tap", [tap.split("/")[0] for tap in taps]),
            "layer": ("tap", [tap.split("/")[1] for tap in taps]),
            "block": ("tap", BLOCKS),
        },
        attrs={"study": "lab", "n_images": "64"},
    )


def read(record, folder):
    """The data of a record's script, and its values as ``values[kind][tap, other]``."""
    explorer.save(record, folder / "kept" / "cka.npz")
    return parsed(explorer.script(folder / "kept" / "cka.npz"))


def parsed(script):
    text = script.removeprefix("globalThis.explorerStudy(").removesuffix(");\n")
    data = json.loads(text)
    count = sum(len(role["layers"]) for role in data["roles"])
    bytes_ = np.frombuffer(base64.b64decode(data["values"]), np.int8).reshape(2, -1)
    values = np.zeros((2, count, count), int)
    rows, columns = np.tril_indices(count)
    values[:, rows, columns] = values[:, columns, rows] = bytes_
    return data, dict(zip(("cka", "margin"), values, strict=True))


def test_values_are_the_records_to_rounding(record, tmp_path):
    data, values = read(record, tmp_path)
    margin = (record["high"] - record["low"]).values / 2
    for found, expected in ((values["cka"], record["cka"].values), (values["margin"], margin)):
        defined = ~np.isnan(expected)
        np.testing.assert_array_equal(found == data["undefined"], ~defined)
        inside = defined & (np.abs(expected) < 1.27)
        assert inside.sum() >= 15
        np.testing.assert_allclose(found[inside] / 100, expected[inside], atol=0.005 + 1e-9)
    assert values["margin"][0, 0] == 127


def test_taps_and_blocks_are_found_again(record, tmp_path):
    data, _ = read(record, tmp_path)
    assert (data["study"], data["images"]) == ("lab", 64)
    vit, resnet = data["roles"]
    assert (vit["name"], vit["first"], vit["blocks"]) == ("ViT", 0, [0])
    assert (resnet["name"], resnet["first"], resnet["blocks"]) == ("ResNet", 2, [1])
    assert vit["layers"] == ["block 0, output", "block 0, attention"]
    assert resnet["layers"] == ["stage 1 unit 0, norm 2", "stage 1 unit 0, output", "last norm"]
    assert len(data["colours"]) == 101
    assert data["colours"][0] < "#2" < "#f" < data["colours"][-1]  # from dark to light


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("blocks.0:input", "block 0, input"),
        ("blocks.11.norm2:input", "block 11, stream between its branches"),
        ("blocks.3.mlp.fc2:input", "block 3, hidden layer of the MLP"),
        ("stages.2.blocks.5.conv1", "stage 2 unit 5, convolution 1"),
        ("stages.2.blocks.5", "stage 2 unit 5, output"),
        ("conv1", "convolution 1"),
        ("stem.conv", "stem, convolution"),
        ("blocks.3.something.else", "block 3, something.else"),
        ("features.7", "features.7"),
    ],
)
def test_layers_in_words(layer, words):
    assert explorer.layer_name(layer) == words


def test_roles_are_the_chapters():
    """Or the page would have to measure what the chapter has measured already."""
    source = nbformat.read(CHAPTERS / f"{explorer.CHAPTER}.ipynb", as_version=4)
    (cell,) = [c.source for c in source.cells if "record = measure(chosen, roles," in c.source]
    assert "[MinibatchCKA()], n_images, batch_size, seed, device)" in cell
    assert "roles = claims.networks(chosen, *arms)" in cell
    (arms,) = [line for line in cell.splitlines() if line.startswith("arms = ")]
    assert tuple(ast.literal_eval(arms.removeprefix("arms = "))) == explorer.ARMS
    parameters = run.parameters_of(CHAPTERS / f"{explorer.CHAPTER}.ipynb")
    assert list(parameters) == ["study", "n_images", "batch_size", "seed", "device"]
    assert parameters["study"] == "lab"


def test_what_is_measured_follows_the_parameters_of_the_chapters_run(monkeypatch):
    calls = []
    monkeypatch.setattr("lib.measure.measure", lambda *given, **named: calls.append((given, named)))
    explorer.measured(study="photographs", n_images=96)
    ((study, roles, _), named) = calls[0]
    assert study.name == "photographs"
    assert roles == claims.networks(study, *explorer.ARMS)
    assert named == {"n_images": 96, "batch_size": 64, "seed": 0, "device": "cpu"}


def test_measure_writes_what_the_explorer_shows(record, tmp_path, monkeypatch):
    record.attrs["study"] = "mine"
    monkeypatch.setattr("lib.measure.measure", lambda *_: record)
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(board, "RESULTS", tmp_path / "results")
    out = tmp_path / "results" / "mine" / "cka.npz"
    assert main(["measure", "vit", "--out", str(out)]) == 0
    assert parsed(explorer.script(out))[0]["study"] == "mine"
    # On its page although no chapter was run on it.
    assert board.Book(tmp_path).maps() == ["mine"]
    assert '<option value="mine">mine</option>' in board.Book(tmp_path).render("explorer")


def test_committed_data_are_small_and_each_tap_is_like_itself():
    studies = sorted(RESULTS.glob("*/cka.npz"))
    assert RESULTS / "lab" / "cka.npz" in studies
    for path in studies:
        assert path.stat().st_size < 200_000
        data, values = parsed(explorer.script(path))
        assert data["study"] == path.parent.name
        assert len({role["name"] for role in data["roles"]}) == len(data["roles"])
        own = np.diagonal(values["cka"])
        assert set(own.tolist()) <= {100, data["undefined"]}
