"""The commands that need no chapter: measure, list and train the networks of studies."""

import os
import sys
import tempfile
import warnings
from pathlib import Path


def measure_arguments(parser) -> None:
    parser.epilog = (
        "examples:\n"
        "  measure vit resnet --out lab.nc\n"
        "  measure vit resnet --study imagenet-small --out small.nc\n"
        "  measure vit vit_untrained --study mine.toml --out mine.nc\n"
        "  measure --vit vit_tiny_patch16_224.augreg_in21k --images pictures --out tiny.nc"
    )
    add = parser.add_argument
    add("roles", nargs="*", metavar="ROLE", help="networks, see `studies`")
    add("--out", required=True, metavar="FILE", help="where the record goes; .npz: the explorer's")
    add("--study", help="a study (default: lab), or a TOML file that describes one")
    add("--vit", metavar="NAME", help="plays the role vit: timm's or hf-hub:... name")
    add("--cnn", metavar="NAME", help="plays the role resnet, likewise")
    add("--images", metavar="FOLDER", help="pictures, in a folder per class or loose")
    about = "weights from a file; say whose if both networks are named"
    add("--weights", action="append", default=[], metavar="[vit=|cnn=]FILE", help=about)
    add("--taps", default="all", help="blocks, branches, all (default), or a glob")
    add("--n-images", type=int, default=1024)
    add("--batch-size", type=int, default=64)
    add("--seed", type=int, default=0, help="another seed takes other images")
    add("--device", default="cpu")


def measure(args) -> None:
    """Measure CKA between all layers of some networks and write it to a file.

    It is a netCDF file with intervals and provenance that xarray opens. The networks are roles of
    a study, or any two of timm on your pictures. torchrun deals the minibatches to processes.
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
    check_cache()
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


def check_cache() -> None:
    """Refuse to measure what the cache could not keep."""
    from lib import records

    _check_writable(records.cache_folder(), "name another folder in VIT_SEE_CACHE")


def _check_writable(folder: Path, advice: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}); {advice}") from error


def _study_of(args):
    """The study that is named, or one made of the networks that are."""
    from lib.studies import load_study
    from lib.studies.public import Public, PublicRole, Source

    named = {"vit": args.vit, "resnet": args.cnn}
    named = {role: model for role, model in named.items() if model}
    if not named:
        if args.weights:
            raise ValueError("--weights belongs to --vit or --cnn; a study names its own")
        study = load_study(args.study or "lab")
        if args.images and not isinstance(study, Public):
            raise ValueError(f"the study {study.name!r} has images of its own")
        if args.images:
            study.use_folder(args.images)
        return study
    if args.study:
        raise ValueError("give either --study or networks with --vit and --cnn, not both")
    if not args.images:
        raise ValueError("say which pictures the networks are to see: --images FOLDER")
    weights = dict(_weights(entry, list(named)) for entry in args.weights)
    roles = {
        role: PublicRole(model, "named on the command line", weights=weights.get(role))
        for role, model in named.items()
    }
    return Public("named", roles, Source(folder=args.images))


def _weights(entry: str, named: list[str]) -> tuple[str, str]:
    """The role and the file of ``vit=FILE``, ``cnn=FILE``, or FILE if one network is named."""
    who, file = entry[:4], entry[4:]
    role = {"vit=": "vit", "cnn=": "resnet"}.get(who)
    if role is None:
        role, file = named[0] if len(named) == 1 else None, entry
    if role not in named:
        raise ValueError(f"say whose weights {file} holds: --weights vit={file} or cnn={file}")
    return role, file


def studies_arguments(parser) -> None:
    parser.add_argument("study", nargs="*", metavar="STUDY", help="only these (default: all)")


def studies(args) -> None:
    """List the studies and their networks.

    With the roles come what plays them, and how good it is or whether its weights are here.
    """
    from lib.studies import STUDIES, load_study
    from lib.studies.study import Trained

    for name in args.study or [name for name, entry in STUDIES.items() if entry.load]:
        study = load_study(name)
        if isinstance(study, Trained):
            print(f"{study.name}: {study.purpose}")
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


def train_arguments(parser) -> None:
    add = parser.add_argument
    add("roles", nargs="*", metavar="ROLE", help="networks (default: all)")
    add("--study", default="lab")
    add("--into", metavar="DIR", help="where the weights go (default: the study's own folder)")
    add("--device", help="default: a GPU if there is one, else the CPU")


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
