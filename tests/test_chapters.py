"""The book itself: sources are clean, executed copies are complete, pictures can be read."""

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output

from lib.site import board, results, run

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "chapters").glob("*.ipynb"))
PUBLISHED = ROOT / "book" / "chapters"
MAX_PICTURE = 120_000  # bytes of one figure

pytestmark = pytest.mark.filterwarnings("ignore::nbformat.warnings.MissingIDFieldWarning")
each_chapter = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def executed(source):
    path = PUBLISHED / source.name
    assert path.exists(), f"{source.name} has no executed copy: run `make book`"
    return [cell for cell in code_cells(path) if "injected-parameters" not in tags(cell)]


def pictures(source):
    """(cell, base64) of every picture in the executed chapter."""
    for cell in executed(source):
        for output in cell.outputs:
            for mime, data in output.get("data", {}).items():
                if mime.startswith("image/"):
                    yield cell, mime, data


def test_there_are_chapters():
    # Without any, the parametrised tests below would pass by testing nothing.
    assert SOURCES


def test_chapters_and_executed_copies_are_the_same_set():
    assert {p.name for p in PUBLISHED.glob("*.ipynb")} == {p.name for p in SOURCES}


def test_toc_lists_every_chapter_and_nothing_that_is_missing():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    entries = [entry for part in toc["parts"] for entry in part["chapters"]]
    listed = [next(iter(entry.values())) for entry in entries] + [toc["root"]]
    found = []
    for name in listed:
        files = sorted(
            {*(ROOT / "book").glob(f"{name}.md"), *(ROOT / "book").glob(f"{name}.ipynb")}
        )
        assert files, f"{name} is in _toc.yml but not in book/"
        found += [path.relative_to(ROOT / "book").with_suffix("").as_posix() for path in files]
    assert [name for name in found if name.startswith("chapters/")] == [
        f"chapters/{path.stem}" for path in SOURCES
    ]


@each_chapter
def test_source_is_stripped(source):
    for cell in code_cells(source):
        assert not cell.outputs
        assert cell.execution_count is None


@each_chapter
def test_source_has_one_parameters_cell(source):
    assert sum("parameters" in tags(cell) for cell in code_cells(source)) == 1


@each_chapter
def test_published_code_is_the_source_code(source):
    # Without the injected cell: what papermill adds is what a reader did not write.
    assert [cell.source for cell in executed(source)] == [c.source for c in code_cells(source)]
    prose, published = (
        [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
        for path in (source, PUBLISHED / source.name)
    )
    assert published == prose


@each_chapter
def test_published_with_its_own_parameters(source):
    assert len(executed(source)) == len(code_cells(PUBLISHED / source.name)), (
        "published from a run with other parameters: run `make book`"
    )


@each_chapter
def test_every_cell_ran_without_error(source):
    cells = [cell for cell in executed(source) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [o for o in cell.outputs if o.output_type == "error"], cell.source


@each_chapter
def test_there_is_something_to_compare(source):
    # A chapter without printed results passes nbval whatever happens to its numbers.
    printed = [
        output
        for cell in executed(source)
        for output in cell.outputs
        if output.output_type == "stream" or "text/plain" in output.get("data", {})
    ]
    assert printed
    assert list(pictures(source))


@each_chapter
def test_every_picture_has_caption_name_and_alt_text(source):
    names = []
    for cell, _, _ in pictures(source):
        mystnb = cell.metadata.get("mystnb", {})
        figure, image = mystnb.get("figure", {}), mystnb.get("image", {})
        where = cell.source.splitlines()[0]
        assert figure.get("caption", "").strip(), f"no caption: {where}"
        assert figure.get("name", "").strip(), f"no name: {where}"
        assert len(image.get("alt", "")) >= 20, f"no alternative text that says something: {where}"
        names.append(figure["name"])
    assert len(names) == len(set(names)), "one figure to a cell, each with its own name"


@each_chapter
def test_pictures_are_small(source):
    for cell, mime, data in pictures(source):
        size = len(data.encode()) if "svg" in mime else len(base64.b64decode(data))
        assert size <= MAX_PICTURE, f"{size} bytes: {cell.source.splitlines()[0]}"


@each_chapter
def test_outputs_name_no_machine(source):
    machine = re.compile(r"/(root|home|work|tmp|Users|private|var)/|[A-Z]:\\|" + "pypi" + r"\.org")
    for cell in executed(source):
        for output in cell.outputs:
            texts = [output.get("text", "")]
            texts += [v for k, v in output.get("data", {}).items() if not k.startswith("image/")]
            for text in map(str, texts):
                assert not machine.search(text), machine.search(text)
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@each_chapter
def test_reading_takes_as_long_as_it_says(source):
    cells = nbformat.read(source, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    hidden = {"hide-input", "remove-cell"}
    code = [c.source for c in cells if c.cell_type == "code" and not hidden & set(tags(c))]
    lines = sum(len(text.splitlines()) for text in code)
    # 200 words of prose or 20 lines of code a minute.
    minutes = len(re.findall(r"\w[\w'’-]*", prose)) / 200 + lines / 20
    if said := re.search(r"Reading takes about (\d+) minutes", prose):
        assert abs(int(said[1]) - minutes) <= 2
    else:
        assert source.stem.startswith("99"), "say how long reading takes, below the first heading"


def test_a_chapter_made_from_the_template_passes_from_the_start(tmp_path, monkeypatch):
    source = tmp_path / "chapters" / "07-new.ipynb"
    source.parent.mkdir()
    shutil.copy(ROOT / "book" / "_template.ipynb", source)
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules[__name__], "PUBLISHED", tmp_path / "published")
    run.execute("07", None, tmp_path / "published", source.parent)
    for check in (
        test_source_is_stripped,
        test_source_has_one_parameters_cell,
        test_published_code_is_the_source_code,
        test_every_cell_ran_without_error,
        test_there_is_something_to_compare,
        test_every_picture_has_caption_name_and_alt_text,
        test_pictures_are_small,
        test_outputs_name_no_machine,
        test_reading_takes_as_long_as_it_says,
    ):
        check(source)
    # Its claim is an example: the scoreboard, which has no such claim, must not be asked for it.
    assert board.judged(results.of_chapters(tmp_path / "published")) == {}
    printed = "".join(o.get("text", "") for cell in executed(source) for o in cell.outputs)
    assert re.search(r"unlike its first\. \w", printed)


def nbval(path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--nbval", "--nbval-current-env", "--nbval-sanitize-with"]
    command += [ROOT / "tests" / "nbval-sanitize.cfg", path]
    # Not inside the project, whose settings of pytest are for its own tests.
    run = subprocess.run(
        list(map(str, command)),
        cwd=path.parent,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
    )
    return run.returncode, run.stdout


@pytest.mark.parametrize(
    ("shown", "code", "passes"),
    [
        ("CKA 0.7\n", "print('CKA 0.7')", True),
        ("CKA 0.7\n", "print('CKA', 0.7 * 0.9)", False),
        ("<Line at 0x7f0011223344> in 12.3 s\n", "print('<Line at 0x7f55667788aa> in 4 s')", True),
    ],
    ids=["the same", "a number changed", "an address and a time changed"],
)
def test_the_comparison_of_outputs_catches_what_it_should(tmp_path, shown, code, passes):
    output = new_output("stream", name="stdout", text=shown)
    cell = new_code_cell(code, execution_count=1, outputs=[output])
    path = tmp_path / "chapter.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)
    returncode, report = nbval(path)
    assert returncode == (0 if passes else 1), report
