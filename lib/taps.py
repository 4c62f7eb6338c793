"""Taps: named tensors in a model's forward pass, handed over the moment they exist.

A tap is named after the module that makes the tensor (``blocks.3.attn``); ``:input`` means the
tensor that enters the module instead (``blocks.3.norm2:input`` is the residual stream between
attention and MLP). Values arrive in execution order and are not kept: whoever receives one reduces
it on the spot, so memory does not grow with the depth of the network, and a later in-place
operation cannot change what was measured.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

INPUT = ":input"


class TapError(RuntimeError):
    """A tap that does not exist, did not fire, or fired twice."""


@contextmanager
def tapping(
    model: nn.Module,
    taps: str | Sequence[str] | Callable[[nn.Module], Sequence[str]],
    receive: Callable[[str, Tensor], None],
    graph: bool = False,
) -> Iterator[list[str]]:
    """Hand every tapped tensor to ``receive(name, value)`` while the model runs.

    Parameters
    ----------
    model : nn.Module
        Any module; call it as ``model(x)`` inside the context. It is in evaluation mode there, and
        comes out as it went in, whatever happens inside.
    taps : str or sequence of str
        One of the ready lists ``"blocks"``, ``"branches"``, ``"all"`` (see :func:`tap_names`), or
        names and globs, in which ``*`` stands for one part of a dotted name.
    receive : callable
        Called with the tap's name and its value, a tensor whose first axis is the batch. Reduce or
        clone the value: the model may overwrite it afterwards.
    graph : bool
        Hand over values that are still part of the graph, to take gradients of. By default they
        are detached.

    Yields
    ------
    list of str
        The names of the taps, in the order of the model's modules.

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
    with (
        torch.no_grad(),
        tapping(model, taps, lambda name, value: values.update({name: value.clone()})),
    ):
        model(x)
    return values


def tap_names(
    model: nn.Module, taps: str | Sequence[str] | Callable[[nn.Module], Sequence[str]] = "all"
) -> list[str]:
    """Resolve a ready list, names or globs to the names of taps, in the order of the modules.

    A function is asked which names or globs it wants of this model.

    The ready lists know ViTs, ResNets (v1 and v2) and Mixers; any other network is tapped at the
    members of its stages.

    - ``"blocks"``: the output of every block or residual unit.
    - ``"branches"``: also what each branch adds to the residual stream, and the stream between
      attention and MLP: four taps per ViT block, two per ResNet unit, as in the paper's Fig. 8.
    - ``"all"``: also normalisations, hidden layers and single convolutions: six taps per ViT
      block, seven per pre-activation bottleneck, as in the paper's Fig. 1.
    """
    modules = dict(model.named_modules())
    taps = taps(model) if callable(taps) else taps
    if isinstance(taps, str) and taps in ("blocks", "branches", "all"):
        patterns = _ready_list(modules, taps)
    else:
        patterns = [taps] if isinstance(taps, str) else list(taps)
    if not patterns:
        raise TapError("no tap is named")
    order = {name: place for place, name in enumerate(modules)}
    names: set[str] = set()
    for pattern in patterns:
        suffix = INPUT if pattern.endswith(INPUT) else ""
        glob = pattern.removesuffix(INPUT)
        if "*" in glob:
            glob = re.escape(glob).replace(r"\*", r"[^.]+")
            found = [name + suffix for name in modules if name and re.fullmatch(glob, name)]
        else:
            found = [glob + suffix] if glob and glob in modules else []
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


def _ready_list(modules: dict[str, nn.Module], kind: str) -> list[str]:
    """The taps of a ready list, as names relative to a block, for the families that are known."""
    members = _stage_members(modules)
    if not members:
        raise TapError("this network has no stages of blocks to tap; name the taps yourself")

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


def _stage_members(modules: dict[str, nn.Module]) -> list[str]:
    """Members of the outermost sequences that hold blocks: ``blocks.3``, ``layer2.1``."""
    members: list[str] = []

    def visit(path, module):
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if isinstance(module, nn.Sequential | nn.ModuleList):
                if _holds_blocks(child):
                    visit(inner, child)
                elif any(list(part.parameters()) for part in child.children()):
                    members.append(inner)
            elif _holds_blocks(child):
                visit(inner, child)

    def _holds_blocks(module):
        """A sequence of modules that each have parts of their own, or something around one."""
        if isinstance(module, nn.Sequential | nn.ModuleList):
            return any(list(child.children()) for child in module)
        return any(
            isinstance(child, nn.Sequential | nn.ModuleList) and _holds_blocks(child)
            for child in module.children()
        )

    visit("", modules[""])
    return members


# Where tokens lie ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tap's value lays out the image.

    prefix        : tokens before those that have a place: class token and registers
    class_token   : whether the first of them is a class token
    channels_last : whether a feature map is (n, h, w, channels)
    """

    prefix: int = 0
    class_token: bool = False
    channels_last: bool = False

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Separate the tokens that have a place in the image from those that have none.

        Parameters
        ----------
        value : Tensor (n, tokens, width) or a feature map
            A feature map's tokens are its locations.

        Returns
        -------
        cells : Tensor (n, side * side, width)
            Row by row from the image's upper left corner.
        others : Tensor (n, k, width)
            k is 0 for a feature map and for a network without a class token or registers.
        """
        if value.dim() == 3:
            cells, others = value[:, self.prefix :], value[:, : self.prefix]
        elif value.dim() == 4:
            cells = value.flatten(1, 2) if self.channels_last else value.flatten(2).mT
            others = cells[:, :0]
        else:
            raise TapError(
                f"a tensor of shape {tuple(value.shape)} has no places in the image: tap tokens "
                "(n, tokens, width) or feature maps"
            )
        if math.isqrt(cells.shape[1]) ** 2 != cells.shape[1]:
            raise TapError(
                f"a tensor of shape {tuple(value.shape)} with {self.prefix} tokens before the "
                "patches has no square grid of places"
            )
        return cells, others


def layout(model: nn.Module) -> Layout:
    """The layout of tokens that a network declares: timm's names, torchvision's ViT."""
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:  # torchvision's has no such number
        prefix = int(isinstance(getattr(model, "class_token", None), nn.Parameter))
    # A register is no class token: timm's models say which they have.
    has = getattr(model, "has_class_token", None)
    has = prefix > 0 and getattr(model, "cls_token", prefix) is not None if has is None else has
    last = getattr(model, "output_fmt", "") == "NHWC"
    return Layout(int(prefix), bool(prefix and has), last)


@torch.no_grad()
def layouts(model: nn.Module, taps: Sequence[str], x: Tensor) -> dict[str, Layout]:
    """The layout of every tap, tested by changing one patch of an image after another.

    Parameters
    ----------
    x : Tensor (1, channels, size, size)
        An image as the network takes it.

    Raises
    ------
    TapError
        If the cell that changes most is not the one that was changed: then the network keeps its
        tokens in another order than that of their places.
    """
    size, declared = x.shape[-1], layout(model)
    side = max(1, size // 8)
    changed, corners = [x], [(0, 7), (7, 0), (1, 5), (5, 2)]
    for row, column in corners:
        other = x.clone()
        area = other[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
        area.copy_(area.flip(-1, -2).roll(1, 1) + 1)
        changed.append(other)
    try:
        first = tap_names(model, "blocks")[:1]
    except TapError:
        first = []
    values = collect(model, torch.cat(changed), list(dict.fromkeys([*first, *taps])))
    found, trusted = {}, False
    for name, value in values.items():
        if name not in taps and (value.dim() not in (3, 4) or len(value) != len(changed)):
            continue
        if value.dim() not in (3, 4) or len(value) != len(changed):
            raise TapError(
                f"tap {name!r} of {type(model).__name__} makes a tensor of shape "
                f"{tuple(value.shape)} of {len(changed)} images: it has no places in the image"
            )
        fits = {one: _fit(one, value, corners) for one in _candidates(declared, value)}
        right = [one for one, fit in fits.items() if fit >= 0.75]
        if not fits or not (right or trusted):
            why = "another cell than the one that was changed changes most" if fits else "no grid"
            raise TapError(
                f"where the tokens of tap {name!r} of {type(model).__name__}, of shape "
                f"{tuple(value.shape)}, lie in the image is not known: {why}"
            )
        best = (right or [max(fits, key=fits.get)])[0]
        # Deep layers may answer to a patch anywhere; the first tells the order of the places.
        found[name], trusted = best, True
    return {name: found[name] for name in taps}


def _candidates(declared: Layout, value: Tensor) -> list[Layout]:
    """Layouts that a tensor's shape allows, the declared one first."""
    if value.dim() == 3:
        rest = value.shape[1] - math.isqrt(value.shape[1]) ** 2  # of networks that declare none
        prefixes = dict.fromkeys((declared.prefix, 0, rest))
        return [
            dataclasses.replace(declared, prefix=p, class_token=declared.class_token and p > 0)
            for p in prefixes
            if value.shape[1] > p and math.isqrt(value.shape[1] - p) ** 2 == value.shape[1] - p
        ]
    square = {False: value.shape[2] == value.shape[3], True: value.shape[1] == value.shape[2]}
    orders = dict.fromkeys((declared.channels_last, False, True))
    return [Layout(channels_last=last) for last in orders if square[last]]


def _fit(candidate: Layout, value: Tensor, corners) -> float:
    """Share of the changes at which the cell that moves most is one that was changed."""
    cells = candidate.split(value.float())[0]
    side = math.isqrt(cells.shape[1])
    most = (cells[1:] - cells[:1]).norm(dim=-1).argmax(1).tolist()
    hits = [
        all(
            k * side // 8 <= at < (k + 1) * side / 8
            for k, at in zip(corner, divmod(cell, side), strict=True)
        )
        for corner, cell in zip(corners, most, strict=True)
    ]
    return sum(hits) / len(hits)
