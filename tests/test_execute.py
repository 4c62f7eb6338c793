"""``lib.site.run`` runs notebooks completely or not at all."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib.__main__ import main
from lib.site import run


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A book of two chapters; ``add`` writes another source notebook."""

    def add(name, *code):
        cells = [new_code_cell("n = 2\nstudy = 'lab'", metadata={"tags": ["parameters"]})]
        cells += [new_markdown_cell("Some words."), *map(new_code_cell, code)]
        for number, cell in enumerate(cells):
            cell.id = f"cell-{number}"
        notebook = new_notebook(cells=cells, metadata={"kernelspec": run.KERNEL})
        path = tmp_path / "chapters" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    (tmp_path / "chapters").mkdir()
    add("01-first", "print(n, study)\nn * 2")
    add("02-second", "print('the second')")
    monkeypatch.setattr(run, "CHAPTERS", tmp_path / "chapters")
    monkeypatch.setattr(run, "BOOK_CHAPTERS", tmp_path / "published")
    monkeypatch.setattr(run, "DRAFTS", tmp_path / "drafts")
    workshop = type("Workshop", (), {"add": staticmethod(add), "path": tmp_path})

    def execute(names=None, parameters=None, jobs=1):
        return run.execute(names, parameters, tmp_path / "published", tmp_path / "chapters", jobs)

    workshop.execute = staticmethod(execute)
    return workshop


def test_progress_bars_are_not_results(workshop):
    workshop.add("03-third", "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass\nprint(1)")
    (path,) = workshop.execute("03")
    assert printed(path) == ["1\n"]


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return [o.text for cell in cells for o in cell.get("outputs", []) if o.get("text")]


def test_chapters_run_and_a_second_run_gives_the_same_bytes(workshop):
    written = workshop.execute()
    assert [path.name for path in written] == ["01-first.ipynb", "02-second.ipynb"]
    assert printed(written[0]) == ["2 lab\n"]
    before = [path.read_bytes() for path in written]
    assert workshop.execute() == written
    assert [path.read_bytes() for path in written] == before
    assert sorted(path.name for path in written[0].parent.iterdir()) == [p.name for p in written]

    executed, source = (
        nbformat.read(path, as_version=4) for path in (written[0], run.CHAPTERS / "01-first.ipynb")
    )
    nbformat.validate(executed)
    assert [cell.source for cell in executed.cells] == [cell.source for cell in source.cells]
    assert [cell.id for cell in executed.cells] == [cell.id for cell in source.cells]
    assert [cell.metadata for cell in executed.cells] == [cell.metadata for cell in source.cells]
    assert "papermill" not in executed.metadata


def test_chapters_that_run_together_give_the_same_in_the_same_order(workshop):
    # The first waits for the second, so they do run together.
    flag = workshop.path / "flag"
    wait = f"import os, time\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.1)"
    workshop.add("01-first", wait, "print('first')")
    threads = "print(os.environ['OMP_NUM_THREADS'])"
    workshop.add("02-second", f"import os\nopen({str(flag)!r}, 'w').close()\n{threads}")
    written = workshop.execute(jobs=2)
    assert [path.name for path in written] == ["01-first.ipynb", "02-second.ipynb"]
    assert printed(written[0]) == ["first\n"]
    assert printed(written[1]) == ["1\n"]
    with pytest.raises(ValueError, match="chapters cannot run 0 at a time"):
        workshop.execute(jobs=0)


def test_parameters_are_injected_behind_their_defaults(workshop):
    (path,) = workshop.execute("1", {"n": 5})
    assert printed(path) == ["5 lab\n"]
    cells = nbformat.read(path, as_version=4).cells
    assert cells[1].id == "injected-parameters"
    assert "remove-cell" in cells[1].metadata.tags


def test_a_run_on_another_study_says_what_its_text_is_about(workshop):
    def ids(study):
        (path,) = workshop.execute("1", {"study": study})
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        return [cell.id for cell in notebook.cells], notebook.cells[1].source

    own, _ = ids("lab")
    others, said = ids("imagenet")
    assert others == [own[0], "other-study", *own[1:]]
    assert "run on the study `imagenet`" in said
    assert said.endswith("written about `lab`.")


def test_words_in_the_place_of_a_number_are_pasted_without_its_format(workshop):
    path = workshop.add(
        "03-third",
        "from myst_nb import glue\nglue('a', 0.25, display=False)",
        "glue('b', 'not measured here', display=False)",
    )
    text = "{glue:text}`a:.1f` or {glue:text}`b:.1f` or {glue:text}`b` or {glue:text}`unknown:.1f`"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = text
    nbformat.write(notebook, path)
    (written,) = workshop.execute("03")
    said = nbformat.read(written, as_version=4).cells[1].source
    assert said == text.replace("`b:.1f`", "`b`")


def test_a_failing_chapter_changes_nothing(workshop):
    published = workshop.path / "published"
    published.mkdir()
    (published / "01-first.ipynb").write_text("as it was")
    workshop.add("03-third", "x = 1", "# why\nraise KeyError('no such role')")
    with pytest.raises(run.ChapterError) as caught:
        workshop.execute()
    message = str(caught.value)
    assert "03-third" in message
    assert "cell 3 (# why)" in message
    assert "KeyError: 'no such role'" in message
    assert "\x1b" not in message
    assert "\n" not in message
    assert [path.name for path in published.iterdir()] == ["01-first.ipynb"]
    assert (published / "01-first.ipynb").read_text() == "as it was"
    assert "KeyError" in (workshop.path / "drafts" / "03-third.failed.ipynb").read_text()


def test_a_dying_kernel_is_an_error_too(workshop):
    workshop.add("03-third", "import os\nos._exit(1)")
    with pytest.raises(run.ChapterError, match="03-third lost its kernel"):
        workshop.execute("03")
    assert not (workshop.path / "published").exists()


def test_unknown_names_stop_before_anything_runs(workshop):
    workshop.add("00-never", "raise SystemExit(3)")
    with pytest.raises(ValueError, match="no chapter '7'; there are 00-never, 01-first, 02-second"):
        workshop.execute(["00", "7"])
    with pytest.raises(
        ValueError, match="chapter 00-never has no parameter images, m; it has n, study"
    ):
        workshop.execute(None, {"images": 2, "n": 3, "m": 1})
    assert not (workshop.path / "published").exists()


def test_no_chapters_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no chapters in"):
        run.execute(source=tmp_path)


def test_an_experiment_leaves_the_book_alone(workshop, capsys):
    assert main(["execute", "01", "-p", "n", "7", "-p", "study", "tiny-imagenet"]) == 0
    assert printed(workshop.path / "drafts" / "01-first.ipynb") == ["7 tiny-imagenet\n"]
    assert not (workshop.path / "published").exists()
    assert "--publish" in capsys.readouterr().out


def test_the_command_line_lists_and_explains(workshop, capsys):
    assert main(["execute", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "01-first",
        "    n = 2",
        "    study = 'lab'",
    ]
    assert main(["execute", "99"]) == 2
    error = capsys.readouterr().err
    assert error == "there is no chapter '99'; there are 01-first, 02-second\n"
    with pytest.raises(ValueError, match="no chapter '99'"):
        main(["--traceback", "execute", "99"])


def test_an_interrupt_is_one_line(workshop, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "execute", interrupt)
    assert main(["execute"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_in_the_middle_of_a_chapter_leaves_nothing_behind(workshop):
    marker, scratch = workshop.path / "kernel", workshop.path / "scratch"
    scratch.mkdir()
    here = f"import os, time\nopen({str(marker)!r}, 'w').write(str(os.getpid()))\n"
    workshop.add("03-third", here + "time.sleep(300)")
    program = f"""
import pathlib, signal, sys
from lib import __main__
from lib.site import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
run.CHAPTERS = pathlib.Path({str(run.CHAPTERS)!r})
run.BOOK_CHAPTERS = pathlib.Path({str(run.BOOK_CHAPTERS)!r})
sys.exit(__main__.main(["execute", "03"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        text=True,
        cwd=run.ROOT,
        env=os.environ | {"TMPDIR": str(scratch)},
        start_new_session=True,
    )
    try:
        until(lambda: marker.exists() and marker.read_text())
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    until(lambda: not psutil.pid_exists(int(marker.read_text())))
    assert not list(scratch.glob("chapters-*"))
    assert not run.BOOK_CHAPTERS.exists()


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_help_imports_no_command(capsys):
    start = time.perf_counter()
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert time.perf_counter() - start < 1
    text = capsys.readouterr().out
    for command in ("execute", "measure", "studies", "train", "pages"):
        assert command in text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("0.5", 0.5),
        ("True", True),
        ("lab", "lab"),
        ("['vit']", ["vit"]),
        ("a b", "a b"),
    ],
)
def test_values_are_read_as_python_where_they_are(text, value):
    assert run._value(text) == value
