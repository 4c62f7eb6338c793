"""Networks without the skip connections of one block compute what their formula says."""

import pytest
import torch
from torch import nn

from lib.studies import networks
from lib.studies.networks import without_skips
from lib.taps import collect

# The architectures of the lab that miss a skip: (the intact one, the block that lost it)
CUTS = {
    "vit_no_skip_early": ("vit", 1),
    "vit_no_skip_middle": ("vit", 4),
    "vit_no_skip_late": ("vit", 6),
    "resnet_no_skip_middle": ("resnet", 6),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(model):
    """The blocks or units of a network of the lab, from input to output."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    return [unit for stage in model.stages for unit in stage.blocks]


@torch.no_grad()
def by_hand(block, x, skips):
    """A block's output from its parts, with its skips or without."""
    if hasattr(block, "attn"):
        x = skips * x + block.attn(block.norm1(x))
        return skips * x + block.mlp(block.norm2(x))
    branch = block.conv1(block.norm1(x))
    branch = block.conv3(block.norm3(block.conv2(block.norm2(branch))))
    return skips * x + branch


@pytest.mark.parametrize(
    ("name", "block", "shape"),
    [("vit", 4, (2, 65, 96)), ("vit_gap", 0, (2, 64, 96)), ("resnet", 6, (2, 128, 16, 16))],
)
def test_the_block_hands_on_its_branches_and_nothing_of_its_input(name, block, shape):
    model = networks.build(name, 0)
    cut = without_skips(model, block)
    x = draw(*shape)
    with torch.no_grad():
        found, intact = blocks(cut)[block](x), blocks(model)[block](x)
    torch.testing.assert_close(found, by_hand(blocks(model)[block], x, 0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(intact, by_hand(blocks(model)[block], x, 1), atol=1e-6, rtol=1e-5)
    assert (found - intact).abs().mean() > 0.5  # both skips carry much of x


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_only_that_block_changes_and_the_network_changes_from_there_on(name):
    model = networks.build(name, 0)
    cut = without_skips(model, 6)
    kinds = [type(a) is type(b) for a, b in zip(blocks(model), blocks(cut), strict=True)]
    assert kinds == [place != 6 for place in range(len(kinds))]
    x = draw(2, 3, 32, 32)
    before, after = (list(collect(one, x, "blocks").values()) for one in (model, cut))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [place < 6 for place in range(len(same))]


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_weights_keep_their_values_and_names_and_the_original_is_untouched(name):
    model = networks.build(name, 0)
    x = draw(2, 3, 32, 32)
    with torch.no_grad():
        before = model.forward_features(x)
    assert before.std() > 0.1
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    cut = without_skips(model, 6)
    assert list(cut.state_dict()) == list(weights)
    assert all(torch.equal(cut.state_dict()[key], value) for key, value in weights.items())
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
        assert torch.equal(model.forward_features(x), before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_what_is_left_is_trained_through_the_cut():
    cut = without_skips(networks.build("vit", 0), 4)
    # (Not the logits: an untrained head is all zeros.)
    cut.forward_features(draw(2, 3, 32, 32))[..., 0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in cut.blocks[0].mlp.parameters())


@pytest.mark.parametrize("name", CUTS)
def test_the_labs_networks_miss_the_skips_that_their_names_say(name):
    intact, place = CUTS[name]
    assert (networks.family(name), networks.cut(name)) == (intact, place)
    assert (networks.family(intact), networks.cut(intact)) == (intact, None)
    model, whole = networks.build(name, 3), networks.build(intact, 3)
    for network, places in ((model, [place]), (whole, [])):
        skipless = [hasattr(block, "skipless") for block in blocks(network)]
        assert [number for number, found in enumerate(skipless) if found] == places
    states = model.state_dict(), whole.state_dict()
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_mistakes_are_refused_in_one_sentence():
    for model in (networks.build("mixer", 0), nn.Sequential(nn.Linear(3, 3))):
        with pytest.raises(ValueError, match=f"^{type(model).__name__} has no blocks whose skips"):
            without_skips(model, 0)
    vit, resnet = networks.build("vit", 0), networks.build("resnet", 0)
    for block in (-1, 8):
        with pytest.raises(ValueError, match=f"^there is no block {block}; they go from 0 to 7$"):
            without_skips(vit, block)
    for unit in (0, 3, 7):  # the first of each stage
        with pytest.raises(ValueError, match=f"^the shortcut of unit {unit} is a projection"):
            without_skips(resnet, unit)


# Size ---------------------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    assert networks.multiply_adds(model, size=4) == 16 * 44


@pytest.mark.parametrize("side", [32, 64])
def test_networks_end_in_the_same_grid_whatever_the_size_of_images(side):
    size = networks.Size(side, 200)
    vit, resnet = (networks.build(name, 0, size) for name in ("vit", "resnet"))
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (96, 8, 6)
    assert vit.patch_embed.patch_size == (side // 8, side // 8)
    assert resnet.stem.conv.stride == (side // 32, side // 32)
    x = torch.zeros(1, 3, side, side)
    assert resnet.forward_features(x).shape[2:] == (8, 8)
    assert vit(x).shape == resnet(x).shape == (1, 200)
