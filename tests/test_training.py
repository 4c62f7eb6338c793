"""Training is a recipe: interrupted or not, it ends in the same weights, bit for bit."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lib.studies import checkpoints, networks, recipes, training
from lib.studies.recipes import Recipe

# 100 steps, 10 to an epoch: a point of the curve every 2 and a saved state every 5.
SHORT = Recipe(images=1600, distinct=160, batch_size=16, lr=3e-3, warmup_steps=10)


class Data:
    """Eight-pixel images of two classes, one brighter than the other, and whatever may go wrong."""

    def __init__(self, n, interrupt_at=None):
        stream = torch.Generator().manual_seed(0)
        self.labels = torch.randint(2, (n,), generator=stream)
        noise = torch.randint(0, 160, (n, 3, 8, 8), generator=stream)
        self.pixels = (noise + 32 * self.labels[:, None, None, None]).to(torch.uint8)
        self.interrupt_at = interrupt_at
        self.asked = []

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, indices):
        if len(self.asked) == self.interrupt_at:
            raise KeyboardInterrupt
        self.asked.append(indices.tolist())
        return self.pixels[indices], self.labels[indices]


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(
            img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=2
        ).eval()


def held_out():
    data = Data(80)
    return data.pixels, data.labels


def train(folder, model=None, data=None, recipe=SHORT, **options):
    model = model or network()
    data = data or Data(recipe.distinct)
    return model, training.train(model, recipe, data, held_out(), folder, **options)


def points(curve):
    """The curve without its timing, which is no result."""
    return [{key: point[key] for key in point if key != "seconds"} for point in curve]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    model, curve = train(tmp_path_factory.mktemp("whole"))
    return model.state_dict(), points(curve)


# Does it train ------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_curve_says_so(uninterrupted):
    _, curve = uninterrupted
    assert [point["images"] for point in curve] == list(range(32, 1601, 32))
    assert curve[0].keys() == {"images", "loss", "accuracy"}
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=0.3)
    assert curve[-1]["loss"] < 0.3
    assert curve[-1]["accuracy"] > 0.9


def test_the_last_point_is_there_even_if_it_is_not_a_round_one(tmp_path):
    recipe = Recipe(images=103 * 16, distinct=160, batch_size=16, warmup_steps=10)
    _, curve = train(tmp_path, recipe=recipe)
    assert [point["images"] for point in curve[-2:]] == [102 * 16, 103 * 16]


def test_a_part_of_a_training_is_the_beginning_of_the_whole(tmp_path):
    whole, part = network(), network()
    train(tmp_path / "whole", whole, stop_after=31)
    _, curve = train(tmp_path / "part", part, recipe=dataclasses.replace(SHORT, until=0.31))
    assert [point["images"] for point in curve] == [16 * step for step in (*range(2, 31, 2), 31)]
    for name, value in whole.state_dict().items():
        assert torch.equal(part.state_dict()[name], value), name


def test_the_loss_of_a_point_is_the_mean_since_the_last_one(tmp_path, monkeypatch):
    losses = []
    cross_entropy = recipes.F.cross_entropy

    def recorded(*arguments):
        loss = cross_entropy(*arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(recipes.F, "cross_entropy", recorded)
    _, curve = train(tmp_path, stop_after=6)
    means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert [point["loss"] for point in curve] == pytest.approx(means)


def test_scores_are_taken_in_float32_and_evaluation_mode_steps_in_bfloat16(tmp_path):
    model, seen = network(), []
    model.head.register_forward_hook(
        lambda module, _, output: seen.append((module.training, output.dtype))
    )
    train(tmp_path, model, stop_after=4)
    step, scored = (True, torch.bfloat16), (False, torch.float32)
    assert seen == [step, step, scored, step, step, scored]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_network_comes_out_in_the_mode_it_went_in(tmp_path):
    for mode in (True, False):
        model = network().train(mode)
        model.blocks[0].attn.fused_attn = True
        train(tmp_path / str(mode), model, stop_after=2)
        assert all(module.training is mode for module in model.modules())
        assert model.blocks[0].attn.fused_attn is True


def test_steps_follow_the_schedule_and_gradients_are_clipped(tmp_path, monkeypatch):
    rates, norms, settings = [], [], {}

    class Spy(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            settings.update(options)
            super().__init__(parameters, **options)

        def step(self, *arguments):
            (group,) = self.param_groups
            rates.append(group["lr"])
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norms.append(float(nn.utils.get_total_norm(gradients)))
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    recipe = Recipe(images=1600, distinct=160, batch_size=16, warmup_steps=10, clip=0.05)
    train(tmp_path, recipe=recipe, stop_after=20)
    assert rates == [recipe.rate(step) for step in range(20)]
    assert settings == {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.05}
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


# The schedule and the order -----------------------------------------------------------------------


def test_the_schedule_is_a_linear_warm_up_into_a_cosine():
    recipe = Recipe(images=32_000, batch_size=32, lr=0.4, warmup_steps=100)
    assert recipe.steps == 1000
    assert recipe.rate(0) == pytest.approx(0.4 / 100)
    assert recipe.rate(49) == pytest.approx(0.2 * 0.5 * (1 + math.cos(0.049 * math.pi)))
    assert recipe.rate(500) == pytest.approx(0.2)  # half way
    assert recipe.rate(750) == pytest.approx(0.4 * (1 - math.sqrt(0.5)) / 2)
    assert recipe.rate(999) == pytest.approx(0.4 * (math.pi / 1000) ** 2 / 4, rel=1e-4)
    assert recipe.rate(1000) == 0

    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=1000)
    for step in range(1000):
        if step >= 100:
            assert recipe.rate(step) == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
        optimiser.step()
        cosine.step()


def test_every_epoch_shows_every_image_once():
    orders = {}
    for seed in (0, 1):
        recipe = Recipe(images=480, distinct=160, batch_size=16, seed=seed)
        steps = [training._order(recipe, step).tolist() for step in range(30)]
        assert all(len(step) == 16 for step in steps)
        for epoch in range(3):
            orders[seed, epoch] = np.concatenate(steps[10 * epoch : 10 * epoch + 10]).tolist()
            assert sorted(orders[seed, epoch]) == list(range(160))
    distinct = {tuple(order) for order in orders.values()}
    assert len(distinct) == 6
    assert tuple(range(160)) not in distinct


def test_the_first_epoch_keeps_neighbours_together_and_later_ones_do_not():
    recipe = Recipe(images=320, distinct=160, batch_size=16)
    first, later = training._order(recipe, 3), training._order(recipe, 13)
    assert first.tolist() == list(range(int(first[0]), int(first[0]) + 16))
    assert first[0] % 16 == 0
    assert later.diff().abs().max() > 1


def test_the_order_does_not_depend_on_where_one_starts():
    recipe = Recipe(images=480, distinct=160, batch_size=16)
    forwards = [training._order(recipe, step).tolist() for step in range(30)]
    backwards = [training._order(recipe, step).tolist() for step in reversed(range(30))]
    assert forwards == backwards[::-1]


# Interrupted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(7,), (10,), (1, 2, 30, 99)], ids=str)
def test_stopped_and_resumed_is_the_same_to_the_last_bit(tmp_path, uninterrupted, stops):
    # 7 lies between two points of the curve and between two saved states; 10 on an epoch's end.
    for seed, stop in enumerate(stops):
        train(tmp_path, network(seed), stop_after=stop)  # from seed 0; then on from the state
    data = Data(160)
    model, curve = train(tmp_path, network(seed=5), data)
    assert len(data.asked) == 100 - stops[-1]
    assert_same(model.state_dict(), uninterrupted[0])
    assert points(curve) == uninterrupted[1]


def test_an_interrupt_loses_the_steps_since_the_last_save_and_nothing_else(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data=Data(160, interrupt_at=18))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert torch.load(tmp_path / "state.pt")["step"] == 15
    data = Data(160)
    model, curve = train(tmp_path, network(seed=5), data)
    assert len(data.asked) == 85
    assert data.asked[0] == training._order(SHORT, 15).tolist()
    assert_same(model.state_dict(), uninterrupted[0])
    assert points(curve) == uninterrupted[1]


def test_an_interrupt_before_the_first_save_starts_again(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data=Data(160, interrupt_at=3))
    assert list(tmp_path.iterdir()) == []
    model, _ = train(tmp_path)
    assert_same(model.state_dict(), uninterrupted[0])


@pytest.mark.parametrize("where", ["save", "replace"])
def test_an_interrupt_while_saving_leaves_the_state_before(
    tmp_path, uninterrupted, monkeypatch, where
):
    train(tmp_path, stop_after=10)
    before = (tmp_path / "state.pt").read_bytes()

    def half(state, path):
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    def never(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if where == "save":
            patched.setattr(training.torch, "save", half)
        else:
            patched.setattr(training.os, "replace", never)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before
    model, curve = train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert_same(model.state_dict(), uninterrupted[0])
    assert points(curve) == uninterrupted[1]


def test_the_time_taken_adds_up_over_interruptions(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))  # ten seconds pass whenever somebody looks
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    _, first = train(tmp_path, stop_after=5)
    kept = torch.load(tmp_path / "state.pt")["seconds"]
    assert kept > first[-1]["seconds"] > 0
    _, curve = train(tmp_path, stop_after=10)
    assert curve[:2] == first
    assert kept < curve[2]["seconds"] <= kept + 10


def test_a_finished_training_does_nothing(tmp_path, uninterrupted):
    train(tmp_path)
    data = Data(160, interrupt_at=0)
    model, curve = train(tmp_path, network(seed=5), data)
    assert_same(model.state_dict(), uninterrupted[0])
    assert points(curve) == uninterrupted[1]


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"seed": 1}, {"images": 3200}], ids=str)
def test_the_state_of_another_recipe_is_refused_in_one_sentence(tmp_path, change):
    train(tmp_path, stop_after=2)
    other = Recipe(**({**vars(SHORT), **change}))
    data = Data(160, interrupt_at=0)
    with pytest.raises(ValueError, match="belongs to another recipe; delete it") as caught:
        train(tmp_path, data=data, recipe=other)
    assert "\n" not in str(caught.value)
    assert torch.load(tmp_path / "state.pt")["step"] == 2


def test_data_that_do_not_fit_the_recipe_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^the recipe wants 160 distinct images, got 96$"):
        train(tmp_path, data=Data(96))
    recipe = Recipe(images=1600, distinct=100, batch_size=16)
    with pytest.raises(ValueError, match=r"must be a multiple of the batch size$"):
        train(tmp_path, recipe=recipe)
    assert list(tmp_path.iterdir()) == []


# Scores -------------------------------------------------------------------------------------------


def test_predictions_are_the_largest_logits_whatever_the_number_of_images():
    class Argmax(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))  # three channels, three classes

    stream = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 255, (600, 3, 2, 2), generator=stream, dtype=torch.uint8)
    expected = pixels.double().mean((2, 3)).argmax(1)
    sizes = []
    model = Argmax()
    model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    assert torch.equal(training.predict(model, pixels), expected)
    assert sizes == [256, 256, 88]
    wrong = expected.clone()
    wrong[:150] = (wrong[:150] + 1) % 3
    assert training.score(model, pixels, wrong) == 0.75
    for mode in (True, False):
        training.predict(model.train(mode), pixels[:2])
        assert model.training is mode


# Checkpoints --------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "new" / "net.safetensors"
    checkpoints.write(network(), {"role": "net", "accuracy": 0.5}, path)
    return path


def test_a_checkpoint_holds_matrices_in_8_bits_and_all_else_in_16(checkpoint):
    kept, packed = network().state_dict(), load_file(checkpoint)
    read = checkpoints.read(network(seed=9), checkpoint).state_dict()
    whole = {name for name, value in packed.items() if value.dtype == torch.int8}
    assert whole == {name for name in kept if name.endswith("weight") and "norm" not in name}
    for name, value in kept.items():
        if name in whole:
            largest = value.flatten(1).abs().amax(1)
            error = (read[name] - value).flatten(1).abs().amax(1)
            assert (error <= largest / 254 * (1 + 1e-4)).all()
            assert (packed[name].flatten(1).abs().amax(1) == 127).all()
        else:  # positions, class token, norms, biases
            assert torch.equal(read[name], value.half().float()), name
    assert checkpoint.stat().st_size < sum(v.numel() for v in kept.values()) + 8000
    assert json.loads(checkpoint.with_suffix(".json").read_text())["accuracy"] == 0.5
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["net.json", "net.safetensors"]


def test_weights_in_8_bits_are_the_same_when_packed_again():
    stream = torch.Generator().manual_seed(0)
    weights = (
        torch.randn(500, 7, 3, 3, generator=stream)
        * torch.logspace(-9, 3, 500)[:, None, None, None]
    )
    weights[3] = 0
    packed = checkpoints.pack({"conv.weight": weights})
    assert_same(checkpoints.pack(checkpoints.unpack(packed)), packed)
    assert (checkpoints.unpack(packed)["conv.weight"][3] == 0).all()


def test_writing_what_was_read_gives_the_same_bytes(checkpoint):
    model = checkpoints.read(network(seed=9), checkpoint)
    again = checkpoint.with_name("again.safetensors")
    checkpoints.write(model, {}, again)
    assert again.read_bytes() == checkpoint.read_bytes()


def test_loading_is_strict(checkpoint):
    weights = load_file(checkpoint)
    missing = {name: value for name, value in weights.items() if name != "norm.bias"}
    for changed, complaint in (
        (missing, "Missing key.*norm.bias"),
        (weights | {"more": torch.ones(1).half()}, "Unexpected key.*more"),
        (weights | {"norm.bias": torch.ones(3).half()}, "size mismatch for norm.bias"),
    ):
        save_file(changed, checkpoint)
        with pytest.raises(RuntimeError, match=re.compile(complaint, re.DOTALL)):
            checkpoints.read(network(), checkpoint)


def test_the_card_is_written_last(checkpoint, monkeypatch):
    # A card is what says that a network is trained: one without its weights would be a lie.
    before = checkpoint.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.write(network(seed=1), {"role": "another"}, checkpoint)
    assert checkpoint.read_bytes() == before
    assert json.loads(checkpoint.with_suffix(".json").read_text())["role"] == "net"


# Skip connections that fade out -------------------------------------------------------------------


def test_skips_fade_from_whole_to_nothing():
    recipe = dataclasses.replace(SHORT, fade=0.25)
    assert [recipe.skip(step) for step in (0, 5, 20, 25, 99)] == pytest.approx([1, 0.8, 0.2, 0, 0])
    assert SHORT.skip(0) == SHORT.skip(99) == 0


def test_a_network_ends_without_the_skips_that_fade(tmp_path):
    model = networks.without_skips(network(), 0)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, _: seen.append(block.skip))
    recipe = dataclasses.replace(SHORT, fade=0.25)
    train(tmp_path, model, recipe=recipe, stop_after=30)
    in_training = [skip for skip in seen if skip > 0]
    assert max(in_training) == 1
    assert min(in_training) == pytest.approx(0.04)
    assert model.blocks[0].skip == 0

    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        block = model.blocks[0]
        z = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        z = block.attn(block.norm1(z))
        z = block.mlp(block.norm2(z))
        torch.testing.assert_close(model.forward_features(x), model.norm(z))
