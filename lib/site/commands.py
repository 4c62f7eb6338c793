"""The commands of ``python -m lib``.

Libraries are imported only by the command that needs them, so that help is immediate.
"""

import argparse
import ast
import os
import sys
import time
from pathlib import Path

from lib.site import CHAPTERS, DRAFTS, PUBLISHED, RESULTS, RUN, measuring, run

DESCRIPTION = """\
A study names some images and a network for every role (vit, resnet, vit_untrained, ...).
A chapter measures one study; its parameters cell holds what you may change.
"""
EPILOG = """\
first steps:
  python -m lib studies                       what can be measured here
  python -m lib execute --list                the chapters, and what each lets you change
  python -m lib execute 01 -p n_images 256    one chapter with your value
  python -m lib measure vit resnet --out my.nc   similarities of your choice, as a file
  python -m lib measure --vit vit_tiny_patch16_224.augreg_in21k --cnn resnet18.a1_in1k \\
      --images pictures --out my.nc           the same of any networks of timm
`python -m lib COMMAND --help` explains one command.
"""


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
    if not hasattr(args, "run"):
        _parser().print_help()
        return 0
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if args.traceback:
            raise
        if isinstance(error, ModuleNotFoundError):
            advice = "run `make setup` and use .venv/bin/python"
            error = f"{error.name} is not installed for this Python; {advice}"
        rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        who = f"process {rank} of {count}: " if count != "1" else ""
        print(f"{who}{error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m lib", description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter
    )
    parser.add_argument(
        "--traceback", action="store_true", help="on an error, show where it came from"
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for add_arguments, function in (
        (_execute_arguments, execute),
        (measuring.measure_arguments, measuring.measure),
        (measuring.studies_arguments, measuring.studies),
        (measuring.train_arguments, measuring.train),
    ):
        summary = function.__doc__.partition(".")[0]
        command = commands.add_parser(
            function.__name__, help=summary, formatter_class=formatter, description=function.__doc__
        )
        add_arguments(command)
        command.set_defaults(run=function)
    return parser


def _execute_arguments(parser) -> None:
    parser.epilog = (
        "examples:\n"
        "  execute                          every chapter\n"
        "  execute 01                       the first\n"
        "  execute 01 -p n_images 256       the first with a value of yours\n"
        "  execute --study photographs      every chapter that measures, on another study\n"
        "  execute --list                   the chapters, and what each lets you change"
    )
    add = parser.add_argument
    add("chapters", nargs="*", metavar="CHAPTER", help="by name, number or path (default: all)")
    about = "new value for a name in the chapters' parameters cell; may be repeated"
    add("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help=about)  # fmt: skip
    add("--study", help="measure another study, with what it sets for a chapter")
    add("-j", "--jobs", type=int, default=1, metavar="N", help="chapters at a time (default: 1)")
    add("--publish", action="store_true", help="write into book/chapters")
    add("--list", action="store_true", help="list chapters and parameters, run nothing")


def execute(args) -> None:
    """Run chapters from top to bottom and write the executed notebooks.

    Without parameters they go to _build/chapters, of which `make book` builds the site. With
    parameters they are your own experiment and go to _build/executed. --publish renews the copies
    in book/chapters, which `make site` shows and the tests compare against. With --study, what the
    chapters that measure find in that study goes to book/results/STUDY. A chapter that fails
    changes nothing.
    """
    names = args.chapters or None
    if args.list:
        for name, path in run.choose(names, run.chapters(CHAPTERS)).items():
            print(name)
            for parameter, default in run.parameters_of(path).items():
                print(f"    {parameter} = {default!r}")
        return
    measuring.check_cache()
    parameters = {name: value_of(text) for name, text in args.parameter}
    if args.study:
        _execute_study(args.study, names, parameters)
        return
    out = PUBLISHED if args.publish else DRAFTS if parameters else RUN
    start = time.perf_counter()
    written = run.execute(names, parameters, out, CHAPTERS, args.jobs)
    if out != DRAFTS:
        maps = RUN / "cka.npz" if out == RUN else RESULTS / "lab" / "cka.npz"
        _explore_chapter([path.stem for path in written], maps, **parameters)
    print(f"{len(written)} executed in {time.perf_counter() - start:.0f} s:")
    for path in written:
        print(f"    {run.short(path)}")
    if out != PUBLISHED:
        print("The book's own copies are as they were (see --publish).")


def _execute_study(name: str, names, parameters: dict) -> None:
    """Run the chapters that measure on another study, and keep what they find."""
    import json

    from lib.site import results
    from lib.studies import load_study

    study = load_study(name)
    if study.name == "lab":
        raise ValueError("the lab is what `execute` measures without --study")
    of_probes = getattr(study, "probe_parameters", {})
    needed = {"study", "n_images", *parameters}
    known = run.choose(names, run.chapters(CHAPTERS))
    chosen = {
        stem: has
        for stem, path in known.items()
        if needed <= (has := run.parameters_of(path).keys())
    }
    if not chosen:
        listed, lacking = ", ".join(known), ", ".join(sorted(needed))
        raise ValueError(f"none of {listed} has the parameters {lacking}")
    cards = {role: card for role, card in study.cards.items() if card["study"] == study.name}
    for stem, has in chosen.items():
        values = {"study": name} | (of_probes if of_probes.keys() <= has else {}) | parameters
        start = time.perf_counter()
        (path,) = run.execute(stem, values, DRAFTS / study.name, CHAPTERS)
        notebook = json.loads(path.read_text(encoding="utf-8"))
        folder = results.save(study.name, {stem: notebook}, cards)
        took = time.perf_counter() - start
        print(f"{run.short(folder)}: {stem} in {took:.0f} s", flush=True)
    _explore_chapter(list(chosen), RESULTS / study.name / "cka.npz", study=name, **parameters)


def _explore_chapter(stems: list[str], target: Path, **parameters) -> None:
    """Keep the CKA maps that the chapter on representation structure has just measured."""
    from lib.site import explorer

    if explorer.CHAPTER in stems:
        explorer.save(explorer.measured(**parameters), target)


def value_of(text: str):
    """A Python literal where the text is one (64, 0.5, True, ['vit', 'resnet']), else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
