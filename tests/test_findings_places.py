"""Claims about places come out as the world is, and are not true of noise."""

import types

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import r2_score

from lib.findings import places
from lib.findings.claims import CONTRADICTED, INCONCLUSIVE, SUPPORTED, UNMEASURABLE, judge
from lib.findings.places import MAPS, PROBES
from lib.intervals import mean_of
from lib.measurements.localisation import contrast, estimate
from lib.measurements.probes import ARRANGEMENTS, READOUTS
from lib.studies import load_study

SIDE = 4
TOKENS, BLOCKS, IMAGES = SIDE**2, 3, 400
ARMS = ("vit", "vit_gap", "resnet")
ROLES = [arm + again for arm in ARMS for again in ("", "_seed_1")]
INSIDE = np.pad(np.ones((SIDE - 2, SIDE - 2), bool), 1).ravel()
CLAIMS = {claim.key: claim for claim in MAPS + PROBES}


class Study:
    """Whose roles are the arms, from two seeds, and their baselines."""

    def find(self, arm, replicate=0, trained=True):
        name = f"{arm}_seed_{replicate}" if replicate else arm
        return types.SimpleNamespace(name=name if trained else f"{name}_untrained")


def labels_of_taps():
    taps = [(role, block) for role in ROLES for block in range(BLOCKS)]
    return {
        "tap": [f"{role}/blocks.{block}" for role, block in taps],
        "role": ("tap", [role for role, _ in taps]),
    }


def peaks(own=0.5, other=0.2):
    """A map: CKA with the own patch and with all others."""
    return np.where(np.eye(TOKENS, dtype=bool), own, other)


def maps_record(cka, noise=1e-3, groups=10, seed=0):
    """Maps (tokens, patches) that are a function of the arm and the block."""
    stream = np.random.default_rng(seed)
    sizes = stream.integers(20, 40, groups).astype(float)
    maps = np.stack([cka(role.split("_seed")[0], b) for role in ROLES for b in range(BLOCKS)])
    jitter = noise * stream.normal(size=(groups, *maps.shape))
    of_group = sizes[:, None, None]
    return xr.Dataset(
        {
            "localisation": (("tap", "cell", "patch"), maps),
            "cross_hsic": (
                ("group", "tap", "cell", "patch"),
                of_group[..., None] * (maps + jitter),
            ),
            "token_hsic": (("group", "tap", "cell"), of_group * np.ones(maps.shape[:2])),
            "patch_hsic": (("group", "cell", "patch"), of_group * np.eye(TOKENS)),
        },
        coords=labels_of_taps(),
    )


def probes_record(accuracy, draws=3, seed=0):
    """Probes that are right as often as a function of the arm and the read-out says."""
    stream = np.random.default_rng(seed)
    shape = (len(ROLES), BLOCKS, draws)
    luck = stream.random((*shape[2:], IMAGES)), stream.random((len(ROLES), draws, IMAGES))
    right = np.full((*shape, len(READOUTS), IMAGES), np.nan)
    token = np.full((*shape, IMAGES), np.nan)
    for place, role in enumerate(ROLES):
        # Images are hard for all networks alike, up to a little luck.
        hard = 0.8 * luck[0] + 0.2 * luck[1][place]
        rank = hard.argsort(-1).argsort(-1) / IMAGES
        for k, readout in enumerate(READOUTS):
            right[place, ..., k, :] = rank < accuracy(role.split("_seed")[0], readout)
        token[place] = rank < accuracy(role.split("_seed")[0], "one token")
    axes, taps = ("draw", "readout", "image"), len(ROLES) * BLOCKS
    return xr.Dataset(
        {
            "right": (("tap", *axes), right.reshape(taps, *right.shape[2:])),
            "token_right": (("tap", "draw", "image"), token.reshape(taps, *token.shape[2:])),
            "token_accuracy": (("tap", "draw", "probe_cell"), np.ones((taps, draws, TOKENS))),
        },
        coords=labels_of_taps() | {"readout": list(READOUTS)},
    )


def near_edge(inner, outer):
    """Tokens like their own patch, and like others by where those lie."""
    return np.where(np.eye(TOKENS, dtype=bool), 0.5, np.where(INSIDE, inner, outer))


def interior_misses(share):
    """The share of interior tokens that are most like another patch."""
    found = peaks()
    inside = np.flatnonzero(INSIDE)
    found[inside[: round(share * len(inside))], 0] = 0.9
    return found


def of_arm(**maps):
    return lambda arm, block: maps.get(arm, peaks())


def losing(*contrasts):
    return lambda arm, block: peaks(0.2 + contrasts[block])


def read(default=0.5, **accuracies):
    """Accuracies by arm and read-out: ``vit_class`` and so on."""
    ways = {"class token": "class", "mean of patches": "mean", "first patch": "first"}
    return lambda arm, readout: accuracies.get(f"{arm}_{ways.get(readout, 'one')}", default)


MAP_WORLDS = {
    "E12-own-patch": (of_arm(vit=interior_misses(0.25)), of_arm(vit=interior_misses(0.75))),
    "E12-edges": (of_arm(vit=near_edge(0.1, 0.3)), of_arm(vit=near_edge(0.3, 0.1))),
    "E12-sharper": (of_arm(resnet=peaks(0.1, 0.2)), of_arm(vit=peaks(0.1, 0.2))),
    "E13-pooling": (of_arm(vit=peaks(0.6)), of_arm(vit_gap=peaks(0.6))),
    "X9-last-block": (losing(0.6, 0.5, 0.1), losing(0.6, 0.2, 0.1)),
}
PROBE_WORLDS = {
    "E14-gap": (read(vit_gap_one=0.8), read(vit_one=0.8)),
    "E14-resnet": (read(resnet_one=0.8), read(vit_one=0.8)),
    "E15-tie": (read(vit_class=0.51), read(vit_class=0.3)),
    "E15-plateau": (read(vit_class=0.7), read(vit_mean=0.7)),
    "E15-first": (read(vit_gap_first=0.49), read(vit_gap_first=0.3)),
}
WORLDS = {key: (maps_record, pair) for key, pair in MAP_WORLDS.items()}
WORLDS |= {key: (probes_record, pair) for key, pair in PROBE_WORLDS.items()}


def judged(key, record, roles=ROLES):
    (found,) = judge([CLAIMS[key]], record, Study(), roles)
    return found


def test_every_claim_has_its_worlds():
    assert set(WORLDS) == set(CLAIMS)


@pytest.mark.parametrize("key", WORLDS)
def test_a_claim_comes_out_as_the_world_is(key):
    make, pair = WORLDS[key]
    for expected, world in zip((SUPPORTED, CONTRADICTED), pair, strict=True):
        found = judged(key, make(world))
        assert found.verdict == expected
        assert len(found.replicates) == 2
        assert found.trained.low <= found.trained.value <= found.trained.high


@pytest.mark.parametrize("key", MAP_WORLDS)
def test_a_claim_about_maps_is_not_true_of_noise(key):
    record = maps_record(lambda arm, block: np.full((TOKENS, TOKENS), 0.5), noise=0.3, seed=2)
    assert judged(key, record).verdict == INCONCLUSIVE


@pytest.mark.parametrize("key", PROBE_WORLDS)
def test_a_claim_about_probes_is_not_true_of_guesses_at_its_threshold(key):
    # Of differences that must exceed 0.05, or stay below it, equal ones are no question.
    at = {
        "E14-gap": read(vit_gap_one=0.55),
        "E14-resnet": read(resnet_one=0.55),
        "E15-tie": read(vit_class=0.55),
        "E15-plateau": read(),
        "E15-first": read(vit_gap_first=0.45),
    }[key]
    assert judged(key, probes_record(at, seed=1)).verdict == INCONCLUSIVE


def test_no_network_is_compared_with_itself():
    one_gap = [role for role in ROLES if role != "vit_gap_seed_1"]
    assert len(judged("E13-pooling", maps_record(of_arm()), one_gap).replicates) == 1
    assert len(judged("E12-sharper", maps_record(of_arm()), one_gap).replicates) == 2


def test_claims_about_probes_need_labels():
    found = judge(MAPS + PROBES, maps_record(of_arm()), Study(), ROLES)
    by_key = {one.claim.key: one for one in found}
    assert set(by_key) == set(CLAIMS)
    for claim in PROBES:
        assert by_key[claim.key].verdict == UNMEASURABLE
        assert by_key[claim.key].why == "needs labels"
    assert by_key["E13-pooling"].verdict != UNMEASURABLE


def test_shares_of_hits_are_told_apart_by_their_bounds():
    record = maps_record(of_arm(vit=interior_misses(0.25), resnet=interior_misses(1.0)))
    vit, resnet = (places.hits(record, role) for role in ("vit", "resnet"))
    assert (vit.value, resnet.value) == (15 / 16, 12 / 16)
    assert places.hits(record, "vit", interior=True).value == 0.75
    found = judged("E12-sharper", record).trained
    assert found.value == pytest.approx(3 / 16)
    assert found.low == pytest.approx(vit.low - resnet.high)
    assert found.high == pytest.approx(vit.high - resnet.low)


def test_contrast_is_compared_in_the_last_block_of_both():
    def cka(arm, block):
        return peaks(0.2 + (0.1 * block if arm == "vit" else 0.4))

    record = maps_record(cka, noise=0)
    assert places.ahead(record, "vit", "resnet").value == pytest.approx(0.2 - 0.4)
    assert np.isnan(places.ahead(record, "vit", "mixer").value), "which is not there"
    one = estimate(places.last(record, "vit"), lambda maps: contrast(maps)[0])
    assert one.value == pytest.approx(0.2)


def test_a_size_cannot_be_negative():
    for vit, expected in ((0.6, 0.1), (0.4, 0.1), (0.505, 0.005)):
        found = judged("E15-tie", probes_record(read(vit_class=vit))).trained
        assert found.value == pytest.approx(expected, abs=0.003)
        assert 0 <= found.low <= found.value <= found.high
    assert found.low == 0


def test_read_outs_are_taken_where_they_were_measured():
    record = probes_record(read(vit_class=0.7, vit_one=0.3, resnet_one=0.9))
    record["right"][BLOCKS - 1, :, 0] = 0  # the last block's class token is never read rightly
    record["token_accuracy"][0] = np.nan  # and the first block was not probed
    assert places.probed(record, "vit").sizes["tap"] == BLOCKS - 1
    assert places.accuracy(record, "vit", "class token").value == 0
    assert places.accuracy(record, "vit", "class token", 0).value == pytest.approx(0.7, abs=0.003)
    assert places.accuracy(record, "vit", "one token") == mean_of(
        record["token_right"].sel(tap="vit/blocks.2")
    )
    assert np.isnan(places.accuracy(record, "mixer", "one token").value)
    assert np.isnan(places.accuracy(maps_record(of_arm()), "vit", "one token").value)


def test_the_object_is_missed_by_the_distance_of_the_centres():
    record = probes_record(read())
    true = np.random.default_rng(0).normal(size=(IMAGES, 2))
    found = np.stack([true + np.array([3, 4]), true])  # by arrangement
    record["centre"] = (("tap", "arrangement", "image", "axis"), np.tile(found, (18, 1, 1, 1)))
    record["true_centre"] = (("image", "axis"), true)
    record = record.assign_coords(arrangement=list(ARRANGEMENTS))
    assert places.errors(record, "vit", ARRANGEMENTS[0]) == pytest.approx(np.full((3, IMAGES), 5))
    assert (places.errors(record, "vit", ARRANGEMENTS[1]) == 0).all()
    assert len(places.errors(maps_record(of_arm()), "vit", ARRANGEMENTS[0])) == 0


def test_r_squared_is_scikit_learns():
    stream = np.random.default_rng(0)
    true = stream.normal(size=(50, 2)) * [1, 5]
    found = true + stream.normal(size=(50, 2))
    expected = r2_score(true, found, multioutput="variance_weighted")
    assert places.r_squared(found, true) == pytest.approx(expected)
    assert places.pixel_error([[3, 4]], [[0, 0]]).tolist() == [5]


def test_the_grid_is_one_that_tokens_locations_and_pixels_share():
    study = load_study("lab")
    assert places.shared_grid(study, ["vit_untrained", "resnet_untrained"], 8) == 8
    assert places.shared_grid(study, ["vit_untrained"], 5) == 4
