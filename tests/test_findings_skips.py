"""Statistics of curves over depth and of cuts, and the claims on skip connections."""

import types

import numpy as np
import pytest
import xarray as xr

from lib.findings import skips
from lib.findings.claims import CONTRADICTED, INCONCLUSIVE, SUPPORTED, UNMEASURABLE, judge
from lib.findings.similarity import across
from lib.findings.skips import CURVES, WITHOUT_SKIPS, of_curves
from lib.measurements.norm_ratio import EDGES, QUANTITIES, TOKENS, Curves, estimate
from lib.studies import load_study, networks

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
    quantities = [*QUANTITIES, "median"]
    for what, change in changes.items():
        role, sublayer, token, quantity = what.split("_", 3)
        end = {"attention": ".attn", "mlp": ".mlp", "unit": ".conv3"}[sublayer]
        rows = [i for i, tap in enumerate(taps) if tap.startswith(role) and tap.endswith(end)]
        values[rows, TOKENS.index(token), quantities.index(quantity)] = change
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


STEP = np.repeat([1.0, 0.0], BLOCKS // 2)  # 1 in the first half of the blocks
BOTH = ("attention", "mlp")


def of_class(values, sublayers=BOTH, quantity="ratio"):
    return {f"vit_{sub}_class_{quantity}": values for sub in sublayers}


def of_patches(values, sublayers=BOTH, quantity="ratio"):
    return {f"vit_{sub}_patch_{quantity}": values for sub in sublayers}


def by_means(curves):
    return skips.above_resnet(curves, "ratio")


@pytest.mark.parametrize(
    ("statistic", "changes", "expected"),
    [
        # Twice the patches' ratio early, half of it late.
        (skips.crossing, of_class(2 * 2.0 ** (2 * STEP - 1)), 1.0),
        (skips.crossing, of_class(2 * 2.0 ** (1 - 2 * STEP)), -1.0),
        (skips.crossing, of_class(4.0), -1.0),  # above throughout: no crossing
        (skips.crossing, of_class(1.0), -1.0),
        (skips.crossing, {}, 0.0),
        (skips.crossing, of_class(2 * 2.0 ** (2 * STEP - 1), ["mlp"]), 0.5),
        # The first block's class token does not count.
        (skips.crossing, of_class(np.array([1e-3, 4, 4, 4, 1, 1, 1, 1])), 1.0),
        (by_means, of_patches(8.0), 2.0),
        (by_means, of_patches(0.5), -2.0),
        (by_means, of_patches(8.0, ["attention"]), 1.0),  # 8 of 16: between the two
        (by_means, {"resnet_unit_patch_ratio": [64, 2, 2, 64, 2, 2, 2, 64] + [2] * 5}, 0.0),
        (skips.class_changes_late, of_class(2.0 ** (3 * STEP)), 3.0),
        (skips.class_changes_late, of_class(2.0 ** (-3 * STEP)), -3.0),
        (skips.class_changes_by_mlp, of_class(1.0, ["mlp"]), 1.0),
        (skips.class_changes_by_mlp, of_class(2 * 2.0 ** -STEP, ["mlp"]), 0.0),  # early only
        (skips.patches_align, of_patches(0.9 - 0.4 * STEP, quantity="cosine"), 0.4),
        (skips.patches_align, of_patches(0.5 + 0.4 * STEP, quantity="cosine"), -0.4),
        (skips.patches_aligned, of_patches(0.97, quantity="cosine"), 0.97),
        (skips.patches_aligned, of_patches(0.9, ["mlp"], quantity="cosine"), 0.7),
        (skips.class_turns, of_class(0.6 + 0.3 * STEP, quantity="cosine"), 0.3),
        (skips.class_turns, of_class(0.9 - 0.3 * STEP, quantity="cosine"), -0.3),
    ],
)  # fmt: skip
def test_statistics_are_what_they_say(statistic, changes, expected):
    record = world(**changes)
    assert statistic(Curves(record)) == pytest.approx(expected, abs=1e-9)
    found = estimate(record, statistic)
    value, low, high = found.value, found.low, found.high
    assert value == pytest.approx(expected, abs=5e-3)
    assert low < value < high
    assert high - low < 0.05


def test_statistics_of_medians_are_read_from_the_histograms():
    record = world(**of_class(2 * 2.0 ** (2 * STEP - 1), quantity="median"))
    found = estimate(record, lambda curves: skips.crossing(curves, "median"))
    assert found.value == pytest.approx(1, abs=0.1)  # within a bin
    assert estimate(record, skips.crossing).value == pytest.approx(0, abs=5e-3)
    record = world(**of_patches(8.0, quantity="median"), resnet_unit_patch_ratio=np.inf)
    assert estimate(record, skips.above_resnet).value == pytest.approx(2, abs=0.1)


def test_an_infinite_mean_has_no_interval():
    found = estimate(world(**of_patches(np.inf)), skips.crossing)
    assert np.isnan([found.low, found.high]).all()


def test_the_class_token_over_the_patches_is_told_for_each_half():
    record = world(**of_class(2 * 2.0 ** (3 * STEP - 1)))
    assert skips.class_over_patches(Curves(record)) == pytest.approx((2, -1))


def test_the_first_block_counts_where_it_is_asked_to():
    record = world(**of_class(np.array([0.25, 4, 4, 4, 1, 1, 1, 1])))
    all_blocks = skips.crossing(Curves(record), skip_first=False)
    assert all_blocks == pytest.approx((-3 + 1 + 1 + 1) / 4)


# The claims ---------------------------------------------------------------------------------------

# Set before anything was measured. Whoever changes one says why in the chapter, and keeps the old
# verdict visible there.
FROZEN = {
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
LAB = load_study("lab")


def test_thresholds_are_as_they_were_set():
    sides = {c.key: ("<" if c.below else ">", c.threshold) for c in CURVES + WITHOUT_SKIPS}
    assert sides == FROZEN


WORLDS = {
    # claim: (changes that make it true, changes that make it false)
    "E08-crossing": (of_class(2.0 ** (2 * STEP)), of_class(2.0 ** (2 - 2 * STEP))),
    "E08-above-resnet": [of_patches(ratio, quantity="median") for ratio in (4.0, 1.0)],
    "E09-class-late": (of_class(2.0**STEP), of_class(2.0**-STEP)),
    "E09-class-mlp": (of_class(1.0, ["mlp"]), of_class(4.0, ["mlp"])),
    "E10-patches-rise": [
        of_patches(c, quantity="cosine") for c in (0.9 - STEP / 2, 0.4 + STEP / 2)
    ],
    "E10-patches-end": [of_patches(cosine, quantity="cosine") for cosine in (0.95, 0.85)],
    "E10-class-falls": [of_class(c, quantity="cosine") for c in (0.4 + STEP / 2, 0.9 - STEP / 2)],
}


def test_every_claim_about_curves_has_its_worlds():
    assert WORLDS.keys() == {claim.key for claim in CURVES}


@pytest.mark.parametrize("key", WORLDS)
def test_a_claim_about_curves_comes_out_as_the_world_is(key):
    [claim] = [claim for claim in CURVES if claim.key == key]
    for changes, expected in zip(WORLDS[key], (SUPPORTED, CONTRADICTED), strict=True):
        [judgement] = judge([claim], world(**changes), LAB, ("vit", "resnet"))
        assert judgement.verdict == expected


def test_where_all_curves_are_flat_nothing_is_decided():
    judgements = {j.claim.key: j for j in judge(CURVES, world(), LAB, ("vit", "resnet"))}
    assert judgements.pop("E10-patches-end").verdict == CONTRADICTED  # the cosine is 0.5
    # Medians are equal to the last bit here, so that there is no noise to decide by.
    assert judgements.pop("E08-above-resnet").trained.value == 0
    assert {j.verdict for j in judgements.values()} == {INCONCLUSIVE}


def test_curves_of_networks_that_were_not_measured_are_unknown():
    for cast in ({"vit": "vit", "resnet": ""}, {"vit": "mixer"}):
        assert str(of_curves(skips.crossing)(world(), cast)) == "–"


# Without the skips of a block ---------------------------------------------------------------------


def squares(intact, without, blocks=8, groups=10):
    """CKA of two networks, each (blocks, blocks), with a little noise between groups."""
    stream = np.random.default_rng(0)
    whole = np.full((2 * blocks, 2 * blocks), 0.3)
    whole[:blocks, :blocks], whole[blocks:, blocks:] = intact, without
    np.fill_diagonal(whole, 1)
    noise = stream.normal(0, 0.002, (groups, *whole.shape))
    roles = np.repeat(["vit", skips.CUT], blocks)
    layers = [f"blocks.{k}" for k in range(blocks)] * 2
    taps = [f"{role}/{layer}" for role, layer in zip(roles, layers, strict=True)]
    return xr.Dataset(
        {"hsic": (("group", "tap", "other"), whole + noise + noise.swapaxes(1, 2))},
        coords={
            "tap": taps,
            "other": taps,
            "role": ("tap", roles),
            "layer": ("tap", layers),
            "block": ("tap", np.ones(2 * blocks, dtype=bool)),
        },
    )


def parts(cut, blocks=8):
    """A map that falls into two squares at a cut."""
    late = np.arange(blocks) >= cut
    return np.where(late[:, None] == late[None], 0.8, 0.2)


class Study:
    """A ViT, and one without the skips of a block that is as accurate as given."""

    classes = range(16)

    def __init__(self, cut=4, accuracy=(0.5, (0.45, 0.55))):
        value, interval = accuracy
        self.cut, self.cards = cut, {"vit": {"accuracy": 0.7, "accuracy_interval": [0.65, 0.75]}}
        self.cards[skips.CUT] = {"accuracy": value, "accuracy_interval": list(interval)}

    def role(self, name):
        trained = not name.endswith("_untrained")
        return types.SimpleNamespace(name=name, cut=self.cut, trained=trained)

    def find(self, arm, replicate=0, trained=True):
        return self.role(arm if trained else f"{arm}_untrained") if not replicate else None


def judged(record, study=None):
    study = study or Study()
    return judge(WITHOUT_SKIPS, (record, study), study, ("vit", skips.CUT))


def test_across_is_the_mean_of_layers_before_a_cut_with_those_from_it_on():
    square = np.arange(16.0).reshape(4, 4)
    assert across(square, 1) == np.mean([1, 2, 3])
    assert across(square, 2) == np.mean([2, 3, 6, 7])


def test_the_partition_comes_out_as_the_world_is():
    alike = np.full((8, 8), 0.8)
    partition, _ = judged(squares(alike, parts(4)))
    assert partition.trained.value == pytest.approx(0.6, abs=0.01)
    assert partition.verdict == SUPPORTED
    assert judged(squares(parts(4), alike))[0].verdict == CONTRADICTED
    assert judged(squares(alike, alike))[0].verdict == CONTRADICTED  # 0.1 is more than nothing


@pytest.mark.parametrize("cut", [2, 6])
def test_the_partition_is_looked_for_at_the_cut_that_the_study_names(cut):
    record = squares(np.full((8, 8), 0.8), parts(cut))
    partition, _ = judged(record, Study(cut))
    assert partition.trained.value == pytest.approx(0.6, abs=0.01)
    elsewhere, _ = judged(record, Study(4))
    assert elsewhere.trained.value < 0.5
    assert networks.cut("vit_no_skip_middle") == LAB.role("vit_no_skip_middle").cut == 4


def test_what_is_lost_has_newcombes_interval():
    record = squares(parts(4), parts(4))
    _, lost = judged(record)
    assert lost.trained.value == pytest.approx(0.2)
    assert lost.trained.high - 0.2 == pytest.approx(np.hypot(0.05, 0.05))
    assert lost.verdict == SUPPORTED
    assert judged(record, Study(accuracy=(0.9, (0.85, 0.95))))[1].verdict == CONTRADICTED
    assert judged(record, Study(accuracy=(0.7, (0.65, 0.75))))[1].verdict == INCONCLUSIVE
    untrained = {"vit": "vit_untrained", skips.CUT: f"{skips.CUT}_untrained"}
    assert str(skips.accuracy_lost((record, Study()), untrained)) == "–"


def test_a_network_that_did_not_learn_tells_nothing_of_its_skips():
    record = squares(np.full((8, 8), 0.8), parts(4))
    for accuracy, learned in (((0.06, (0.05, 0.12)), False), ((0.1, (0.08, 0.13)), True)):
        study = Study(accuracy=accuracy)
        assert skips.learned(study, skips.CUT) == learned
        for judgement in judged(record, study):
            assert (judgement.verdict == UNMEASURABLE) == (not learned)
            if not learned:
                assert judgement.why == "without these skips the network did not learn"
