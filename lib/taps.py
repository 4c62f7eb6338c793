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

INPUT, SEQUENCES = ":input", nn.Sequential | nn.ModuleList
Taps = str | Sequence[str] | Callable[[nn.Module], Sequence[str]]  # see tap_names()


class TapError(RuntimeError):
    """A tap that does not exist, did not fire, or fired twice."""


@contextmanager
def tapping(
    model: nn.Module, taps: Taps, receive: Callable[[str, Tensor], None], graph: bool = False
) -> Iterator[list[str]]:
    """Hand every tapped tensor to ``receive(name, value)`` while the model runs.

    Call it as ``model(x)`` inside the context. It is in evaluation mode there, and comes out as it
    went in, whatever happens inside. The context's value is what :func:`tap_names` makes of
    ``taps``. Reduce or clone a value on receipt: the model may overwrite it afterwards. With
    ``graph`` it is still part of the graph, to take gradients of. A TapError is raised if a name
    matches no module, or a tap does not fire, or fires more than once, in a forward pass, or makes
    something other than one tensor.
    """
    names = tap_names(model, taps)
    modules = dict(model.named_modules())
    fired: set[str] = set()

    def fire(name, value):
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TapError(f"tap {name!r} makes a {kind}, not a tensor; tap a module inside it")
        if name in fired:
            why = "its module is used more than once; tap the modules around it instead"
            raise TapError(f"tap {name!r} fired twice in one forward pass: {why}")
        fired.add(name)
        receive(name, value if graph else value.detach())

    def complain(*_):
        if missing := [name for name in names if name not in fired]:
            why = f"{type(model).__name__} holds this module but does not call it"
            silent = f"{len(missing)} of {len(names)} taps are silent"
            raise TapError(f"tap {missing[0]!r} did not fire: {why} ({silent})")

    with _as_it_was(model):
        model.eval()
        handles = [
            model.register_forward_pre_hook(lambda *_: fired.clear(), prepend=True),
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
    patterns = [taps] if isinstance(taps, str) else list(taps)
    if isinstance(taps, str) and taps in ("blocks", "branches", "all"):
        patterns = _ready_list(model, taps)
    if not patterns:
        raise TapError("no tap is named")
    order, names = {name: place for place, name in enumerate(modules)}, set()
    for pattern in patterns:
        suffix = INPUT if pattern.endswith(INPUT) else ""
        glob = re.escape(pattern.removesuffix(INPUT)).replace(r"\*", r"[^.]+")
        found = [name + suffix for name in modules if name and re.fullmatch(glob, name)]
        if not found:
            parts = ", ".join(name for name, _ in model.named_children())
            kind = type(model).__name__
            raise TapError(f"no module of {kind} matches {pattern!r}; its parts are {parts}")
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
    return module.register_forward_pre_hook(lambda _, args: fire(name, args[0] if args else None))


# Of the families that are known: the parts of a block by which one is told, its branches, what else
# is inside, and what is around the blocks, of which "stream" is the input of the first.
# (Windowed and post-norm transformers have other branches, and no place for a LayerScale.)
# fmt: off
FAMILIES = (
    (["norm1", "attn", "ls1", "norm2", "mlp.fc2", "ls2"],  # ViT
     ["attn|ls1", "norm2:input", "mlp|ls2"],
     ["norm1", "attn", "norm2:input", "norm2", "mlp.fc2:input"], ["stream", "norm"]),
    (["norm1", "mlp_tokens", "norm2", "mlp_channels.fc2"],  # Mixer
     ["mlp_tokens", "norm2:input", "mlp_channels"],
     ["norm1", "mlp_tokens", "norm2:input", "norm2", "mlp_channels.fc2:input"], ["stream", "norm"]),
    # ResNet v1, of bottlenecks, and of basic units, in which act2 is the unit's output; v2 likewise
    (["conv1", "bn1", "conv2", "bn2", "bn3"], ["bn3"],
     ["conv1", "bn1", "act1", "conv2", "bn2", "conv3", "bn3", "downsample", "act2"],
     ["conv1", "bn1", "act1", "maxpool"]),
    (["conv1", "bn1", "conv2", "bn2"], ["bn2"],
     ["conv1", "bn1", "act1", "conv2", "bn2", "downsample"], ["conv1", "bn1", "act1", "maxpool"]),
    (["norm1", "conv1", "norm2", "conv2", "conv3"], ["conv3"],
     ["norm1", "conv1", "norm2", "conv2", "norm3", "conv3", "downsample"],
     ["stem.conv", "stem.pool", "norm"]),
    (["norm1", "conv1", "norm2", "conv2"], ["conv2"],
     ["norm1", "conv1", "norm2", "conv2", "downsample"], ["stem.conv", "stem.pool", "norm"]),
    ([], [], [], []),
)
# fmt: on


def _ready_list(model: nn.Module, kind: str) -> list[str]:
    """The taps of a ready list."""
    modules, members = dict(model.named_modules()), _stage_members(model)
    if not members:
        raise TapError(f"{type(model).__name__} has no stages of blocks; name the taps yourself")

    def is_a_layer(name):  # timm fills gaps with Identity
        module = modules.get(name.removesuffix(INPUT))
        return module is not None and not isinstance(module, nn.Identity)

    branches, inside, around = next(
        lists
        for told, *lists in FAMILIES
        if all(f"{members[-1]}.{part}" in modules for part in told)
    )
    wanted = list(members)
    for part in {"blocks": [], "branches": branches, "all": inside}[kind]:
        branch, _, scale = part.partition("|")  # a branch ends in its LayerScale, if it has one
        part = scale if scale and is_a_layer(f"{members[-1]}.{scale}") else branch
        wanted += [f"{member}.{part}" for member in members]
    if kind == "all":
        wanted += [f"{members[0]}{INPUT}" if name == "stream" else name for name in around]
    return [name for name in wanted if is_a_layer(name)]


def _stage_members(model: nn.Module) -> list[str]:
    """Members of the outermost sequences that hold blocks: ``blocks.3``, ``layer2.1``."""
    members: list[str] = []

    def visit(path, module):
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if _holds_blocks(child):
                visit(inner, child)
            elif isinstance(module, SEQUENCES) and any(
                list(part.parameters()) for part in child.children()
            ):
                members.append(inner)

    visit("", model)
    return members


def _holds_blocks(module: nn.Module) -> bool:
    """A sequence of modules that each have parts of their own, or something around one."""
    if isinstance(module, SEQUENCES):
        return any(list(child.children()) for child in module)
    return any(isinstance(child, SEQUENCES) and _holds_blocks(child) for child in module.children())
