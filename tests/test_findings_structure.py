"""Statistics of similarity maps, and the claims on structure that are made of them."""

import itertools
import math

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

from lib.findings import similarity
from lib.findings.claims import CONTRADICTED, INCONCLUSIVE, SUPPORTED, UNMEASURABLE, judge
from lib.findings.similarity import MINIBATCHES, batch_size_effect, in_minibatches, of_maps
from lib.findings.structure import MAPS
from lib.studies import load_study
from lib.taps import tap_names

# Statistics on matrices whose answer is known -----------------------------------------------------


def contrast(square, labels):
    """Mean within minus mean across groups, pair by pair and without the diagonal."""
    pairs = [(i, j) for i in range(len(square)) for j in range(len(square)) if i != j]
    within = [square[i, j] for i, j in pairs if labels[i] == labels[j]]
    across = [square[i, j] for i, j in pairs if labels[i] != labels[j]]
    return sum(within) / len(within) - sum(across) / len(across)


def planted(sizes, within=0.9, across=0.2, diagonal=1.0):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    square = np.where(labels[:, None] == labels[None], within, across)
    np.fill_diagonal(square, diagonal)
    return square


def random_map(n, seed=0):
    square = np.random.default_rng(seed).random((n, n))
    square = (square + square.T) / 2
    np.fill_diagonal(square, 1)
    return square


def test_low_high_is_the_corner():
    square = np.arange(36.0).reshape(6, 6)
    assert similarity.low_high(square) == np.mean([4, 5, 10, 11])
    assert similarity.low_high(np.arange(64.0).reshape(8, 8)) == np.mean(
        [5, 6, 7, 13, 14, 15, 21, 22, 23]
    )
    assert similarity.low_high(np.arange(4.0).reshape(2, 2)) == 1
    assert (
        similarity.low_high(np.arange(169.0).reshape(13, 13))
        == np.arange(169.0).reshape(13, 13)[:4, 9:].mean()
    )
    square[0, 4] = np.nan  # a layer whose CKA is undefined is left out
    assert similarity.low_high(square) == pytest.approx(np.mean([5, 10, 11]))


@pytest.mark.parametrize("cut", [1, 2, 3, 6])
@pytest.mark.parametrize("diagonal", [1.0, 100.0])
def test_two_block_contrast_finds_the_planted_cut(cut, diagonal):
    square = planted([cut, 7 - cut], 0.9, 0.2, diagonal)
    assert similarity.two_block_contrast(square) == pytest.approx(0.7)


def test_two_block_contrast_is_the_best_of_all_cuts():
    square = random_map(6)
    cuts = [contrast(square, [i >= cut for i in range(6)]) for cut in range(1, 6)]
    assert similarity.two_block_contrast(square) == pytest.approx(max(cuts))
    assert similarity.two_block_contrast(planted([6], 0.4)) == pytest.approx(0)


STAGES = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"]
STAGES += ["stages.1.blocks.2", "stages.2.blocks.0", "stages.2.blocks.1"]
OWN = [0, 0, 1, 1, 1, 2, 2]


def runs(n, parts):
    """Every division of n layers into so many runs, as labels."""
    for labels in itertools.product(range(parts), repeat=n):
        steps = np.diff(labels)
        if labels[0] == 0 and labels[-1] == parts - 1 and set(steps.tolist()) <= {0, 1}:
            yield list(labels)


@pytest.mark.parametrize("seed", range(3))
def test_stage_contrast_is_the_stages_against_all_other_divisions(seed):
    square = random_map(7, seed)
    divisions = list(runs(7, 3))
    assert len(divisions) == math.comb(6, 2)
    others = [contrast(square, labels) for labels in divisions if labels != OWN]
    expected = contrast(square, OWN) - np.mean(others)
    assert similarity.stage_contrast(square, STAGES) == pytest.approx(expected)


def test_stage_contrast_is_positive_for_stages_and_not_for_runs_cut_elsewhere():
    assert similarity.stage_contrast(planted([2, 3, 2]), STAGES) > 0.2
    assert similarity.stage_contrast(planted([1, 3, 3]), STAGES) < 0
    assert similarity.stage_contrast(planted([4, 2, 1]), STAGES) < 0
    assert similarity.stage_contrast(planted([7], 0.5), STAGES) == pytest.approx(0)
    # Layers that are alike because they are close are no stages.
    decay = np.exp(-np.abs(np.subtract.outer(np.arange(7), np.arange(7))) / 3)
    assert abs(similarity.stage_contrast(decay, STAGES)) < 0.1


def test_diagonal_contrast_compares_equal_relative_depth():
    square = np.full((3, 5), 0.2)
    square[[0, 1, 2], [0, 2, 4]] = [0.6, 0.7, 0.8]
    assert similarity.diagonal_contrast(square) == pytest.approx(0.7 - 0.2)
    assert similarity.diagonal_contrast(0.3 + 0.5 * np.eye(4)) == pytest.approx(0.5)
    assert similarity.diagonal_contrast(0.9 - 0.5 * np.eye(4)) == pytest.approx(-0.5)
    assert similarity.diagonal_contrast(np.full((4, 4), 0.9)) == pytest.approx(0)
    square[0, 0] = np.nan
    assert similarity.diagonal_contrast(square) == pytest.approx(0.75 - 0.2)


VIT = [
    f"blocks.{block}{part}"
    for block in range(3)
    for part in (".norm1", ".attn", ".norm2:input", ".mlp.fc2:input", "")
]
VIT = ["blocks.0:input", *VIT, "norm"]


def on_stream(layer):
    return layer.endswith("norm2:input") or layer in ("blocks.0", "blocks.1", "blocks.2")


def test_kind_contrast_is_stream_with_stream_minus_stream_with_branch():
    square = random_map(len(VIT), 5)
    alike, unlike = [], []
    for (i, one), (j, other) in itertools.product(enumerate(VIT), repeat=2):
        inside = one[:7] == other[:7] == "blocks." and ":input" not in (one[8:], other[8:])
        if not inside or one[7] == other[7]:
            continue  # the network's ends, and pairs within one block
        if on_stream(one) and on_stream(other):
            alike.append(square[i, j])
        elif on_stream(one) != on_stream(other):
            unlike.append(square[i, j])
    assert len(alike) == 3 * 2 * 4
    assert len(unlike) == 3 * 2 * 2 * 2 * 3
    expected = np.mean(alike) - np.mean(unlike)
    assert similarity.kind_contrast(square, VIT) == pytest.approx(expected)
    assert similarity.kind_contrast(np.full_like(square, 0.7), VIT) == pytest.approx(0)


def test_kind_contrast_is_blind_to_how_alike_far_blocks_are():
    # A map that only falls with the distance of the blocks has no grid.
    block = np.array([int(layer[7]) if layer != "norm" else 2 for layer in VIT])
    decay = np.exp(-np.abs(np.subtract.outer(block, block)))
    assert similarity.kind_contrast(decay, VIT) == pytest.approx(0)


# Estimates ----------------------------------------------------------------------------------------


def record_of(cells, layers, groups=10, noise=0.002, seed=0):
    """A record in which the CKA of two taps is ``cells(role, layer, role, layer)``.

    ``layers`` gives every role's layers and which of them end a block. The groups of minibatches
    differ by a little noise, so that there is an interval.
    """
    taps = [(role, layer) for role, found in layers.items() for layer in found]
    square = np.array([[cells(*one, *other) for other in taps] for one in taps], dtype=float)
    assert np.allclose(square, square.T, equal_nan=True)
    np.fill_diagonal(square, 1)
    stream = np.random.default_rng(seed)
    sums = []
    for size in stream.integers(50, 100, groups):
        jitter = stream.normal(0, noise, square.shape)
        scale = np.exp(stream.normal(0, 0.1, len(taps)))  # layers are of any size
        sums.append(size * (square + jitter + jitter.T) * np.outer(scale, scale) * 7)
    names = [f"{role}/{layer}" for role, layer in taps]
    return xr.Dataset(
        {"hsic": (("group", "tap", "other"), np.array(sums))},
        coords={
            "tap": names,
            "other": names,
            "role": ("tap", [role for role, _ in taps]),
            "layer": ("tap", [layer for _, layer in taps]),
            "block": ("tap", [layers[role][layer] for role, layer in taps]),
        },
    )


def cast(*arms):
    return dict(zip(arms, arms, strict=True))


def small(*roles):
    return {role: {"stem": False, "blocks.0": True, "blocks.1": True} for role in roles}


def test_an_estimate_is_the_statistic_with_a_jackknife_over_groups():
    record = record_of(lambda a, i, b, j: 0.3 + 0.1 * (i == j), small("vit", "resnet"), 6, 0.05)
    hsic = record["hsic"].values

    def statistic(sums):  # of blocks.0 of the ViT (1) and blocks.1 of the ResNet (5)
        return (sums[1, 5] / math.sqrt(sums[1, 1] * sums[5, 5])) ** 2

    found = of_maps(lambda maps: maps["vit", "resnet"][0, 1] ** 2)(record, cast("vit", "resnet"))
    left_out = [statistic(np.delete(hsic, g, axis=0).sum(0)) for g in range(6)]
    error = math.sqrt(5 / 6 * sum((value - np.mean(left_out)) ** 2 for value in left_out))
    margin = stats.t.ppf(0.975, 5) * error
    assert margin > 0.005
    assert found.value == pytest.approx(statistic(hsic.sum(0)))
    assert found.high - found.value == pytest.approx(margin)
    assert found.value - found.low == pytest.approx(margin)


def test_taps_of_other_measurements_leave_an_estimate_as_it_is():
    record = record_of(lambda a, i, b, j: 0.3 + 0.1 * (i == j), small("vit", "resnet"))
    taps = ["vit/blocks.0.attn", "vit/blocks.1.attn"]
    heads = xr.Dataset(
        {"distance": ("tap", [1.0, 2.0])},
        coords={
            "tap": taps,
            "role": ("tap", ["vit"] * 2),
            "layer": ("tap", [tap.removeprefix("vit/") for tap in taps]),
            "block": ("tap", [False] * 2),
        },
    )
    both = xr.merge([record, heads], join="outer", compat="no_conflicts")
    both["block"] = both["block"].astype(bool)
    assert both.sizes["tap"] == record.sizes["tap"] + 2
    assert both.sizes["other"] == record.sizes["other"]
    mean = of_maps(lambda maps: maps.all("vit", "resnet").mean())
    assert mean(both, cast("vit", "resnet")) == mean(record, cast("vit", "resnet"))


def test_maps_are_the_right_way_round_and_have_their_layers():
    record = record_of(
        lambda a, i, b, j: 0.5 if a == b else _cell(a, i, b, j), small("vit", "resnet")
    )
    seen = {}

    def statistic(maps):
        seen["blocks"] = maps["vit", "resnet"]
        seen["turned"] = maps["resnet", "vit"]
        seen["all"] = maps.all("vit", "resnet")
        assert maps.layers("vit") == ["blocks.0", "blocks.1"]
        assert maps.layers("vit", blocks=False) == ["stem", "blocks.0", "blocks.1"]
        return 0.0

    of_maps(statistic)(record, cast("vit", "resnet"))
    layers = list(small("vit")["vit"])
    expected = [[_cell("vit", i, "resnet", j) for j in layers] for i in layers]
    assert np.allclose(seen["all"], expected, atol=0.02)
    assert np.array_equal(seen["blocks"], seen["all"][1:, 1:])
    assert np.array_equal(seen["turned"], seen["blocks"].T)


def _cell(a, i, b, j):
    """Some asymmetric map between two networks."""
    order = ["stem", "blocks.0", "blocks.1"]
    if a > b:
        i, j = j, i
    return 0.1 * order.index(i) + 0.3 * order.index(j)


def test_another_network_can_play_an_arm_and_one_that_was_not_measured_is_unknown():
    def cells(a, i, b, j):
        return 0.8 if a == b == "vit" else 0.4 if a == b == "vit_untrained" else 0.1

    record = record_of(cells, small("vit", "vit_untrained", "resnet"))
    corner = of_maps(lambda maps: maps["vit", "vit"][0, 1])
    assert corner(record, {"vit": "vit"}).value == pytest.approx(0.8, abs=0.01)
    assert corner(record, {"vit": "vit_untrained"}).value == pytest.approx(0.4, abs=0.01)
    assert str(corner(record, {"vit": "mixer"})) == "–"


def test_an_undefined_layer_and_a_single_group_decide_nothing():
    record = record_of(lambda a, i, b, j: 0.8, small("vit"), groups=1)
    alone = of_maps(lambda maps: maps["vit", "vit"][0, 1])(record, cast("vit"))
    assert alone.value == pytest.approx(0.8, abs=0.02)
    assert np.isnan([alone.low, alone.high]).all()
    record = record_of(lambda a, i, b, j: 0.8, small("vit"))
    record["hsic"][:, 1, :] = record["hsic"][:, :, 1] = np.nan
    assert str(of_maps(lambda maps: maps["vit", "vit"][0, 1])(record, cast("vit"))) == "–"


# The claims ---------------------------------------------------------------------------------------

# Set before anything was measured. Whoever changes one says why in the chapter, and keeps the old
# verdict visible there.
FROZEN = {
    "E01-uniform": (">", 0.0),
    "E01-stages": (">", 0.0),
    "E01-grid": (">", 0.0),
    "E02-midpoint": (">", 0.0),
    "E02-last-third": (">", 0.0),
    "E21-diagonal": (">", 0.0),
    "E22-blocks": (">", 0.0),
    "E22-kinship": (">", 0.0),
    "E23-batch-size": ("<", 0.02),
}
LAB = load_study("lab")
CLAIMS = {claim.key: claim for claim in MAPS}


def test_thresholds_are_as_they_were_set():
    sides = {c.key: ("<" if c.below else ">", c.threshold) for c in MAPS + MINIBATCHES}
    assert sides == FROZEN


@pytest.fixture(scope="module")
def lab_taps():
    """Blocks of the lab's networks by their real names, and all taps of the ViT."""
    found = {}
    for name in ("vit", "vit_gap", "resnet", "mixer"):
        model = LAB.model(f"{name}_untrained")
        ends = tap_names(model, "blocks")
        taps = tap_names(model, "all") if name == "vit" else ends
        found[name] = {tap: tap in ends for tap in taps}
    return found


def depth(layers, layer):
    """Relative depth, 0 to 1, of a block or of the block a tap lies in."""
    ends = [name for name, end in layers.items() if end]
    if layer in ends:
        return ends.index(layer) / (len(ends) - 1)
    inside = [k for k, name in enumerate(ends) if layer.startswith((f"{name}.", f"{name}:"))]
    return (inside or [len(ends) - 1])[0] / (len(ends) - 1)


def uniform(role):
    """That network is alike all the way through, the others are not."""
    return lambda a, x, i, b, y, j: 0.9 if a == b == role else math.exp(-3 * abs(x - y))


def stages(place):
    """Layers fall into runs according to ``place(layer, depth)``."""
    return lambda a, x, i, b, y, j: 0.9 if place(i, x) == place(j, y) else 0.3


def grid(same, different):
    def cells(a, x, i, b, y, j):
        streams = [on_vit_stream(i), on_vit_stream(j)]
        return same if all(streams) else different if any(streams) else 0.5

    return cells


def on_vit_stream(layer):
    return layer.count(".") == 1 or layer.endswith("norm2:input")


def peak(where):
    """The ResNet resembles the ViT at one depth of the ViT only."""

    def cells(a, x, i, b, y, j):
        if a == b:
            return 0.5
        vit = x if a == "vit" else y
        return 0.8 - 0.7 * abs(vit - where)

    return cells


def diagonal(sign):
    return lambda a, x, i, b, y, j: 0.5 + sign * (0.4 - abs(x - y)) / 2


def two_parts(role):
    def cells(a, x, i, b, y, j):
        return 0.5 if not a == b == role else 0.9 if (x > 0.6) == (y > 0.6) else 0.2

    return cells


def kin(*pair):
    return lambda a, x, i, b, y, j: 0.8 if {a, b} == set(pair) else 0.4


WORLDS = {
    # claim: (a world in which it is true, one in which it is false)
    "E01-uniform": (uniform("vit"), uniform("resnet")),
    "E01-stages": (
        stages(lambda layer, x: layer.split(".")[1]),
        stages(lambda layer, x: int(x > 0.4) + int(x > 0.9)),
    ),
    "E01-grid": (grid(0.9, 0.4), grid(0.4, 0.9)),
    "E02-midpoint": (peak(0.15), peak(0.8)),
    "E02-last-third": (peak(0.5), peak(1.0)),
    "E21-diagonal": (diagonal(1), diagonal(-1)),
    "E22-blocks": (two_parts("mixer"), two_parts("vit")),
    "E22-kinship": (kin("mixer", "vit"), kin("mixer", "resnet")),
}


def test_every_claim_has_its_worlds():
    assert WORLDS.keys() == CLAIMS.keys()


@pytest.mark.parametrize("key", WORLDS)
def test_a_claim_comes_out_as_the_world_is(key, lab_taps):
    claim = CLAIMS[key]
    layers = {role: lab_taps[role] for role in claim.arms}
    worlds = dict(zip((SUPPORTED, CONTRADICTED), WORLDS[key], strict=True))
    for expected, world in worlds.items():

        def cells(a, i, b, j, world=world):
            return world(a, depth(layers[a], i), i, b, depth(layers[b], j), j)

        [judgement] = judge([claim], record_of(cells, layers), LAB, layers)
        assert judgement.verdict == expected
        assert judgement.trained.low < judgement.trained.value < judgement.trained.high


@pytest.mark.parametrize("key", WORLDS)
def test_a_claim_is_not_true_of_noise(key, lab_taps):
    # Between groups that differ by more than any structure there is nothing to be seen.
    layers = {role: lab_taps[role] for role in CLAIMS[key].arms}
    record = record_of(lambda a, i, b, j: 0.5, layers, noise=0.1, seed=3)
    [judgement] = judge([CLAIMS[key]], record, LAB, layers)
    assert judgement.verdict == INCONCLUSIVE


# The size of the minibatch ------------------------------------------------------------------------


def gram_matrices(n, width=64, layers=2):
    """Of layers that share half of what they have, by role and tap."""
    stream = torch.Generator().manual_seed(0)
    shared = torch.randn(n, width, generator=stream)
    found = {role: {} for role in ("vit", "resnet")}
    for role, taps in found.items():
        for k in range(layers):
            x = shared + torch.randn(n, width, generator=stream)
            taps[f"{role}/blocks.{k}"] = x @ x.T
    return found


def test_squares_of_a_gram_matrix_are_those_of_the_minibatches():
    grams = gram_matrices(64)["vit"]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    record = in_minibatches(grams, 16, order=order)
    metric = similarity.MinibatchCKA()
    for part in order.split(16):
        squares = {tap: similarity.centre(gram[part][:, part]) for tap, gram in grams.items()}
        metric.update(squares)
    assert np.array_equal(record["cka"], metric.compute()["cka"])
    whole = in_minibatches(grams, 64)["cka"].values
    assert 0.003 < np.abs(record["cka"] - whole).max() < 0.3


def test_the_claim_about_minibatches_comes_out_as_its_numbers_are():
    grams = gram_matrices(512)
    unbiased = batch_size_effect(grams, cast("vit", "resnet"), 128)
    biased = batch_size_effect(grams, cast("vit", "resnet"), 128, "biased")
    assert 0 <= unbiased.low < unbiased.value < unbiased.high < 0.02
    assert biased.low > 0.02
    [claim] = MINIBATCHES
    [judgement] = judge([claim], grams, LAB, grams)
    assert (judgement.verdict, judgement.trained) == (SUPPORTED, unbiased)
    assert claim.holds(biased) == CONTRADICTED
    [judgement] = judge([claim], gram_matrices(255), LAB, grams)
    assert judgement.verdict == UNMEASURABLE
    assert judgement.why == "needs at least two minibatches of 128"
