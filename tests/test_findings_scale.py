"""Claims on scale come out as the world is, whichever way that is, and noise decides nothing."""

import numpy as np
import pytest
import xarray as xr

from lib.findings import scale
from lib.findings.claims import (
    ALREADY_TRUE,
    CONTRADICTED,
    INCONCLUSIVE,
    SUPPORTED,
    UNMEASURABLE,
    judge,
)
from lib.intervals import mean_of
from lib.studies import load_study

LAB = load_study("lab")
CLAIMS = {claim.key: claim for claim in [*scale.DATA, *scale.PROBES, *scale.TUNED]}
DEPTH = 6  # of the networks below
FEWER = {"": "vit_data_10", "-03": "vit_data_03"}

# Set before anything was measured. Whoever changes one says why in the chapter, and keeps the old
# verdict visible there.
FROZEN = {
    "E16-late": (">", 0.0),
    "E16-early": ("<", 0.1),
    "E16-late-03": (">", 0.0),
    "E16-early-03": ("<", 0.1),
    "E17-middle": (">", 0.0),
    "E17-middle-03": (">", 0.0),
    "E18-middle": (">", 0.0),
    "E19-early": ("<", 0.05),
    "E19-distant": (">", 0.0),
}


class Study:
    """Arms with any number of replicates, named as in the lab where there is one of them."""

    def __init__(self, **replicates):
        self.replicates = replicates

    def find(self, arm, replicate=0, trained=True):
        if replicate >= self.replicates.get(arm, 0):
            return None
        return LAB.find(arm, 0, trained) if not replicate else Named(f"{arm}_{replicate}")


class Named:
    def __init__(self, name):
        self.name = name


def labels(roles):
    """Taps of the blocks of some roles, and what a record says of them."""
    layers = [f"blocks.{k}" for k in range(DEPTH)]
    return {
        "tap": [f"{role}/{layer}" for role in roles for layer in layers],
        "role": ("tap", np.repeat(roles, DEPTH)),
        "layer": ("tap", layers * len(roles)),
        "block": ("tap", np.ones(len(roles) * DEPTH, dtype=bool)),
    }


def maps_of(cells, roles, noise=0.002, seed=0):
    """A record in which equal blocks, at relative depth x, have CKA ``cells(role, role, x)``.

    Other pairs have 0.5. Groups of minibatches differ by a little noise, so that there is an
    interval.
    """
    square = np.full((len(roles) * DEPTH,) * 2, 0.5)
    for k, x in enumerate(np.linspace(0, 1, DEPTH)):
        square[k::DEPTH, k::DEPTH] = [[cells(a, b, x) for b in roles] for a in roles]
    np.fill_diagonal(square, 1)
    stream = np.random.default_rng(seed)
    sizes = np.exp(stream.normal(0, 0.5, len(square)))  # layers are of any size
    sums = []
    for size in stream.integers(50, 100, 10):
        jitter = stream.normal(0, noise, square.shape)
        sums.append(size * (square + jitter + jitter.T) * np.outer(sizes, sizes) * 7)
    known = labels(roles)
    return xr.Dataset(
        {"hsic": (("group", "tap", "other"), np.array(sums))}, known | {"other": known["tap"]}
    )


def probes_of(accuracies, images=400, draws=3, seed=0):
    """A record of probes that are right with the probability ``accuracies[role](x)``."""
    stream = np.random.default_rng(seed)
    x = np.linspace(0, 1, DEPTH)
    share = np.concatenate([np.broadcast_to(of(x), DEPTH) for of in accuracies.values()])
    right = stream.random((len(share), draws, 2, images)) < share[:, None, None, None]
    coords = labels(list(accuracies)) | {"readout": ["class token", "mean of patches"]}
    return xr.Dataset({"right": (("tap", "draw", "readout", "image"), right.astype(float))}, coords)


def one(key, record, study=LAB):
    roles = set(record["role"].values.tolist())
    return judge([CLAIMS[key]], record, study, roles)[0]


def between(role, value):
    """CKA of a role with any other is ``value(x)``, and all others are alike."""
    return lambda a, b, x: value(x) if (a == role) != (b == role) else 0.99


# What is claimed ----------------------------------------------------------------------------------


def test_thresholds_are_as_they_were_set():
    sides = {key: ("<" if c.below else ">", c.threshold) for key, c in CLAIMS.items()}
    assert sides == FROZEN


def test_claims_speak_of_networks_of_the_lab():
    for claim in CLAIMS.values():
        for arm in claim.arms:
            assert LAB.find(arm.partition("+")[0]), (claim.key, arm)


# Statistics whose answer is known -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "parts"), [(8, (3, 2, 3)), (6, (2, 2, 2)), (16, (5, 6, 5)), (3, (1, 1, 1))]
)
def test_thirds_are_the_first_the_middle_and_the_last(depth, parts):
    curve = np.arange(2 * depth).reshape(depth, 2)
    found = scale.thirds(curve)
    assert tuple(map(len, found)) == parts
    assert np.array_equal(np.concatenate(found), curve)


def test_loss_is_against_the_ceiling_and_drift_against_oneself_before():
    maps = {
        ("vit", "vit+1"): np.array([[0.9, 0.1], [0.2, 0.7]]),
        ("less", "vit+1"): np.array([[0.6, 0.8], [0.8, 0.75]]),
        ("vit", "tuned"): np.array([[0.98, 0.3], [0.3, 0.4]]),
    }
    np.testing.assert_allclose(scale.loss(maps, "less"), [0.3, -0.05])
    np.testing.assert_allclose(scale.drift(maps, "tuned"), [0.02, 0.6])


def test_losses_and_drifts_of_a_record_are_those_of_its_maps():
    def cells(a, b, x):
        known = {("vit", "vit_other_seed"): 0.9, ("vit_data_10", "vit_other_seed"): 0.8 - 0.3 * x}
        return known.get(tuple(sorted((a, b))), 0.5)

    record = maps_of(cells, ["vit", "vit_other_seed", "vit_data_10"], noise=1e-5)
    early, late = one("E16-early", record), one("E16-late", record)
    assert early.trained.value == pytest.approx(0.1 + 0.3 * 0.1, abs=1e-3)  # mean of x: 0, 0.2
    assert late.trained.value == pytest.approx(0.3 * (0.9 - 0.1), abs=1e-3)
    cast = {"less": "vit_data_10", "vit": "vit", "vit+1": "vit_other_seed"}
    assert scale.mean_loss(2, "less")(record, cast).value == pytest.approx(0.37, abs=1e-3)
    assert np.isnan(scale.mean_loss(2, "less")(record, cast | {"less": ""}).value)


def test_probes_are_compared_over_the_middle_third():
    record = probes_of({"vit": lambda x: 0.3 + 0.5 * x, "resnet": lambda x: 0.6 - 0.2 * x})
    vit, resnet = (record["right"].values[k : k + DEPTH, :, 1] for k in (0, DEPTH))
    assert np.array_equal(scale.right(record, "resnet"), resnet)
    assert np.array_equal(scale.middle(record, "vit"), (vit[2] + vit[3]) / 2)
    assert np.array_equal(
        scale.right(record, "vit", "class token"), record["right"].values[:DEPTH, :, 0]
    )
    found = one("E18-middle", record)
    assert found.trained == mean_of((vit[2] + vit[3]) / 2 - (resnet[2] + resnet[3]) / 2)
    assert found.trained.value == pytest.approx(0.05, abs=0.04)


# Worlds in which a claim holds, and in which it does not ------------------------------------------

MAPS = {
    **{
        f"E16-{where}{end}": (between(fewer, true), between(fewer, false))
        for end, fewer in FEWER.items()
        for where, true, false in (
            ("late", lambda x: 0.9 - 0.6 * x, lambda x: 0.3 + 0.6 * x),
            ("early", lambda x: 0.99 if x < 0.5 else 0.2, lambda x: 0.99 if x > 0.5 else 0.8),
        )
    },
    "E19-early": (
        between("vit_tuned_colour", lambda x: 0.98 if x < 0.5 else 0.2),
        between("vit_tuned_colour", lambda x: 0.98 if x != 0 else 0.9),
    ),
    "E19-distant": (
        between("vit_tuned_colour", lambda x: 0.9 - 0.3 * x),
        between("vit_tuned_fine_textures", lambda x: 0.9 - 0.3 * x),
    ),
}
PROBES = {
    "E17-middle": ("vit", "vit_data_10"),
    "E17-middle-03": ("vit", "vit_data_03"),
    "E18-middle": ("vit", "resnet"),
}


def actors(key):
    """The roles that play a claim's arms in the lab."""
    parts = [arm.partition("+") for arm in CLAIMS[key].arms]
    return [LAB.find(arm, int(further or 0)).name for arm, _, further in parts]


def test_every_claim_has_its_worlds():
    assert set(MAPS) | set(PROBES) == set(CLAIMS)


@pytest.mark.parametrize("key", MAPS)
def test_a_claim_on_maps_comes_out_as_the_world_is(key):
    for world, expected in zip(MAPS[key], (SUPPORTED, CONTRADICTED), strict=True):
        found = one(key, maps_of(world, actors(key)))
        assert found.verdict == expected
        assert found.trained.low < found.trained.value < found.trained.high


@pytest.mark.parametrize("key", MAPS)
def test_a_claim_on_maps_is_not_true_of_noise(key):
    """Between groups that differ by more than any structure there is nothing to be found."""
    record = maps_of(lambda a, b, x: 0.5, actors(key), noise=0.1, seed=3)
    # Layers that are half alike have not stayed as they were, whatever the noise.
    assert one(key, record).verdict == (CONTRADICTED if key == "E19-early" else INCONCLUSIVE)


@pytest.mark.parametrize("key", PROBES)
def test_a_claim_on_probes_comes_out_as_the_world_is(key):
    more, less = PROBES[key]

    def high_in_the_middle(x):
        return np.where((x > 0.3) & (x < 0.7), 0.8, 0.1)

    def low_in_the_middle(x):
        return 0.9 - high_in_the_middle(x)

    curves = high_in_the_middle, low_in_the_middle
    assert one(key, probes_of(dict(zip((more, less), curves, strict=True)))).verdict == SUPPORTED
    found = one(key, probes_of(dict(zip((less, more), curves, strict=True))))
    assert found.verdict == CONTRADICTED
    noise = probes_of({more: lambda x: 0.5 + 0 * x, less: lambda x: 0.5 + 0 * x}, seed=1)
    assert one(key, noise).verdict == INCONCLUSIVE


# Replicates, baselines, and what is missing -------------------------------------------------------


@pytest.mark.parametrize("end", FEWER)
def test_one_network_with_less_data_is_one_replicate(end):
    """A second full-data network makes no second pair of it, and no network is its own ceiling."""
    for where in ("early", "late"):
        key = f"E16-{where}{end}"
        assert len(one(key, maps_of(MAPS[key][0], actors(key))).replicates) == 1
    curve = {role: lambda x: 0.5 + 0 * x for role in ("vit", "vit_other_seed", FEWER[end])}
    assert len(one(f"E17-middle{end}", probes_of(curve)).replicates) == 1


def test_networks_with_less_data_are_paired_by_seed_and_have_the_next_as_their_reference():
    study = Study(vit=2, vit_data_10=2)

    def cells(a, b, x):
        known = {
            ("vit", "vit_1"): 0.9,
            ("vit_1", "vit_data_10"): 0.7,  # the first's reference is vit_1
            ("vit", "vit_data_10_1"): 0.4,  # the second's is vit
        }
        return known.get(tuple(sorted((a, b))), 0.1)

    record = maps_of(cells, ["vit", "vit_1", "vit_data_10", "vit_data_10_1"])
    found = one("E16-early", record, study)
    assert [e.value for e in found.replicates] == pytest.approx([0.2, 0.5], abs=0.01)
    assert found.baselines == ()


def test_further_training_is_repeated_from_another_seeds_network():
    roles = ["vit", "vit_tuned_colour", "vit_other_seed", "vit_other_seed_tuned_colour"]
    stayed = {("vit", "vit_tuned_colour"): 0.99, tuple(roles[2:]): 0.8}
    record = maps_of(lambda a, b, x: stayed.get(tuple(sorted((a, b))), 0.5), roles)
    found = one("E19-early", record)
    assert [e.value for e in found.replicates] == pytest.approx([0.01, 0.2], abs=0.01)
    assert (found.verdict, found.baselines) == (INCONCLUSIVE, ())
    assert len(one("E19-early", maps_of(lambda a, b, x: 0.5, roles[:3])).replicates) == 1


def test_probes_of_untrained_networks_are_the_baseline():
    def accuracies(before):
        return {
            "vit": lambda x: 0.8 + 0 * x,
            "resnet": lambda x: 0.5 + 0 * x,
            "vit_untrained": lambda x: before + 0 * x,
            "resnet_untrained": lambda x: 0.2 + 0 * x,
        }

    found = one("E18-middle", probes_of(accuracies(0.5)))
    assert found.baselines[0].value == pytest.approx(0.3, abs=0.04)
    assert (found.verdict, found.why) == (SUPPORTED, ALREADY_TRUE)
    assert one("E18-middle", probes_of(accuracies(0.2))).why == ""


def test_claims_that_cannot_be_measured_say_why():
    reasons = {
        "E16-late": "not measured here: no network vit_data_10",
        "E17-middle-03": "not measured here: no network vit_data_03",
        "E18-middle": "needs labels",
        "E19-early": "not measured here: no network vit_tuned_colour",
    }
    record = maps_of(lambda a, b, x: 0.5, ["vit", "vit_other_seed", "resnet"])
    for key, reason in reasons.items():
        found = one(key, record)
        assert (found.verdict, found.why, str(found.trained)) == (UNMEASURABLE, reason, "–"), key
    alone = maps_of(lambda a, b, x: 0.5, ["vit", "vit_data_10"])
    assert one("E16-late", alone).why == "not measured here: no second network vit"


def test_taps_of_other_measurements_leave_an_interval_as_it_is():
    """Groups that held no image stay out of it, though other taps have no number in any group."""
    record = maps_of(MAPS["E16-early"][0], actors("E16-early"))
    record = record.pad(group=(0, 4), constant_values={"hsic": 0})
    heads = {name: (dims, values[:2]) for name, (dims, values) in list(labels(["vit"]).items())[1:]}
    heads = xr.Dataset(
        {"distance": ("tap", [1.0, 2.0])},
        heads | {"tap": ["vit/blocks.0.attn", "vit/blocks.1.attn"]},
    )
    both = xr.merge([record, heads], join="outer", compat="no_conflicts")
    both["block"] = both["block"].astype(bool)
    assert both.sizes["tap"] == record.sizes["tap"] + 2
    assert one("E16-early", both) == one("E16-early", record)
