"""Taps: named tensors in a model's forward pass, handed over the moment they exist.

A tap is named after the module that makes the tensor (``blocks.3.attn``); ``:input`` means the
tensor that enters the module instead (``blocks.3.norm2:input`` is the residual stream between
attention and MLP). Values arrive in execution order and are not kept: whoever receives one reduces
it on the spot, so memory does not grow with the depth of the network, and a later in-place
operation cannot change what was measured.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

INPUT = ":input"
Taps = str | Sequence[str] | Callable[[nn.Module], Sequence[str]]  # see tap_names()


class TapError(RuntimeError):
    """A tap that does not exist, did not fire, or fired twice."""


@contextmanager
def tapping(
    model: nn.Module, taps: Taps, receive: Callable[[str, Tensor], None], graph: bool = False
) -> Iterator[list[str]]:
    """Hand every tapped tensor to ``receive(name, value)`` while the model runs.

    Parameters
    ----------
    model : nn.Module
        Call it as ``model(x)`` inside the context. It is in evaluation mode there, and comes out
        as it went in, whatever happens inside.
    taps
        See :func:`tap_names`; the context's value is the names, in the order of the modules.
    receive : callable
        Called with the tap's name and its value. Reduce or clone the value: the model may
        overwrite it afterwards.
    graph : bool
        Hand over values that are still part of the graph, to take gradients of.

    Raises
    ------
    TapError
        If a name matches no module, or a tap does not fire, or fires more than once, in a forward
        pass, or makes something other than one tensor.
    """
    names = tap_names(model, taps)
    modules = dict(model.named_modules())
    fired: set[str] = set()

    def fire(name, value):
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TapError(f"tap {name!r} makes a {kind}, not a tensor; tap a module inside it")
        if name in fired:
            raise TapError(
                f"tap {name!r} fired twice in one forward pass: its module is used more than once; "
                "tap the modules around it instead"
            )
        fired.add(name)
        receive(name, value if graph else value.detach())

    def forget(*_):
        fired.clear()

    def complain(*_):
        if missing := [name for name in names if name not in fired]:
            raise TapError(
                f"tap {missing[0]!r} did not fire: {type(model).__name__} holds this module but "
                f"does not call it ({len(missing)} of {len(names)} taps are silent)"
            )

    with _as_it_was(model):
        model.eval()
        handles = [
            model.register_forward_pre_hook(forget, prepend=True),
            # Not always_call: if forward() raised, do not report silent taps as well.
            model.register_forward_hook(complain),
        ]
        try:
            for name in names:
                path = name.removesuffix(INPUT)
                # An attention map exists only where attention is not fused into one kernel.
                parent = modules.get(path.rpartition(".")[0])
                if path.endswith(".attn_drop") and hasattr(parent, "fused_attn"):
                    parent.fused_attn = False
                handles.append(_hook(modules[path], name, fire))
            yield names
        finally:
            for handle in handles:
                handle.remove()


def collect(model: nn.Module, x: Tensor, taps: str | Sequence[str]) -> dict[str, Tensor]:
    """Run the model once and keep a copy of every tapped value, in execution order."""
    values: dict[str, Tensor] = {}

    def keep(name, value):
        values[name] = value.clone()

    with torch.no_grad(), tapping(model, taps, keep):
        model(x)
    return values


def tap_names(model: nn.Module, taps: Taps = "all") -> list[str]:
    """Names of taps, in the order of the modules.

    ``taps`` are names and globs, in which ``*`` stands for one part of a dotted name; a function
    of the model that gives some; or a ready list, for ViTs, ResNets (v1 and v2) and Mixers (any
    other network is tapped at the members of its stages):

    - ``"blocks"``: the output of every block or residual unit.
    - ``"branches"``: also what each branch adds to the residual stream, and the stream between
      attention and MLP: four taps per ViT block, two per ResNet unit, as in the paper's Fig. 8.
    - ``"all"``: also normalisations, hidden layers and single convolutions: six taps per ViT
      block, seven per pre-activation bottleneck, as in the paper's Fig. 1.
    """
    modules = dict(model.named_modules())
    taps = taps(model) if callable(taps) else taps
    if isinstance(taps, str) and taps in ("blocks", "branches", "all"):
        patterns = _ready_list(model, taps)
    else:
        patterns = [taps] if isinstance(taps, str) else list(taps)
    if not patterns:
        raise TapError("no tap is named")
    order = {name: place for place, name in enumerate(modules)}
    names: set[str] = set()
    for pattern in patterns:
        suffix = INPUT if pattern.endswith(INPUT) else ""
        glob = re.escape(pattern.removesuffix(INPUT)).replace(r"\*", r"[^.]+")
        found = [name + suffix for name in modules if name and re.fullmatch(glob, name)]
        if not found:
            some = ", ".join(name for name in modules if name.count(".") == 0 and name)
            raise TapError(
                f"no module of {type(model).__name__} matches {pattern!r}; its parts are {some}"
            )
        names.update(found)
    # In the order of the modules; a module's input comes before what is inside it.
    return sorted(names, key=lambda name: (order[name.removesuffix(INPUT)], INPUT not in name))


@contextmanager
def unfused_attention(model: nn.Module) -> Iterator[None]:
    """Compute attention step by step instead of in one fused kernel, as long as this lasts."""
    with _as_it_was(model):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        yield


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    before = [(m, m.training, getattr(m, "fused_attn", None)) for m in model.modules()]
    try:
        yield
    finally:
        for module, training, fused in before:
            module.training = training
            if fused is not None:
                module.fused_attn = fused


def _hook(module, name, fire):
    if not name.endswith(INPUT):
        return module.register_forward_hook(lambda _, args, output: fire(name, output))

    def pre_hook(_, args):
        fire(name, args[0] if args else None)

    return module.register_forward_pre_hook(pre_hook)


def _ready_list(model: nn.Module, kind: str) -> list[str]:
    """The taps of a ready list, as names relative to a block, for the families that are known."""
    modules, members = dict(model.named_modules()), _stage_members(model)
    if not members:
        raise TapError(f"{type(model).__name__} has no stages of blocks; name the taps yourself")

    def has(*parts):
        return all(f"{members[-1]}.{part}" in modules for part in parts)

    stream = f"{members[0]}{INPUT}"

    def added(branch, scale):
        """A branch ends in its LayerScale, if it has one."""
        return scale if _is_a_layer(modules, f"{members[-1]}.{scale}") else branch

    # (Windowed and post-norm transformers have other branches, and no place for a LayerScale.)
    if has("norm1", "attn", "ls1", "norm2", "mlp.fc2", "ls2"):  # ViT
        branches = [added("attn", "ls1"), "norm2:input", added("mlp", "ls2")]
        inside = ["norm1", "attn", "norm2:input", "norm2", "mlp.fc2:input"]
        around = [stream, "norm"]
    elif has("norm1", "mlp_tokens", "norm2", "mlp_channels.fc2"):  # Mixer
        branches = ["mlp_tokens", "norm2:input", "mlp_channels"]
        inside = ["norm1", "mlp_tokens", "norm2:input", "norm2", "mlp_channels.fc2:input"]
        around = [stream, "norm"]
    elif has("conv1", "bn1", "conv2", "bn2"):  # ResNet v1
        branches = ["bn3" if has("bn3") else "bn2"]
        inside = ["conv1", "bn1", "act1", "conv2", "bn2", "conv3", "bn3", "downsample"]
        inside += ["act2"] if has("bn3") else []  # of a basic unit this is the unit's output
        around = ["conv1", "bn1", "act1", "maxpool"]
    elif has("norm1", "conv1", "norm2", "conv2"):  # ResNet v2
        branches = ["conv3" if has("conv3") else "conv2"]
        inside = ["norm1", "conv1", "norm2", "conv2", "norm3", "conv3", "downsample"]
        around = ["stem.conv", "stem.pool", "norm"]
    else:
        branches, inside, around = [], [], []

    parts = {"blocks": [], "branches": branches, "all": inside}[kind]
    wanted = [f"{member}.{part}" for member in members for part in parts] + members
    if kind == "all":
        wanted += around
    return [name for name in wanted if _is_a_layer(modules, name)]


def _is_a_layer(modules, name) -> bool:
    """Whether the tap's module exists and does something (timm fills gaps with Identity)."""
    module = modules.get(name.removesuffix(INPUT))
    return module is not None and not isinstance(module, nn.Identity)


def _stage_members(model: nn.Module) -> list[str]:
    """Members of the outermost sequences that hold blocks: ``blocks.3``, ``layer2.1``."""
    members: list[str] = []

    def visit(path, module):
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if _holds_blocks(child):
                visit(inner, child)
            elif isinstance(module, nn.Sequential | nn.ModuleList) and any(
                list(part.parameters()) for part in child.children()
            ):
                members.append(inner)

    visit("", model)
    return members


def _holds_blocks(module: nn.Module) -> bool:
    """A sequence of modules that each have parts of their own, or something around one."""
    children = list(module.children())
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return any(list(child.children()) for child in children)
    sequences = [child for child in children if isinstance(child, nn.Sequential | nn.ModuleList)]
    return any(map(_holds_blocks, sequences))
