"""The chapters of findings run on any study, and say what they could not measure there.

Three studies and six chapters run one after the other in one kernel, each from an empty namespace:
most of what a chapter of so few images costs is the import of its packages.
"""

import ast
import math
import re
import zipfile

import nbformat
import numpy as np
import pytest
import safetensors.torch
import torch
import xarray as xr
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from lib.findings import CLAIMS
from lib.findings.claims import NOT_MEASURED
from lib.records import ROOT
from lib.site import CHAPTERS as SOURCES
from lib.site import run
from lib.studies import hub, load_study

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet-sample.zip"
VIT, RESNET = "test_vit.r160_in1k", "test_resnet.r160_in1k"
CHAPTERS = {
    "01": ("E23",),
    "02": ("E01", "E02", "E21", "E22"),
    "03": ("E03", "E04", "E05", "E06", "E07"),
    "04": ("E08", "E09", "E10", "E11"),
    "05": ("E12", "E13", "E14", "E15", "X9"),
    "06": ("E16", "E17", "E18", "E19"),
}
PARAMETERS = {"n_images": 16, "batch_size": 8, "n_fields": 2, "channels": 1, "shots": 2}
STUDIES = {
    # No twins, pictures without labels; photographs where there are some.
    "pair": ({"vit": VIT, "resnet": RESNET}, 224, False),
    # What imagenet.toml has roles for.
    "wide": (
        {"vit": VIT, "vit_b32": VIT, "vit_gap": "test_vit_relpos", "vit_cls": VIT}
        | {"resnet": RESNET, "mixer": "mixer_s32_224"},
        128,
        True,
    ),
    "alone": ({"vit": VIT}, 64, True),
}


def make_study(folder, name):
    """A study of random weights, and 24 pictures of which it draws some."""
    roles, crop, labelled = STUDIES[name]
    pictures = folder / f"{name} pictures"
    pictures.mkdir()
    if PHOTOGRAPHS.exists() and not labelled:
        with zipfile.ZipFile(PHOTOGRAPHS) as archive:
            for member in [one for one in archive.namelist() if one.endswith(".jpg")][:24]:
                (pictures / member.replace("/", "-")).write_bytes(archive.read(member))
    else:
        stream = np.random.default_rng(0)
        for number in range(24):
            target = pictures / "ab"[number % 2] if labelled else pictures
            target.mkdir(exist_ok=True)
            coarse = stream.integers(0, 255, (9, 7, 3), dtype=np.uint8)
            coarse[: 5 * (number % 2)] //= 3
            Image.fromarray(coarse).resize((160, 140)).save(target / f"{number}.png")
    text = f'[images]\nfolder = "{pictures.name}"\nresize = {crop}\ncrop = {crop}\n'
    for seed, (role, model) in enumerate(roles.items(), start=10):
        weights = hub.build(model, seed, crop).state_dict()
        noise = torch.Generator().manual_seed(seed)
        for key, value in weights.items():  # away from the start, where branches add nothing
            if key.endswith("weight"):
                weights[key] = value + 0.05 * torch.randn(value.shape, generator=noise)
        safetensors.torch.save_file(weights, folder / f"{name}-{role}.safetensors")
        text += f'[roles.{role}]\nmodel = "{model}"\nweights = "{name}-{role}.safetensors"\n'
    (folder / f"{name}.toml").write_text(text)
    return folder / f"{name}.toml"


class Executed:
    """The chapters as executed on a study, and the records they made."""

    def __init__(self, study, cells, records):
        self.study, self.records = study, records
        self.cells = {
            number: [cell for cell in cells if cell.id.startswith(f"{study.name}-{number}-")]
            for number in CHAPTERS
        }

    def outputs(self, number):
        return [out for cell in self.cells[number] for out in cell.get("outputs", [])]

    def tables(self, number):
        pages = [out["data"].get("text/html", "") for out in self.outputs(number) if "data" in out]
        return [BeautifulSoup(page, "html.parser").table for page in pages if "<table" in page]

    def verdicts(self, number):
        """By claim: measured, other seed, untrained, and the verdict with its reason."""
        (table,) = [one for one in self.tables(number) if "claims" in one.get("class", [])]
        rows = [row.find_all("td") for row in table.tbody.find_all("tr")]
        return {row[0].b.text: [cell.get_text(" ") for cell in row[1:]] for row in rows}

    def glued(self, number):
        return {
            out["metadata"]["scrapbook"]["name"]: text
            for out in self.outputs(number)
            if "scrapbook" in out.get("metadata", {})
            for mime, text in out["data"].items()
            if mime.endswith("text/plain")
        }


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    paths = {name: make_study(folder, name) for name in STUDIES}
    cells = []
    for name, path in paths.items():
        for number in CHAPTERS:
            cells.append(new_code_cell("%reset -f", id=f"{name}-reset-{number}"))
            (chapter,) = SOURCES.glob(f"{number}-*.ipynb")
            for cell in nbformat.read(chapter, as_version=4).cells:
                if "parameters" in cell.metadata.get("tags", []):
                    ours = PARAMETERS | {"study": str(path)}
                    known = re.findall(r"^(\w+) =", cell.source, re.MULTILINE)
                    lines = [f"{key} = {ours[key]!r}" for key in known if key in ours]
                    cell.source += "\n" + "\n".join(lines)
                    cell.metadata = {}
                cell.id = f"{name}-{cell.id}"
                cells.append(cell)
    (folder / "source").mkdir()
    notebook = new_notebook(cells=cells, metadata={"kernelspec": run.KERNEL})
    nbformat.write(notebook, folder / "source" / "01-all.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT_SEE_CACHE", str(folder / "cache"))
        patch.setattr(run, "DRAFTS", folder / "drafts")
        (written,) = run.execute("01", out=folder / "out", source=folder / "source")
    done = nbformat.read(written, as_version=4).cells
    records = [xr.load_dataset(p, engine="h5netcdf") for p in (folder / "cache").glob("*.nc")]
    return {
        name: Executed(
            load_study(str(path)), done, [r for r in records if r.attrs.get("study") == name]
        )
        for name, path in paths.items()
    }


@pytest.fixture(params=STUDIES)
def study(request, everything):
    return everything[request.param]


# What holds on any study --------------------------------------------------------------------------


@pytest.mark.parametrize("number", CHAPTERS)
def test_every_claim_is_listed_with_numbers_or_with_a_reason(study, number):
    verdicts = study.verdicts(number)
    assert set(verdicts) == {key for key in CLAIMS if key.startswith(CHAPTERS[number])}
    for key, (measured, other_seed, untrained, verdict) in verdicts.items():
        kind = re.fullmatch(
            r"(supported|contradicted|inconclusive|not measurable) *(.*)", verdict.strip()
        )
        assert kind, (key, verdict)
        if kind[1] == "not measurable":
            assert len(kind[2]) > 5, key
        else:
            value, low, high = map(float, re.findall(r"-?\d+\.\d+", measured))
            assert low <= value <= high, key
        for arm in CLAIMS[key].arms:
            if study.study.find(arm.partition("+")[0]) is None:
                assert kind[2].startswith(f"{NOT_MEASURED}: no network "), key
                assert (measured, other_seed, untrained) == ("–", "–", "–")
                break
        assert "nan" not in measured + other_seed + untrained, key


@pytest.mark.parametrize("number", CHAPTERS)
def test_every_figure_is_drawn_and_the_text_pastes_numbers_or_words(study, number):
    for cell in study.cells[number]:
        if "figure" in cell.metadata.get("mystnb", {}):
            assert any("image/png" in out.get("data", {}) for out in cell.outputs), cell.id
    glued = study.glued(number)
    text = "\n".join(c.source for c in study.cells[number] if c.cell_type == "markdown")
    pasted = re.findall(r"\{glue:text\}`([^`:]+)(?::([^`]*))?`", text)
    assert len(pasted) > 5
    for key, form in pasted:
        value = ast.literal_eval(glued[key])  # neither nan nor inf is a literal
        if value != NOT_MEASURED:  # words are pasted without a format
            assert re.fullmatch(r"[+-]?[\d,.]+%?", format(value, form)), (key, value)


def test_similarities_lie_between_minus_one_and_one(study):
    records = [record for record in study.records if "cka" in record]
    squares = [record["cka"].sel(tap=record["other"].values).values for record in records]
    assert len(squares) == 3  # of chapters 02, 04 and 06
    for square in squares:
        constant = np.isnan(np.diag(square))
        assert constant.mean() < 0.2
        known = square[~constant][:, ~constant]
        np.testing.assert_allclose(np.diag(known), 1, atol=1e-5)
        np.testing.assert_allclose(known, known.T, atol=1e-5)
        assert np.abs(known).max() <= 1 + 1e-5
        assert known.min() < 0.995  # not everything is alike


@pytest.mark.parametrize(("name", "grid"), [("pair", 7), ("wide", 4), ("alone", 4)])
def test_tokens_and_locations_share_the_finest_grid_of_all_networks(everything, name, grid):
    maps = [r["localisation"] for r in everything[name].records if "localisation" in r]
    assert len(maps) == 2 * len(everything[name].study.those("vit", "vit_gap", "resnet"))
    assert {one.shape[1:] for one in maps} == {(grid**2, grid**2)}
    assert all(np.nanmax(np.abs(one)) <= 1 + 1e-5 for one in maps)


def test_heads_look_no_further_than_the_image_is_wide(study):
    records = [record for record in study.records if "prefix_mass" in record]
    assert len(records) == 2  # of chapters 03 and 06
    for record in records:
        side = STUDIES[study.study.name][1]
        known = ~np.isnan(record["distance"].values)
        maps = [tap.endswith("attn_drop") for tap in record["tap"].values.tolist()]
        assert (known.any(1) == maps).all()
        distance = record["distance"].values[known]
        assert 0 < distance.min() < distance.max() < math.sqrt(2) * side
        assert np.isnan(
            record["object_mass"].values[known]
        ).all()  # the objects' places are unknown


# What is left out ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "key", "reason"),
    [
        ("pair", "01", "E23-batch-size", "needs at least two minibatches of 128"),
        ("pair", "02", "E21-diagonal", "not measured here: no network vit_gap"),
        ("pair", "03", "E04-data", "not measured here: no network vit_data_03"),
        ("pair", "04", "E11-accuracy", "not measured here: no network vit_no_skip_middle"),
        ("pair", "05", "E14-resnet", "needs labels"),
        ("pair", "06", "E18-middle", "needs labels"),
        ("wide", "06", "E16-late", "not measured here: no network vit_data_10"),
        ("alone", "02", "E01-uniform", "not measured here: no network resnet"),
        ("alone", "05", "E12-sharper", "not measured here: no network resnet"),
    ],
)
def test_a_claim_that_cannot_be_measured_says_why(everything, name, number, key, reason):
    measured, other_seed, untrained, verdict = everything[name].verdicts(number)[key]
    assert " ".join(verdict.split()) == f"not measurable {reason}"
    assert (measured, other_seed, untrained) == ("–", "–", "–")


@pytest.mark.parametrize(
    ("name", "number", "keys"),
    [
        ("pair", "02", ("E01-uniform", "E01-grid", "E02-midpoint", "E02-last-third")),
        ("pair", "03", ("E03-local", "E03-spread", "E03-global", "E06-centre", "E07-mlp")),
        ("pair", "04", ("E08-crossing", "E09-class-late", "E10-patches-end")),
        ("pair", "05", ("E12-own-patch", "E12-sharper", "X9-last-block")),
        ("wide", "02", ("E21-diagonal", "E22-blocks", "E22-kinship")),
        ("wide", "05", ("E13-pooling", "E14-gap", "E14-resnet", "E15-tie", "E15-plateau")),
        ("wide", "06", ("E18-middle",)),
        ("alone", "03", ("E03-local", "E06-centre")),
        ("alone", "05", ("E12-edges", "E15-plateau")),
    ],
)
def test_a_claim_that_can_be_measured_is_with_its_untrained_twin(everything, name, number, keys):
    for key in keys:
        measured, other_seed, untrained, verdict = everything[name].verdicts(number)[key]
        assert re.fullmatch(r"-?\d+\.\d{3} \[.*\]", measured), key
        assert re.fullmatch(r"-?\d+\.\d{3} \[.*\]", untrained), key
        assert other_seed == "–"
        assert "not measurable" not in verdict, key


def test_missing_twins_are_words_in_the_text_and_dashes_in_tables(everything):
    pair, alone = everything["pair"], everything["alone"]
    words = repr(NOT_MEASURED)
    first, second = pair.glued("01"), pair.glued("02")
    assert first["vit_seed_first"] == first["resnet_seed_last"] == words
    assert second["low_high_mixer_trained"] == second["low_high_vit_gap_untrained"] == words
    assert -1 <= float(first["vit_floor_last"]) <= 1
    assert -1 <= float(second["low_high_resnet_untrained"]) <= 1
    assert alone.glued("01")["resnet_floor_first"] == words
    assert pair.glued("05")["centre_vit"] == pair.glued("05")["single_vit"] == words
    assert 0 <= float(alone.glued("05")["single_vit"]) <= 1
    rows = [row for table in pair.tables("02") for row in table.find_all("tr")]
    (twin,) = [row for row in rows if row.th and row.th.text == "other seed"]
    assert {cell.text for cell in twin.find_all("td")} == {"–"}


def test_pictures_were_photographs():
    if not PHOTOGRAPHS.exists():
        pytest.skip("no photographs beside this checkout: drawn pictures took their place")
