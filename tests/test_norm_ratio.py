"""Norm ratios against known norms and angles, and against what every family of networks adds."""

import re
import weakref
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from lib.cka import MinibatchCKA
from lib.measure import measure
from lib.measurements import norm_ratio
from lib.measurements.norm_ratio import (
    EDGES,
    Curves,
    NormRatio,
    branch_taps,
    compare,
    estimate,
    median,
    sublayers,
)
from lib.records import between
from lib.studies import networks
from lib.studies.images import scene_images
from lib.taps import TapError, collect, tapping

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(**options):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return VisionTransformer(**size, num_classes=5, **options)


FAMILIES = {
    "ViT": vit,
    "mean-pooled ViT": lambda: vit(class_token=False, global_pool="avg"),
    "ViT with registers and LayerScale": lambda: vit(init_values=0.3, reg_tokens=4),
    "Mixer": lambda: MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=24),
    "ResNet v1, basic": lambda: ResNet(BasicBlock, (2, 2, 1, 1), channels=(8, 16, 16, 16)),
    "ResNet v1, bottleneck": lambda: ResNet(Bottleneck, (2, 2, 1, 1), channels=(8, 16, 16, 16)),
    "ResNet v1, squeeze and excitation": lambda: ResNet(
        BasicBlock, (2, 1, 1, 1), channels=(16, 16, 16, 16), block_args={"attn_layer": "se"}
    ),
    "ResNet v2, bottleneck": networks.resnet,
    "ResNet v2, basic": lambda: ResNetV2((2, 2), (32, 64), basic=True, bottle_ratio=1, stem_chs=32),
}


def network(make):
    """A random network in which nothing is zero, and so nothing is hidden, by initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make().eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("bias"):
                nn.init.uniform_(parameter, 0.3, 0.9)
    return model


def pairs(model, pixels=PIXELS):
    """z and f(z) of every sub-layer, as tensors."""
    layers = sublayers(model)
    values = collect(model, pixels, branch_taps)
    return [
        (
            layer,
            values[layer.skip],
            values[layer.branch].mT if layer.transposed else values[layer.branch],
        )
        for layer in layers
    ]


def hooked(model, pixels=PIXELS):
    """What the hooks of one forward pass keep, by tap of the branch."""
    receive, kept = NormRatio().reducer(model, [], pixels), {}

    def keep(name, value):
        result = receive(name, value)
        if result is not None:
            kept[result.branch] = result

    with torch.no_grad(), tapping(model, branch_taps, keep):
        model(pixels)
    return kept


# What is added ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_skip_plus_branch_is_what_the_block_makes(family):
    model = network(FAMILIES[family])
    outputs = collect(model, PIXELS, "blocks")
    found = pairs(model)
    for number, (layer, skip, branch) in enumerate(found):
        path = layer.branch.rpartition(".")[0]
        if hasattr(model, "blocks") and number % 2 == 0:  # after it comes the MLP of its block
            assert found[number + 1][0].branch.startswith(path)
            expected = found[number + 1][1]
        else:
            expected = outputs[path]
        total = skip + branch
        total = total.relu() if family.startswith("ResNet v1") else total
        torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
        assert branch.std() > 1e-4
        assert skip.std() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_keep_of_every_pair_what_it_is_by_hand(family):
    """Also where the branch is computed before the shortcut, and added to in place."""
    model = network(FAMILIES[family])
    kept = hooked(model)
    assert sorted(kept) == sorted(layer.branch for layer in sublayers(model))
    prefix = getattr(model, "num_prefix_tokens", 0)
    for layer, skip, branch in pairs(model):
        z, f = (x.double().flatten(2).mT if x.dim() == 4 else x.double() for x in (skip, branch))
        ratio = (z.norm(dim=-1) / f.norm(dim=-1))[:, prefix:]
        cosine = nn.functional.cosine_similarity(z, z + f, dim=-1)[:, prefix:]
        one = kept[layer.branch]
        ratio, cosine = (x[~x.isnan()] for x in (ratio, cosine[z.norm(dim=-1)[:, prefix:] > 0]))
        means = one.sums[1, :, 0] / one.sums[1, :, 1]
        assert float(means[0]) == pytest.approx(float(ratio.mean()), rel=1e-5)
        assert float(means[1]) == pytest.approx(float(cosine.mean()), rel=1e-5)
        assert one.projected == layer.projected == ("downsample" in layer.skip)
        assert one.images == len(PIXELS)


def test_projections_are_marked():
    assert [layer.projected for layer in sublayers(networks.resnet())] == [
        unit in (0, 3, 7) for unit in range(13)
    ]
    assert not any(layer.projected for layer in sublayers(networks.vit()))


@pytest.mark.parametrize("family", ["ViT", "Mixer", "ResNet v1, bottleneck"])
def test_no_activation_outlives_its_pair(family):
    model = network(FAMILIES[family])
    receive, seen, most = NormRatio().reducer(model, [], PIXELS), [], []

    def keep(name, value):
        seen.append(weakref.ref(value))
        receive(name, value)
        del value
        most.append(sum(one() is not None for one in seen[:-1]))

    with torch.no_grad(), tapping(model, branch_taps, keep):
        model(PIXELS)
    assert len(most) == 2 * len(sublayers(model))
    assert max(most) <= 1


def test_a_block_without_skips_has_no_ratio_and_the_others_keep_theirs():
    for name, block, number in (("vit", 4, 14), ("resnet", 6, 12)):
        layers = sublayers(networks.without_skips(networks.build(name, 0), block))
        assert len(layers) == number
    assert not any(
        layer.branch.startswith("blocks.4.")
        for layer in sublayers(networks.without_skips(networks.vit(), 4))
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: vit(block_fn=ResPostBlock), "ResPostBlock .* its branch ends in a normalisation"),
        (
            lambda: SwinTransformerV2(
                32, 2, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4
            ),
            "SwinTransformerV2Block .* its branch ends in a normalisation",
        ),
        (lambda: vit(block_fn=ParallelScalingBlock), "ParallelScalingBlock .* the same z at once"),
        (lambda: vit(block_fn=ParallelThingsBlock), "ParallelThingsBlock .* the same z at once"),
        (
            lambda: nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.Tanh())] * 2),
            r"^no norm ratio for a Sequential \(0\): skip and branch are known of the ViT's Block,",
        ),
    ],
)
def test_blocks_without_such_a_ratio_are_refused_with_the_reason(model, message):
    with pytest.raises(TapError, match=message):
        branch_taps(model())


# Norms, ratios and cosines ------------------------------------------------------------------------


def known(ratio, angle, length=2.0, width=8):
    """z of a length along one axis, and f(z) at an angle to it, by its ratio."""
    z, f = torch.zeros(width), torch.zeros(width)
    z[0] = length
    f[0], f[1] = np.cos(angle) * length / ratio, np.sin(angle) * length / ratio
    return z, f


def means(one):
    return (one.sums[..., 0] / one.sums[..., 1]).numpy()


def test_a_hand_built_block_with_known_norms_and_angles():
    """A class token, a register and two patches, each with a ratio and an angle of its own."""
    ratios, angles = [0.25, 100.0, 2.0, 6.0], [np.pi / 2, 0.1, np.pi / 3, np.pi]
    z, f = (torch.stack(x) for x in zip(*map(known, ratios, angles), strict=True))

    class Constant(nn.Module):
        def forward(self, x, **_):
            return f.expand_as(x)

    class Net(nn.Module):
        num_prefix_tokens, has_class_token = 2, True

        def __init__(self):
            super().__init__()
            blocks = [Block(8, 2), Block(8, 2)]
            for block in blocks:
                block.attn = Constant()
                block.mlp = nn.Sequential()
                block.mlp.forward = lambda x: 0.5 * torch.ones_like(x)
            self.blocks = nn.Sequential(*blocks)

        def forward(self, x):
            return self.blocks(x)

    kept = hooked(Net(), z.expand(5, 4, 8))
    found = means(kept["blocks.0.attn"])
    half_turn = [np.cos(np.pi / 3), np.cos(np.pi)]
    expected = [
        [0.25, 1 / 17**0.5, 0.0, 2.0, 8.0],
        [4.0, (2.5 / 7**0.5 + 1) / 2, np.mean(half_turn), 2.0, (1 + 1 / 3) / 2],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(kept["blocks.0.attn"].tokens[:, 0] / 5, [2.0, 6.0], rtol=1e-6)
    # The MLP's skip is the stream after attention.
    after = (z + f).norm(dim=1)
    assert means(kept["blocks.0.mlp"])[0, 0] == pytest.approx(float(after[0]) / 2**0.5, rel=1e-6)
    assert means(kept["blocks.0.mlp"])[1, 3] == pytest.approx(float(after[2:].mean()), rel=1e-6)


def test_scaling_both_changes_only_norms_and_rotating_both_changes_nothing():
    z, f = draw(4, 5, 16), draw(4, 5, 16, seed=1)
    before = means(compare(z, f, 1, True))
    np.testing.assert_allclose(
        means(compare(1000 * z, 1000 * f, 1, True)), before * [1, 1, 1, 1000, 1000], rtol=1e-5
    )
    turn = torch.linalg.qr(draw(16, 16, seed=2))[0]
    np.testing.assert_allclose(means(compare(z @ turn, f @ turn, 1, True)), before, rtol=1e-4)
    twice = means(compare(2 * z, f, 1, True))
    np.testing.assert_allclose(twice[:, 0], 2 * before[:, 0], rtol=1e-6)
    np.testing.assert_allclose(twice[:, 2], before[:, 2], rtol=1e-5)


def test_a_feature_map_is_its_locations_as_tokens():
    z, f = draw(3, 6, 4, 5), draw(3, 6, 4, 5, seed=1)
    one, tokens = compare(z, f), compare(z.flatten(2).mT, f.flatten(2).mT)
    np.testing.assert_allclose(one.sums, tokens.sums, rtol=1e-6)
    assert torch.equal(one.histogram, tokens.histogram)
    assert one.tokens.shape == (0, 2)
    assert tokens.tokens.shape == (20, 2)


def test_zeros_make_infinite_ratios_and_undefined_values_do_not_count():
    z, f = draw(2, 4, 8), draw(2, 4, 8, seed=1)
    f[0, 0] = 0
    found = means(compare(z, f))
    assert found[1, 0] == np.inf
    assert np.isfinite(found[1, 1:]).all()
    assert np.isfinite(median(compare(z, f).histogram)[1])
    z[0, 0] = 0
    one = compare(z, f)
    assert one.sums[1, :, 1].tolist() == [7, 7, 7, 8, 8]
    np.testing.assert_allclose(
        means(one)[1, 0], float((z.norm(dim=-1) / f.norm(dim=-1)).nanmean()), rtol=1e-6
    )
    assert np.isnan(means(one)[0]).all(), "there is no class token"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_kinds_of_numbers(dtype):
    z, f = draw(3, 4, 300).to(dtype), (100 * draw(3, 4, 300, seed=1)).to(dtype)
    found, expected = means(compare(z, f)), means(compare(z.double(), f.double()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_skip_and_a_branch_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=re.escape("got (2, 3, 4) and (2, 4, 3)")):
        compare(draw(2, 3, 4), draw(2, 4, 3))


# Medians ------------------------------------------------------------------------------------------


def counted(ratios):
    """The histogram of given ratios, through the measurement."""
    z = torch.as_tensor(ratios, dtype=torch.float64)[None, :, None]
    return compare(z, torch.ones_like(z)).histogram[1].numpy()


@pytest.mark.parametrize("centre", [0.02, 1.0, 7.3, 900.0])
def test_medians_from_histograms_are_medians(centre):
    ratios = centre * np.exp(np.random.default_rng(0).normal(0, 0.7, 4001))
    assert median(counted(ratios)) == pytest.approx(np.median(ratios), rel=0.01)


def test_medians_of_sums_of_histograms_are_those_of_all():
    ratios = np.exp(np.random.default_rng(1).normal(1, 1, 999))
    parts = sum(counted(part) for part in np.array_split(ratios, 7))
    assert median(parts) == median(counted(ratios))


def test_medians_outside_the_histogram_and_of_nothing():
    assert median(counted([1e-5, 1e-4, 3.0])) == 0
    assert median(counted([3.0, 1e5, np.inf])) == np.inf
    assert np.isnan(median(np.zeros(len(EDGES) + 1)))
    several = np.stack([counted([2.0]), counted([1e9]), np.zeros(len(EDGES) + 1)])
    np.testing.assert_allclose(median(several), [2.0, np.inf, np.nan], rtol=0.05)


# The measurement ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream():
    """What the hooks keep of seven minibatches of different sizes."""
    model = network(vit)
    return [hooked(model, draw(n, 3, 32, 32, seed=n)) for n in (9, 4, 7, 1, 6, 5, 8)]


def filled(batches, groups=4):
    metric = NormRatio()
    metric.groups = groups
    for number, batch in enumerate(batches):
        metric.update(batch, batch=number)
    return metric


def test_minibatches_add_up_to_one_pass_over_all_images(stream):
    model = network(vit)
    pixels = torch.cat([draw(n, 3, 32, 32, seed=n) for n in (9, 4, 7, 1, 6, 5, 8)])
    whole, parts = (filled(batches).compute() for batches in ([hooked(model, pixels)], stream))
    np.testing.assert_allclose(parts["residual"], whole["residual"], rtol=1e-5)
    np.testing.assert_allclose(parts["token_ratio"], whole["token_ratio"], rtol=1e-5)
    assert np.isnan(whole["residual_low"]).all()
    # Patches have a mean over their own places.
    np.testing.assert_allclose(
        parts["token_ratio"].mean("position"),
        parts["residual"].sel(token="patch", quantity="ratio"),
        rtol=1e-6,
    )


def test_intervals_are_those_of_a_jackknife_over_groups(stream):
    record = filled(stream).compute()
    groups = [filled(stream[g::4], groups=2).compute() for g in range(4)]
    some = {"branch": "blocks.1.mlp", "token": "patch", "quantity": "ratio"}
    weights = np.array([sum(b["blocks.1.mlp"].images for b in stream[g::4]) for g in range(4)])
    values = np.array([float(part["residual"].sel(some)) for part in groups])
    left_out = [np.average(np.delete(values, g), weights=np.delete(weights, g)) for g in range(4)]
    margin = 3.182446 * np.sqrt(3 * np.var(left_out))  # Student's, three degrees of freedom
    high, low = (float(record[f"residual_{end}"].sel(some)) for end in ("high", "low"))
    assert (high - low) / 2 == pytest.approx(margin, rel=1e-5)
    assert (high + low) / 2 == pytest.approx(float(record["residual"].sel(some)), rel=1e-6)


def test_a_pair_is_named_by_its_branch_whichever_fires_last():
    model = network(FAMILIES["ResNet v1, basic"])
    metric, kept = NormRatio(), {}
    receive = metric.reducer(model, [], PIXELS)

    def keep(name, value):
        if (result := receive(name, value)) is not None:
            kept[f"a role/{name}"] = result

    with torch.no_grad(), tapping(model, branch_taps, keep):
        model(PIXELS)
    assert "a role/layer2.0.downsample" in kept
    metric.update(kept)
    record = metric.compute()
    expected = [f"a role/{layer.branch}" for layer in sublayers(model)]
    assert record["branch"].values.tolist() == expected
    assert record["projected"].values.tolist() == ["layer" in n and ".0." in n for n in expected]


def test_a_metric_can_be_used_again_and_refuses_mistakes(stream):
    metric = filled(stream)
    before = metric.compute()
    metric.reset()
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(ValueError, match="minibatch of 1 images or more, and none"),
    ):
        metric.compute()
    for number, batch in enumerate(stream):
        metric.update(batch, batch=number)
    assert metric.compute().equals(before)
    some = dict(list(stream[0].items())[1:])
    with pytest.raises(ValueError, match=r"same taps; this differs in \['blocks.0.attn'\]"):
        metric.update(some)


def one_of_two(rank, folder, batches):
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank
    )
    metric = NormRatio()
    metric.groups = 4
    for number in range(rank, len(batches), 2):
        metric.update(batches[number], batch=number)
    torch.save(metric.compute()["residual"].values, folder / str(rank))
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path, stream):
    torch.multiprocessing.spawn(one_of_two, (tmp_path, stream), nprocs=2)
    expected = filled(stream).compute()["residual"]
    for rank in "01":
        found = torch.load(tmp_path / rank, weights_only=False)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


class Study:
    """Scenes, and the lab's networks before training."""

    name = "untrained"

    def images(self, n, seed=0):
        return scene_images(n, seed=seed)

    def model(self, role):
        return networks.build(role, 0)

    def to_input(self, pixels, role):
        return pixels.float() / 64 - 2


def test_it_shares_the_pass_of_other_measurements(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    roles = ["vit", "vit_gap", "mixer", "resnet", "vit_no_skip_middle"]
    record = measure(Study(), roles, [MinibatchCKA("blocks"), NormRatio()], 16, 8)
    curves = Curves(record)
    lengths = {role: len(curves(role)) for role in roles}
    assert lengths == {
        "vit": 16,
        "vit_gap": 16,
        "mixer": 16,
        "resnet": 13,
        "vit_no_skip_middle": 14,
    }
    assert len(curves("vit", "attention", "class")) == 8
    assert np.isfinite(curves("vit", "mlp", "class", "median")).all()
    assert np.isnan(curves("vit_gap", token="class")).all()
    assert np.flatnonzero(curves.projected("resnet")).tolist() == [0, 3, 7]
    assert record["token_ratio"].sel(branch="mixer/blocks.7.mlp_tokens").notnull().sum() == 64
    alone = measure(Study(), ["mixer"], [NormRatio()], 16, 8)
    np.testing.assert_allclose(
        Curves(alone)("mixer", "all", "patch", "cosine"),
        curves("mixer", "all", "patch", "cosine"),
        rtol=1e-6,
    )
    # What the other measurement says is as it would be without this one.
    other = measure(Study(), ["vit", "resnet"], [MinibatchCKA("blocks")], 16, 8)
    for blocks in (True, False):
        both, one = (between(r, "vit", "resnet", blocks=blocks) for r in (record, other))
        np.testing.assert_allclose(both, one, atol=1e-6)


# Curves -------------------------------------------------------------------------

BLOCKS, UNITS = 8, 13


def world(**changes):
    """A record in which every curve is 2 and every cosine 0.5, but for what a test changes.

    Changes by ``<role>_<sublayer>_<token>_<quantity>``: one value per block, or one for all.
    """
    layers = {f"vit/blocks.{i // 2}.{('attn', 'mlp')[i % 2]}": i for i in range(2 * BLOCKS)}
    layers |= {f"resnet/stages.0.blocks.{i}.conv3": i for i in range(UNITS)}
    taps = list(layers)
    values = np.full((len(taps), 2, 6), 2.0)
    values[..., 1] = 0.5
    quantities = [*norm_ratio.QUANTITIES, "median"]
    for what, change in changes.items():
        role, sublayer, token, quantity = what.split("_", 3)
        end = {"attention": ".attn", "mlp": ".mlp", "unit": ".conv3"}[sublayer]
        rows = [i for i, tap in enumerate(taps) if tap.startswith(role) and tap.endswith(end)]
        values[rows, norm_ratio.TOKENS.index(token), quantities.index(quantity)] = change
    projected = [tap.startswith("resnet") and layers[tap] in (0, 3, 7) for tap in taps]
    rng = np.random.default_rng(0)
    noise = rng.normal(1, 1e-3, (10, *values[..., :5].shape))
    sums = np.stack([values[..., :5] * noise, np.ones_like(noise)], -1) * 50
    histogram = np.zeros((10, len(taps), 2, len(EDGES) + 1))
    place = np.searchsorted(EDGES, values[..., 5], side="right")
    np.put_along_axis(histogram, np.broadcast_to(place, (10, *place.shape))[..., None], 50, -1)
    return xr.Dataset(
        {
            "residual": (("branch", "token", "quantity"), values),
            "residual_sums": (("group", "branch", "token", "summed", "sum_and_count"), sums),
            "residual_histogram": (("group", "branch", "token", "bin"), histogram),
            "projected": ("branch", projected),
        },
        coords={"branch": taps, "quantity": quantities},
    )


def test_statistics_of_means_and_of_medians_have_intervals():
    record = world(vit_mlp_class_ratio=8.0, vit_mlp_class_median=4.0)
    for quantity, expected, slack in (("ratio", 8, 0.02), ("median", 4, 0.2)):
        found = estimate(record, lambda c, q=quantity: c("vit", "mlp", "class", q).mean())
        assert found.value == pytest.approx(expected, abs=slack)  # a median within its bin
        assert found.low <= found.value <= found.high
        assert found.high - found.low < 0.1
    others = estimate(record, lambda curves: curves("vit", "attention", "class").mean())
    assert others.value == pytest.approx(2, abs=0.02)


def test_an_infinite_mean_has_no_interval():
    record = world(vit_mlp_patch_ratio=np.inf)
    found = estimate(record, lambda curves: curves("vit", "mlp").mean())
    assert np.isnan([found.low, found.high]).all()


def test_another_network_can_play_a_role_and_a_missing_one_is_named():
    record = world(resnet_unit_class_ratio=1.0)
    cast = {"vit": "resnet"}
    assert len(Curves(record, cast)("vit", "unit")) == UNITS
    with pytest.raises(
        ValueError, match=r"^no mlp of 'resnet' was measured; measured were vit, resnet$"
    ):
        Curves(record, cast)("vit", "mlp")
    with pytest.raises(ValueError, match=r"^no attention of 'mixer' was measured"):
        estimate(record, lambda c: c("vit", "attention").mean(), {"vit": "mixer"})
