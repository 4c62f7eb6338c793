"""The book's command line: ``python -m lib COMMAND``.

Libraries are imported only by the command that needs them, so that help is immediate.
"""

import argparse
import sys

from lib import book

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
    for name, summary, add_arguments, run in (
        ("execute", "run chapters and write the executed notebooks", book.add_arguments, book.main),
        ("measure", "measure similarities and write a record", _measure_arguments, _measure),
        ("studies", "list the studies and their networks", _studies_arguments, _studies),
        ("train", "train a study's networks", _train_arguments, _train),
    ):
        command = commands.add_parser(name, help=summary, formatter_class=formatter)
        add_arguments(command)
        command.set_defaults(run=run)
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
        print(error, file=sys.stderr)
        return 2
    return 0


def _measure_arguments(parser):
    parser.description = (
        "Measure CKA between all layers of some networks of a study and write it, with its\n"
        "intervals and its provenance, to a netCDF file that xarray opens."
    )
    parser.add_argument("roles", nargs="+", metavar="ROLE", help="networks, see `studies`")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the record goes")
    parser.add_argument("--study", default="lab")
    parser.add_argument("--taps", default="all", help="blocks, branches, all (default), or a glob")
    parser.add_argument("--n-images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="another seed takes other images")
    parser.add_argument("--device", default="cpu")


def _measure(args):
    from lib import records
    from lib.cka import MinibatchCKA
    from lib.measure import measure
    from lib.studies import load_study

    record = measure(
        load_study(args.study),
        args.roles,
        [MinibatchCKA(args.taps)],
        args.n_images,
        args.batch_size,
        args.seed,
        args.device,
    )
    records.save(record, args.out)
    print(f"{args.out}: CKA of {record.sizes['tap']} taps over {args.n_images} images")


def _studies_arguments(parser):
    parser.description = "List the studies: their roles, what plays them, and how good it is."


def _studies(args):
    from lib.studies import STUDIES, load_study

    for name in STUDIES:
        study = load_study(name)
        print(f"{name}: {type(study).__doc__.splitlines()[0]}")
        print(f"  {'role':29} {'architecture':21} {'test accuracy':22} what it is for")
        for role, what in study.roles.items():
            print(f"  {role:29} {what.architecture:21} {_accuracy(study, role):22} {what.purpose}")
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

    from lib.studies import CHECKPOINTS, load_study

    study = load_study(args.study)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.into) if args.into else CHECKPOINTS
    wanted = args.roles or list(study.roles)
    waiting = [role for role in wanted if not study.is_trained(role, folder)]
    if not waiting:
        print(f"nothing to do: {', '.join(wanted)} are trained, by the recipe they have now")
        return
    print(f"{len(waiting)} of {len(wanted)} networks to train on {device}, weights into {folder}:")
    for role in waiting:
        images = study.role(role).recipe.images
        card = study.cards.get(role)
        took = f"took {card['seconds'] / 60:.0f} min on {card['device']}" if card else "not timed"
        print(f"  {role:29} {images:,} images ({took})")
    for role in waiting:
        print(role)
        card = study.train(role, checkpoints=folder, device=device)
        print(f"  accuracy {card['accuracy']:.3f} on {card['test_images']:,} test scenes")


if __name__ == "__main__":
    sys.exit(main())
