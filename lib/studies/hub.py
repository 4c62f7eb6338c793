"""Public checkpoints: timm's networks with weights from the Hugging Face hub or from a file.

Weights are loaded completely or not at all, and every error on the way is one sentence with a cure.
"""

import difflib
import errno
import functools
import hashlib
import re
from pathlib import Path

import safetensors
import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from timm.models import load_model_config_from_hf
from torch import nn

FILES = ("model.safetensors", "pytorch_model.bin")
ON_THE_HUB = "hf-hub:"
REFUSALS = {
    401: "it does not know the token (401): renew HF_TOKEN, or unset it",
    403: "it is forbidden (403): set HF_TOKEN to a token that may read it",
    429: "it was asked too often (429): wait some minutes, set HF_TOKEN",
}


class HubError(RuntimeError):
    """Weights that could not be downloaded, or not be read."""


@functools.lru_cache
def config(name: str) -> dict:
    """timm's facts about a checkpoint: mean and std of its input, licence, place of its weights.

    Parameters
    ----------
    name : str
        As timm spells it, ``"vit_base_patch16_224.augreg_in21k"``, or ``"hf-hub:user/repository"``
        for any other network on the hub.
    """
    if name.startswith(ON_THE_HUB):
        repository = name.removeprefix(ON_THE_HUB)
        return _from_hub(name, lambda: load_model_config_from_hf(repository)[0])
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        meant = f" (is it {near[0]!r} you mean?)" if near else ""
        raise ValueError(
            f"timm {timm.__version__} has no network {architecture!r}{meant}; "
            "timm.list_models() names all"
        )
    tagged = [found.partition(".")[2] for found in timm.list_pretrained(architecture)]
    if tag and tag not in tagged:
        raise ValueError(
            f"timm {timm.__version__} has no checkpoint {name!r}; "
            f"of this network it has {', '.join(tagged) or 'none'}"
        )
    found = timm.get_pretrained_cfg(name)
    return found.to_dict() if found else {}


def build(name: str, seed: int = 0, size: int = 224, weights=None) -> nn.Module:
    """A network with random weights, the same for the same seed, in evaluation mode.

    ``weights`` is a file of weights for the network, which may have another number of classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _create(name, size, _classes(config(name), weights)).eval()


def pretrained(name: str, size: int = 224, weights=None) -> nn.Module:
    """A network with its weights, in evaluation mode.

    Parameters
    ----------
    name : str
        See :func:`config`.
    size : int
        Side of the images, in pixels: networks that are built for one size are built for this one,
        and their position embedding is interpolated.
    weights : path, optional
        A file of weights for this network (.safetensors, or what ``torch.save`` wrote of tensors)
        instead of the ones on the hub. It may have another number of classes.

    Raises
    ------
    HubError
        If there are no weights to be had, or they do not fit.
    """
    found = config(name)
    if weights is None:
        file = fetch(name)
    elif not (file := Path(weights).expanduser()).is_file():
        raise FileNotFoundError(f"there is no file of weights {file} for {name}")
    try:
        state = timm.models.load_state_dict(str(file))
    except Exception as error:  # safetensors, zip and pickle have an error each
        raise HubError(
            f"{file} cannot be read as weights ({_line(error)}): is it whole, "
            "and a .safetensors file or a state dict?"
        ) from error
    classes = _classes(found, weights, state)
    source = {"state_dict": state, "source": "", "custom_load": False, "file": None}
    source |= {} if classes is None else {"num_classes": classes}
    try:
        model = _create(name, size, classes, pretrained=True, pretrained_cfg_overlay=source)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise HubError(f"{file} does not hold weights of {name}: {_misfit(error)}") from error
    model.pretrained_cfg = {**model.pretrained_cfg, "state_dict": None}
    return model.eval()


def fetch(name: str) -> Path:
    """The file of a checkpoint's weights, downloaded if it is not on this machine.

    The hub announces a file's SHA-256; a file that has another one is removed.
    """
    repository, revision, files = _place(name)
    file = _from_hub(name, lambda: _first_of(repository, revision, files))
    blob = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        with blob.open("rb") as content:
            right = hashlib.file_digest(content, "sha256").hexdigest() == blob.name
        if not right:
            file.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise HubError(
                f"the weights of {name} are damaged: their SHA-256 is not the one that "
                f"{constants.ENDPOINT} announced; they were removed, so try again or, if it "
                "happens again, set HF_ENDPOINT to another mirror"
            )
    return file


def is_here(name: str) -> bool:
    """Whether a checkpoint's weights are on this machine already, in the hub's cache."""
    try:
        repository, revision, files = _place(name)
    except (HubError, ValueError):
        return False
    found = [try_to_load_from_cache(repository, file, revision=revision) for file in files]
    return any(isinstance(path, str) for path in found)


def _place(name: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Repository, revision and possible files of a checkpoint on the hub."""
    if name.startswith(ON_THE_HUB):
        identity, file = name.removeprefix(ON_THE_HUB), None
    else:
        found = config(name)
        identity, file = found.get("hf_hub_id"), found.get("hf_hub_filename")
        if not identity:
            raise HubError(
                f"timm {timm.__version__} knows no weights for {name}: add the tag of a "
                "checkpoint to the name, or give a file of weights"
            )
    repository, _, revision = identity.partition("@")
    return repository, revision or None, (file,) if file else FILES


def _first_of(repository, revision, files) -> Path:
    file, *others = files
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) or not others:
            raise
        return _first_of(repository, revision, others)


def _from_hub(name, download):
    """Call the hub's client; its errors come out as one sentence."""
    try:
        return download()
    except Exception as error:  # whichever HTTP library the client uses
        raise HubError(f"{_trouble(name, error)}, or give a file of weights") from error


def _trouble(name: str, error: Exception) -> str:
    """Why the hub's client failed, and what to do about it."""
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if number := getattr(error, "errno", None):
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"there is no room in {cache} for {name}, and nothing was kept: set HF_HOME"
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{name} cannot be written to {cache}: set HF_HOME to a folder of yours"
    # The client wraps errors of its first request.
    silent = isinstance(error, LocalEntryNotFoundError)
    error = (silent and error.__cause__) or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"the weights of {name} are not in {cache}, and HF_HUB_OFFLINE forbids to download "
            "them: unset it, set HF_HOME to a folder that has them"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{hub} gives the weights of {name} only to those who have accepted their terms: "
            "do so on its page and set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError) and status:
        return (
            f"{hub} has no weights of {name} ({status}): check the name, set HF_TOKEN if they are "
            "private, set HF_ENDPOINT to a mirror"
        )
    if status in REFUSALS:
        return f"{hub} refuses to give {name}: {REFUSALS[status]}"
    if isinstance(error, FileMetadataError):
        return (
            f"{hub} answers as no hub does, perhaps with a login page, when asked for {name}: open "
            "it in a browser, set HF_ENDPOINT to a mirror"
        )
    if silent:
        return (
            f"the weights of {name} are not in {cache}, and {hub} does not answer: set HF_ENDPOINT "
            "to a mirror that does, set HF_HOME to a folder that has them"
        )
    return (
        f"the download of {name} from {hub} broke off, and nothing was kept ({_line(error)}): try "
        "again, set HF_ENDPOINT to a mirror"
    )


def _create(name, size, classes, **source) -> nn.Module:
    options = {} if classes is None else {"num_classes": classes}
    options |= {"img_size": size} if config(name).get("fixed_input_size") else {}
    return timm.create_model(name, **options, **source)


def _classes(found: dict, weights, state=None) -> int | None:
    """How many classes a file of weights has, or None to leave it at timm's number."""
    classifier = found.get("classifier")
    if weights is None or not isinstance(classifier, str):
        return None
    key = f"{classifier}.weight"
    if state is None:
        if Path(weights).suffix != ".safetensors" or not Path(weights).is_file():
            return None
        with safetensors.safe_open(str(weights), "pt") as opened:
            return opened.get_slice(key).get_shape()[0] if key in opened.keys() else 0  # noqa: SIM118
    return state[key].shape[0] if key in state else 0


def _misfit(error: Exception) -> str:
    """The first thing that does not fit, of torch's list below its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [*lines[1:2], *lines[:1], type(error).__name__][0]
    return told if len(told) <= 160 else f"{told[:160]}..."


def _line(error: Exception) -> str:
    """The first line of an error, which may be long and have several."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")
