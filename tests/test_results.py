"""Pages of other studies beside the lab, made of toy notebooks."""

import base64
import io
import json
import re

import nbformat
import numpy as np
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from lib import plots
from lib.__main__ import main
from lib.findings import claims
from lib.site import results, run
from lib.studies.photographs import Photographs

TOC = """\
format: jb-book
root: index
parts:
  - caption: Other studies
    chapters:
      - file: studies
  - caption: Appendix
    chapters:
      - file: glossary
"""


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
    cell.id = f"fig-{number}"
    cell.metadata["mystnb"] = {
        "figure": {"caption": f"What is seen in {number}.", "name": f"fig-toy-{number}"},
        "image": {"alt": f"A square, {number}."},
    }
    return cell


def judged(value, key="E01-uniform"):
    claim = claims.CLAIMS[key]
    estimate = claims.Estimate(value, value - 0.1, value + 0.1)
    table = claims.table([claims.decide(claim, estimate, None, None)])
    data, metadata = table._repr_mimebundle_()
    output = new_output("execute_result", data, metadata=metadata)
    return new_code_cell("claims.table(judgements)", outputs=[output])


def chapter(path, pictures, *tables, code="draw = print", facts="8"):
    cells = [
        new_markdown_cell("# A toy\n\nWords with a {glue:text}`number` and (a-label)="),
        new_code_cell(code),
        new_markdown_cell("## First part"),
        *(figure(number, picture) for number, picture in enumerate(pictures)),
        *tables,
        new_markdown_cell("## The end\n\n$$ a $$ (eq-toy)"),
        new_code_cell(
            "as_table(facts)",
            outputs=[shown(text_html=f"<style>x\n\ny</style>\n<table>\n\n{facts} images</table>")],
        ),
    ]
    for number, cell in enumerate(cells):
        if not cell.id.startswith("fig-"):
            cell.id = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def write(tmp_path):
    """A book with two chapters and one other study, which has seen the first of them."""
    chapter(tmp_path / "chapters" / "02-toy.ipynb", [png(1), png(2)], judged(0.5))
    chapter(tmp_path / "chapters" / "03-other.ipynb", [png(3)])
    chapter(tmp_path / "records" / "photos" / "02-toy.ipynb", [png(4), None], judged(-0.5))
    (tmp_path / "_toc.yml").write_text(TOC)

    def run():
        return results.write(
            tmp_path / "chapters", tmp_path / "records", tmp_path / "studies",
            tmp_path / "_toc.yml",
        )  # fmt: skip

    return run


def everything(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "chapters" not in path.parts and "records" not in path.parts
    }


def test_each_figure_stands_beside_the_labs(write, tmp_path):
    (page,) = write()
    assert page == tmp_path / "studies" / "02-toy.md"
    text = page.read_text()
    assert text.startswith("# A toy, study by study\n")
    assert "{doc}`../chapters/02-toy`" in text
    assert "{doc}`../studies`" in text
    folder = page.with_suffix("")
    assert sorted(path.name for path in folder.iterdir()) == [
        "fig-toy-0-lab.png", "fig-toy-0-photos.png", "fig-toy-1-lab.png",
    ]  # fmt: skip
    for study, drawn in (("lab", png(1)), ("photos", png(4))):
        shown, expected = (
            np.asarray(Image.open(picture).convert("RGB"), dtype=int)
            for picture in (folder / f"fig-toy-0-{study}.png", io.BytesIO(drawn))
        )
        assert np.abs(shown - expected).max() <= 2
    first, second = re.findall(r":::::\{grid\}.*?\n:::::\n\n(?:.*?)\n\n", text, re.DOTALL)
    assert first.index("02-toy/fig-toy-0-lab.png") < first.index("02-toy/fig-toy-0-photos.png")
    assert ":alt: A square, 0." in first
    assert ":alt: In photos: What is seen in 0." in first
    assert first.rstrip().endswith("{numref}`fig-toy-0`: What is seen in 0.")
    assert second.count("{image}") == 1
    assert "*Not measured in this study.*" in second
    assert text.count("## First part") == 1


def test_no_label_equation_or_glued_number_is_there_twice(write):
    text = write()[0].read_text()
    for twice in ("glue", "a-label", "eq-toy", ":name:", "{figure}", ")="):
        assert twice not in text


def test_verdicts_stand_side_by_side(write, tmp_path):
    other = judged(0.5, "E01-stages")
    chapter(tmp_path / "records" / "photos" / "02-toy.ipynb", [], judged(-0.5), other)
    text = write()[0].read_text()
    (head,) = re.findall(r"<thead>(.*?)</thead>", text)
    assert re.findall(r"<th>(.*?)</th>", head) == ["claim", "The lab", "photos"]
    body = text.partition("<tbody>")[2]
    first, second = (re.findall("<td>(.*?)</td>", row) for row in body.splitlines()[1:3])
    assert "<b>E01-uniform</b>" in first[0]
    assert '<span class="verdict-supported">supported</span>' in first[1]
    assert "0.500 [0.400, 0.600]" in first[1]
    assert '<span class="verdict-contradicted">contradicted</span>' in first[2]
    assert "-0.500 [-0.600, -0.400]" in first[2]
    assert first[0].endswith("Taken together: depends on the study</small>")
    assert "<b>E01-stages</b>" in second[0]
    assert second[1] == "not measured"
    assert "supported" in second[2]
    assert "together" not in second[0]


def test_where_numbers_come_from_and_code_that_has_changed(write, tmp_path):
    text = write()[0].read_text()
    assert "8 images" in text
    assert "<style" not in text
    assert "\n\n" not in text[text.index("<table>") : text.index("8 images")]
    assert "The chapter's code has changed" not in text
    path = tmp_path / "records" / "photos" / "02-toy.ipynb"
    chapter(path, [png(4), None], judged(-0.5), code="draw = repr")
    assert "The chapter's code has changed" in write()[0].read_text()


def test_the_same_notebooks_give_the_same_bytes_and_nothing_old_stays(write, tmp_path):
    pages = tmp_path / "studies"
    write()
    before = everything(tmp_path)
    (pages / "01-gone.md").write_text("of a record that was removed")
    (pages / "02-toy" / "fig-old.png").write_bytes(b"")
    write()
    assert everything(tmp_path) == before


def test_pages_are_listed_exactly_while_they_exist(write, tmp_path):
    def listed():
        toc = yaml.safe_load((tmp_path / "_toc.yml").read_text())
        return [entry["file"] for part in toc["parts"] for entry in part["chapters"]]

    write()
    assert listed() == ["studies", "studies/02-toy", "glossary"]
    chapter(tmp_path / "records" / "more" / "03-other.ipynb", [png(5)])
    assert [page.name for page in write()] == ["02-toy.md", "03-other.md"]
    assert listed() == ["studies", "studies/02-toy", "studies/03-other", "glossary"]
    for path in (tmp_path / "records").glob("*/*.ipynb"):
        path.unlink()
    assert write() == []
    assert (tmp_path / "_toc.yml").read_text() == TOC
    assert [path.name for path in (tmp_path / "studies").iterdir()] == ["networks.txt"]


def test_large_pictures_get_fewer_colours(write, tmp_path):
    large = png(0, noise=300)
    assert len(large) > results.LARGEST
    chapter(tmp_path / "records" / "photos" / "02-toy.ipynb", [large])
    write()
    path = tmp_path / "studies" / "02-toy" / "fig-toy-0-photos.png"
    assert path.stat().st_size <= results.LARGEST
    assert Image.open(path).size == (300, 300)


def test_pictures_that_would_be_too_small_beside_each_other_stand_below_each_other(write, tmp_path):
    assert write()[0].read_text().count("{grid} 1 1 2 2") == 2
    buffer = io.BytesIO()
    Image.new("L", (results.WIDEST + 1, 2 * results.LINE)).save(buffer, "PNG")
    chapter(tmp_path / "records" / "photos" / "02-toy.ipynb", [buffer.getvalue(), png(1)])
    text = write()[0].read_text()
    assert text.count("{grid} 1 1 1 1") == text.count("{grid} 1 1 2 2") == 1


def test_a_line_that_says_what_is_missing_is_no_picture(write, tmp_path):
    plots.use_style()
    data = base64.b64decode(
        re.search('base64,(.*?)"', plots.inline(plots.nothing("x"), "").data)[1]
    )
    chapter(tmp_path / "records" / "photos" / "02-toy.ipynb", [data, png(1)])
    text = write()[0].read_text()
    assert text.count("*Not measured in this study.*") == 1
    assert ":alt: In photos: What is seen in 1." in text
    assert "fig-toy-0-photos" not in text


def test_networks_are_those_of_the_cards(write, tmp_path):
    def networks():
        return (tmp_path / "studies" / "networks.txt").read_text()

    write()
    assert networks().startswith("**Not measured here:**")
    card = {
        "role": "vit", "parameters": 925_352, "seconds": 5400, "device": "one CPU",
        "accuracy": 0.1234, "accuracy_interval": [0.117, 0.13], "test_images": 10_000,
        "recipe": {"images": 480_000, "distinct": 24_000, "until": 1.0, "seed": 1},
    }  # fmt: skip
    (tmp_path / "records" / "photos" / "vit.json").write_text(json.dumps(card))
    write()
    assert "`photos`, accuracy on 10,000 test images:" in networks()
    assert networks().splitlines()[-1] == (
        "| `vit` | 0.93 M | 480,000 | 24,000 | 1 | 0.123 [0.117, 0.130] | 90 min, one CPU |"
    )


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
        notebook = new_notebook(cells=[cell, new_code_cell(shows)], metadata={})
        notebook.metadata["kernelspec"] = run.KERNEL
        nbformat.write(notebook, tmp_path / "chapters" / f"{name}.ipynb")
    monkeypatch.setattr(run, "CHAPTERS", tmp_path / "chapters")
    monkeypatch.setattr(run, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(run, "write_pages", lambda: print("pages are made"))
    cards = {"vit": {"study": "tiny-imagenet-small"}, "shared": {"study": "lab"}}
    monkeypatch.setattr(Photographs, "cards", cards)
    return tmp_path


@pytest.mark.parametrize(
    ("more", "printed"),
    [([], "tiny-imagenet-small 4800 5\n"), (["-p", "shots", "3"], "tiny-imagenet-small 4800 3\n")],
)
def test_chapters_that_measure_are_executed_on_a_study(workshop, more, printed, capsys):
    assert main(["execute", "--study", "tiny-imagenet-small", *more]) == 0
    assert capsys.readouterr().out.endswith("pages are made\n")
    (path,) = (workshop / "records").rglob("*.ipynb")
    assert path == workshop / "records" / "tiny-imagenet-small" / "05-all.ipynb"
    assert nbformat.read(path, as_version=4).cells[-1].outputs[0].text == printed
    kept = run.cards(path.parent)
    assert kept == {"vit": {"study": "tiny-imagenet-small"}}  # a card of the lab is kept there


def test_what_cannot_be_executed_on_a_study_is_one_sentence(workshop, capsys):
    for given, says in (
        (["--study", "lab"], "the lab is what `execute` measures without --study"),
        (["01", "--study", "tiny-imagenet"], "none of 01-some has the parameters"),
        (["--study", "imaginary"], "there is no study 'imaginary'"),
    ):
        assert main(["execute", *given]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_the_books_own_pages_are_those_of_its_notebooks(tmp_path):
    toc = tmp_path / "_toc.yml"
    toc.write_bytes(results.TOC.read_bytes())
    pages = tmp_path / results.PAGES.name
    written = results.write(pages=pages, toc=toc)
    again = "run `python -m lib pages`"
    assert toc.read_bytes() == results.TOC.read_bytes(), again
    assert everything(pages) == everything(results.PAGES), again
    for page in written:
        assert not re.search(r":\w+: None|>None<|\bNone [\w*]", page.read_text())
