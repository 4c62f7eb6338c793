"""What is kept of executed chapters, and the pages that are made of it, with toy notebooks."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from datetime import date

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from lib import plots
from lib.findings import CLAIMS, claims
from lib.intervals import Estimate
from lib.site import CHAPTERS, PUBLISHED, RESULTS, ROOT, board, commands, extension, results, run
from lib.site.commands import main
from lib.studies.photographs import Photographs


def png(shade, noise=0):
    pixels = np.full((noise or 2 * results.LINE, noise or 4, 3), shade, dtype=np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 255, pixels.shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shown(**data):
    return new_output("display_data", {name.replace("_", "/"): d for name, d in data.items()})


def figure(number, picture):
    """A cell that draws; without a picture, one that had nothing to draw."""
    outputs = [shown(image_png=base64.b64encode(picture).decode())] if picture else []
    cell = new_code_cell(f"draw({number})", outputs=outputs)
    cell.metadata["mystnb"] = {
        "figure": {"caption": f"The “{number}” & more.", "name": f"fig-toy-{number}"},
        "image": {"alt": f"A square, {number}."},
    }
    return cell


def judged(value, key="E01-uniform"):
    estimate = Estimate(value, value - 0.1, value + 0.1)
    table = claims.table([claims.Judgement(CLAIMS[key], (estimate,))])
    data, metadata = table._repr_mimebundle_()
    output = new_output("execute_result", data, metadata=metadata)
    return new_code_cell(f"claims.table({key!r})", outputs=[output])


def glue(**values):
    prefix = "application/papermill.record/"
    outputs = [
        new_output(
            "display_data",
            {f"{prefix}text/plain": repr(value)},
            metadata={"scrapbook": {"mime_prefix": prefix, "name": name}},
        )
        for name, value in values.items()
    ]
    return new_code_cell("glue(...)", outputs=outputs, metadata={"tags": ["remove-cell"]})


def notebook(pictures, *tables, code="import os\ndraw = print", facts="8", printed="one"):
    cells = [
        new_markdown_cell(
            "# A toy\n\nThere are {glue:text}`count:.1f` and {glue:text}`words:.2f`."
        ),
        new_code_cell(code),
        glue(count=2.25, words="not measured here"),
        new_code_cell("print(1)", outputs=[new_output("stream", name="stdout", text=printed)]),
        *(figure(number, picture) for number, picture in enumerate(pictures)),
        *tables,
        new_code_cell(
            "as_table(facts)",
            outputs=[
                shown(
                    text_html="<style>x\n\ny</style>\n<table><tr>\n<th>images</th>\n"
                    f"<td>{facts} &lt; 9</td></tr></table>"
                )
            ],
        ),
    ]
    # As it is read from a file.
    return json.loads(nbformat.writes(new_notebook(cells=cells)))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A book whose chapter 02-toy was run on the lab and on the study `photos`."""
    for module in (results, board, extension):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "lab").mkdir()
    lab = notebook([png(1), png(2)], judged(0.5))
    (tmp_path / "lab" / "02-toy.ipynb").write_text(json.dumps(lab))
    results.save("photos", {"02-toy": notebook([png(4), None], judged(-0.5), printed="<two>")})
    return tmp_path


# What is kept ------------------------------------------------------------------------------------


def test_what_a_chapter_holds_is_kept(home):
    chapter = results.load("photos")["chapters"]["02-toy"]
    assert chapter["edition"] == results.EDITION
    assert chapter["figures"] == {
        "fig-toy-0": {
            "caption": "The “0” & more.",
            "alt": "In photos: The “0” & more.",
            "width": 4,
        },
        "fig-toy-1": {"caption": "The “1” & more.", "alt": "In photos: The “1” & more."},
    }
    assert chapter["glued"] == {"count": 2.25, "words": "not measured here"}
    assert list(chapter["outputs"].values()) == ["<pre>&lt;two&gt;</pre>"]
    assert chapter["provenance"] == {"images": "8 < 9", "date": date.today().isoformat()}
    assert [evidence["replicates"] for evidence in chapter["claims"]] == [[[-0.5, -0.6, -0.4]]]
    lab = results.of_chapters(home / "lab")["chapters"]["02-toy"]
    assert lab["figures"]["fig-toy-1"]["alt"] == "A square, 1."
    assert (lab["code"], list(lab["outputs"])) == (chapter["code"], list(chapter["outputs"]))


def test_pictures_are_the_chapters_in_fewer_colours(home):
    (name,) = kept = results.figures("photos")
    assert name == "02-toy/fig-toy-0"
    shown = np.asarray(Image.open(io.BytesIO(kept[name])).convert("RGB"), dtype=int)
    expected = np.asarray(Image.open(io.BytesIO(png(4))), dtype=int)
    assert np.abs(shown - expected).max() <= 2
    large = png(0, noise=300)
    assert len(large) > results.LARGEST
    fewer = results.small(large)
    assert len(fewer) <= results.LARGEST
    assert Image.open(io.BytesIO(fewer)).size == (300, 300)


def test_a_line_that_says_what_is_missing_is_no_picture(home):
    plots.use_style()
    shown = plots.inline(plots.nothing("x"), "").data
    line = base64.b64decode(re.search('base64,(.*?)"', shown)[1])
    results.save("photos", {"02-toy": notebook([line, png(1)])})
    assert list(results.figures("photos")) == ["02-toy/fig-toy-1"]


def test_one_chapter_or_card_replaces_its_own_only_and_the_same_gives_the_same_bytes(home):
    folder = results.save("photos", {"03-more": notebook([png(9)])}, {"vit": {"seed": 1}})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"results.json", "figures.zip"}
    assert list(results.load("photos")["chapters"]) == ["02-toy", "03-more"]
    results.save("photos", {"03-more": notebook([png(9)])})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    results.save("photos", {"02-toy": notebook([])}, {"resnet": {"seed": 2}})
    assert list(results.figures("photos")) == ["03-more/fig-toy-0"]
    assert results.load("photos")["cards"] == {"vit": {"seed": 1}, "resnet": {"seed": 2}}


@pytest.mark.parametrize(
    ("code", "same"),
    [
        ("draw = print", True),
        ("from os import (\n    path,\n)\n\ndraw = print", True),
        ("import os\ndraw = print  # other", False),
        ("draw = repr", False),
    ],
)
def test_the_hash_of_the_code_leaves_out_imports(code, same):
    mine, base = (
        results.of_chapter(notebook([], **given), "x")[0]["code"] for given in ({"code": code}, {})
    )
    assert (mine == base) == same


# The switch ---------------------------------------------------------------------------------------


def pages(home):
    chapters = home / "lab"
    made = extension.Pages(home / "published", chapters)
    content = ["the file in book/"]
    made.read(None, "chapters/02-toy", content)
    return made, json.loads(content[0])


def test_a_chapter_is_shown_with_numbers_verdicts_and_places(home):
    _, shown = pages(home)
    assert shown["cells"][0]["source"] == (
        '# A toy\n\nThere are <span data-glue="count:.1f">2.2</span> and '
        '<span data-glue="words:.2f">not measured here</span>.'
    )
    (table,) = [c for c in shown["cells"] if "claims.table" in str(c["source"])]
    html = table["outputs"][0]["data"]["text/html"]
    row = BeautifulSoup(html, "html.parser").find("tr", id="e01-uniform")
    assert "0.500 [0.400, 0.600]" in row.text
    assert row.find(class_="verdict-supported")
    keys = [tag for cell in shown["cells"] for tag in cell["metadata"].get("tags", [])]
    assert len([key for key in keys if key.startswith("cell-")]) == len(set(keys) - {"remove-cell"})


def test_the_switch_has_every_place_of_the_other_study(home):
    made, shown = pages(home)
    lab, photos = made.switches["02-toy"]
    assert (lab["name"], lab["html"]) == ("lab", {})
    assert (photos["name"], photos["title"]) == ("photos", "photos")
    html = {key: BeautifulSoup(value, "html.parser") for key, value in photos["html"].items()}
    image = html.pop("figure:fig-toy-0").img
    assert image["src"] == "../_static/studies/photos/02-toy/fig-toy-0.png"
    assert image["alt"] == "In photos: The “0” & more."
    assert html.pop("figure:fig-toy-1").text == "Not measured in this study."
    assert html.pop("glue:count:.1f").text == "2.2"
    assert html.pop("glue:words:.2f").text == "not measured here"
    tagged = {
        tag.removeprefix("cell-"): "".join(cell["source"])
        for cell in shown["cells"]
        for tag in cell["metadata"].get("tags", [])
    }
    cells = {tagged[key.removeprefix("cell:")]: found for key, found in html.items()}
    assert set(cells) == {"print(1)", "claims.table('E01-uniform')", "as_table(facts)"}
    assert cells["print(1)"].pre.text == "<two>"
    assert cells["claims.table('E01-uniform')"].find(class_="verdict-contradicted")
    assert cells["as_table(facts)"].find("th", string="images").find_next("td").text == "8 < 9"


def test_code_that_has_changed_is_said_and_its_outputs_stay_the_labs(home):
    made, _ = pages(home)
    assert made.switches["02-toy"][1]["note"] == f"Measured by the {results.EDITION} of this book."
    other = notebook([png(4), None], judged(-0.5))
    (cell,) = [cell for cell in other["cells"] if "print(1)" in str(cell["source"])]
    cell["source"] = "print(1.0)"
    results.save("photos", {"02-toy": other})
    _, photos = pages(home)[0].switches["02-toy"]
    assert photos["note"].endswith("whose code for this chapter was another.")
    assert "<pre>" not in "".join(photos["html"].values())


def test_the_last_run_outweighs_what_is_published(home):
    (home / "published").mkdir()
    for name in ("02-toy", "03-old"):
        text = json.dumps(notebook([], printed="published"))
        (home / "published" / f"{name}.ipynb").write_text(text)
    made, shown = pages(home)
    assert "one" in json.dumps(shown)
    assert "published" not in json.dumps(shown)
    content = [""]
    made.read(None, "chapters/03-old", content)
    assert "published" in content[0]


def test_a_chapter_that_only_the_lab_has_run_has_no_switch(home):
    (home / "lab" / "03-alone.ipynb").write_text(json.dumps(notebook([png(3)])))
    made, _ = pages(home)
    made.read(None, "chapters/03-alone", [""])
    assert list(made.switches) == ["02-toy"]


def test_networks_are_those_of_the_cards(home):
    card = {
        "role": "vit", "parameters": 925_352, "seconds": 5400, "device": "one CPU",
        "accuracy": 0.1234, "accuracy_interval": [0.117, 0.13], "test_images": 10_000,
        "recipe": {"images": 480_000, "distinct": 24_000, "until": 1.0, "seed": 1},
    }  # fmt: skip
    results.save("photos", {}, {"vit": card})
    table = BeautifulSoup(board.Book(home / "lab").render("networks"), "html.parser")
    assert table.caption.text == "photos, accuracy on 10,000 test images"
    assert [cell.text for cell in table.tbody.find_all(["th", "td"])] == [
        "vit", "0.93 M", "480,000", "24,000", "1", "0.123 [0.117, 0.130]", "90 min, one CPU",
    ]  # fmt: skip


# What pages show of the committed results, as a program of its own and in this one.
SHOWN = """
import json
from lib.site import PUBLISHED, extension
pages = extension.Pages(PUBLISHED)
for name in pages.chapters:
    pages.read(None, f"chapters/{name}", [""])
templates = ("scoreboard", "summary", "studies", "explorer", "networks")
shown = [pages.switches, [pages.book.render(name) for name in templates]]
text = json.dumps(shown, sort_keys=True)
"""
LACKING = [
    "torch", "torchvision", "torchmetrics", "timm", "pandas", "scipy", "xarray", "seaborn",
    "psutil", "matplotlib", "papermill", "msgspec", "safetensors", "huggingface_hub", "h5py",
    "h5netcdf",
]  # fmt: skip


def test_pages_are_the_same_without_pytorch(tmp_path):
    """Nor what else the group `site` of pyproject.toml lacks."""
    lacking = f"""
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find, lacking = finder.find_spec, {LACKING}
finder.find_spec = lambda name, *at: None if name.split(".")[0] in lacking else find(name, *at)
"""
    told = tmp_path / "shown"
    tell = f"open({str(told)!r}, 'w').write(text)\nprint({{*lacking}} & {{*sys.modules}})"
    ran = subprocess.run(
        [sys.executable, "-c", lacking + SHOWN + tell],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("set()\n", "")
    names = {}
    exec(SHOWN, names)
    assert len(names["pages"].switches) >= 6
    assert told.read_text() == names["text"]


# On the command line ------------------------------------------------------------------------------


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A book of sources: only the last chapter measures a study's images."""
    (tmp_path / "chapters").mkdir()
    for name, values in {
        "00-none": "n = 1",
        "01-some": "study = 'lab'",
        "05-all": "study = 'lab'\nn_images = 7\nshots = 10",
    }.items():
        cell = new_code_cell(values, metadata={"tags": ["parameters"]})
        shows = "print(study, n_images, shots)" if name == "05-all" else "1 / 0"
        source = new_notebook(cells=[cell, new_code_cell(shows), new_code_cell("")], metadata={})
        source.metadata["kernelspec"] = run.KERNEL
        nbformat.write(source, tmp_path / "chapters" / f"{name}.ipynb")
    monkeypatch.setattr(commands, "CHAPTERS", tmp_path / "chapters")
    monkeypatch.setattr(commands, "DRAFTS", tmp_path / "drafts")
    for module in (commands, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))
    cards = {"vit": {"study": "photographs"}, "shared": {"study": "lab"}}
    monkeypatch.setattr(Photographs, "cards", cards)
    return tmp_path


@pytest.mark.parametrize(
    ("more", "printed"),
    [([], "photographs 8000 10\n"), (["-p", "shots", "3"], "photographs 8000 3\n")],
)
def test_chapters_that_measure_are_executed_on_a_study(workshop, more, printed, capsys):
    assert main(["execute", "--study", "photographs", *more]) == 0
    assert "photographs: 05-all in " in capsys.readouterr().out
    kept = results.load("photographs")
    assert list(kept["chapters"]["05-all"]["outputs"].values()) == [f"<pre>{printed}</pre>"]
    assert kept["cards"] == {"vit": {"study": "photographs"}}  # the lab keeps its own


def test_what_cannot_be_executed_on_a_study_is_one_sentence(workshop, capsys):
    for given, says in (
        (["--study", "lab"], "the lab is what `execute` measures without --study"),
        (["01", "--study", "photographs"], "none of 01-some has the parameters"),
        (["--study", "imaginary"], "there is no study 'imaginary'"),
    ):
        assert main(["execute", *given]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


# The book's own -----------------------------------------------------------------------------------


def test_committed_results_are_complete_and_name_no_machine():
    chapters = {path.stem for path in CHAPTERS.glob("0[1-6]*.ipynb")}
    paths = sorted(RESULTS.glob("*/results.json"))
    assert paths
    for path in paths:
        study = path.parent.name
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(root|home|work|tmp|Users|private|var)/|[A-Z]:\\", text)
        kept, pictures = results.load(study), results.figures(study)
        assert kept["study"] == study
        assert set(kept["chapters"]) == chapters
        drawn = set()
        for name, chapter in kept["chapters"].items():
            assert chapter["claims"], (study, name)
            assert {"images", "code", "study"} <= set(chapter["provenance"])
            drawn |= {f"{name}/{key}" for key, one in chapter["figures"].items() if "width" in one}
        assert set(pictures) == drawn
        assert max(map(len, pictures.values())) <= results.LARGEST
        assert (path.parent / "cka.npz").exists()


def test_published_chapters_carry_evidence():
    for path in PUBLISHED.glob("*.ipynb"):
        chapter, _ = results.of_chapter(json.loads(path.read_text(encoding="utf-8")), "lab")
        for evidence in chapter["claims"]:
            assert set(evidence) == {"claim", "replicates", "baselines", "why"}, path.name


def test_cells_are_told_apart_by_their_code():
    """Or a study's output would be shown in the place of another."""
    for path in PUBLISHED.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        keys = [results.cell_key(c) for c in cells if c["cell_type"] == "code" and c["outputs"]]
        assert len(keys) == len(set(keys)), path.name
