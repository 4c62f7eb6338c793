"""Places of tokens: found where they are in every kind of network, refused where they are not."""

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

from lib.measure import measure
from lib.measurements.localisation import Localisation
from lib.measurements.places import Layout, layout, layouts
from lib.studies import load_study
from lib.studies.images import Images
from lib.taps import TapError, collect, tap_names


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(name, **options):
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, **options).eval()


def mixer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "num_blocks": 2}
        return timm.models.MlpMixer(**size).eval()


def answers(model, tap, where, size, row, column, of=8):
    """Which cell moves most when one of the ``of`` x ``of`` squares of an image is changed."""
    x, step = draw(1, 3, size, size, seed=5), size // of
    other = x.clone()
    other[..., row * step : (row + 1) * step, column * step : (column + 1) * step] += 2
    one, two = (where.split(collect(model, y, [tap])[tap])[0][0] for y in (x, other))
    side = round(len(one) ** 0.5)
    return divmod(int((one - two).norm(dim=-1).argmax()), side), side


# Splitting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "first"), [(8, 0), (8, 1), (14, 5), (7, 1)])
def test_patch_tokens_are_the_last_ones(side, first):
    value = draw(2, first + side * side, 3)
    cells, others = Layout(first).split(value)
    assert torch.equal(cells, value[:, first:])
    assert torch.equal(others, value[:, :first])


def test_tokens_of_a_feature_map_are_its_locations_row_by_row():
    value = draw(2, 3, 5, 5)
    for where, one in ((Layout(), value), (Layout(channels_last=True), value.movedim(1, -1))):
        cells, others = where.split(one)
        assert cells.shape == (2, 25, 3)
        assert torch.equal(cells[:, 7], value[:, :, 1, 2])
        assert others.shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 60, 8), r"\(4, 60, 8\) with 1 tokens before the patches has no square grid"),
        ((4, 8), r"^a tensor of shape \(4, 8\) has no places in the image: tap tokens"),
        ((4, 8, 7, 5), r"no square grid of places"),
        ((4, 2, 2, 2, 2), r"has no places in the image"),
    ],
)
def test_tensors_without_a_square_grid_are_refused(shape, message):
    with pytest.raises(TapError, match=message):
        Layout(1).split(draw(*shape))


# What a network declares --------------------------------------------------------------------------

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_tiny_patch16_224", SMALL, (1, True)),
        ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}, (0, False)),
        ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 4}, (5, True)),
        ("deit_tiny_distilled_patch16_224", SMALL, (2, True)),
        # Registers without a class token.
        ("vit_wee_patch16_reg1_gap_256", SMALL, (1, False)),
        ("vit_tiny_patch16_dinov3", SMALL, (5, True)),
        ("beit_base_patch16_224", SMALL, (1, True)),
        ("test_convnext", {}, (0, False)),
    ],
)
def test_prefix_tokens_and_whether_there_is_a_class_token(name, options, expected):
    if name == "vit_tiny_patch16_dinov3":
        name = "vit_small_patch16_dinov3"
    found = layout(network(name, **options))
    assert (found.prefix, found.class_token) == expected


def test_torchvisions_vit_has_a_class_token():
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)
    assert layout(model) == Layout(1, class_token=True)


# What is tested on the network --------------------------------------------------------------------

KINDS = {  # name: network, size of its images, taps, expected layout of the first
    "swin": (
        lambda: network("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2)),
        64, "blocks", Layout(channels_last=True),
    ),
    # As wide as its grid has cells: the shape alone does not tell where the channels are.
    "swinv2_cr, 96 x 96 x 96": (
        lambda: network("swinv2_cr_tiny_384", depths=(1, 1), num_heads=(3, 6)),
        384, "blocks", Layout(channels_last=True),
    ),
    # Five prefix tokens and 2 x 2 patches make nine tokens, which is 3 x 3.
    "dinov3 at 32 pixels": (
        lambda: network("vit_small_patch16_dinov3", img_size=32, depth=2),
        32, "blocks", Layout(5, class_token=True),
    ),
    # 1 + 8 + 4 x 4 = 5 x 5.
    "eight registers at 64 pixels": (
        lambda: network("vit_tiny_patch16_224", img_size=64, depth=2, reg_tokens=8),
        64, "blocks", Layout(9, class_token=True),
    ),
    "ConvNeXt, inside its blocks": (
        lambda: network("test_convnext"),
        160, ["stages.*.blocks.0.norm", "stages.*.blocks.0.mlp"], Layout(channels_last=True),
    ),
    "ConvNeXt": (lambda: network("test_convnext"), 160, "blocks", Layout()),
    "CaiT": (
        lambda: network("cait_xxs24_224", img_size=64, depth=3, patch_size=8),
        64, ["blocks.*"], Layout(),
    ),
    "ResNet": (lambda: network("resnet18"), 64, "blocks", Layout()),
    "Mixer": (mixer, 64, "blocks", Layout()),
    "mean-pooled with a register": (
        lambda: network("vit_wee_patch16_reg1_gap_256", **SMALL), 32, "blocks", Layout(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_places_found_are_those_that_answer(kind):
    make, size, taps, expected = KINDS[kind]
    model = make()
    names = tap_names(model, taps)
    found = layouts(model, names, draw(1, 3, size, size))
    assert found[names[0]] == expected
    assert list(found) == names
    for row, column in ((0, 7), (6, 0), (3, 5)):
        (at, across), side = answers(model, names[0], found[names[0]], size, row, column)
        # A cell of a fine grid may answer most to what lies beside it.
        for k, cell in ((row, at), (column, across)):
            assert abs((cell + 0.5) / side - (k + 0.5) / 8) <= 1 / 16 + max(0.5, side // 16) / side


class Plain(nn.Module):
    """A Vision Transformer that declares nothing: patches, extra tokens before them, blocks."""

    def __init__(self, prefix=0, width=16, order=None):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.first = nn.Parameter(torch.randn(1, prefix, width))
        layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(layer, nn.TransformerEncoderLayer(width, 2, 32, 0, nn.ReLU()))
        self.blocks[1].self_attn.batch_first = True
        self.order = order

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = x if self.order is None else x[:, self.order]
        return self.blocks(torch.cat([self.first.expand(len(x), -1, -1), x], 1))


@pytest.mark.parametrize("prefix", [0, 1, 3, 7])
def test_a_network_that_declares_nothing_is_tested_alone(prefix):
    torch.manual_seed(1)
    found = layouts(Plain(prefix).eval(), ["blocks.0", "blocks.1"], draw(1, 3, 32, 32))
    assert [one.prefix for one in found.values()] == [prefix] * 2
    assert not any(one.class_token for one in found.values())


@pytest.mark.parametrize("wrong", ["shuffled", "columns first", "mirrored"])
def test_another_order_of_tokens_is_refused(wrong):
    torch.manual_seed(1)
    grid = torch.arange(64).reshape(8, 8)
    order = {
        "shuffled": torch.randperm(64),
        "columns first": grid.T.flatten(),
        "mirrored": grid.flip(1).flatten(),
    }[wrong]
    model = Plain(1, order=order).eval()
    for taps in (["blocks.0"], ["blocks.1"], ["patches", "blocks.1"]):
        with pytest.raises(
            TapError, match=r"'blocks\.\d' of Plain lie in .* is not known.*another"
        ):
            layouts(model, taps, draw(1, 3, 32, 32))
    assert layouts(model, ["patches"], draw(1, 3, 32, 32)) == {"patches": Layout()}


class Study:
    """One network under the name ``some``."""

    name = "one"

    def __init__(self, model, size):
        self.network, self.size = model, size

    def images(self, n, seed=0):
        pixels = torch.randint(0, 256, (n, 3, self.size, self.size), dtype=torch.uint8)
        return Images(pixels, torch.zeros(n, dtype=torch.long), torch.zeros(n, 4))

    def model(self, role):
        return self.network

    def to_input(self, pixels, role):
        return pixels.float() / 127.5 - 1


def test_hiera_is_refused_with_role_and_network_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    model = network("hiera_tiny_224", img_size=64, stages=(1, 1), q_pool=1, embed_dim=24)
    message = r"^some \(Hiera\): where the tokens of tap 'blocks\.0' of Hiera lie in the image"
    with pytest.raises(TapError, match=message):
        measure(Study(model, 64), ["some"], [Localisation(["patch_embed", "blocks.0"])], 8, 4)


@pytest.mark.parametrize("size", [6, 9, 15, 30, 36, 100])
def test_any_size_of_images_will_do(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh())
    assert layouts(model, ["0", "1"], draw(1, 3, size, size)) == {"0": Layout(), "1": Layout()}


def test_a_class_token_alone_is_no_grid():
    model = network("cait_xxs24_224", img_size=64, depth=2, patch_size=8)
    with pytest.raises(TapError, match=r"blocks_token_only\.0' of Cait.*there is no grid"):
        layouts(model, ["blocks.0", "blocks_token_only.0"], draw(1, 3, 64, 64))


@pytest.mark.parametrize("tap", ["stages.2.1.transformer.0", "head"])
def test_windows_and_vectors_have_no_grid(tap):
    with pytest.raises(TapError, match=f"'{tap}' of ByobNet .*no grid"):
        layouts(network("mobilevit_xxs"), [tap], draw(1, 3, 64, 64))


def test_an_attention_map_is_no_feature_map():
    model = network("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(TapError, match=r"attn_drop' of VisionTransformer .* not known"):
        layouts(model, ["blocks.0", "blocks.1.attn.attn_drop"], draw(1, 3, 32, 32))


@pytest.mark.parametrize("role", ["vit", "vit_gap", "resnet", "mixer", "vit_no_skip_middle"])
def test_the_places_of_all_blocks_of_trained_networks_are_found(role):
    study = load_study("lab")
    model = study.model(role)
    names = tap_names(model, "blocks")
    expected = Layout(1, class_token=True) if role in ("vit", "vit_no_skip_middle") else Layout()
    for seed in (0, 1):
        x = study.to_input(study.images(1, seed).pixels, role)
        found = layouts(model, names, x)
        assert found == dict.fromkeys(names, expected)


class Deep(nn.Module):
    """A first block that keeps places, and a second in which every token is the mean of all."""

    def __init__(self):
        super().__init__()
        keep, mix = nn.Sequential(nn.Conv2d(3, 8, 4, 4)), nn.Sequential(nn.Conv2d(8, 8, 1))
        self.blocks = nn.Sequential(keep, mix)

    def forward(self, x):
        x = self.blocks[0](x)
        return self.blocks[1](x.mean((2, 3), keepdim=True) + 0 * x)


def test_deep_layers_that_answer_everywhere_keep_the_layout_of_the_first():
    found = layouts(Deep(), ["blocks.0", "blocks.1"], draw(1, 3, 64, 64))
    assert found == {"blocks.0": Layout(), "blocks.1": Layout()}
    assert layouts(Deep(), ["blocks.1"], draw(1, 3, 64, 64)) == {"blocks.1": Layout()}


def test_what_attention_adds_has_the_places_of_its_block():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=64).eval()
        x = torch.rand(1, 3, 64, 64) * 2 - 1
    taps = tap_names(model, ["blocks.*.attn", "blocks.*.mlp"])
    assert set(layouts(model, taps, x).values()) == {Layout(1, True)}
