"""Networks without the skip connections of one block compute what their formula says."""

import pytest
import torch
from torch import nn

from lib.studies import networks
from lib.studies.networks import blocks_without_skips, without_skips
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
    model, twin = networks.build(name, 3), networks.build(intact, 3)
    assert blocks_without_skips(model) == [place]
    assert blocks_without_skips(twin) == []
    assert blocks_without_skips(without_skips(model, place - 1)) == [place - 1, place]
    states = model.state_dict(), twin.state_dict()
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


# Work ---------------------------------------------------------------------------------------------


def test_work_is_counted_until_a_layer_is_done():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    done = networks.work_until(model, ["0", "1", "2"], size=4)
    assert done == pytest.approx({"0": 12 / 44, "1": 12 / 44, "2": 1})
    assert not model[0]._forward_hooks
    assert networks.multiply_adds(model, size=4) == 16 * 44


def test_half_of_a_vits_blocks_are_half_of_its_work():
    model = networks.build("vit", 0)
    done = list(networks.work_until(model, [f"blocks.{block}" for block in range(8)]).values())
    assert done == sorted(done)
    assert done[3] == pytest.approx(0.5, abs=0.01)
    assert done[-1] == pytest.approx(1, abs=0.001)
