"""Claims about heads and fields come out as the world is, and are not true of noise."""

import itertools
import types

import numpy as np
import pytest
import xarray as xr

from lib.findings import locality
from lib.findings.claims import CONTRADICTED, INCONCLUSIVE, SUPPORTED, UNMEASURABLE, judge
from lib.findings.locality import FIELDS, HEADS, along, half, judge_heads, less_data
from lib.intervals import jackknife
from lib.measurements.attention import SUMS
from lib.measurements.heads import subset_cka
from lib.measurements.receptive_field import dominance, measure_receptive_fields, radius
from lib.studies import load_study

UNIFORM, PATCH, HEADS_OF_A_BLOCK = 16.0, 4, 6
CLAIMS = {claim.key: claim for claim in HEADS + FIELDS}


class Study:
    """Whose roles are the arms, from two seeds, and their baselines."""

    def find(self, arm, replicate=0, trained=True):
        name = f"{arm}_seed_{replicate}" if replicate else arm
        return types.SimpleNamespace(name=name if trained else f"{name}_untrained")


def heads_record(
    relative, similar=lambda role, head, unit: 0.5 + 0.01 * head, noise=1e-3, groups=10, seed=0
):
    """Heads of known distances, of 8 blocks by role: ``relative`` {role: (blocks, heads)}.

    The first block's heads have the CKA ``similar`` with every unit of the ResNet, and 0.5 with
    each other.
    """
    stream = np.random.default_rng(seed)
    sizes = stream.integers(20, 40, groups)
    sums, taps, roles = [], [], []
    for role, blocks in relative.items():
        for block, heads in enumerate(blocks):
            jitter = noise * stream.normal(size=(groups, len(heads)))
            distance = (np.array(heads) + jitter) * UNIFORM / PATCH
            of = {name: np.ones_like(distance) for name in SUMS} | {"distance": distance}
            sums.append(sizes[:, None, None] * np.stack([of[name] for name in SUMS], 1))
            taps.append(f"{role}/blocks.{block}.attn.attn_drop")
            roles.append(role)
    parts = [f"{role}/blocks.0.attn.proj:input/{h}" for role in relative for h in range(6)]
    parts += [f"{role}/stages.0.blocks.{u}" for role in ("resnet", "resnet_seed_1") for u in (0, 1)]
    square = np.full((len(parts), len(parts)), 0.5)
    for (i, one), (j, other) in itertools.product(enumerate(parts), repeat=2):
        if one.startswith("vit") and other.startswith("resnet"):
            cell = similar(one.split("/")[0], int(one[-1]), int(other[-1]))
            square[i, j] = square[j, i] = cell
    np.fill_diagonal(square, 1)
    jitter = noise * stream.normal(size=(groups, *square.shape))
    return xr.Dataset(
        {
            "head_sums": (("group", "tap", "head_sum", "head"), np.stack(sums, 1)),
            "head_hsic": (
                ("group", "part", "other_part"),
                sizes[:, None, None] * (square + jitter + jitter.swapaxes(1, 2)),
            ),
            "distance": (("tap", "head"), UNIFORM * np.concatenate(list(relative.values()))),
            "relative": (("tap", "head"), np.concatenate(list(relative.values()))),
            "uniform": ("tap", [UNIFORM] * len(taps)),
            "patch_size": ("tap", [float(PATCH)] * len(taps)),
        },
        coords={"tap": taps, "role": ("tap", roles), "part": parts, "head_sum": list(SUMS)},
    )


def blocks(first=1.0, last=1.0, low=0.01):
    """Relative distances of 8 blocks of 6 heads; the nearest head of the first is ``low`` less."""
    found = np.ones((8, HEADS_OF_A_BLOCK))
    found[:2], found[-2:] = first, last
    found[0] += np.linspace(-low, 0, HEADS_OF_A_BLOCK)
    return found


def judged(record, key, others=("resnet", "resnet_seed_1")):
    roles = {*record["role"].values.tolist(), *others}
    return {one.claim.key: one for one in judge_heads(record, Study(), roles)}[key]


ORDERED = {"vit": blocks(low=0.8), "vit_seed_1": blocks(low=0.7)}
WORLDS = {
    "E03-local": (
        {"relative": {"vit": blocks(low=0.7), "vit_seed_1": blocks(low=0.6)}},
        {"relative": {"vit": blocks(low=0.1), "vit_seed_1": blocks(low=0.2)}},
    ),
    "E03-spread": (
        {"relative": {"vit": blocks(low=0.1), "vit_seed_1": blocks(first=1.2)}},
        {"relative": {"vit": blocks(low=0.01), "vit_seed_1": blocks(first=1.02)}},
    ),
    "E03-global": (
        {"relative": {"vit": blocks(last=0.9), "vit_seed_1": blocks(last=1.1, low=0.9)}},
        {"relative": {"vit": blocks(last=0.7), "vit_seed_1": blocks(last=0.5)}},
    ),
    "E04-data": (
        {"relative": {"vit": blocks(low=0.5), "vit_data_03": blocks(low=0.2)}},
        {"relative": {"vit": blocks(low=0.2), "vit_data_03": blocks(low=0.5)}},
    ),
    "E05-slope": (
        {"relative": ORDERED, "similar": lambda role, head, unit: 0.7 - 0.1 * head},
        {"relative": ORDERED, "similar": lambda role, head, unit: 0.2 + 0.1 * head * unit},
    ),
}


@pytest.mark.parametrize("key", WORLDS)
def test_a_claim_about_heads_comes_out_as_the_world_is(key):
    for expected, world in zip((SUPPORTED, CONTRADICTED), WORLDS[key], strict=True):
        found = judged(heads_record(**world), key)
        assert found.verdict == expected
        assert len(found.replicates) == (1 if key == "E04-data" else 2), "no network twice"
        assert found.trained.low <= found.trained.value <= found.trained.high


NOISE = {"E03-local": (0.5, 2.0), "E03-spread": (1.05, 1.0), "E03-global": (0.8, 2.0)}
NOISE |= {"E04-data": (0.5, 2.0), "E05-slope": (0.5, 2.0)}


@pytest.mark.parametrize("key", WORLDS)
def test_a_claim_about_heads_is_not_true_of_noise(key):
    claim = CLAIMS[key]
    # One head is at the threshold, and all others are where they do not matter.
    odd, others = NOISE[key]
    relative = np.full((8, HEADS_OF_A_BLOCK), others)
    relative[:, 0] = odd
    roles = {"vit": relative, "vit_seed_1": relative, "vit_data_03": relative}
    found = judge([claim], heads_record(roles, noise=0.3, seed=4), Study(), [*roles, "resnet"])
    assert found[0].verdict == INCONCLUSIVE


def test_heads_at_one_distance_are_not_put_in_order():
    world = {"vit": blocks(low=0.2), "vit_seed_1": blocks(low=0.2)}
    found = judged(heads_record(world, lambda role, head, unit: 0.7 - 0.1 * head), "E05-slope")
    assert found.verdict == UNMEASURABLE
    assert "a factor of 1.25 only; it takes 2" in found.why
    assert found.trained.value == pytest.approx(-1), "and the number stands all the same"


def test_a_missing_network_is_named():
    record = heads_record({"vit": blocks()})
    for key, arm in {"E04-data": "vit_data_03", "E05-slope": "resnet"}.items():
        found = judged(record, key, [])
        assert found.verdict == UNMEASURABLE
        assert found.why == f"not measured here: no network {arm}"


def test_less_data_is_compared_with_all_of_it_in_the_two_lowest_blocks():
    world = {"vit": blocks(low=0.3), "vit_data_10": blocks(first=0.9, low=0.1, last=0.1)}
    record = heads_record(world, noise=0)
    claim = less_data("vit_data_10", "10 %")
    (found,) = judge([claim], record, Study(), list(world))
    assert found.trained.value == pytest.approx(0.8 - 0.7)
    assert "with 10 % of the images" in claim.meaning


def test_statistics_of_heads():
    heads = {"relative": np.array([[0.9, 1.3, np.nan]]), "distance": np.array([[2.0, 5.0, np.nan]])}
    assert locality.most_local(heads) == 0.9
    assert locality.departure(heads) == pytest.approx(0.3)
    assert locality.spread(heads) == 2.5


def test_rank_correlation_is_that_of_the_least_obedient_layer():
    distance = [1.0, 2.0, 3.0, 10.0]
    falling = np.array([0.9, 0.5, 0.45, 0.1])
    assert locality.rank_correlation(distance, falling[:, None]) == pytest.approx(-1)
    mixed = np.array([0.9, 0.5, 0.6, 0.1])  # one neighbouring pair exchanged: 1 - 6 * 2 / 60
    both = np.stack([falling, mixed], 1)
    assert locality.rank_correlation(distance, both) == pytest.approx(-0.8)


def test_pairs_of_heads_go_from_local_to_global():
    relative = blocks()
    relative[0] = [0.9, 0.3, 0.5, 0.1, 0.7, np.nan]  # other networks may have more heads
    record = heads_record({"vit": relative})
    distance, sets = locality.pairs(record, "vit")
    assert sets == [[3, 1], [1, 2], [2, 4], [4, 0]]
    assert distance == pytest.approx(UNIFORM * np.array([0.2, 0.4, 0.6, 0.8]))
    hsic = record["head_hsic"].values.sum(0)
    units = locality.parts(record, "resnet")
    found = locality.head_cka(record, sets, "resnet")
    assert np.array_equal(found, subset_cka(hsic, sets, units))
    assert found.shape == (4, 2)


def test_a_number_of_what_was_not_measured_is_unknown():
    record = heads_record({"vit": blocks(low=0.4)})
    assert locality.number(record, "vit", lambda p: p["relative"].min(), slice(1)) == pytest.approx(
        0.6
    )
    assert np.isnan(locality.number(record, "vit_gap", lambda part: part["relative"].min()))


# Fields -------------------------------------------------------------------------------------------

SIDE, CELL = 32, 4
UNITS = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"]
TAPS = {
    "vit": [f"blocks.{block}{end}" for block in range(4) for end in (".attn", ".mlp", "")],
    "resnet": UNITS,
}


def field(width, lead):
    """A round field of a width, with a share ``lead`` more in its own patch, or beside it."""
    y, x = (np.arange(SIDE) - 17.5 for _ in range(2))
    round_one = np.exp(-np.hypot(y[:, None], x) / width)
    square = np.zeros((SIDE, SIDE))
    start = 16 if lead > 0 else 20
    square[16:20, start : start + 4] = 1 / 16
    return round_one / round_one.sum() + abs(lead) * square


def fields_record(width, lead, noise=1e-3, groups=16, seed=0):
    """Fields whose width and lead are functions of the family and the tap's layer and depth."""
    stream = np.random.default_rng(seed)
    taps, values = [], []
    for family, seed_of in itertools.product(TAPS, ("", "_seed_1")):
        for place, layer in enumerate(TAPS[family]):
            depth = (place // (3 if family == "vit" else 1) + 1) / 4
            one = field(width(family, depth), lead(layer, depth))
            jitter = noise * one.mean() * stream.normal(size=(groups, SIDE, SIDE))
            values.append(one + jitter)
            taps.append((f"{family}{seed_of}", layer))
    names = [f"{role}/{layer}" for role, layer in taps]
    return xr.Dataset(
        {
            "field": (("group", "tap", "y", "x"), np.stack(values, 1)),
            "centre": ("tap", [17.5] * len(names)),
            "cell": ("tap", [CELL] * len(names)),
        },
        coords={"tap": names, "role": ("tap", [role for role, _ in taps])},
    )


def even(family, depth):
    return 5


def own(layer, depth):
    return 0.5


FIELD_WORLDS = {
    "E06-wide": (
        (lambda family, depth: 6 if family == "vit" else 1 + 3 * depth, own),
        (lambda family, depth: 3 if family == "vit" and depth == 0.5 else 5, own),
    ),
    "E06-centre": ((even, own), (even, lambda layer, depth: 0.5 - 0.8 * (depth == 0.75))),
    "E07-attention": (
        (even, lambda layer, depth: -0.2 if "attn" in layer and depth > 0.5 else 0.5),
        (even, lambda layer, depth: 0.2 if "attn" in layer and depth > 0.5 else -0.5),
    ),
    "E07-mlp": (
        (even, lambda layer, depth: 0.2 if "mlp" in layer and depth > 0.5 else -0.5),
        (even, lambda layer, depth: -0.2 if "mlp" in layer and depth > 0.5 else 0.5),
    ),
}
ROLES = ["vit", "vit_seed_1", "resnet", "resnet_seed_1"]


def test_every_claim_has_its_worlds():
    assert {*WORLDS, *FIELD_WORLDS} == set(CLAIMS)


@pytest.mark.parametrize("key", FIELD_WORLDS)
def test_a_claim_about_fields_comes_out_as_the_world_is(key):
    for expected, world in zip((SUPPORTED, CONTRADICTED), FIELD_WORLDS[key], strict=True):
        (found,) = judge([CLAIMS[key]], fields_record(*world), Study(), ROLES)
        assert found.verdict == expected
        assert len(found.replicates) == 2
        assert found.trained.low < found.trained.value < found.trained.high


@pytest.mark.parametrize("key", FIELD_WORLDS)
def test_a_claim_about_fields_is_not_true_of_noise(key):
    record = fields_record(even, lambda layer, depth: 0, noise=20, seed=1)
    (found,) = judge([CLAIMS[key]], record, Study(), ROLES)
    # The strongest of many patches that differ by noise alone is stronger than one given patch.
    assert found.verdict != (CONTRADICTED if key == "E07-attention" else SUPPORTED)


def test_scores_along_a_network_are_those_of_its_fields_with_a_jackknife():
    record = fields_record(lambda family, depth: 2 + depth, own, noise=0.3)
    names = [f"vit/blocks.{block}" for block in range(4)]
    assert locality.layers(record, "vit") == names
    assert locality.layers(record, "vit", ".attn") == [f"{name}.attn" for name in names]
    assert locality.layers(record, "resnet") == [f"resnet/{unit}" for unit in UNITS]
    found = along(record, "vit", half)
    values = record["field"].sel(tap=names).values
    expected = jackknife(values, lambda sums: np.array([radius(one, 17.5, 0.5) for one in sums]))
    assert found.value == pytest.approx(expected.value)
    assert found.low == pytest.approx(expected.low)
    leads = along(record, "vit", dominance, ".attn").value
    assert locality.upper_half(record, "vit", ".attn").value == pytest.approx(leads[2:].mean())
    assert along(record, "mixer", half).value.size == 0, "of a network that is not there"


def test_own_networks_have_the_channels_seed_and_precision_of_the_study_s(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    study, role = load_study("lab"), "resnet_untrained"
    tap = "stages.0.blocks.1"
    again = {"again": (role, study.model(role))}
    taps = {role: [tap], "again": [tap]}
    one = measure_receptive_fields(study, taps, 2, channels=1, seed=3, own=again)
    assert np.array_equal(one["field"][:, 0], one["field"][:, 1])
    assert one["role"].values.tolist() == [role, "again"]
    for other in ({"channels": 2, "seed": 3}, {"channels": 1, "seed": 4}):
        two = measure_receptive_fields(study, taps, 2, own=again, **other)
        assert np.array_equal(two["field"][:, 0], two["field"][:, 1])
        assert not np.array_equal(two["field"][:, 1], one["field"][:, 1])
