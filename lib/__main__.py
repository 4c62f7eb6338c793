"""The book's command line: ``python -m lib COMMAND``.

Libraries are imported only by the command that needs them, so that help is immediate.
"""

import argparse
import os
import sys
import warnings

from lib.site import run

DESCRIPTION = """\
Do Vision Transformers see like convolutional networks? This runs the book that asks.

A study names some images and a network for every role (vit, resnet, vit_untrained, ...).
A chapter asks one question of a study; its parameters cell holds what you may change.
"""

EPILOG = """\
first steps:
  python -m lib studies                       what can be measured here
  python -m lib execute --list                the chapters, and what each lets you change
  python -m lib execute 01 -p n_images 256    one chapter with your value
  python -m lib execute                       every chapter, as published
  python -m lib measure vit resnet --out my.nc   similarities of your choice, as a file
  python -m lib measure --vit vit_tiny_patch16_224.augreg_in21k --cnn resnet18.a1_in1k \\
      --images pictures --out my.nc           the same of any networks of timm
`python -m lib COMMAND --help` explains one command.
"""


def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m lib", description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter
    )
    parser.add_argument(
        "--traceback", action="store_true", help="on an error, show where it came from"
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, summary, add_arguments, function in (
        ("execute", "run chapters and write the executed notebooks", run.add_arguments, run.main),
        ("measure", "measure similarities and write a record", _measure_arguments, _measure),
        ("studies", "list the studies and their networks", _studies_arguments, _studies),
        ("train", "train a study's networks", _train_arguments, _train),
        ("pages", "make the pages that follow from the chapters", _pages_arguments, _pages),
    ):
        command = commands.add_parser(name, help=summary, formatter_class=formatter)
        add_arguments(command)
        command.set_defaults(run=function)
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if args.traceback:
            raise
        print(
            f"{error.name} is not installed for this Python; "
            "run `make setup` and use .venv/bin/python",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"{_who()}{error}", file=sys.stderr)
        return 2
    return 0


def _who() -> str:
    """Which of several processes speaks."""
    rank, count = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", 1))
    return f"process {rank} of {count}: " if count > 1 else ""


def _plain_warnings():
    """Warnings as one line each, and once if several processes have the same ones."""
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)


def _measure_arguments(parser):
    parser.description = (
        "Measure CKA between all layers of some networks and write it, with its intervals and\n"
        "its provenance, to a netCDF file that xarray opens. The networks are roles of a study,\n"
        "or any two of timm on your pictures. torchrun deals the minibatches to processes."
    )
    parser.epilog = (
        "examples:\n"
        "  measure vit resnet --out lab.nc\n"
        "  measure vit resnet --study imagenet-small --out small.nc\n"
        "  measure vit vit_untrained --study mine.toml --out mine.nc\n"
        "  measure --vit vit_tiny_patch16_224.augreg_in21k --images pictures --out tiny.nc"
    )
    parser.add_argument("roles", nargs="*", metavar="ROLE", help="networks, see `studies`")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the record goes")
    parser.add_argument("--study", help="a study (default: lab), or a TOML file that describes one")
    parser.add_argument(
        "--vit", metavar="NAME", help="plays the role vit: timm's or hf-hub:... name"
    )
    parser.add_argument("--cnn", metavar="NAME", help="plays the role resnet, likewise")
    parser.add_argument(
        "--images", metavar="FOLDER", help="pictures to measure on, in a folder per class or loose"
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="[vit=|cnn=]FILE",
        help="weights from a file; say whose if both networks are named",
    )
    parser.add_argument("--taps", default="all", help="blocks, branches, all (default), or a glob")
    parser.add_argument("--n-images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="another seed takes other images")
    parser.add_argument("--device", default="cpu")


def _measure(args):
    from lib import processes, records
    from lib.cka import MinibatchCKA
    from lib.measure import measure

    _plain_warnings()
    study = _study_of(args)
    roles = args.roles or (list(study.roles) if args.vit or args.cnn else [])
    if not roles:
        raise ValueError("name the roles to measure, or networks with --vit and --cnn")
    for role in roles:
        study.role(role)
    with processes.joined(args.device) as device:
        record = measure(
            study,
            roles,
            [MinibatchCKA(args.taps)],
            args.n_images,
            args.batch_size,
            args.seed,
            device,
        )
        if processes.rank() == 0:
            records.save(record, args.out)
            print(f"{args.out}: CKA of {record.sizes['tap']} taps over {args.n_images} images")


def _study_of(args):
    """The study that is named, or one made of the networks that are."""
    from lib.studies import load_study
    from lib.studies.public import Public, PublicRole

    named = {"vit": args.vit, "resnet": args.cnn}
    named = {role: model for role, model in named.items() if model}
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
        who, _, file = entry.partition("=") if entry[:4] in ("vit=", "cnn=") else ("", "", entry)
        role = {"vit": "vit", "cnn": "resnet"}.get(who)
        if not who and len(named) == 1:
            (role,) = named
        if role not in named:
            raise ValueError(f"say whose weights {file} holds: --weights vit={file} or cnn={file}")
        weights[role] = file
    roles = {
        role: PublicRole(model, "named on the command line", weights=weights.get(role))
        for role, model in named.items()
    }
    return Public("named", roles, {"folder": args.images})


def _studies_arguments(parser):
    parser.description = (
        "List the studies: their roles, what plays them, and how good it is or whether its\n"
        "weights are on this machine."
    )
    parser.add_argument("study", nargs="*", metavar="STUDY", help="only these (default: all)")


def _studies(args):
    from lib.studies import STUDIES, load_study
    from lib.studies.study import Trained

    for name in args.study or STUDIES:
        study = load_study(name)
        if isinstance(study, Trained):
            print(f"{name}: {study.purpose}")
            print(f"  {'role':34} {'architecture':21} {'test accuracy':22} what it is for")
            for role, what in study.roles.items():
                accuracy = _accuracy(study, role)
                print(f"  {role:34} {what.architecture:21} {accuracy:22} {what.purpose}")
        else:
            print(f"{study.name}: {study.purpose}")
            print(f"  {'role':21} {'checkpoint':41} {'licence':15} {'weights':12} what it is for")
            for role, what in study.roles.items():
                here = "here" if study.is_here(role) else "not here yet"
                print(f"  {role:21} {what.model:41} {what.licence:15} {here:12} {what.purpose}")
        print("  and each as <role>_untrained: the same network before its training")


def _accuracy(study, role):
    if role not in study.cards:
        return "no weights here"
    low, high = study.cards[role]["accuracy_interval"]
    return f"{study.cards[role]['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _train_arguments(parser):
    parser.description = (
        "Train the networks of a study, one after the other. Ctrl-C at any time: the same command\n"
        "goes on where it stopped, and networks that are finished are not trained again.\n"
        "On a CPU, start one process per core, each with its own roles and OMP_NUM_THREADS=1."
    )
    parser.add_argument("roles", nargs="*", metavar="ROLE", help="networks (default: all)")
    parser.add_argument("--study", default="lab")
    parser.add_argument(
        "--into", metavar="DIR", help="where the weights go (default: the study's own folder)"
    )
    parser.add_argument("--device", help="default: a GPU if there is one, else the CPU")


def _train(args):
    from pathlib import Path

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
    where = folder or study.checkpoints
    print(f"{len(waiting)} of {len(wanted)} networks to train on {device}, weights into {where}:")
    for role in waiting:
        recipe = study.role(role).recipe
        card = study.cards.get(role)
        took = f"took {card['seconds'] / 60:.0f} min on {card['device']}" if card else "not timed"
        print(f"  {role:34} {recipe.end * recipe.batch_size:,} images ({took})")
    for role in waiting:
        print(role)
        card = study.train(role, into=folder, device=device)
        print(f"  accuracy {card['accuracy']:.3f} on {card['test_images']:,} test images")


def _pages_arguments(parser):
    parser.description = (
        "Make what follows from the executed chapters in book/chapters and, of other studies, in\n"
        "book/records/STUDY: the scoreboard of all claims, the pages that show other studies\n"
        "beside the lab, and the data of the explorer of CKA maps. Only the last may have to\n"
        "measure, what the chapter on representation structure does, if that is not cached."
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        help="make only the explorer's data of a record that `measure` has written; a new study's "
        "also need a line in book/explorer.md and _config.yml",
    )


def _pages(args):
    from lib import records
    from lib.site import explorer

    if not args.record:
        run.write_pages()
    explorer.write(records.load(args.record) if args.record else explorer.measured())


if __name__ == "__main__":
    sys.exit(main())
