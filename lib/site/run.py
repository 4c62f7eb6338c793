"""Run the chapters: a source notebook goes in, an executed one comes out.

``chapters/`` holds sources without outputs; ``book/chapters/`` holds the same chapters as executed,
which is what the site shows and what the tests compare a fresh run against. A run is all or
nothing: the executed copies change only once every chapter asked for has finished, and running the
same chapter twice gives the same bytes unless a result changed.

The notebook packages are imported where they are used: help and errors need none of them.
"""

import ast
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ROOT / "chapters"
BOOK_CHAPTERS = ROOT / "book" / "chapters"
RECORDS = ROOT / "book" / "records"
DRAFTS = ROOT / "_build" / "executed"

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
# What the site needs to colour the code, without the version of Python that happened to run it.
LANGUAGE = {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"}
INJECTED = "injected-parameters"
START_TIMEOUT = 600  # seconds; importing torch on a busy machine outlasts papermill's 60


class ChapterError(RuntimeError):
    """A chapter stopped before its end."""


def chapters(source: Path = CHAPTERS) -> dict[str, Path]:
    """Every chapter's name and source notebook, in the order of the book."""
    found = {path.stem: path for path in sorted(Path(source).glob("*.ipynb"))}
    if not found:
        raise FileNotFoundError(
            f"there are no chapters in {source}; run this from a checkout of the book"
        )
    return found


def cards(folder: Path) -> dict[str, dict]:
    """The model cards that are kept in a folder with what was measured, by role."""
    paths = sorted(Path(folder).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def parameters_of(path: Path) -> dict[str, str]:
    """The names a chapter's ``parameters`` cell sets, and their values as written there."""
    import papermill

    return {name: found["default"] for name, found in papermill.inspect_notebook(path).items()}


def execute(
    names: str | Iterable[str] | None = None,
    parameters: Mapping | None = None,
    out: str | Path = BOOK_CHAPTERS,
    source: str | Path = CHAPTERS,
    jobs: int = 1,
) -> list[Path]:
    """Run chapters with papermill and write the executed notebooks.

    Parameters
    ----------
    names : str or iterable of str, optional
        Chapters to run, by name (``"01-measuring-similarity"``), number (``"01"``) or path;
        all of them by default.
    parameters : mapping, optional
        New values for names in the chapters' ``parameters`` cells. Every chapter that is run must
        know every name.
    out : path
        Folder for the executed notebooks; by default the one the site is built from.
    source : path
        Folder of the source notebooks.
    jobs : int
        Chapters that run at the same time. With more than one, each has a single thread.

    Returns
    -------
    list of Path
        The executed notebooks, in the order of the book.

    Raises
    ------
    ValueError
        If a chapter or a parameter does not exist. Nothing has run then.
    ChapterError
        If a cell fails. Nothing in ``out`` has changed then.
    """
    import psutil
    from tqdm import tqdm

    chosen = _choose(names, chapters(Path(source)))
    parameters = dict(parameters or {})
    _check(parameters, chosen)

    out = Path(out)
    if jobs < 1:
        raise ValueError(f"chapters cannot run {jobs} at a time")
    quiet = {"TQDM_DISABLE": "1"}  # progress inside a chapter is no result
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    # A layer takes the memory that the last one has freed, instead of asking the system for it.
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
    finished, before = {}, _kernels()
    with (
        tempfile.TemporaryDirectory(prefix="chapters-") as scratch,
        _environment(**quiet, **threads, **memory),
        ThreadPoolExecutor(min(jobs, len(chosen))) as pool,
        tqdm(total=len(chosen), unit="chapter", disable=False) as bar,
    ):
        # The longest chapters are the later ones: left to the end, they would run alone.
        running = {
            pool.submit(_executed, path, parameters, Path(scratch) / path.name): name
            for name, path in reversed(chosen.items())
        }
        try:
            for future in as_completed(running):
                finished[running[future]] = future.result()
                bar.update()
                bar.set_description(running[future])
        except BaseException:  # a chapter that failed, or Ctrl-C: the others need not go on
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in running):
                for kernel in _kernels() - before:
                    with suppress(psutil.NoSuchProcess):
                        kernel.kill()
                time.sleep(0.1)
            raise

    out.mkdir(parents=True, exist_ok=True)
    written = {out / path.name: finished[name] for name, path in chosen.items()}
    for path, text in written.items():
        # Written beside its target and renamed, so that a reader never sees half a notebook.
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return list(written)


def _executed(path: Path, parameters: dict, scratch: Path) -> str:
    """The executed notebook of a chapter, as the text of its file."""
    import nbformat

    notebook = _clean(_run(path, parameters, scratch))
    if "study" in parameters:
        _say_study(notebook, ast.literal_eval(parameters_of(path)["study"]), parameters["study"])
    return nbformat.writes(notebook) + "\n"


def _kernels() -> set:
    """The notebook kernels that this process has started and that run."""
    import psutil

    found = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            found |= {child} if "ipykernel_launcher" in child.cmdline() else set()
    return found


@contextmanager
def _environment(**values: str):
    """Variables that a kernel started inside the context inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _choose(names, known: dict[str, Path]) -> dict[str, Path]:
    if names is None:
        return known
    chosen = set()
    for name in [names] if isinstance(names, str | Path) else names:
        stem = Path(name).name.removesuffix(".ipynb")
        matches = [full for full in known if full == stem or full.split("-")[0] == stem.zfill(2)]
        if len(matches) != 1:
            raise ValueError(f"there is no chapter {str(name)!r}; there are {_listed(known)}")
        chosen.add(matches[0])
    return {name: path for name, path in known.items() if name in chosen}


def _check(parameters: dict, chosen: dict[str, Path]) -> None:
    if not parameters:
        return  # nothing to look up, and opening every notebook takes a while
    for name, path in chosen.items():
        known = parameters_of(path)
        unknown = [parameter for parameter in parameters if parameter not in known]
        if unknown:
            has = f"has {_listed(known)}" if known else "has none"
            raise ValueError(f"chapter {name} has no parameter {_listed(unknown)}; it {has}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _run(path: Path, parameters: dict, scratch: Path):
    import papermill

    try:
        return papermill.execute_notebook(
            path,
            scratch,
            parameters=parameters,
            kernel_name=KERNEL["name"],
            cwd=ROOT,
            progress_bar=False,
            request_save_on_cell_execute=False,
            start_timeout=START_TIMEOUT,
            extra_arguments=["--log-level=ERROR"],  # of the kernel, not of the chapter
        )
    except papermill.PapermillExecutionError as error:
        # The notebook as far as it came holds the traceback: keep it where it disturbs nothing.
        kept = DRAFTS / f"{path.stem}.failed.ipynb"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(scratch.read_bytes())
        raise ChapterError(
            f"chapter {path.stem} stopped in cell {_cell(path, error)}: "
            f"{error.ename}: {_plain(error.evalue)} (its traceback is in {_short(kept)})"
        ) from error
    except RuntimeError as error:  # the kernel did not start, or died under the cell
        raise ChapterError(f"chapter {path.stem} lost its kernel: {_plain(str(error))}") from error


def _cell(path: Path, error) -> str:
    """Where the error is in the *source*, and that cell's first line of code."""
    import nbformat

    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    where = sources.index(error.source) if error.source in sources else "of the given parameters"
    lines = [line for line in error.source.splitlines() if line.strip()]
    return f"{where} ({lines[0].strip()})" if lines else f"{where}"


def _plain(text: str) -> str:
    """The text without terminal colours, on one line."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def _short(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _say_words(notebook) -> None:
    """Where words were glued instead of a number, let the text paste them without its format."""
    glued = {
        output.metadata["scrapbook"]["name"]: text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "scrapbook" in output.get("metadata", {})
        for mime, text in output.data.items()
        if mime.endswith("text/plain") and text.startswith(("'", '"'))
    }
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(
                r"(\{glue:text\}`([^`:]+)):[^`]*`",
                lambda found: f"{found[1]}`" if found[2] in glued else found[0],
                cell.source,
            )


def _say_study(notebook, about: str, study: str) -> None:
    """Below the title, that the chapter's text is about another study than was measured."""
    import nbformat

    if study != about:
        text = (
            f"**This is a run on the study `{study}`.** Figures, tables and numbers are of that "
            f"study. What the text says of them was written about `{about}`."
        )
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(text, id="other-study"))


def _clean(notebook):
    """Drop what differs from run to run though no result did: times, paths, random ids."""
    import nbformat

    _say_words(notebook)
    for key in ("papermill", "widgets"):  # widgets would make the site fetch scripts
        notebook.metadata.pop(key, None)
    notebook.metadata.update(nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE}))
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        tags = cell.metadata.pop("tags", [])
        if INJECTED in tags:
            cell.id = INJECTED
            tags = [*tags, "remove-cell"]
        if tags:  # papermill leaves an empty list on every cell
            cell.metadata["tags"] = tags
    return notebook


def add_arguments(parser) -> None:
    parser.description = (
        "Run chapters from top to bottom and write the executed notebooks. Without parameters\n"
        "they replace the copies in book/chapters, which the site shows and the tests compare\n"
        "against. With parameters they are your own experiment and go to _build/executed, so\n"
        "that the book keeps its published numbers; --publish puts them into the book all the\n"
        "same. With --study, chapters that measure run one after the other on that study, go to\n"
        "book/records/STUDY, and the pages that show them are made anew. A chapter that fails\n"
        "changes nothing."
    )
    parser.epilog = (
        "examples:\n"
        "  execute                          every chapter\n"
        "  execute 01                       the first\n"
        "  execute 01 -p n_images 256       the first with a value of yours\n"
        "  execute --study tiny-imagenet    every chapter that measures, on another study\n"
        "  execute --list                   the chapters, and what each lets you change"
    )
    parser.add_argument(
        "chapters",
        nargs="*",
        metavar="CHAPTER",
        help="chapter to run, by name, number or path (default: all)",
    )
    parser.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="new value for a name in the chapters' parameters cell; may be repeated",
    )
    parser.add_argument("--study", help="measure another study, with what it sets for a chapter")
    parser.add_argument(
        "-j", "--jobs", type=int, default=1, metavar="N", help="chapters at a time (default: 1)"
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write into book/chapters although parameters were given",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the chapters and their parameters, run nothing"
    )


def main(args) -> None:
    names = args.chapters or None
    if args.list:
        for name, path in _choose(names, chapters(CHAPTERS)).items():
            print(name)
            for parameter, default in parameters_of(path).items():
                print(f"    {parameter} = {default}")
        return
    parameters = {name: _value(text) for name, text in args.parameter}
    if args.study:
        _execute_study(args.study, names, parameters)
        return
    out = DRAFTS if parameters and not args.publish else BOOK_CHAPTERS
    start = time.perf_counter()
    written = execute(names, parameters, out, CHAPTERS, args.jobs)
    print(f"{len(written)} executed in {time.perf_counter() - start:.0f} s:")
    for path in written:
        print(f"    {_short(path)}")
    if out == DRAFTS:
        print("The book's own copies are as they were (see --publish).")


def _execute_study(name: str, names, parameters: dict) -> None:
    """Run the chapters that measure on another study, and make the pages of what it shows."""
    from lib.site import explorer
    from lib.studies import load_study

    study = load_study(name)
    if study.name == "lab":
        raise ValueError("the lab is what `execute` measures without --study")
    of_probes = getattr(study, "probe_parameters", {})
    needed = {"study", "n_images", *parameters}
    known = _choose(names, chapters(CHAPTERS))
    chosen = {
        stem: has for stem, path in known.items() if needed <= (has := parameters_of(path).keys())
    }
    if not chosen:
        raise ValueError(f"none of {_listed(known)} has the parameters {_listed(sorted(needed))}")
    for stem, has in chosen.items():
        values = {"study": name} | (of_probes if of_probes.keys() <= has else {}) | parameters
        start = time.perf_counter()
        (path,) = execute(stem, values, RECORDS / study.name, CHAPTERS)
        print(f"{_short(path)} in {time.perf_counter() - start:.0f} s", flush=True)
    for role, card in study.cards.items():  # of what was measured and is kept nowhere else
        if card["study"] == study.name:
            card_of_role = RECORDS / study.name / f"{role}.json"
            card_of_role.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    if explorer.CHAPTER in chosen:
        explorer.write(explorer.measured(study=name, **parameters))
    write_pages()


def write_pages() -> None:
    """Make the scoreboard, and the pages that show other studies, of the executed chapters."""
    from lib.site import board, results

    board.write()
    for page in results.write():
        print(_short(page))


def _value(text: str):
    """A Python literal where the text is one (64, 0.5, True, ['vit', 'resnet']), else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
