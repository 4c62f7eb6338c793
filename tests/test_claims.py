"""Verdicts follow from the numbers, and every claim can come out either way."""

import itertools
import math

import numpy as np
import pytest
import xarray as xr
from bs4 import BeautifulSoup
from scipy import stats

from lib.cka import jackknife_margin
from lib.findings import claims
from lib.findings.claims import (
    CLAIMS,
    CONTRADICTED,
    INCONCLUSIVE,
    SUPPORTED,
    UNMEASURABLE,
    Claim,
    Estimate,
    decide,
    estimate,
    judge,
)
from lib.studies import load_study, networks
from lib.taps import tap_names

LAB_ROLES = load_study("lab").roles

# Verdicts -----------------------------------------------------------------------------------------

PLACES = {
    "above": Estimate(0.8, 0.7, 0.9),
    "below": Estimate(0.2, 0.1, 0.3),
    "across": Estimate(0.5, 0.4, 0.6),
    "undefined": Estimate(math.nan, math.nan, math.nan),
    "no interval": Estimate(0.8, math.nan, math.nan),
}


def claim_of(statistic=None, roles=("vit",), threshold=0.5, **options):
    return Claim(
        "E99-key", "A sentence.", "Fig. 9", statistic, "meaning", threshold, roles, **options
    )


def verdict(good, trained, other) -> str:
    """What :func:`decide` promises, where ``good`` is the claimed side of the threshold."""
    if trained in ("undefined", "no interval"):
        return UNMEASURABLE
    if trained == "across" or other not in (None, trained):
        return INCONCLUSIVE
    return SUPPORTED if trained == good else CONTRADICTED


def reason(good, trained, other, untrained) -> str:
    if trained == "across":
        return "the interval contains the threshold"
    if other not in (None, trained):
        return "another seed does not repeat it"
    return "already true before training" if trained == untrained == good else ""


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("trained", PLACES)
def test_every_combination_has_the_verdict_it_should(below, trained):
    good = "below" if below else "above"
    for other, untrained in itertools.product([None, *PLACES], repeat=2):
        given = [PLACES.get(name) for name in (trained, other, untrained)]
        judgement = decide(claim_of(below=below), *given)
        assert [judgement.trained, judgement.other_seed, judgement.untrained] == given
        assert judgement.verdict == verdict(good, trained, other), (other, untrained)
        if judgement.verdict == UNMEASURABLE:
            assert judgement.why, "not measurable, and nobody learns why"
        else:
            assert judgement.why == reason(good, trained, other, untrained), (other, untrained)


def test_an_interval_that_touches_the_threshold_decides_nothing():
    for below in (False, True):
        for low, high in ((0.5, 0.9), (0.1, 0.5), (0.5, 0.5)):
            middle = Estimate((low + high) / 2, low, high)
            assert claim_of(below=below).holds(middle) == INCONCLUSIVE


def test_estimates_are_printed_with_their_interval():
    assert str(Estimate(0.12345, -0.0004, 1)) == "0.123 [-0.000, 1.000]"


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
    assert claims.low_high(square) == np.mean([4, 5, 10, 11])
    assert claims.low_high(np.arange(64.0).reshape(8, 8)) == np.mean(
        [5, 6, 7, 13, 14, 15, 21, 22, 23]
    )
    assert claims.low_high(np.arange(4.0).reshape(2, 2)) == 1
    assert (
        claims.low_high(np.arange(169.0).reshape(13, 13))
        == np.arange(169.0).reshape(13, 13)[:4, 9:].mean()
    )
    square[0, 4] = np.nan  # a layer whose CKA is undefined is left out
    assert claims.low_high(square) == pytest.approx(np.mean([5, 10, 11]))


@pytest.mark.parametrize("cut", [1, 2, 3, 6])
@pytest.mark.parametrize("diagonal", [1.0, 100.0])
def test_two_block_contrast_finds_the_planted_cut(cut, diagonal):
    square = planted([cut, 7 - cut], 0.9, 0.2, diagonal)
    assert claims.two_block_contrast(square) == pytest.approx(0.7)


def test_two_block_contrast_is_the_best_of_all_cuts():
    square = random_map(6)
    cuts = [contrast(square, [i >= cut for i in range(6)]) for cut in range(1, 6)]
    assert claims.two_block_contrast(square) == pytest.approx(max(cuts))
    assert claims.two_block_contrast(planted([6], 0.4)) == pytest.approx(0)


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
    assert claims.stage_contrast(square, STAGES) == pytest.approx(expected)


def test_stage_contrast_is_positive_for_stages_and_not_for_runs_cut_elsewhere():
    assert claims.stage_contrast(planted([2, 3, 2]), STAGES) > 0.2
    assert claims.stage_contrast(planted([1, 3, 3]), STAGES) < 0
    assert claims.stage_contrast(planted([4, 2, 1]), STAGES) < 0
    assert claims.stage_contrast(planted([7], 0.5), STAGES) == pytest.approx(0)
    # Layers that are alike because they are close are no stages.
    decay = np.exp(-np.abs(np.subtract.outer(np.arange(7), np.arange(7))) / 3)
    assert abs(claims.stage_contrast(decay, STAGES)) < 0.1


def test_diagonal_contrast_compares_equal_relative_depth():
    square = np.full((3, 5), 0.2)
    square[[0, 1, 2], [0, 2, 4]] = [0.6, 0.7, 0.8]
    assert claims.diagonal_contrast(square) == pytest.approx(0.7 - 0.2)
    assert claims.diagonal_contrast(0.3 + 0.5 * np.eye(4)) == pytest.approx(0.5)
    assert claims.diagonal_contrast(0.9 - 0.5 * np.eye(4)) == pytest.approx(-0.5)
    assert claims.diagonal_contrast(np.full((4, 4), 0.9)) == pytest.approx(0)
    square[0, 0] = np.nan
    assert claims.diagonal_contrast(square) == pytest.approx(0.75 - 0.2)


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
    assert claims.kind_contrast(square, VIT) == pytest.approx(expected)
    assert claims.kind_contrast(np.full_like(square, 0.7), VIT) == pytest.approx(0)


def test_kind_contrast_is_blind_to_how_alike_far_blocks_are():
    # A map that only falls with the distance of the blocks has no grid.
    block = np.array([int(layer[7]) if layer != "norm" else 2 for layer in VIT])
    decay = np.exp(-np.abs(np.subtract.outer(block, block)))
    assert claims.kind_contrast(decay, VIT) == pytest.approx(0)


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


def small(*roles):
    return {role: {"stem": False, "blocks.0": True, "blocks.1": True} for role in roles}


def test_an_estimate_is_the_statistic_with_a_jackknife_over_groups():
    record = record_of(lambda a, i, b, j: 0.3 + 0.1 * (i == j), small("vit", "resnet"), 6, 0.05)
    claim = claim_of(lambda maps: maps["vit", "resnet"][0, 1] ** 2, ("vit", "resnet"))
    hsic = record["hsic"].values

    def statistic(sums):  # of blocks.0 of the ViT (1) and blocks.1 of the ResNet (5)
        return (sums[1, 5] / math.sqrt(sums[1, 1] * sums[5, 5])) ** 2

    found = estimate(claim, record)
    left_out = [statistic(np.delete(hsic, g, axis=0).sum(0)) for g in range(6)]
    error = math.sqrt(5 / 6 * sum((value - np.mean(left_out)) ** 2 for value in left_out))
    margin = stats.t.ppf(0.975, 5) * error
    assert margin > 0.005
    assert found.value == pytest.approx(statistic(hsic.sum(0)))
    assert found.high - found.value == pytest.approx(margin)
    assert found.value - found.low == pytest.approx(margin)
    assert margin == pytest.approx(float(jackknife_margin(hsic, statistic)))


def test_taps_that_only_rode_along_leave_an_estimate_as_it_is():
    record = record_of(lambda a, i, b, j: 0.3 + 0.1 * (i == j), small("vit", "resnet"))
    claim = claim_of(lambda maps: maps.all("vit", "resnet").mean(), ("vit", "resnet"))
    maps_of_heads = xr.Dataset(
        {"distance": ("tap", [1.0, 2.0])},
        coords={
            "tap": ["vit/blocks.0.attn", "vit/blocks.1.attn"],
            "role": ("tap", ["vit"] * 2),
            "layer": ("tap", ["blocks.0.attn", "blocks.1.attn"]),
            "block": ("tap", [False] * 2),
        },
    )
    both = xr.merge([record, maps_of_heads], join="outer", compat="no_conflicts")
    both["block"] = both["block"].astype(bool)
    assert both.sizes["tap"] == record.sizes["tap"] + 2
    assert both.sizes["other"] == record.sizes["other"]
    assert estimate(claim, both) == estimate(claim, record)


def test_maps_are_the_right_way_round_and_know_their_layers():
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

    estimate(claim_of(statistic, ("vit", "resnet")), record)
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


def test_another_network_can_play_a_role():
    def cells(a, i, b, j):
        return 0.8 if a == b == "vit" else 0.4 if a == b == "vit_untrained" else 0.1

    record = record_of(cells, small("vit", "vit_untrained", "resnet"))
    claim = claim_of(lambda maps: maps["vit", "vit"][0, 1])
    assert estimate(claim, record).value == pytest.approx(0.8, abs=0.01)
    assert estimate(claim, record, {"vit": "vit_untrained"}).value == pytest.approx(0.4, abs=0.01)


def test_an_undefined_layer_makes_a_claim_unmeasurable():
    record = record_of(lambda a, i, b, j: 0.8, small("vit"))
    record["hsic"][:, 1, :] = record["hsic"][:, :, 1] = np.nan
    judgement = judge(claim_of(lambda maps: maps["vit", "vit"][0, 1]), record)
    assert judgement.verdict == UNMEASURABLE


def test_one_group_of_minibatches_decides_nothing():
    record = record_of(lambda a, i, b, j: 0.8, small("vit"), groups=1)
    judgement = judge(claim_of(lambda maps: maps["vit", "vit"][0, 1]), record)
    assert judgement.trained.value == pytest.approx(0.8, abs=0.02)
    assert judgement.verdict == UNMEASURABLE


# Twins --------------------------------------------------------------------------------------------


def judged(level, roles=("vit",), **twins):
    """Judgement of "CKA of two blocks > 0.5" where roles and twins have the given levels."""
    levels = dict.fromkeys(roles, level) | twins

    def cells(a, i, b, j):
        return levels[a] if a == b else 0.1

    record = record_of(cells, small(*levels))
    statistic = claim_of(lambda maps: np.mean([maps[r, r][0, 1] for r in roles]), roles)
    return judge(statistic, record)


def test_twins_are_found_in_the_record_and_decide_with_it():
    alone = judged(0.8)
    assert (alone.verdict, alone.why, alone.other_seed, alone.untrained) == (
        SUPPORTED,
        "",
        None,
        None,
    )
    assert judged(0.8, vit_other_seed=0.7).verdict == SUPPORTED
    seed = judged(0.8, vit_other_seed=0.3)
    assert (seed.verdict, seed.why) == (INCONCLUSIVE, "another seed does not repeat it")
    assert seed.other_seed.value == pytest.approx(0.3, abs=0.01)
    before = judged(0.8, vit_other_seed=0.7, vit_untrained=0.9)
    assert (before.verdict, before.why) == (SUPPORTED, "already true before training")
    assert before.untrained.value == pytest.approx(0.9, abs=0.01)
    learned = judged(0.8, vit_untrained=0.2)
    assert (learned.verdict, learned.why) == (SUPPORTED, "")
    assert judged(0.2, vit_other_seed=0.3).verdict == CONTRADICTED
    assert judged(0.2, vit_other_seed=0.7).verdict == INCONCLUSIVE
    assert judged(0.5).verdict == INCONCLUSIVE


def test_untrained_means_that_no_network_of_the_claim_was_trained():
    both = ("vit", "resnet")
    assert judged(
        0.8, both, vit_untrained=0.9, resnet_untrained=0.7
    ).untrained.value == pytest.approx(0.8, abs=0.01)
    assert judged(0.8, both, vit_untrained=0.9).untrained is None
    # Where one network has a second seed, that is another pair of networks.
    assert judged(0.8, both, vit_other_seed=0.6).other_seed.value == pytest.approx(0.7, abs=0.01)


def test_a_claim_may_name_its_twin():
    """Of further training the twin is further training from another seed's network."""
    layers = {
        role: {"blocks.0": True, "blocks.1": True}
        for role in ("vit", "vit_tuned", "vit_other_seed", "vit_other_seed_tuned")
    }

    def cells(a, i, b, j):
        return {("vit", "vit_tuned"): 0.8, ("vit_other_seed", "vit_other_seed_tuned"): 0.6}.get(
            tuple(sorted((a, b), key=len)), 0.5
        )

    twin = {"vit": "vit_other_seed", "vit_tuned": "vit_other_seed_tuned"}
    claim = claim_of(
        lambda maps: float(maps["vit", "vit_tuned"][0, 0]),
        roles=("vit", "vit_tuned"),
        other_seed=twin,
    )
    judgement = judge(claim, record_of(cells, layers))
    assert judgement.trained.value == pytest.approx(0.8, abs=0.05)
    assert judgement.other_seed.value == pytest.approx(0.6, abs=0.05)
    without = {role: layers[role] for role in ("vit", "vit_tuned", "vit_other_seed")}
    assert judge(claim, record_of(cells, without)).other_seed is None


def test_without_its_networks_a_claim_is_not_measurable_and_names_the_first():
    record = record_of(lambda a, i, b, j: 0.5, small("vit"))
    judgement = judge(CLAIMS["E22-kinship"], record)
    assert judgement.verdict == UNMEASURABLE
    assert judgement.why == "not measured here: no network mixer"
    assert (str(judgement.trained), judgement.other_seed, judgement.untrained) == ("–", None, None)


def test_a_chapter_is_asked_for_the_twins_that_there_are():
    claim = claim_of(None, roles=("vit", "resnet"))
    values = {"": 0.8, "_other_seed": 0.7, "_untrained": 0.6}
    asked = []

    def of(twin):
        asked.append(twin)
        return Estimate(values[twin], values[twin] - 0.05, values[twin] + 0.05)

    known = {"vit", "resnet", "vit_other_seed", "vit_untrained", "resnet_untrained"}
    judgement = claims.judge_by(claim, known, of)
    assert sorted(asked) == ["", "_untrained"]
    assert (judgement.trained.value, judgement.untrained.value) == (0.8, 0.6)
    assert judgement.other_seed is None
    assert judgement.why == "already true before training"
    assert claims.judge_by(claim, known | {"resnet_other_seed"}, of).other_seed.value == 0.7
    asked.clear()
    missing = claims.judge_by(claim, known - {"resnet"}, of)
    assert (missing.verdict, asked) == (UNMEASURABLE, [])
    assert missing.why == "not measured here: no network resnet"


def test_numbers_that_are_missing_are_words():
    nan = float("nan")
    assert claims.number(np.float32(0.5)) == 0.5
    assert type(claims.number(np.float32(0.5))) is float
    for missing in (None, nan, np.inf):
        assert claims.number(missing) == "not measured here"
    assert str(Estimate(0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert str(Estimate(0.5, nan, nan)) == "0.500 (no interval)"
    assert str(Estimate(nan, nan, nan)) == str(Estimate(-np.inf, nan, nan)) == "–"
    judgement = decide(claim_of(None), Estimate(-np.inf, nan, nan), None, None)
    assert judgement.why == "the statistic is undefined"


# The claims of the book ---------------------------------------------------------------------------

# Set before anything was measured. Whoever changes one says why in the chapter, and keeps the old
# verdict visible there.
FROZEN = {
    "E01-uniform": (">", 0.0),
    "E01-stages": (">", 0.0),
    "E01-grid": (">", 0.0),
    "E02-midpoint": (">", 0.0),
    "E02-last-third": (">", 0.0),
    "E03-local": ("<", 0.5),
    "E03-spread": (">", 0.05),
    "E03-global": (">", 0.8),
    "E04-data": (">", 0.0),
    "E05-slope": ("<", -0.5),
    "E06-wide": (">", 0.0),
    "E06-centre": (">", 0.0),
    "E07-attention": ("<", 0.0),
    "E07-mlp": (">", 0.0),
    "E12-own-patch": (">", 0.5),
    "E12-edges": (">", 0.0),
    "E12-sharper": (">", 0.0),
    "E13-pooling": (">", 0.0),
    "X9-last-block": (">", 0.0),
    "E14-gap": (">", 0.05),
    "E14-resnet": (">", 0.05),
    "E15-tie": ("<", 0.05),
    "E15-plateau": (">", 0.0),
    "E15-first": ("<", 0.05),
    "E21-diagonal": (">", 0.0),
    "E22-blocks": (">", 0.0),
    "E22-kinship": (">", 0.0),
    "E23-batch-size": ("<", 0.02),
    "E16-late": (">", 0.0),
    "E16-early": ("<", 0.1),
    "E16-late-03": (">", 0.0),
    "E16-early-03": ("<", 0.1),
    "E17-middle": (">", 0.0),
    "E17-middle-03": (">", 0.0),
    "E18-middle": (">", 0.0),
    "E19-early": ("<", 0.05),
    "E19-distant": (">", 0.0),
    "E08-crossing": (">", 0.0),
    "E08-above-resnet": (">", 0.0),
    "E09-class-late": (">", 0.0),
    "E09-class-mlp": (">", 0.0),
    "E10-patches-rise": (">", 0.0),
    "E10-patches-end": (">", 0.9),
    "E10-class-falls": (">", 0.0),
    "E11-partition": (">", 0.1),
    "E11-accuracy": (">", 0.0),
}


def test_thresholds_are_as_they_were_set():
    sides = {key: ("<" if c.below else ">", c.threshold) for key, c in CLAIMS.items()}
    assert sides == FROZEN


def test_claims_are_complete():
    for key, claim in CLAIMS.items():
        assert claim.key == key
        assert claim.sentence.endswith(".")
        assert claim.source
        assert claim.meaning
        assert claim.roles
        assert set(claim.roles) <= set(LAB_ROLES)
        if claim.other_seed is not None:
            assert set(claim.other_seed) <= set(claim.roles)
            assert set(claim.other_seed.values()) <= set(LAB_ROLES)


@pytest.fixture(scope="module")
def lab_taps():
    """The blocks of the lab's networks by their real names, and all taps of the ViT."""
    found = {}
    for name, role in LAB_ROLES.items():
        model = networks.build(role.architecture, 0)
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


def pair(role, value):
    """CKA of that network with others is ``value(depth)``, everything else is alike."""
    return lambda a, x, i, b, y, j: value(max(x, y)) if (a == role) != (b == role) else 0.99


def halved(role):
    """One network falls into two parts in the middle, others are alike all the way through."""

    def cells(a, x, i, b, y, j):
        return 0.2 if a == b == role and (x > 0.5) != (y > 0.5) else 0.8

    return cells


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
    **{
        f"E16-{where}{key}": (pair(role, true), pair(role, false))
        for key, role in {"": "vit_data_10", "-03": "vit_data_03"}.items()
        for where, true, false in (
            ("late", lambda x: 0.9 - 0.6 * x, lambda x: 0.3 + 0.6 * x),
            ("early", lambda x: 0.99 if x < 0.5 else 0.2, lambda x: 0.99 if x > 0.5 else 0.8),
        )
    },
    "E19-early": (
        pair("vit_tuned_colour", lambda x: 0.98 if x < 0.5 else 0.2),
        pair("vit_tuned_colour", lambda x: 0.98 if x != 0 else 0.9),
    ),
    "E19-distant": (
        pair("vit_tuned_colour", lambda x: 0.9 - 0.3 * x),
        pair("vit_tuned_fine_textures", lambda x: 0.9 - 0.3 * x),
    ),
    "E11-partition": (halved("vit_no_skip_middle"), halved("vit")),
}
# Layers that are half alike have not stayed as they were, whatever the noise; and of a difference
# that must exceed something, noise is evidence that it does not.
NOISE = {"E19-early": CONTRADICTED, "E11-partition": CONTRADICTED}


def test_every_claim_about_maps_has_its_worlds():
    assert set(WORLDS) == {key for key, claim in CLAIMS.items() if claim.statistic}


@pytest.mark.parametrize("key", WORLDS)
def test_a_claim_comes_out_as_the_world_is(key, lab_taps):
    claim = CLAIMS[key]
    layers = {role: lab_taps[role] for role in claim.roles}
    worlds = dict(zip((SUPPORTED, CONTRADICTED), WORLDS[key], strict=True))
    for expected, world in worlds.items():

        def cells(a, i, b, j, world=world):
            return world(a, depth(layers[a], i), i, b, depth(layers[b], j), j)

        judgement = judge(claim, record_of(cells, layers))
        assert judgement.verdict == expected
        assert judgement.trained.low < judgement.trained.value < judgement.trained.high


def test_the_partition_is_looked_for_where_the_skips_are_missing():
    middle = networks.build("vit_no_skip_middle", 0)
    assert networks.blocks_without_skips(middle) == [claims.MIDDLE]
    square = np.arange(16.0).reshape(4, 4)
    assert claims.across(square, 1) == np.mean([1, 2, 3])
    assert claims.across(square, 2) == np.mean([2, 3, 6, 7])


@pytest.mark.parametrize("key", WORLDS)
def test_a_claim_is_not_true_of_noise(key, lab_taps):
    # Between groups that differ by more than any structure there is nothing to be seen.
    claim = CLAIMS[key]
    layers = {role: lab_taps[role] for role in claim.roles}
    record = record_of(lambda a, i, b, j: 0.5, layers, noise=0.1, seed=3)
    assert judge(claim, record).verdict == NOISE.get(key, INCONCLUSIVE)


def test_the_claim_about_minibatches_comes_out_as_its_numbers_are():
    claim = CLAIMS["E23-batch-size"]
    small, large = Estimate(0.006, 0.004, 0.008), Estimate(0.3, 0.28, 0.32)
    assert decide(claim, small, small, None).verdict == SUPPORTED
    assert decide(claim, large, large, None).verdict == CONTRADICTED
    assert decide(claim, small, large, None).verdict == INCONCLUSIVE
    assert decide(claim, small, small, small).why == "already true before training"


# The table ----------------------------------------------------------------------------------------


def test_the_table_shows_every_column_of_every_judgement_in_full():
    far = Estimate(0.123456, 0.1, 0.147)
    first = decide(claim_of(below=True, threshold=0.02), PLACES["above"], far, None)
    second = decide(CLAIMS["E02-midpoint"], PLACES["above"], PLACES["above"], PLACES["above"])
    page = BeautifulSoup(claims.table([first, second]).data, "html.parser")
    head, *rows = page.find_all("tr")
    names = [cell.text for cell in head.find_all("th")]
    assert names == ["claim", "measured [95 %]", "other seed", "untrained", "verdict"]
    assert len(rows) == 2
    cells = [[cell.get_text(" ") for cell in row.find_all("td")] for row in rows]
    assert [len(row) for row in cells] == [5, 5]
    assert cells[0][1:4] == ["0.800 [0.700, 0.900]", "0.123 [0.100, 0.147]", "–"]
    assert cells[1][1:4] == ["0.800 [0.700, 0.900]"] * 3
    assert "E99-key" in cells[0][0]
    assert "A sentence. (the paper's Fig. 9)" in cells[0][0]
    claim = CLAIMS["E02-midpoint"]
    for text in (claim.key, claim.sentence, claim.source, claim.meaning):
        assert text in cells[1][0]
    assert cells[1][4].split() == ["supported", "already", "true", "before", "training"]
    assert "…" not in page.text
    assert "..." not in page.text


def test_the_table_escapes_what_is_not_markup():
    below = decide(claim_of(below=True, threshold=0.02), PLACES["below"], None, None)
    above = decide(claim_of(threshold=0.25), PLACES["below"], None, None)
    html = claims.table([below, above]).data
    assert "meaning &lt; 0.02" in html
    assert "meaning &gt; 0.25" in html
    text = BeautifulSoup(html, "html.parser").text
    assert "meaning < 0.02" in text
    assert "meaning > 0.25" in text


@pytest.mark.parametrize(
    ("verdict", "css"),
    [
        (SUPPORTED, "supported"),
        (CONTRADICTED, "contradicted"),
        (INCONCLUSIVE, "inconclusive"),
        (UNMEASURABLE, "unmeasured"),
    ],
)
def test_a_verdict_has_its_badge(verdict, css):
    assert claims.badge(verdict) == f'<span class="verdict-{css}">{verdict}</span>'
