"""Masked autoencoding: what is hidden is hidden, what is painted is scored as it should be."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer

from lib.studies import masked, training
from lib.studies.masked import MaskedAutoencoder, MaskedRecipe

RECIPE = MaskedRecipe(
    images=2400, distinct=240, batch_size=16, lr=3e-3, warmup_steps=10, fitted_on=160
)


def network(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=2, **options
        )
    position = build_sincos2d_pos_embed([4, 4], dim=16)
    model.pos_embed.data[:, model.num_prefix_tokens :] = 0.5 * position
    return model.eval()


class Stripes:
    """Upright stripes and lying ones: each patch tells what the others look like."""

    def __init__(self, n):
        stream = torch.Generator().manual_seed(n)
        self.labels = torch.randint(2, (n,), generator=stream)
        wave = torch.arange(16) * torch.pi / 4
        wave = (127 + 100 * wave.sin()).expand(3, 16, 16).to(torch.uint8)
        self.pixels = torch.stack([wave.mT if label else wave for label in self.labels])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, which):
        return self.pixels[which], self.labels[which]


def to_input(pixels):
    return pixels.float() / 64 - 2


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def order():
    return torch.rand(3, 16, generator=torch.Generator().manual_seed(2)).argsort(1)


def patches(images):
    """(n, 16, 4, 4, 3): the patches, in the order of tokens."""
    return images.view(-1, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)


pooled = pytest.mark.parametrize(
    "options", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class token", "mean"]
)


# What the network sees ----------------------------------------------------------------------------


@pooled
def test_what_is_hidden_does_not_reach_the_network(options, images, order):
    learner = MaskedAutoencoder(network(**options))
    other = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    seen = learner._encode(images, order[:, :4])
    assert seen.shape == (3, 4, 16)
    for number, reached in ((order[0, 10], False), (order[0, 2], True)):
        changed = images.clone()
        row, column = divmod(int(number), 4)
        place = (0, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        changed[place] = other[place]
        again = learner._encode(changed, order[:, :4])
        assert torch.equal(again[1:], seen[1:])
        assert torch.equal(again[0], seen[0]) != reached


@pooled
def test_shown_everything_the_network_makes_what_it_always_makes(options, images):
    model = network(**options)
    learner = MaskedAutoencoder(model)
    everything = torch.arange(16).expand(3, -1)
    expected = model.forward_features(images)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(learner._encode(images, everything), expected)
    torch.testing.assert_close(learner(images), model(images))


def test_the_network_is_left_as_it_was(images, order):
    model = network()
    before = model(images)
    learner = MaskedAutoencoder(model)
    learner.error(images, order, 4)
    torch.testing.assert_close(model(images), before)
    with pytest.raises(AssertionError, match="height"):
        learner.error(images[:, :, :8], order, 4)
    torch.testing.assert_close(model(images), before)


# What it is asked ---------------------------------------------------------------------------------


def test_painting_every_patch_in_its_mean_colour_costs_one(images, order):
    learner = MaskedAutoencoder(network())
    torch.nn.init.zeros_(learner.paint[1].weight)
    torch.nn.init.zeros_(learner.paint[1].bias)
    assert learner.error(images, order, 4).item() == pytest.approx(1, abs=1e-4)


def test_the_error_is_that_of_the_hidden_patches(images, order):
    learner = MaskedAutoencoder(network())
    torch.nn.init.zeros_(learner.paint[1].weight)
    painted = torch.linspace(-1, 1, 48)
    learner.paint[1].bias.data = painted
    # torch's order within a patch: channel, row, column.
    target = patches(images).permute(0, 1, 4, 2, 3).flatten(2).double().numpy()
    target -= target.mean(-1, keepdims=True)
    target /= np.sqrt(target.var(-1, keepdims=True) + 1e-5)
    errors = [
        ((target[image, number] - painted.double().numpy()) ** 2).mean()
        for image in range(3)
        for number in order[image, 4:].tolist()
    ]
    found = learner.error(images, order, 4).item()
    assert found == pytest.approx(np.mean(errors), rel=1e-5)


def test_it_does_not_matter_in_which_order_patches_are_shown_or_painted(images, order):
    learner = MaskedAutoencoder(network())
    shuffled = torch.cat([order[:, :4].flip(1), order[:, 4:].roll(5, 1)], dim=1)
    torch.testing.assert_close(learner.error(images, order, 4), learner.error(images, shuffled, 4))
    others = order.roll(4, 1)
    apart = learner.error(images, order, 4) - learner.error(images, others, 4)
    assert abs(apart.item()) > 1e-3


def test_every_step_hides_other_patches_and_always_the_same_ones(images):
    learner = RECIPE.learner(network())

    def losses(recipe):
        return [recipe.loss(learner, images, None, step).item() for step in (0, 1)]

    first, second = losses(RECIPE)
    assert first != second
    assert losses(RECIPE) == [first, second]
    assert losses(dataclasses.replace(RECIPE, seed=1))[0] not in (first, second)
    # Of 16 patches, a quarter is shown.
    learner.error = lambda images, order, shown: (order.sort(1).values, shown)
    order, shown = RECIPE.loss(learner, images, None, 0)
    assert shown == 4
    assert torch.equal(order, torch.arange(16).expand(3, -1))


# Training -----------------------------------------------------------------------------------------


def train(folder, model, **options):
    held_out = Stripes(100)
    data = Stripes(RECIPE.distinct)
    held_out = held_out.pixels, held_out.labels
    return training.train(model, RECIPE, data, held_out, folder, to_input=to_input, **options)


def test_it_learns_to_paint_and_is_scored_by_a_classifier_fitted_to_it(tmp_path):
    model = network()
    names = set(model.state_dict())
    start = {name: value.clone() for name, value in model.state_dict().items()}
    curve = train(tmp_path / "whole", model)
    assert set(model.state_dict()) == names
    assert curve[0]["loss"] > 0.8
    assert curve[-1]["loss"] < 0.2
    assert curve[-1]["accuracy"] == 1
    assert not torch.equal(start["blocks.1.mlp.fc1.weight"], model.blocks[1].mlp.fc1.weight)

    train(tmp_path / "again", network(), stop_after=70)
    again = network()
    resumed = train(tmp_path / "again", again)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for one, other in zip(curve, resumed, strict=True):
        assert (one["loss"], one["accuracy"]) == (other["loss"], other["accuracy"])


def test_the_classifier_is_a_ridge_regression_and_nothing_else_changes():
    model, data = network(), Stripes(200)
    data.pixels = data.pixels + torch.randint(0, 25, data.pixels.shape).to(torch.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masked.fit_classifier(model, data.pixels, data.labels, to_input)
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert changed == {"head.weight", "head.bias"}

    with torch.no_grad():
        features = model.forward_head(
            model.forward_features(to_input(data.pixels)), pre_logits=True
        ).double()
        found = model(to_input(data.pixels))
    scaled = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()
    targets = 2 * np.eye(2)[data.labels] - 1
    expected = Ridge(alpha=0.2).fit(scaled, targets).predict(scaled)
    np.testing.assert_allclose(found, expected, atol=2e-4)
