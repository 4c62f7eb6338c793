"""Run the chapters: a source notebook goes in, an executed one comes out.

A run is all or nothing: executed copies change only once every chapter asked for has finished, and
running a chapter twice gives the same bytes unless a result changed. Chapters run in the book's
surroundings, whatever the user has set for Jupyter, IPython and Matplotlib.

The notebook packages are imported where they are used: help and errors need none of them.
"""

import ast
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from lib.site import CHAPTERS, DRAFTS, ROOT, RUN, results
from lib.studies import find_file

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
# What the site needs to colour the code, without the version of Python that happened to run it.
LANGUAGE = {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"}
INJECTED = "injected-parameters"
DATE = re.compile(r"<tr>\s*<th>date</th>\s*<td>[\d-]*</td>\s*</tr>\s*")  # of a provenance
USERS = ("JUPYTER", "IPYTHON", "MPL", "MATPLOTLIB", "PYTHONSTARTUP")  # not for the chapters


class ChapterError(RuntimeError):
    """A chapter stopped before its end, or is not complete."""


def chapters(source: Path = CHAPTERS) -> dict[str, Path]:
    """Every chapter's name and source notebook, in the order of the book."""
    found = {path.stem: path for path in sorted(Path(source).glob("*.ipynb"))}
    if not found:
        raise FileNotFoundError(
            f"there are no chapters in {source}; run this from a checkout of the book"
        )
    return found


def parameters_of(path: Path) -> dict:
    """The names a chapter's ``parameters`` cell sets, and their values."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for cell in cells
        if "parameters" in cell["metadata"].get("tags", [])
        for statement in ast.parse(results.text(cell["source"])).body
    }


def execute(
    names: str | Iterable[str] | None = None, parameters: Mapping | None = None,
    out: str | Path = RUN, source: str | Path = CHAPTERS, jobs: int = 1,
) -> list[Path]:  # fmt: skip
    """Run chapters with papermill; the executed notebooks, in the order of the book.

    names : chapters by name (``"01-measuring-similarity"``), number (``"01"``) or path, or all
    parameters : new values for names in the ``parameters`` cell of every chapter that is run
    out, source : folders of the executed notebooks and of those to run
    jobs : chapters that run at the same time; if more than one, each with a single thread

    Nothing has run at a ValueError: a chapter or a parameter does not exist, or a value is of
    another type. Nothing in ``out`` has changed at a ChapterError: a cell failed, or one that draws
    a figure has none.
    """
    from tqdm import tqdm

    if jobs < 1:
        raise ValueError(f"chapters cannot run {jobs} at a time")
    chosen = choose(names, chapters(Path(source)))
    parameters = _checked(dict(parameters or {}), chosen)
    with (
        tempfile.TemporaryDirectory(prefix="chapters-") as scratch,
        ThreadPoolExecutor(min(jobs, len(chosen))) as pool,
        tqdm(total=len(chosen), unit="chapter", disable=False) as bar,
    ):
        kernel, kernels = _kernels(Path(scratch), jobs)
        # The longest chapters are the later ones: left to the end, they would run alone.
        running = {
            pool.submit(_executed, path, parameters, Path(scratch) / path.name, kernel): path.name
            for path in reversed(chosen.values())
        }
        try:
            for future in as_completed(running):
                future.result()
                bar.update()
                bar.set_description(running[future])
        except BaseException:  # a chapter that failed, or Ctrl-C: the others need not go on
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in running):
                for manager in kernels:
                    with suppress(AttributeError):  # not started yet, or stopped already
                        manager.provisioner.process.kill()
                time.sleep(0.1)
            raise
        return _written({name: future.result() for future, name in running.items()}, Path(out))


def _written(texts: dict[str, str], out: Path) -> list[Path]:
    """Write each beside its target and rename it: a reader never sees half a notebook."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        partial = out / f".{name}.{os.getpid()}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)
    return sorted(out / name for name in texts)


def _kernels(scratch: Path, jobs: int):
    """A class of kernel managers with the book's surroundings, and the list of its instances."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    (scratch / "matplotlibrc").touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(USERS)}
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    surroundings = kept | threads | {
        "IPYTHONDIR": str(scratch / "ipython"),
        "MATPLOTLIBRC": str(scratch / "matplotlibrc"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TQDM_DISABLE": "1",  # progress inside a chapter is no result
        # A layer takes the memory that the last one has freed, instead of asking the system.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "2000000000",
    }  # fmt: skip
    started = []

    class Manager(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3", language="python",
        )  # fmt: skip

        def start_kernel(self, **given):
            started.append(self)
            return super().start_kernel(**given | {"env": surroundings})

    return Manager, started


def _executed(path: Path, parameters: dict, scratch: Path, kernel) -> str:
    """The executed notebook of a chapter, as the text of its file."""
    import nbformat

    notebook = _clean(_run(path, parameters, scratch, kernel))
    for cell in notebook.cells:
        figure = cell.metadata.get("mystnb", {}).get("figure")
        if figure and not results.picture(cell):
            raise ChapterError(f"chapter {path.stem} has no picture for {figure['name']}")
    about = parameters_of(path).get("study")
    if (study := parameters.get("study", about)) != about:
        text = (
            f"**This is a run on the study `{study}`.** Figures, tables and numbers are of that "
            f"study. What the text says of them was written about `{about}`."
        )
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(text, id="other-study"))
    return nbformat.writes(notebook) + "\n"


def choose(names, known: dict[str, Path]) -> dict[str, Path]:
    """Those of the known chapters that are named; all if none is."""
    if names is None:
        return known
    chosen = set()
    for name in [names] if isinstance(names, str | Path) else names:
        stem = Path(name).name.removesuffix(".ipynb")
        matches = [full for full in known if full == stem or full.split("-")[0] == stem.zfill(2)]
        if len(matches) != 1:
            raise ValueError(f"there is no chapter {str(name)!r}; there are {', '.join(known)}")
        chosen.add(matches[0])
    return {name: path for name, path in known.items() if name in chosen}


def _checked(parameters: dict, chosen: dict[str, Path]) -> dict:
    """The parameters, if every chapter has them, with a study's file as seen from anywhere."""
    for name, path in chosen.items() if parameters else ():
        known = parameters_of(path)
        if unknown := [parameter for parameter in parameters if parameter not in known]:
            has = f"has {', '.join(known)}" if known else "has none"
            raise ValueError(f"chapter {name} has no parameter {', '.join(unknown)}; it {has}")
        for parameter, value in parameters.items():
            kinds = type(known[parameter]), type(value)
            if kinds[0] is not kinds[1] and kinds != (float, int):
                about = f"is of the type of {known[parameter]!r}; {value!r} is not"
                raise ValueError(f"{parameter} of chapter {name} {about}")
    if (study := parameters.get("study", "")).endswith(".toml"):
        parameters["study"] = str(find_file(study))
    return parameters


def _run(path: Path, parameters: dict, scratch: Path, kernel):
    import papermill

    # papermill takes braces in a path for places of parameters.
    files = (str(each).replace("{", "{{").replace("}", "}}") for each in (path, scratch))
    try:
        return papermill.execute_notebook(
            *files, parameters, kernel_name=KERNEL["name"], kernel_manager_class=kernel, cwd=ROOT,
            progress_bar=False, request_save_on_cell_execute=False,
            start_timeout=600,  # seconds; importing torch on a busy machine outlasts papermill's 60
            # Of the kernel, not of the chapter: at its end it tells of its own interrupt.
            extra_arguments=["--log-level=CRITICAL"],
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        # The notebook as far as it came holds the traceback: keep it where it disturbs nothing.
        kept = DRAFTS / f"{path.stem}.failed.ipynb"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(scratch.read_bytes())
        raise ChapterError(
            f"chapter {path.stem} stopped in cell {_cell(path, error.source)}: "
            f"{error.ename}: {_plain(error.evalue)} (its traceback is in {short(kept)})"
        ) from error
    except RuntimeError as error:  # the kernel did not start, or died under the cell
        raise ChapterError(f"chapter {path.stem} lost its kernel: {_plain(str(error))}") from error


def _cell(path: Path, source: str) -> str:
    """Where a cell is in the chapter's *source*, and its first line of code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [results.text(cell["source"]) for cell in cells]
    where = sources.index(source) if source in sources else "of the given parameters"
    return f"{where} ({source.strip().partition(chr(10))[0].strip()})"


def _plain(text: str) -> str:
    """The text without terminal colours, on one line."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def short(path: Path) -> Path:
    """The path as seen from the repository's root."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _clean(notebook):
    """Drop what differs from run to run though no result did: dates, paths, random ids."""
    import nbformat

    metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    notebook.metadata.update(metadata)
    for key in ("papermill", "widgets"):  # widgets would make the site fetch scripts
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = DATE.sub("", output.data["text/html"])
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if INJECTED in (tags := cell.metadata.pop("tags", [])):
            cell.id = INJECTED
            tags = [*tags, "remove-cell"]
        if tags:  # papermill leaves an empty list on every cell
            cell.metadata["tags"] = tags
    return notebook
