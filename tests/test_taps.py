"""Taps hand over what hooks of our own see at that moment, in the order it happens."""

import functools

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from lib.taps import TapError, collect, tap_names, tapping, unfused_attention

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **options).eval()


def vit(**options):
    return network("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=3, **options)


def deit3():
    return network("deit3_small_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=2)


def mixer():
    torch.manual_seed(0)
    return MlpMixer(img_size=32, patch_size=8, embed_dim=48, num_blocks=2).eval()


def convnext():
    return network("test_convnext")


def basic_resnet():
    return network("resnet18", channels=(8, 8, 16, 16), zero_init_last=False)


def bottleneck_resnet():
    return network("resnet50", layers=(1, 2, 1, 1), channels=(8, 8, 16, 16), zero_init_last=False)


@functools.cache
def outline(name):
    """A network without numbers: enough to name its taps, and quick to make."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def witness(model, x):
    """What plain hooks see of all modules, copied on the spot, in order."""
    inputs, outputs, handles = {}, {}, []

    def seen(name):
        def before(_, args):
            if args and isinstance(args[0], torch.Tensor):
                inputs[name] = args[0].detach().clone()

        def after(_, args, output):
            if isinstance(output, torch.Tensor):
                outputs[name] = output.detach().clone()

        return before, after

    for name, module in model.named_modules():
        before, after = seen(name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def hooks(model):
    return [
        hook
        for module in model.modules()
        for kind in (module._forward_hooks, module._forward_pre_hooks)
        for hook in kind.values()
    ]


def state(model):
    return [(m.training, getattr(m, "fused_attn", None)) for m in model.modules()]


class Backwards(nn.Module):
    """Modules run in another order than they were registered in."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.middle = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.middle[0](self.middle[1](self.first(x))))


class Odd(nn.Module):
    """A module that rests, one that runs twice, one that makes a pair, one that fails on demand."""

    def __init__(self):
        super().__init__()
        self.rest, self.twice, self.fine = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.pair = nn.LSTM(4, 4)
        self.keyword = Keyword()
        self.fails = False

    def forward(self, x):
        x = self.fine(x)
        if self.fails:
            raise ArithmeticError("on demand")
        return self.keyword(x=self.pair(self.twice(self.twice(x)))[0])


class Keyword(nn.Module):
    def forward(self, x):
        return x + 1


# What is handed over


@pytest.mark.parametrize(
    "make",
    [
        vit,
        basic_resnet,
        bottleneck_resnet,
        convnext,
        mixer,
    ],
)
def test_every_tap_is_what_a_hook_sees_at_that_moment_in_execution_order(make):
    model = make()
    inputs, outputs = witness(model, PIXELS)
    values = collect(model, PIXELS, "all")
    assert sorted(values) == sorted(tap_names(model, "all"))
    for name, value in values.items():
        seen = inputs if name.endswith(":input") else outputs
        assert torch.equal(value, seen[name.removesuffix(":input")]), name
    made = [name for name in values if ":" not in name]
    assert made == [name for name in outputs if name in values]


def test_execution_order_is_not_the_order_of_registration():
    model, x = Backwards(), torch.ones(2, 4)
    taps = ["last", "middle.*", "first", "middle.0:input"]
    order = ["first", "middle.1", "middle.0:input", "middle.0", "last"]
    assert list(collect(model, x, taps)) == order
    names = ["last", "middle.0:input", "middle.0", "middle.1", "first"]
    assert tap_names(model, taps) == names
    with tapping(model, taps, lambda name, value: None) as yielded:
        model(x)
    assert yielded == names


@pytest.mark.parametrize("make", [basic_resnet, bottleneck_resnet])
def test_relu_in_place_does_not_reach_what_was_measured(make):
    model = make()
    values = collect(model, PIXELS, ["bn1", "act1", "layer*.*.bn1", "layer*.*.act1"])
    units = ["", *(f"{name.removesuffix('bn1')}" for name in values if name.endswith(".bn1"))]
    assert len(units) > 4
    for unit in units:
        before, after = values[f"{unit}bn1"], values[f"{unit}act1"]
        assert before.min() < 0
        assert torch.equal(before.relu(), after)


def test_the_value_is_the_models_own_memory_and_may_be_overwritten_later():
    """Nothing is copied behind the scenes: who wants to keep a value clones it."""
    model, kept = basic_resnet(), {}
    with torch.no_grad(), tapping(model, ["bn1", "act1"], kept.__setitem__):
        model(PIXELS)
    assert torch.equal(kept["bn1"], kept["act1"])


def test_input_taps():
    model = vit()
    names = ["blocks.*:input", "blocks.*.attn", "blocks.*.norm2:input", "blocks.*.mlp", "blocks.*"]
    values = collect(model, PIXELS, names)
    assert len(values) == 15
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        between = values[f"{block}:input"] + values[f"{block}.attn"]
        torch.testing.assert_close(values[f"{block}.norm2:input"], between, rtol=0, atol=0)
        after = between + values[f"{block}.mlp"]
        torch.testing.assert_close(values[block], after, rtol=0, atol=0)
    assert torch.equal(values["blocks.1:input"], values["blocks.0"])


def test_values_are_detached_and_the_model_can_still_learn():
    model, flags = vit(), []
    with tapping(model, "blocks", lambda name, value: flags.append(value.requires_grad)):
        model(PIXELS).sum().backward()
    assert flags == [False] * 3
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_values_in_the_graph_can_be_differentiated():
    model, values = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), {}
    x = torch.ones(1, 3, requires_grad=True)
    with tapping(model, ["0"], values.__setitem__, graph=True):
        model(x)
    [gradient] = torch.autograd.grad(values["0"][0, 1], x)
    assert torch.equal(gradient[0], model[0].weight[1])


def test_several_forward_passes_in_one_context():
    model, seen = vit(), []
    taps = ["blocks.*", "blocks.0.attn.attn_drop"]
    with torch.no_grad(), tapping(model, taps, lambda name, value: seen.append((name, len(value)))):
        for n in (3, 1, 2):
            model(PIXELS[:n])
    names = ["blocks.0.attn.attn_drop", "blocks.0", "blocks.1", "blocks.2"]
    assert seen == [(name, n) for n in (3, 1, 2) for name in names]


def test_two_contexts_at_once():
    model, seen = vit(), []
    with (
        torch.no_grad(),
        tapping(model, "blocks", lambda name, _: seen.append(("outer", name))),
        tapping(model, "blocks.1", lambda name, _: seen.append(("inner", name))),
    ):
        model(PIXELS)
    assert seen == [
        ("outer", "blocks.0"),
        ("outer", "blocks.1"),
        ("inner", "blocks.1"),
        ("outer", "blocks.2"),
    ]
    assert not hooks(model)


# The model comes out as it went in


def test_evaluation_mode_inside_and_every_submodule_as_it_was_after():
    model = vit(drop_rate=0.5)
    model.train()
    model.blocks[1].eval()
    model.blocks[2].mlp.train(False)
    model.blocks[0].attn.fused_attn = False
    before = state(model)
    assert len({training for training, _ in before}) == 2
    with tapping(model, "blocks.*.attn.attn_drop", lambda name, value: None):
        assert not any(module.training for module in model.modules())
        assert not any(block.attn.fused_attn for block in model.blocks)
        with torch.no_grad():
            assert torch.equal(model(PIXELS), model(PIXELS)), "no dropout"
    assert state(model) == before
    assert not hooks(model)
    collect(model, PIXELS, "all")
    assert state(model) == before
    assert not hooks(model)


@pytest.mark.parametrize("where", ["model", "receiver", "caller", "tap"])
def test_whatever_happens_inside(where):
    model = Odd().train()
    model.twice.eval()
    before = state(model)
    model.fails = where == "model"

    def receive(name, value):
        if where == "receiver":
            raise ArithmeticError("on demand")

    error = TapError if where == "tap" else ArithmeticError
    taps = ["fine", "rest"] if where == "tap" else ["fine"]
    with pytest.raises(error), tapping(model, taps, receive):  # noqa: PT012
        model(torch.ones(2, 3, 4))
        assert where == "caller"
        raise ArithmeticError("on demand")
    assert state(model) == before
    assert not hooks(model)


def test_a_wrong_name_is_noticed_before_anything_is_touched():
    model = vit().train()
    with (
        pytest.raises(TapError, match="no module of VisionTransformer matches 'block'"),
        tapping(model, ["blocks", "block"], print),
    ):
        pass
    assert not hooks(model)
    assert all(module.training for module in model.modules())


def test_a_failed_forward_pass_can_be_repeated_in_the_same_context():
    model, seen = Odd(), []
    with tapping(model, ["fine", "pair:input"], lambda name, value: seen.append(name)):
        model.fails = True
        with pytest.raises(ArithmeticError):
            model(torch.ones(2, 3, 4))
        model.fails = False
        model(torch.ones(2, 3, 4))
    assert seen == ["fine", "fine", "pair:input"]


# Errors


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("rest", r"'rest' did not fire: Odd holds this module but does not call it \(1 of 2"),
        ("rest:input", "'rest:input' did not fire"),
        ("twice", "'twice' fired twice in one forward pass"),
        ("twice:input", "'twice:input' fired twice"),
        ("pair", "'pair' makes a tuple, not a tensor"),
        ("keyword:input", "'keyword:input'.*not a tensor"),
        ("absent", "no module of Odd matches 'absent'; its parts are rest, twice, fine, pair"),
        ("fine.*", r"no module of Odd matches 'fine\.\*'"),
        (":input", "no module of Odd matches ':input'"),
        ("", "no module of Odd matches ''"),
        ("fin", "no module of Odd matches 'fin'"),
        ("f.ne", "no module of Odd matches 'f.ne'"),
    ],
)
def test_errors_say_which_tap_and_why(tap, message):
    model = Odd()
    with pytest.raises(TapError, match=message):
        collect(model, torch.ones(2, 3, 4), ["fine", tap])
    assert not hooks(model)
    assert list(collect(model, torch.ones(2, 3, 4), "fine")) == ["fine"]


def test_no_taps_at_all_is_an_error():
    with pytest.raises(TapError, match="tap"):
        tap_names(Odd(), [])


# Names


def test_globs_stand_for_one_part_of_a_name():
    model = vit()
    assert tap_names(model, "blocks.*") == ["blocks.0", "blocks.1", "blocks.2"]
    assert tap_names(model, "blocks.*.attn") == [f"blocks.{i}.attn" for i in range(3)]
    assert tap_names(model, "*.1.*:input") == [
        f"blocks.1.{part}:input"
        for part in ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    ]
    assert tap_names(model, "blocks.2.mlp.fc*") == ["blocks.2.mlp.fc1", "blocks.2.mlp.fc2"]
    assert "blocks" in tap_names(model, "*")
    assert "blocks.0" not in tap_names(model, "*")


def test_a_function_chooses_taps_for_every_model():
    def last(model):
        return [str(len(model) - 1)]

    deep = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    assert tap_names(deep, last) == ["2"]
    assert tap_names(deep[:2], last) == ["1"]
    assert list(collect(deep, torch.ones(1, 3), last)) == ["2"]


def test_names_come_once_and_in_the_order_of_the_modules():
    model = vit()
    names = tap_names(model, ["norm", "blocks.1", "blocks.*", "blocks.1.attn", "blocks.1:input"])
    assert names == [
        "blocks.0", "blocks.1:input", "blocks.1", "blocks.1.attn", "blocks.2", "norm"
    ]  # fmt: skip


def parts_of(names, member):
    """What is tapped inside a member, and whether the member itself is."""
    inside = [name.removeprefix(member + ".") for name in names if name.startswith(member + ".")]
    return sorted(inside), member in names


VIT = ["attn", "mlp.fc2:input", "norm1", "norm2", "norm2:input"]
BASIC = ["act1", "bn1", "bn2", "conv1", "conv2"]
BOTTLENECK = ["act1", "act2", "bn1", "bn2", "bn3", "conv1", "conv2", "conv3"]
PREACTIVATION = ["conv1", "conv2", "conv3", "norm1", "norm2", "norm3"]
V1_STEM = ["conv1", "bn1", "act1", "maxpool"]


@pytest.mark.parametrize(
    ("name", "members", "first", "inside", "projections", "around"),
    [
        ("vit_tiny_patch16_224", 12, "blocks.0", VIT, 0, ["blocks.0:input", "norm"]),
        ("deit3_small_patch16_224", 12, "blocks.0", VIT, 0, ["blocks.0:input", "norm"]),
        ("test_vit2", 8, "blocks.0", VIT, 0, ["blocks.0:input"]),  # its norm is after pooling
        ("resnet18", 8, "layer1.0", BASIC, 3, V1_STEM),
        ("resnet50", 16, "layer1.0", BOTTLENECK, 4, V1_STEM),
        (
            "resnetv2_50x1_bit", 16, "stages.0.blocks.0", PREACTIVATION, 4,
            ["stem.conv", "stem.pool", "norm"],
        ),
        ("resnetv2_50d_gn", 16, "stages.0.blocks.0", PREACTIVATION, 4, ["stem.pool", "norm"]),
        (
            "mixer_b16_224", 12, "blocks.0",
            ["mlp_channels.fc2:input", "mlp_tokens", "norm1", "norm2", "norm2:input"],
            0, ["blocks.0:input", "norm"],
        ),
    ],
)  # fmt: skip
def test_ready_lists(name, members, first, inside, projections, around):
    model = outline(name)
    blocks = tap_names(model, "blocks")
    assert len(blocks) == members
    assert blocks[0] == first
    names = tap_names(model, "all")
    assert set(blocks) | set(around) <= set(names)
    for block in blocks:
        found, itself = parts_of(names, block)
        assert [part for part in found if part != "downsample"] == inside
        assert itself
    assert sum(name.endswith("downsample") for name in names) == projections
    assert len(names) == members * (len(inside) + 1) + projections + len(around)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("vit_tiny_patch16_224", ["attn", "mlp", "norm2:input"]),
        ("deit3_small_patch16_224", ["ls1", "ls2", "norm2:input"]),
        ("mixer_b16_224", ["mlp_channels", "mlp_tokens", "norm2:input"]),
        ("resnet18", ["bn2"]),
        ("resnet50", ["bn3"]),
        ("resnetv2_50x1_bit", ["conv3"]),
    ],
)
def test_branches(name, inside):
    model = outline(name)
    blocks, names = tap_names(model, "blocks"), tap_names(model, "branches")
    assert len(names) == len(blocks) * (len(inside) + 1)
    for block in blocks:
        assert parts_of(names, block) == (inside, True)


@pytest.mark.parametrize(
    "make",
    [
        vit,
        deit3,
        mixer,
    ],
)
def test_branches_are_what_is_added_to_the_stream(make):
    """Also behind a LayerScale; what mixes tokens, a Mixer computes transposed."""
    model = make()
    for module in model.modules():
        if hasattr(module, "gamma"):
            nn.init.normal_(module.gamma)
    values = collect(model, PIXELS, "branches")
    inputs = collect(model, PIXELS, "blocks.*:input")
    for block in tap_names(model, "blocks"):
        attention, between, mlp = (name for name in values if name.startswith(f"{block}."))
        assert between == f"{block}.norm2:input"
        added = values[attention].mT if make is mixer else values[attention]
        torch.testing.assert_close(values[between], inputs[f"{block}:input"] + added)
        torch.testing.assert_close(values[block], values[between] + values[mlp])


@pytest.mark.parametrize("make", [basic_resnet, bottleneck_resnet])
def test_branches_of_a_resnet_are_what_is_added_to_the_shortcut(make):
    model = make()
    values = collect(model, PIXELS, "branches")
    inputs, outputs = witness(model, PIXELS)
    for unit in tap_names(model, "blocks"):
        [branch] = [name for name in values if name.startswith(f"{unit}.")]
        shortcut = outputs.get(f"{unit}.downsample", inputs[unit])
        torch.testing.assert_close(values[unit], (values[branch] + shortcut).relu())


@pytest.mark.parametrize("taps", ["blocks", "branches", "all"])
@pytest.mark.parametrize(
    ("name", "members", "first"),
    [
        ("swin_tiny_patch4_window7_224", 12, "layers.0.blocks.0"),
        ("swinv2_tiny_window8_256", 12, "layers.0.blocks.0"),
        ("convnext_tiny", 18, "stages.0.blocks.0"),
        ("efficientnet_b0", 16, "blocks.0.0"),
        ("test_nfnet", 4, "stages.0.0"),
    ],
)
def test_other_networks_are_tapped_at_the_members_of_their_stages(name, members, first, taps):
    names = tap_names(outline(name), taps)
    assert len(names) == members
    assert names[0] == first


@pytest.mark.parametrize("taps", ["blocks", "branches", "all"])
def test_every_tap_of_a_ready_list_has_the_batch_first(taps):
    """Windowed attention cuts images up; such a tensor is no layer of so many images."""
    model = network(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, patch_size=2, embed_dim=24,
        depths=(2, 2), num_heads=(3, 6),
    )  # fmt: skip
    for name, value in collect(model, PIXELS, taps).items():
        assert len(value) == len(PIXELS), name


def test_a_network_without_stages_wants_names():
    with pytest.raises(TapError, match=r"^Odd has no stages of blocks; name the taps yourself"):
        tap_names(Odd())
    assert tap_names(Odd(), "fine") == ["fine"]


# Attention


def test_attention_maps_are_taps_and_their_rows_sum_to_one():
    model = vit()
    assert model.blocks[0].attn.fused_attn
    with torch.no_grad():
        fused = model(PIXELS)
    values = collect(model, PIXELS, "blocks.*.attn.attn_drop")
    assert len(values) == 3
    qkv = collect(model, PIXELS, "blocks.1.attn.qkv")["blocks.1.attn.qkv"]
    for value in values.values():
        assert value.shape == (3, 3, 5, 5)
        assert value.min() > 0
        torch.testing.assert_close(value.sum(-1), torch.ones(3, 3, 5))
    query, key, _ = qkv.reshape(3, 5, 3, 3, 16).permute(2, 0, 3, 1, 4)
    expected = (query @ key.transpose(-1, -2) / 4).softmax(-1)
    torch.testing.assert_close(values["blocks.1.attn.attn_drop"], expected)
    assert model.blocks[0].attn.fused_attn
    with torch.no_grad():
        assert torch.equal(model(PIXELS), fused)


def test_attention_stays_fused_where_its_map_is_not_asked_for():
    model = vit()
    with tapping(model, ["blocks.1.attn.attn_drop", "blocks.*"], lambda name, value: None):
        assert [block.attn.fused_attn for block in model.blocks] == [True, False, True]


def test_unfused_attention_lasts_as_long_as_its_context():
    model = vit()
    model.blocks[2].attn.fused_attn = False
    before = state(model)
    fired = []
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: fired.append(1))
    with torch.no_grad():
        fused = model(PIXELS)
        assert not fired
        with unfused_attention(model):
            assert not any(block.attn.fused_attn for block in model.blocks)
            torch.testing.assert_close(model(PIXELS), fused, rtol=1e-4, atol=1e-5)
        assert fired == [1]
        with pytest.raises(ArithmeticError), unfused_attention(model):
            raise ArithmeticError
    assert state(model) == before
