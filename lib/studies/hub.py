"""Public checkpoints: timm's networks with weights from the Hugging Face hub or from a file.

Weights are loaded completely or not at all, and every error on the way is one sentence with a cure.
"""

import difflib
import errno
import functools
import hashlib
import re
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
from timm.models import load_model_config_from_hf
from torch import nn

FILES = ("model.safetensors", "pytorch_model.bin")
ON_THE_HUB = "hf-hub:"
REFUSALS = {
    401: "renew HF_TOKEN, which is not known there, or unset it",
    403: "set HF_TOKEN to a token that may read it",
    429: "wait some minutes, for it was asked too often, set HF_TOKEN",
}


class HubError(RuntimeError):
    """Weights that could not be downloaded, or not be read."""


@functools.lru_cache
def config(name: str) -> dict:
    """timm's facts about a checkpoint: mean and std of its input, licence, place of its weights.

    ``name`` is as timm spells it, ``"vit_base_patch16_224.augreg_in21k"``, or
    ``"hf-hub:user/repository"`` for any other network on the hub.
    """
    if name.startswith(ON_THE_HUB):
        repository = name.removeprefix(ON_THE_HUB)
        return _from_hub(name, lambda: load_model_config_from_hf(repository)[0])
    architecture, dot, _ = name.partition(".")
    tagged = timm.list_pretrained(architecture)
    if not timm.is_model(architecture) or (dot and name not in tagged):
        known = [*tagged, *timm.list_models()]
        near = [*difflib.get_close_matches(name, known, n=1), "vit_base_patch16_224"][0]
        raise ValueError(
            f"timm {timm.__version__} has no network {name!r} (is it {near!r} you mean?); "
            "timm.list_models(pretrained=True) names all"
        )
    found = timm.get_pretrained_cfg(name)
    return found.to_dict() if found else {}


def build(name: str, seed: int = 0, size: int = 224, weights=None) -> nn.Module:
    """A network with random weights, the same for the same seed, in evaluation mode.

    ``weights`` is a file of weights for the network, which may have another number of classes.
    """
    classes = _classes(name, _state(name, weights)) if weights else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _create(name, size, **classes).eval()


def pretrained(name: str, size: int = 224, weights=None) -> nn.Module:
    """A network with its weights, in evaluation mode.

    Networks that are built for one ``size`` of image, in pixels, are built for this one, and their
    position embedding is interpolated. ``weights`` is a file of weights for the network
    (.safetensors, or what ``torch.save`` wrote of tensors) instead of the ones on the hub, and may
    have another number of classes.
    """
    file = weights or fetch(name)
    state = _state(name, file)
    classes = _classes(name, state) if weights else {}
    source = {"state_dict": state, "source": "", "custom_load": False, "file": None} | classes
    try:
        model = _create(name, size, **classes, pretrained=True, pretrained_cfg_overlay=source)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise HubError(f"{file} does not hold weights of {name}: {_line(error, 1)}") from error
    model.pretrained_cfg = {**model.pretrained_cfg, "state_dict": None}
    return model.eval()


def _create(name: str, size: int, **options) -> nn.Module:
    side = {"img_size": size} if config(name).get("fixed_input_size") else {}
    return timm.create_model(name, **side, **options)


def _state(name: str, file) -> dict:
    """The weights in a file."""
    if not (file := Path(file).expanduser()).is_file():
        raise FileNotFoundError(f"there is no file of weights {file} for {name}")
    try:
        return timm.models.load_state_dict(str(file))
    except Exception as error:  # safetensors, zip and pickle have an error each
        raise HubError(
            f"{file} cannot be read as weights ({_line(error)}): is it whole, "
            "and a .safetensors file or a state dict?"
        ) from error


def _classes(name: str, state: dict) -> dict[str, int]:
    """How many classes weights are for, as an option for timm; none to leave it at its number."""
    classifier = config(name).get("classifier")
    if not isinstance(classifier, str):
        return {}
    return {"num_classes": len(state.get(f"{classifier}.weight", ()))}


def fetch(name: str) -> Path:
    """The file of a checkpoint's weights, downloaded if it is not on this machine.

    The hub announces a file's SHA-256; a file that has another one is removed.
    """
    repository, revision, files = _place(name)

    def first(file, *others):
        try:
            return Path(hf_hub_download(repository, file, revision=revision))
        except errors.RemoteEntryNotFoundError:
            if not others:
                raise
            return first(*others)

    file = _from_hub(name, lambda: first(*files))
    blob = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        with blob.open("rb") as content:
            right = hashlib.file_digest(content, "sha256").hexdigest() == blob.name
        if not right:
            file.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise HubError(
                f"the weights of {name} are damaged: their SHA-256 is not the one that "
                f"{constants.ENDPOINT} announced; they were removed: try again, set HF_ENDPOINT to "
                "another mirror"
            )
    return file


def is_here(name: str) -> bool:
    """Whether a checkpoint's weights are on this machine already, in the hub's cache."""
    try:
        repository, revision, files = _place(name)
    except (HubError, ValueError):
        return False
    found = (try_to_load_from_cache(repository, file, revision=revision) for file in files)
    return any(isinstance(path, str) for path in found)


def _place(name: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Repository, revision and possible files of a checkpoint on the hub."""
    found = {"hf_hub_id": name.removeprefix(ON_THE_HUB)} if ON_THE_HUB in name else config(name)
    if not found.get("hf_hub_id"):
        raise HubError(
            f"timm {timm.__version__} knows no weights for {name}: add the tag of a "
            "checkpoint to the name, or give a file of weights"
        )
    repository, _, revision = found["hf_hub_id"].partition("@")
    file = found.get("hf_hub_filename")
    return repository, revision or None, (file,) if file else FILES


def _from_hub(name, download):
    """Call the hub's client; its errors come out as one sentence."""
    try:
        return download()
    except Exception as error:  # whichever HTTP library the client uses
        why, cure = _trouble(error)
        sentence = f"{name} could not be downloaded ({why}): {cure}, or give a file of weights"
        raise HubError(sentence) from error


def _trouble(error: Exception) -> tuple[str, str]:
    """Why the hub's client failed, and what to do about it."""
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    # The client wraps errors of its first request.
    silent = isinstance(error, errors.LocalEntryNotFoundError)
    error = (silent and error.__cause__) or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"there is no room in {cache}, and nothing was kept", "set HF_HOME"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{cache} cannot be written to", "set HF_HOME to a folder of yours"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it", "unset it, set HF_HOME to a folder that has it"
    if isinstance(error, errors.GatedRepoError):
        return f"{hub} gives it only to those who have accepted its terms", "do so, set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError | errors.EntryNotFoundError) and status:
        cure = "check the name, set HF_TOKEN if it is private, set HF_ENDPOINT to a mirror"
        return f"{hub} has no weights of that name ({status})", cure
    if status in REFUSALS:
        return f"{hub} refuses to give it ({status})", REFUSALS[status]
    if isinstance(error, errors.FileMetadataError):
        cure = "open it in a browser, set HF_ENDPOINT to a mirror"
        return f"{hub} answers as no hub does, perhaps with a login page", cure
    if silent:
        cure = "set HF_ENDPOINT to a mirror that does, set HF_HOME to a folder that has it"
        return f"it is not in {cache}, and {hub} does not answer", cure
    cure = "try again, set HF_ENDPOINT to a mirror"
    return f"{hub} broke off, and nothing was kept: {_line(error)}", cure


def _line(error: Exception, number: int = 0) -> str:
    """One line of an error, which may be long and have several, or its last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[: number + 1][-1].strip()[:200].rstrip(". ")
