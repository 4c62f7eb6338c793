"""The commands of ``python -m lib``, or ``vit-see``.

Libraries are imported only by the command that needs them, so that help is immediate.
"""

import argparse
import ast
import inspect
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from lib.site import CHAPTERS, DRAFTS, PUBLISHED, RESULTS, RUN, run

DESCRIPTION = """\
A study names some images and a network for every role (vit, resnet, vit_untrained, ...).
A chapter measures one study; its parameters cell holds what you may change.
"""
EPILOG = """\
first steps:
  %(prog)s studies                       what can be measured here
  %(prog)s execute --list                the chapters, and what each lets you change
  %(prog)s execute 01 -p n_images 256    one chapter with your value
  %(prog)s measure vit resnet --out my.nc   similarities of your choice, as a file
  %(prog)s measure --vit vit_tiny_patch16_224.augreg_in21k --cnn resnet18.a1_in1k \\
      --images pictures --out my.nc           the same of any networks of timm
`%(prog)s COMMAND --help` explains one command.
"""
CACHE = "name another folder in VIT_SEE_CACHE"
# fmt: off
ARGUMENTS = {
    "execute": {
        "chapters": dict(nargs="*", metavar="CHAPTER",
                         help="by name, number or path (default: all)"),
        "-p --parameter": dict(
            nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
            help="new value for a name in the chapters' parameters cell; may be repeated"),
        "--study": dict(help="measure another study, with what it sets for a chapter"),
        "-j --jobs": dict(type=int, default=1, metavar="N", help="chapters at a time (default: 1)"),
        "--publish": dict(action="store_true", help="write into book/chapters"),
        "--list": dict(action="store_true", help="list chapters and parameters, run nothing"),
    },
    "measure": {
        "roles": dict(nargs="*", metavar="ROLE", help="networks, see `studies`"),
        "--out": dict(required=True, metavar="FILE",
                      help="where the record goes; .npz: the explorer's"),
        "--study": dict(help="a study (default: lab), or a TOML file that describes one"),
        "--vit": dict(metavar="NAME", help="plays the role vit: timm's or hf-hub:... name"),
        "--cnn": dict(metavar="NAME", help="plays the role resnet, likewise"),
        "--images": dict(metavar="FOLDER", help="pictures, in a folder per class or loose"),
        "--weights": dict(action="append", default=[], metavar="[vit=|cnn=]FILE",
                          help="weights from a file; say whose if both networks are named"),
        "--taps": dict(default="all", help="blocks, branches, all (default), or a glob"),
        "--n-images": dict(type=int, default=1024), "--batch-size": dict(type=int, default=64),
        "--seed": dict(type=int, default=0, help="another seed takes other images"),
        "--device": dict(default="cpu"),
    },
    "studies": {"study": dict(nargs="*", metavar="STUDY", help="only these (default: all)")},
    "train": {
        "roles": dict(nargs="*", metavar="ROLE", help="networks (default: all)"),
        "--study": dict(default="lab"),
        "--into": dict(metavar="DIR",
                       help="where the weights go (default: the study's own folder)"),
        "--device": dict(help="default: a GPU if there is one, else the CPU"),
    },
}
# fmt: on


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
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
    prog = "vit-see" if Path(sys.argv[0]).stem == "vit-see" else "python -m lib"
    looks = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog, description=DESCRIPTION, epilog=EPILOG, **looks)
    about = "on an error, show where it came from"
    parser.add_argument("--traceback", action="store_true", help=about)
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, arguments in ARGUMENTS.items():
        function = globals()[name]
        about, head, examples = inspect.getdoc(function).partition("\n\nexamples:")
        texts = {"help": about.partition(".")[0], "description": about, "epilog": head + examples}
        command = commands.add_parser(name, **texts, **looks)
        command.set_defaults(run=function)
        for flags, options in arguments.items():
            command.add_argument(*flags.split(), **options)
    return parser


def execute(args) -> None:
    """Run chapters from top to bottom and write the executed notebooks.

    Without parameters they go to _build/chapters, of which `make book` builds the site. With
    parameters they are your own experiment and go to _build/executed. --publish renews the copies
    in book/chapters, which `make site` shows and the tests compare against. With --study, what the
    chapters that measure find in that study goes to book/results/STUDY. A chapter that fails
    changes nothing.

    examples:
      execute                          every chapter
      execute 01                       the first
      execute 01 -p n_images 256       the first with a value of yours
      execute --study photographs      every chapter that measures, on another study
      execute --list                   the chapters, and what each lets you change
    """
    from lib import records

    names = args.chapters or None
    if args.list:
        for name, path in run.choose(names, run.chapters(CHAPTERS)).items():
            print(name)
            for parameter, default in run.parameters_of(path).items():
                print(f"    {parameter} = {default!r}")
        return
    _check_writable(records.cache_folder(), CACHE)
    parameters = {name: value_of(text) for name, text in args.parameter}
    if args.study:
        _execute_study(args.study, names, parameters)
        return
    out = PUBLISHED if args.publish else DRAFTS if parameters else RUN
    start = time.perf_counter()
    written = run.execute(names, parameters, out, CHAPTERS, args.jobs)
    if out != DRAFTS:
        maps = RUN / "cka.npz" if out == RUN else RESULTS / "lab" / "cka.npz"
        _keep_maps([path.stem for path in written], maps, **parameters)
    print(f"{len(written)} executed in {time.perf_counter() - start:.0f} s:")
    print(*(f"    {run.short(path)}" for path in written), sep="\n")
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
    known = run.choose(names, run.chapters(CHAPTERS))
    has = {stem: run.parameters_of(path).keys() for stem, path in known.items()}
    needed = {"study", "n_images", *parameters}
    chosen = [stem for stem in known if needed <= has[stem]]
    if not chosen:
        raise ValueError(
            f"none of {', '.join(known)} has the parameters {', '.join(sorted(needed))}"
        )
    cards = {role: card for role, card in study.cards.items() if card["study"] == study.name}
    for stem in chosen:
        more = of_probes if of_probes.keys() <= has[stem] else {}
        start = time.perf_counter()
        values = {"study": name, **more, **parameters}
        (path,) = run.execute(stem, values, DRAFTS / study.name, CHAPTERS)
        notebook = json.loads(path.read_text(encoding="utf-8"))
        folder = results.save(study.name, {stem: notebook}, cards)
        took = time.perf_counter() - start
        print(f"{run.short(folder)}: {stem} in {took:.0f} s", flush=True)
    _keep_maps(chosen, RESULTS / study.name / "cka.npz", study=name, **parameters)


def _keep_maps(stems: list[str], target: Path, **parameters) -> None:
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


def measure(args) -> None:
    """Measure CKA between all layers of some networks and write it to a file.

    It is a netCDF file with intervals and provenance that xarray opens. The networks are roles of
    a study, or any two of timm on your pictures. torchrun deals the minibatches to processes.

    examples:
      measure vit resnet --out lab.nc
      measure vit resnet --study imagenet-small --out small.nc
      measure vit vit_untrained --study mine.toml --out mine.nc
      measure --vit vit_tiny_patch16_224.augreg_in21k --images pictures --out tiny.nc
    """
    from lib import measure, processes, records
    from lib.cka import MinibatchCKA
    from lib.site import explorer

    if os.environ.get("RANK", "0") != "0":  # several processes have the same warnings
        warnings.simplefilter("ignore")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    out = Path(args.out).absolute()
    if out.is_dir():
        raise IsADirectoryError(f"{args.out} is a folder; --out names the file of the record")
    _check_writable(out.parent, "name another file with --out")
    _check_writable(records.cache_folder(), CACHE)
    study = _study_of(args)
    roles = args.roles or (list(study.roles) if args.vit or args.cnn else [])
    if not roles:
        raise ValueError("name the roles to measure, or networks with --vit and --cnn")
    for role in roles:
        study.role(role)
    cka, size = MinibatchCKA(args.taps), (args.n_images, args.batch_size)
    with processes.joined(args.device) as device:
        record = measure.measure(study, roles, [cka], *size, args.seed, device)
        if processes.rank() == 0:
            (explorer.save if out.suffix == ".npz" else records.save)(record, out)
            print(f"{args.out}: CKA of {record.sizes['tap']} taps over {args.n_images} images")


def _check_writable(folder: Path, advice: str) -> None:
    """Refuse to measure what could not be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}); {advice}") from error


def _study_of(args):
    """The study that is named, or one made of the networks that are."""
    from lib.studies import load_study
    from lib.studies.public import Public, PublicRole, Source

    named = {role: model for role, model in (("vit", args.vit), ("resnet", args.cnn)) if model}
    if not named:
        if args.weights:
            raise ValueError("--weights belongs to --vit or --cnn; a study names its own")
        study = load_study(args.study or "lab")
        if args.images:
            if not isinstance(study, Public):
                raise ValueError(f"the study {study.name!r} has images of its own")
            study.use_folder(args.images)
        return study
    if args.study:
        raise ValueError("give either --study or networks with --vit and --cnn, not both")
    if not args.images:
        raise ValueError("say which pictures the networks are to see: --images FOLDER")
    weights = {}
    for entry in args.weights:
        role, file = {"vit=": "vit", "cnn=": "resnet"}.get(entry[:4]), entry[4:]
        if role is None:
            role, file = next(iter(named)) if len(named) == 1 else None, entry
        if role not in named:
            raise ValueError(f"say whose weights {file} holds: --weights vit={file} or cnn={file}")
        weights[role] = file
    roles = {
        role: PublicRole(model, "named on the command line", weights=weights.get(role))
        for role, model in named.items()
    }
    return Public("named", roles, Source(folder=args.images))


def studies(args) -> None:
    """List the studies and their networks.

    With the roles come what plays them, and how good it is or whether its weights are here.
    """
    from lib.studies import STUDIES, load_study
    from lib.studies.study import Trained

    for name in args.study or [name for name, entry in STUDIES.items() if entry.load]:
        study = load_study(name)
        print(f"{study.name}: {study.purpose}")
        if isinstance(study, Trained):
            line = "  {:34} {:21} {:22} {}"
            print(line.format("role", "architecture", "test accuracy", "what it is for"))
            for role, what in study.roles.items():
                accuracy = _accuracy(study.cards.get(role))
                print(line.format(role, what.architecture, accuracy, what.purpose))
        else:
            line = "  {:21} {:41} {:15} {:12} {}"
            print(line.format("role", "checkpoint", "licence", "weights", "what it is for"))
            for role, what in study.roles.items():
                here = "here" if study.is_here(role) else "not here yet"
                print(line.format(role, what.model, what.licence, here, what.purpose))
        print("  and each as <role>_untrained: the same network before its training")


def _accuracy(card: dict | None) -> str:
    if not card:
        return "no weights here"
    return "{:.3f} [{:.3f}, {:.3f}]".format(card["accuracy"], *card["accuracy_interval"])


def train(args) -> None:
    """Train the networks of a study, one after the other.

    Ctrl-C at any time: the same command goes on where it stopped, and networks that are finished
    are not trained again. On a CPU, start one process per core, each with its own roles and
    OMP_NUM_THREADS=1.
    """
    import torch

    from lib.studies import load_study

    study = load_study(args.study)
    if not hasattr(study, "train"):
        raise ValueError(f"the networks of {args.study!r} come trained: there is nothing to train")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.into) if args.into else None
    wanted = args.roles or list(study.roles)
    waiting = [role for role in wanted if not study.is_trained(role, folder)]
    if not waiting:
        print(f"nothing to do: {', '.join(wanted)} are trained, by the recipe they have now")
        return
    count, where = f"{len(waiting)} of {len(wanted)}", folder or study.checkpoints
    print(f"{count} networks to train on {device}, weights into {where}:")
    for role in waiting:
        recipe = study.role(role).recipe
        card = study.cards.get(role)
        took = f"took {card['seconds'] / 60:.0f} min on {card['device']}" if card else "not timed"
        print(f"  {role:34} {recipe.end * recipe.batch_size:,} images ({took})")
    for role in waiting:
        print(role)
        card = study.train(role, into=folder, device=device)
        print(f"  accuracy {card['accuracy']:.3f} on {card['test_images']:,} test images")
