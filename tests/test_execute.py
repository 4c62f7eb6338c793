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

from lib.site import ROOT, commands, explorer, run
from lib.site.commands import main


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
    monkeypatch.setattr(commands, "CHAPTERS", tmp_path / "chapters")
    for module, name in ((commands, "PUBLISHED"), (commands, "RUN"), (commands, "RESULTS")):
        monkeypatch.setattr(module, name, tmp_path / name.lower())
    for module in (commands, run):
        monkeypatch.setattr(module, "DRAFTS", tmp_path / "drafts")
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))
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
        nbformat.read(path, as_version=4)
        for path in (written[0], workshop.path / "chapters" / "01-first.ipynb")
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


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("n", 1e3, False),
        ("n", "16", False),
        ("n", True, False),
        ("study", 3, False),
        ("n", 3, True),
    ],
)
def test_a_value_of_another_type_stops_before_anything_runs(workshop, name, value, right):
    if right:
        assert workshop.execute("01", {name: value})
        return
    with pytest.raises(ValueError, match=rf"{name} of chapter 01-first is of the type of .*is not"):
        workshop.execute("01", {name: value})
    assert not (workshop.path / "published").exists()


def test_a_float_may_be_given_as_an_integer(workshop):
    path = workshop.add("03-third", "print(n)")
    path.write_text(path.read_text().replace("n = 2", "n = 0.5"))
    (written,) = workshop.execute("03", {"n": 1})
    assert printed(written) == ["1\n"]


def test_a_file_of_a_study_is_found_where_the_user_stands(workshop, monkeypatch):
    mine = workshop.path / "my networks"
    mine.mkdir()
    (mine / "mine.toml").touch()
    monkeypatch.chdir(mine)
    (path,) = workshop.execute("01", {"study": "mine.toml"})
    assert printed(path) == [f"2 {mine / 'mine.toml'}\n"]
    with pytest.raises(FileNotFoundError, match=r"there is no file other\.toml"):
        workshop.execute("01", {"study": "other.toml"})


def test_a_folder_may_have_braces_and_quotes_in_its_name(workshop):
    odd = workshop.path / "it's {lr=0.1} {1} {}"
    (workshop.path / "chapters").rename(odd)
    (path,) = run.execute("01", {"n": 3}, odd / "out", odd)
    assert printed(path) == ["3 lab\n"]


def test_chapters_run_in_the_books_surroundings(workshop, monkeypatch):
    """Not in those of the user's Jupyter, IPython and Matplotlib."""
    home = workshop.path / "home"
    spec = home / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "x"}')
    (home / "ipython" / "profile_default" / "startup").mkdir(parents=True)
    (home / "ipython" / "profile_default" / "startup" / "mine.py").write_text("ours = 1")
    (home / "matplotlibrc").write_text("lines.linewidth: 77")
    (home / "startup.py").write_text("mine = 1")
    for name, value in {
        "JUPYTER_PATH": home / "jupyter",
        "IPYTHONDIR": home / "ipython",
        "MATPLOTLIBRC": home / "matplotlibrc",
        "MPLBACKEND": "Agg",
        "PYTHONSTARTUP": home / "startup.py",
    }.items():
        monkeypatch.setenv(name, str(value))
    path = workshop.add(
        "03-third",
        "import sys, matplotlib.pyplot as plt",
        "print(sys.executable, plt.rcParams['lines.linewidth'], {'mine', 'ours'} & {*dir()})",
        "plt.plot([1, 2])\nplt.show()",
    )
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["mystnb"] = {"figure": {"name": "fig-drawn", "caption": "A line"}}
    nbformat.write(notebook, path)
    (written,) = workshop.execute("03")
    assert printed(written) == [f"{sys.executable} 1.5 set()\n"]
    assert "image/png" in written.read_text()


def test_a_chapter_without_one_of_its_figures_is_not_published(workshop):
    path = workshop.add("03-third", "1")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["mystnb"] = {"figure": {"name": "fig-lost", "caption": "A line"}}
    nbformat.write(notebook, path)
    with pytest.raises(run.ChapterError, match="chapter 03-third has no picture for fig-lost"):
        workshop.execute()
    assert not (workshop.path / "published").exists()


def test_no_date_is_published(workshop):
    row = "<tr>\\n  <th>date</th>\\n  <td>2026-11-23</td>\\n</tr>\\n<tr><th>python</th></tr>"
    shows = f"from IPython.display import HTML\nHTML('<table>{row}</table>')"
    workshop.add("03-third", shows)
    (written,) = workshop.execute("03")
    (output,) = nbformat.read(written, as_version=4).cells[-1].outputs
    assert output.data["text/html"] == "<table><tr><th>python</th></tr></table>"


def test_no_chapters_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no chapters in"):
        run.execute(source=tmp_path)


def test_an_experiment_leaves_the_book_alone(workshop, capsys):
    assert main(["execute", "01", "-p", "n", "7", "-p", "study", "tiny-imagenet"]) == 0
    assert printed(workshop.path / "drafts" / "01-first.ipynb") == ["7 tiny-imagenet\n"]
    assert not (workshop.path / "published").exists()
    assert "--publish" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "folder"), [([], "run"), (["--publish"], "published")])
def test_a_run_goes_to_the_sites_sources_or_to_the_book(workshop, more, folder, monkeypatch):
    kept = []
    monkeypatch.setattr(explorer, "measured", lambda: "the record")
    monkeypatch.setattr(explorer, "save", lambda *given: kept.append(given))
    workshop.add(explorer.CHAPTER, "print(1)")
    assert main(["execute", *more]) == 0
    folders = {path.name for path in workshop.path.iterdir()} & {"run", "published"}
    assert folders == {folder}
    maps = {"run": "run/cka.npz", "published": "results/lab/cka.npz"}[folder]
    assert kept == [("the record", workshop.path / maps)]


def test_what_could_not_be_kept_is_not_measured(workshop, monkeypatch, capsys):
    """A file stands where a folder is needed, which stops root too."""
    (workshop.path / "file").touch()
    monkeypatch.setattr(run, "execute", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr("lib.measure.measure", lambda *_: pytest.fail("it measured"))
    measure = ["measure", "vit", "--out"]
    for command, cache, says in (
        (["execute"], "file/cache", "name another folder in VIT_SEE_CACHE"),
        ([*measure, "my.nc"], "file/cache", "name another folder in VIT_SEE_CACHE"),
        ([*measure, str(workshop.path / "file/my.nc")], "cache", "name another file with --out"),
        ([*measure, str(workshop.path)], "cache", "is a folder; --out names the file"),
    ):
        monkeypatch.setenv("VIT_SEE_CACHE", str(workshop.path / cache))
        assert main(command) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


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
from lib.site import commands
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
commands.CHAPTERS = pathlib.Path({str(workshop.path / "chapters")!r})
commands.RUN = pathlib.Path({str(workshop.path / "run")!r})
sys.exit(commands.main(["execute", "03"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
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
    assert not (workshop.path / "run").exists()


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
    for command in ("execute", "measure", "studies", "train"):
        assert command in text


@pytest.mark.parametrize(
    ("called", "name"), [("/bin/vit-see", "vit-see"), ("lib/__main__.py", "python -m lib")]
)
def test_help_names_the_command_as_it_was_called(called, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {name} [-h]")
    assert f"\n  {name} execute --list  " in text
    with pytest.raises(SystemExit):
        main(["measure", "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {name} measure [-h] --out FILE")


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
    assert commands.value_of(text) == value
