"""Receptive fields that are known: stacks of convolutions, and tokens that never meet."""

import inspect

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lib.intervals import jackknife
from lib.measurements.receptive_field import (
    dominance,
    estimate,
    measure_receptive_fields,
    patch_shares,
    radius,
    receptive_field,
    widening,
)
from lib.studies import load_study
from lib.taps import TapError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def convolutions(depth=3, stride=1, width=8):
    layers = [nn.Conv2d(3, width, 3, padding=1)]
    for k in range(1, depth):
        layers.append(nn.Conv2d(width, width, 3, padding=1, stride=stride if k == 1 else 1))
    return seeded(lambda: nn.Sequential(*layers))


def vit(**options):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return seeded(lambda: timm.models.VisionTransformer(**small | {"num_classes": 5} | options))


class Alone(nn.Module):
    """In the place of attention: every token keeps to itself."""

    def forward(self, x, **_):
        return x


def own_share(field, centre, patch_size):
    shares = patch_shares(field, centre, patch_size)
    return shares[len(shares) // 2, len(shares) // 2]


def field_of(record, tap):
    part = record.sel(tap=tap)
    return part["field"].values.sum(0), float(part["centre"])


# Fields that are known ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [15, 16])
def test_a_stack_of_3x3_convolutions_sees_exactly_its_theoretical_support(size):
    record = receptive_field(convolutions(3), draw(4, 3, size, size), ["0", "1", "2"])
    for tap, reach in (("0", 1), ("1", 2), ("2", 3)):
        field, centre = field_of(record, tap)
        seen = np.argwhere(field > 0)
        assert seen.min() == centre - reach
        assert seen.max() == centre + reach
        assert len(seen) == (2 * reach + 1) ** 2
        assert radius(field, centre, 1.0) == pytest.approx(reach * 2**0.5)


def test_a_stride_widens_the_steps():
    """3 x 3, 3 x 3 with stride 2, 3 x 3: 1 + 2 + 2 + 2 * 2 = 9 pixels wide."""
    record = receptive_field(convolutions(3, stride=2), draw(4, 3, 16, 16), ["2"])
    field, centre = field_of(record, "2")
    assert int(record["cell"].squeeze()) == 2
    seen = np.argwhere(field > 0)
    assert np.ptp(seen, axis=0).tolist() == [8, 8]
    assert abs(seen.mean() - centre) <= 0.5  # padding puts the kernel on a cell's first pixel


@pytest.mark.parametrize("prefix", [{}, {"class_token": False, "global_pool": "avg"}])
def test_tokens_that_never_meet_see_their_own_patch(prefix):
    model = vit(**prefix)
    for block in model.blocks:
        block.attn = Alone()
    record = receptive_field(model, draw(4, 3, 32, 32), "blocks.*")
    for tap in ("blocks.0", "blocks.1"):
        field, centre = field_of(record, tap)
        assert own_share(field, centre, 8) == pytest.approx(1, abs=1e-6)
        assert np.count_nonzero(field) == 64
        assert dominance(field, centre, 8) == pytest.approx(1, abs=1e-6)


def test_attention_makes_them_meet_and_skips_keep_the_own_patch():
    record = receptive_field(vit(), draw(4, 3, 32, 32), ["blocks.*", "blocks.*.attn"])
    after, branch = (field_of(record, f"blocks.1{part}") for part in ("", ".attn"))
    assert np.count_nonzero(after[0]) > 32**2
    assert dominance(*after, 8) > 0.2
    own_after, own_branch = (own_share(*one, 8) for one in (after, branch))
    assert own_after > 2 * own_branch


def test_against_the_definition():
    """Mean over images and channels of the absolute gradient, one channel and image at a time."""
    model = convolutions(2, width=4)
    model.insert(1, nn.Tanh())
    x = draw(3, 3, 7, 7)
    expected = torch.zeros(7, 7)
    for image in x:
        one = image[None].clone().requires_grad_()
        y = model(one)
        for channel in range(4):
            [gradient] = torch.autograd.grad(y[0, channel, 3, 3], one, retain_graph=True)
            expected += gradient[0].abs().mean(0) / 4
    record = receptive_field(model, x, ["2"], channels=4, groups=3)
    assert field_of(record, "2")[0] == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-9)


def test_channels_do_not_cancel():
    """Two channels that are each other's negative: their sum has no gradient at all."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, bias=False))
    with torch.no_grad():
        model[0].weight[1] = -model[0].weight[0]
    field, _ = field_of(receptive_field(model, draw(2, 3, 5, 5), ["0"], channels=2), "0")
    weight = model[0].weight.detach()
    assert field.sum() == pytest.approx(2 * float(weight[0].abs().sum()) / 3, rel=1e-5)


def test_images_take_turns_with_channels():
    """As many images as channels, one draw each: together they have asked every channel once."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)))
    field, _ = field_of(receptive_field(model, draw(4, 3, 5, 5), ["0"], channels=1), "0")
    assert field.sum() == pytest.approx(float(model[0].weight.detach().abs().sum()) / 3, rel=1e-5)


def test_the_four_central_cells_of_an_even_grid_take_turns():
    record = receptive_field(nn.Sequential(nn.Conv2d(3, 1, 1)), draw(4, 3, 6, 6), ["0"], channels=1)
    field, centre = field_of(record, "0")
    assert centre == 3
    assert np.argwhere(field > 0).tolist() == [[3, 3]]
    weights = {}
    model = nn.Sequential(nn.Conv2d(3, 1, 1))
    for n in (1, 2, 3, 4):  # a gain that differs from pixel to pixel shows which were asked
        x = torch.ones(n, 3, 6, 6)
        gain = torch.arange(36.0).reshape(6, 6)
        model[0].register_forward_pre_hook(lambda _, args, gain=gain: args[0] * gain)
        weights[n], _ = field_of(receptive_field(model, x, ["0"], channels=1), "0")
        model[0]._forward_pre_hooks.clear()
    scale = float(model[0].weight.detach().abs().mean())
    totals = [weights[n].sum() / scale for n in (1, 2, 3, 4)]
    assert np.diff([0, *totals]) == pytest.approx([14, 15, 20, 21], rel=1e-5)


def test_what_is_tapped_is_what_was_there_before_it_was_changed_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            y += 100 * x.sum((1, 2, 3), keepdim=True)
            return y

    field, centre = field_of(receptive_field(seeded(InPlace), draw(2, 3, 9, 9), ["conv"]), "conv")
    assert np.count_nonzero(field) == 9
    assert radius(field, centre, 1.0) == pytest.approx(2**0.5)


def test_minibatches_and_the_model_stays_as_it_was():
    model, x = vit(), draw(6, 3, 32, 32)
    model.train()
    model.cls_token.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    whole = receptive_field(model, x, "blocks", groups=3)
    parts = receptive_field(model, x, "blocks", groups=3, batch_size=4)
    assert parts["field"].values == pytest.approx(whole["field"].values, rel=1e-3, abs=1e-7)
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
    assert model.training
    assert not x.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    again = receptive_field(model, x, "blocks", groups=3)
    assert np.array_equal(again["field"], whole["field"])
    other = receptive_field(model, x, "blocks", groups=3, seed=1, channels=1)
    assert not np.allclose(other["field"], whole["field"])


def test_inside_no_grad():
    with torch.no_grad():
        record = receptive_field(convolutions(1), draw(2, 3, 5, 5), ["0"])
    assert record["field"].values.sum() > 0


# What the fields say ------------------------------------------------------------------------------


def test_a_field_of_nothing_has_no_radius():
    assert np.isnan(radius(np.zeros((9, 9)), 4))


def test_radius_of_a_disk_and_of_a_point():
    y, x = np.mgrid[-40:41, -40:41]
    disk = (np.hypot(y, x) <= 30).astype(float)
    assert radius(disk, 40, 0.5) == pytest.approx(30 * 0.5**0.5, abs=0.5)
    assert radius(disk, 40, 0.9) == pytest.approx(30 * 0.9**0.5, abs=0.5)
    assert radius(7 * disk, 40, 0.9) == radius(disk, 40, 0.9)
    point = np.zeros((9, 9))
    point[4, 4] = 3
    assert radius(point, 4, 0.9) == 0
    point[4, 7] = 3
    assert 2 < radius(point, 4, 0.9) <= 3


def test_shares_of_patches():
    field = np.zeros((12, 12))
    field[4:8, 4:8], field[0, 11] = 1, 4  # a patch, and a corner of the one to its upper right
    shares = patch_shares(field, 5.5, 4)
    assert shares.shape == (3, 3)
    assert shares.sum() == pytest.approx(1)
    assert shares[1, 1] == pytest.approx(0.8)
    assert shares[0, 2] == pytest.approx(0.2)
    assert dominance(field, 5.5, 4) == pytest.approx(0.6)
    # Around a pixel's centre the square cuts pixels in half.
    assert patch_shares(np.ones((9, 9)), 4, 4)[1, 1] == pytest.approx(16 / 81)
    assert patch_shares(np.ones((9, 9)), 4, 4).sum() == pytest.approx(1)


def test_widening_is_least_at_equal_depth_in_the_lower_half():
    resnet = np.arange(1.0, 9.0)  # radius = 8 * depth
    assert widening([3, 4, 5, 6, 0, 0, 0, 0], resnet) == pytest.approx(2)
    assert widening([0.5, 4, 5, 6], resnet) == pytest.approx(-1.5)
    assert widening([9.0, 1.0], np.arange(1.0, 14.0)) == pytest.approx(9 - 6.5)


def test_the_interval_is_over_images():
    field = np.zeros((4, 1, 9, 9))
    field[:, 0, 4, 4], field[:, 0, 4, 5] = 1, [1, 2, 3, 4]
    record = receptive_field(convolutions(1), draw(4, 3, 9, 9), ["0"]).assign(
        field=(("group", "tap", "y", "x"), field)
    )
    found = estimate(record, lambda fields: own_share(*fields["0"], 1))
    left_out = np.array([3 / (3 + 10 - k) for k in (1, 2, 3, 4)])
    margin = 3.1824 * np.sqrt(3 * left_out.var())
    expected = (4 / 14, 4 / 14 - margin, 4 / 14 + margin)
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-4)


def test_of_a_study(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    study = load_study("lab")
    taps = {
        "vit_untrained": ["blocks.0"],
        "resnet_untrained": ["stages.0.blocks.0", "stages.1.*.0"],
    }
    record = measure_receptive_fields(study, taps, n_images=4, channels=1)
    assert record["tap"].values.tolist() == [
        "vit_untrained/blocks.0",
        "resnet_untrained/stages.0.blocks.0",
        "resnet_untrained/stages.1.blocks.0",
    ]
    assert record["role"].values.tolist() == ["vit_untrained"] + 2 * ["resnet_untrained"]
    assert record["cell"].values.tolist() == [4, 1, 2]
    x = study.to_input(study.images(4).pixels, "vit")
    alone = receptive_field(study.model("vit_untrained"), x, ["blocks.0"], channels=1)
    assert record["field"].values[:, 0] == pytest.approx(alone["field"].values[:, 0], rel=1e-4)
    assert len(list(tmp_path.glob("*.nc"))) == 2
    measure_receptive_fields(study, taps, n_images=4, channels=1)
    assert len(list(tmp_path.glob("*.nc"))) == 2  # one of each network
    other = measure_receptive_fields(study, taps, n_images=4, channels=2)
    assert len(list(tmp_path.glob("*.nc"))) == 4
    assert not np.allclose(other["field"], record["field"])


def simulated(n, groups, repeats=400, pixels=25, spread=0.6):
    """How often intervals of radii cover that of all possible images.

    Fields of images differ in how wide they are and how strong; each is counted in pixels that
    lie on a line from the centre, as many at every distance as on a circle.
    """
    stream = np.random.default_rng(0)
    far = np.arange(pixels)
    frame = np.zeros((2 * pixels - 1, 1, 2 * pixels - 1))

    def fields(n):
        wide = 4 * np.exp(spread * stream.normal(size=(n, 1)))
        strength = np.exp(0.5 * stream.normal(size=(n, 1)))
        return strength * far * np.exp(-far / wide) / wide**2

    def radius_of(sums, share):
        frame[:] = 0
        frame[pixels - 1, 0, pixels - 1 :] = sums
        return radius(frame[:, 0], pixels - 1, share)

    everything = fields(200_000).sum(0)
    covered = []
    for _ in range(repeats):
        dealt = fields(n).reshape(-1, groups, pixels).sum(0)
        for share in (0.5, 0.9):
            found = jackknife(dealt, lambda sums, share=share: radius_of(sums, share))
            covered.append(found.low <= radius_of(everything, share) <= found.high)
    return np.mean(covered)


def test_intervals_of_64_images_cover_the_radius_of_all_images():
    defaults = inspect.signature(measure_receptive_fields).parameters["n_images"].default
    groups = inspect.signature(receptive_field).parameters["groups"].default
    assert (defaults, groups) == (64, 16)
    assert 0.93 <= simulated(defaults, groups) <= 0.97


REFUSED = {
    "pooled": (
        lambda: receptive_field(vit(), draw(2, 3, 32, 32), ["head"]),
        r"'head' of VisionTransformer lie in the image is not known: it makes \(5, 5\) of 5 images",
    ),
    "uneven": (
        lambda: receptive_field(nn.Sequential(nn.Conv2d(3, 2, 3)), draw(2, 3, 9, 9), ["0"]),
        "the 7 x 7 locations of '0' do not divide 9 pixels evenly",
    ),
    "oblong": (
        lambda: receptive_field(convolutions(1), draw(2, 3, 8, 4), ["0"]),
        r"images must be square, .* got \(2, 3, 8, 4\)",
    ),
    "no channels": (
        lambda: receptive_field(convolutions(1), draw(2, 3, 8, 8), ["0"], channels=0),
        "cannot draw 0 channels",
    ),
    "no such tap": (
        lambda: receptive_field(convolutions(1), draw(2, 3, 8, 8), ["nine"]),
        "no module of Sequential matches 'nine'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors(case):
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TapError), match=message):
        call()


def test_without_cancellation_the_field_is_that_of_the_sum_of_all_channels():
    """With positive weights and images no channel cancels another."""
    model = seeded(lambda: timm.create_model("test_resnet"))
    for weight in model.parameters():
        weight.data.abs_()
    x = draw(2, 3, 160, 160).abs()
    field = receptive_field(model, x, ["layer4"], channels=model.num_features, groups=1)["field"]
    found = field[0, 0].values

    kept = {}
    hook = model.layer4.register_forward_hook(lambda *call: kept.update(value=call[2]))
    y = x.clone().requires_grad_()
    model(y)
    hook.remove()
    [gradient] = torch.autograd.grad(kept["value"][:, :, 2, 2].sum(), y)
    expected = gradient.mean((0, 1)).numpy()
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), atol=1e-8)
