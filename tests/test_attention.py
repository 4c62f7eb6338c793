"""Attention distance against closed forms."""

import itertools
import math
import warnings

import numpy as np
import pytest
import timm
import torch
import torchmetrics

from lib.measure import measure
from lib.measurements.attention import (
    AttentionDistance,
    attention_taps,
    cell_distances,
    estimate,
    heads_of,
    uniform_distance,
)
from lib.measurements.places import layout
from lib.studies import load_study
from lib.studies.images import Images
from lib.taps import TapError, collect

SMALL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
FAMILIES = {  # one class token, none, class token and registers, relative positions, EVA, rotary
    "deit_tiny_patch16_224": SMALL,
    "vit_tiny_patch16_224": SMALL | {"class_token": False, "global_pool": "avg"},
    "vit_base_patch14_reg4_dinov2": SMALL | {"img_size": 56},
    "vit_relpos_small_patch16_224": SMALL,
    "beit_base_patch16_224": SMALL,
    "eva02_tiny_patch14_224": SMALL | {"img_size": 56, "embed_dim": 96},
    "vit_base_patch16_dinov3": SMALL | {"embed_dim": 96},
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def family(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, pretrained=False, **FAMILIES[name]).eval()


def images(n, size=224, boxes=(0, 0, 0, 0)):
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8).expand(n, -1, -1, -1)
    boxes = torch.tensor([boxes], dtype=torch.float32).expand(n, 4)
    return Images(pixels, torch.zeros(n, dtype=torch.long), boxes)


def uniform(side, prefix=0, n=1, heads=1):
    tokens = side**2 + prefix
    return torch.full((n, heads, tokens, tokens), 1 / tokens)


def random_maps(n, heads, side, prefix=0, seed=0, sharpness=2.0):
    tokens = side**2 + prefix
    return (sharpness * draw(n, heads, tokens, tokens, seed=seed)).softmax(-1)


def feed(metric, maps, prefix=0, size=224, boxes=(0, 0, 0, 0), batch=None):
    kept = {name: metric.reduce(one, prefix) for name, one in maps.items()}
    metric.update(kept, images(len(next(iter(maps.values()))), size, boxes), batch)


def measured(*batches, prefix=0, size=224, boxes=(0, 0, 0, 0), groups=20):
    metric = AttentionDistance()
    metric.groups = groups
    for maps in batches:
        feed(metric, {"a": maps}, prefix, size, boxes)
    return metric.compute().sel(tap="a").squeeze()


def reference(maps, size, prefix):
    """The distance of every head as a sum over queries and keys, in float64."""
    maps = maps.double()[:, :, prefix:, prefix:].numpy()
    side = math.isqrt(maps.shape[-1])
    weights = maps / maps.sum(-1, keepdims=True)
    total = np.zeros(maps.shape[1])
    for i, j in itertools.product(range(side**2), repeat=2):
        far = math.hypot(i // side - j // side, i % side - j % side) * size / side
        total += weights[:, :, i, j].mean(0) * far / side**2
    return total


# Closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [(224, 7, 115.5), (224, 14, 116.5), (224, 16, 116.6), (384, 24, 200.0), (256, 16, 133.2)],
)
def test_uniform_attention(size, side, expected):
    assert uniform_distance(side, size / side) == pytest.approx(expected, abs=0.06)
    for prefix in (0, 1, 5):
        record = measured(uniform(side, prefix), prefix=prefix, size=size)
        assert float(record["distance"]) == pytest.approx(expected, abs=0.06)
        assert float(record["uniform"]) == pytest.approx(float(record["distance"]), rel=1e-5)
        assert float(record["prefix_mass"]) == pytest.approx(prefix / (side**2 + prefix), rel=1e-4)
        assert float(record["patches"]) == pytest.approx(side**2, rel=1e-4)


@pytest.mark.parametrize(("side", "patch", "expected"), [(7, 32, 32.4), (14, 16, 16.7)])
def test_uniform_attention_to_a_neighbourhood(side, patch, expected):
    assert uniform_distance(side, patch, window=3) == pytest.approx(expected, abs=0.06)
    assert uniform_distance(side, patch, window=1) == 0
    everything = uniform_distance(side, patch, window=2 * side - 1)
    assert everything == pytest.approx(uniform_distance(side, patch))


def test_a_query_that_looks_at_itself_has_distance_zero():
    record = measured(torch.eye(50).expand(2, 3, 50, 50), prefix=1)
    assert record["distance"].values == pytest.approx(np.zeros(3))
    assert record["patches"].values == pytest.approx(np.ones(3))


def test_looking_at_one_neighbour_is_looking_one_patch_far():
    """The right neighbour; in the last column, the left one."""
    maps = torch.zeros(1, 1, 64, 64)
    query = torch.arange(64)
    maps[0, 0, query, torch.where(query % 8 < 7, query + 1, query - 1)] = 1
    assert float(measured(maps, size=32)["distance"]) == pytest.approx(4)
    # ... and one row down is as far, a corner to the other is the diagonal.
    distance = cell_distances(8)
    assert float(distance[0, 8]) == 1
    assert float(distance[0, 63]) == pytest.approx(7 * 2**0.5)
    assert torch.equal(distance, distance.T)


def test_half_the_mass_on_the_class_token_does_not_make_a_head_local():
    maps = torch.full((1, 1, 197, 197), 0.5 / 196)
    maps[..., 0] = 0.5
    record = measured(maps, prefix=1)
    assert float(record["unnormalised"]) == pytest.approx(58.2, abs=0.1)
    assert float(record["distance"]) == pytest.approx(116.5, abs=0.1)
    assert float(record["prefix_mass"]) == pytest.approx(0.5)


def test_the_class_tokens_own_row_does_not_count():
    maps = uniform(8, prefix=1, heads=2)
    maps[:, :, 0] = 0
    maps[:, 0, 0, 0] = maps[:, 1, 0, 37] = 1
    assert measured(maps, prefix=1)["distance"].values == pytest.approx(
        measured(uniform(8, heads=2))["distance"].values, rel=1e-6
    )


def test_queries_that_look_at_no_patch_have_no_distance():
    maps = torch.zeros(1, 2, 65, 65)
    maps[..., 0] = 1  # all at the class token ...
    query = torch.arange(1, 33)
    maps[0, 0, query, 0], maps[0, 0, query, query] = 0, 1  # ... but half of one head's at itself
    maps[0, 0, 5, 5], maps[0, 0, 5, 7] = 0, 1
    record = measured(maps, prefix=1, size=32)
    assert record["distance"].values == pytest.approx([2 * 4 / 32, np.nan], nan_ok=True)
    assert record["prefix_mass"].values == pytest.approx([0.5, 1])


def test_looking_at_a_place_is_not_looking_near():
    """All queries look at one patch: no distance is gained by who is asking."""
    place = torch.zeros(1, 1, 65, 65)
    place[..., 1 + 27] = 1
    near = torch.eye(65)[None, None]
    record = measured(torch.cat([place, near, uniform(8, prefix=1)], 1), prefix=1, size=32)
    middle = float(4 * cell_distances(8)[27].mean())
    everywhere = uniform_distance(8, 4)
    assert record["distance"].values == pytest.approx([middle, 0, everywhere], rel=1e-5)
    assert record["common"].values == pytest.approx([middle, everywhere, everywhere], rel=1e-5)
    assert middle < 0.8 * everywhere


def test_number_of_patches_looked_at():
    maps = torch.zeros(1, 1, 64, 64)
    maps[..., [3, 17, 50]] = 1 / 3
    assert float(measured(maps)["patches"]) == pytest.approx(3, rel=1e-5)


def test_attention_that_falls_on_the_object():
    """Object: 10 x 8 pixels, patches of 4 pixels; the second column of patches is half covered."""
    box = (0, 8, 10, 16)
    maps = torch.zeros(1, 3, 65, 65)
    maps[..., 0] = 0.4
    maps[:, 0, :, 1 + 2 * 8] = 0.6  # third row, first column: inside
    maps[:, 1, :, 1 + 3 * 8 + 2] = 0.6  # fourth row, third column: half inside
    maps[:, 2, :, 64] = 0.6  # lower right
    record = measured(maps, prefix=1, size=32, boxes=box)
    assert record["object_mass"].values == pytest.approx([1, 0.5, 0], abs=1e-6)
    assert record["object_area"].values == pytest.approx(np.full(3, 10 * 8 / 32**2))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_against_a_sum_over_queries_and_keys(prefix):
    maps = random_maps(3, 2, side=5, prefix=prefix)
    record = measured(maps, prefix=prefix, size=100)
    assert record["distance"].values == pytest.approx(reference(maps, 100, prefix), rel=1e-5)
    half = measured(maps.bfloat16(), prefix=prefix, size=100)
    assert half["distance"].values == pytest.approx(record["distance"].values, rel=5e-3)


# As a metric --------------------------------------------------------------------------------------


def test_minibatches_add_up():
    maps = random_maps(12, 2, side=4, prefix=1)
    whole = measured(maps, prefix=1)
    for sizes in ((4, 4, 4), (5, 7), (1, 11)):
        parts = measured(*maps.split(sizes), prefix=1)
        for name in ("distance", "unnormalised", "prefix_mass", "patches"):
            assert parts[name].values == pytest.approx(whole[name].values, rel=1e-6)


def test_the_interval_is_a_jackknife_over_groups():
    batches = [random_maps(4, 2, side=4, seed=seed, sharpness=5) for seed in range(6)]
    record = measured(*batches)
    left_out = [
        reference(torch.cat(batches[:i] + batches[i + 1 :]), 224, 0) for i in range(len(batches))
    ]
    error = np.sqrt(np.var(left_out, axis=0) * 5)
    margin = 2.5706 * error  # Student's t, 5 degrees of freedom
    assert (record["distance"] - record["distance_low"]).values == pytest.approx(margin, rel=1e-3)
    assert (record["distance_high"] - record["distance"]).values == pytest.approx(margin, rel=1e-3)


def test_statistics_of_heads():
    near = torch.eye(64).expand(1, 1, 64, 64)
    maps = torch.cat(
        [0.5 * near + 0.5 * uniform(8), uniform(8), 0.25 * near + 0.75 * uniform(8)], 1
    )
    metric = AttentionDistance()
    for _ in range(2):
        feed(metric, {"a": maps})
    record = metric.compute()
    assert heads_of(record)["relative"] == pytest.approx(np.array([[0.5, 1, 0.75]]), rel=1e-5)
    found = estimate(record, lambda heads: np.nanmax(heads["distance"]) / heads["distance"][0, 0])
    assert (found.value, found.low, found.high) == pytest.approx((2,) * 3, rel=1e-5)


def test_networks_with_fewer_heads():
    metric = AttentionDistance()
    for _ in range(2):
        kept = {"a": metric.reduce(uniform(8, 1, 2, heads=3), 1)}
        kept |= {"b": metric.reduce(torch.eye(49).expand(2, 1, 49, 49))}
        metric.update(kept, images(2))
    record = metric.compute()
    assert record["distance_low"].notnull().values.tolist() == [[True] * 3, [True, False, False]]
    assert record["distance"].sel(tap="b").values == pytest.approx([0, np.nan, np.nan], nan_ok=True)
    assert record["patch_size"].values.tolist() == [28, 32]


def test_reset_forgets():
    metric = AttentionDistance()
    feed(metric, {"a": random_maps(2, 2, 4)})
    metric.reset()
    feed(metric, {"b": uniform(7)})
    assert metric.compute()["distance"].values == pytest.approx(115.5, abs=0.1)


def test_states_of_two_processes_add_up():
    batches = [random_maps(4, 2, 4, 1, seed=seed) for seed in range(6)]
    processes = [AttentionDistance(), AttentionDistance()]
    for number, maps in enumerate(batches):
        metric = processes[number in (1, 2, 5)]
        metric.groups = 4
        feed(metric, {"a": maps}, 1, batch=number)
    one, other = processes
    assert one._reductions == dict.fromkeys(one._reductions, torchmetrics.utilities.dim_zero_sum)
    for state in one._reductions:
        setattr(one, state, getattr(one, state) + getattr(other, state))
    alone = measured(*batches, prefix=1, groups=4)
    together = one.compute().sel(tap="a").squeeze()
    for name in ("distance", "distance_low", "prefix_mass"):
        assert together[name].values == pytest.approx(alone[name].values, rel=1e-9)


# Networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_with_maps_is_the_attention_of_the_network(name):
    model = family(name)
    taps = attention_taps(model)
    assert len(taps) == 2
    x = draw(2, 3, FAMILIES[name]["img_size"], FAMILIES[name]["img_size"])
    fused = collect(model, x, "blocks")
    unfused = collect(model, x, ["blocks.*", *taps])
    for block in ("blocks.0", "blocks.1"):
        error = (unfused[block] - fused[block]).abs().max() / fused[block].abs().max()
        assert error < 1e-5
    assert all(block.attn.fused_attn for block in model.blocks), "fused again afterwards"
    for tap in taps:
        maps = unfused[tap]
        assert maps.shape[2] == 16 + model.num_prefix_tokens
        assert maps.sum(-1) == pytest.approx(torch.ones(maps.shape[:3]), abs=1e-5)
        parts = AttentionDistance().reduce(maps, layout(model).prefix)
        assert parts["keys"].shape == (2, maps.shape[1], 16)
        assert {part.shape[-1] for name, part in parts.items() if name != "keys"} == {maps.shape[1]}


def test_the_maps_are_softmax_of_queries_and_keys():
    model = family("deit_tiny_patch16_224")
    x = draw(2, 3, 64, 64)
    values = collect(model, x, ["blocks.0.norm1", "blocks.0.attn.attn_drop"])
    qkv = model.blocks[0].attn.qkv(values["blocks.0.norm1"])
    q, k, _ = qkv.reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT / 4).softmax(-1)
    assert torch.allclose(values["blocks.0.attn.attn_drop"], expected, atol=1e-6)


def test_in_the_single_pass_of_a_study(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    study = load_study("lab")
    roles = ["vit_untrained", "vit_gap_untrained"]
    record = measure(study, roles, [AttentionDistance()], n_images=8, batch_size=4)
    assert record.sizes["tap"] == 16
    part = record.sel(tap="vit_untrained/blocks.2.attn.attn_drop")
    sample = study.images(8)
    model = study.model("vit_untrained")
    x = study.to_input(sample.pixels, "vit_untrained")
    maps = collect(model, x, ["blocks.2.attn.attn_drop"])["blocks.2.attn.attn_drop"]
    assert part["distance"].values == pytest.approx(reference(maps, 32, 1), rel=1e-5)
    assert part["prefix_mass"].values == pytest.approx(
        maps[:, :, 1:, 0].mean((0, 2)).numpy(), rel=1e-4
    )
    boxes = sample.boxes
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 32**2
    assert part["object_area"].values == pytest.approx(np.full(6, area.mean()), rel=1e-5)
    assert (record["prefix_mass"].values[8:] == 0).all(), "no class token in the second network"


@pytest.mark.parametrize(
    "name", ["resnet18", "mixer_s32_224", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"]
)
def test_networks_without_attention_between_all_patches_are_refused(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, pretrained=False)
    kind = type(model).__name__
    with pytest.raises(TapError, match=f"^{kind} has no attention of every token to every other"):
        attention_taps(model)


def test_grids_that_are_not_square_are_refused():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=(64, 32), depth=1)
    with pytest.raises(TapError, match="4 x 2 patches; the grid must be square"):
        attention_taps(model)


def wrong(call, *args, **options):
    return lambda: call(*args, **options)


REFUSED = {
    "no softmax": (
        wrong(measured, random_maps(1, 1, 4) * 1.5),
        "the rows of an attention map must sum to 1, and here one is off by 0.5",
    ),
    "undefined": (wrong(measured, uniform(4) * math.nan), "rows of an attention map must sum to 1"),
    "no map": (wrong(measured, draw(2, 16, 48)), r"shape \(2, 16, 48\) is no attention map"),
    "windows": (
        lambda: AttentionDistance().update(
            {"w": AttentionDistance().reduce(uniform(7, n=8))}, images(2)
        ),
        "all taps must see the same 2 images; got {'w': 8}",
    ),
    "no grid": (wrong(measured, uniform(7, prefix=9)), "58 tokens, 0 of them before the patches"),
    "nothing": (wrong(AttentionDistance().compute), "minibatch of 1 images or more, and none"),
    "taps": (
        lambda: [
            feed(metric, {name: uniform(4)}) for metric in [AttentionDistance()] for name in "ab"
        ],
        r"every minibatch must have the same taps; this differs in \['a', 'b'\]",
    ),
}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("case", REFUSED)
def test_errors(case):
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TapError), match=message):
        call()


def test_maps_are_contracted_without_a_copy_of_their_size():
    """Counted by torch: what reduce() allocates at once stays far below the maps' own size."""
    maps = uniform(14, 1, n=4, heads=3)
    metric = AttentionDistance()
    with torch.profiler.profile(profile_memory=True) as profile:
        metric.reduce(maps, 1)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < maps.nbytes / 2
