"""``measure`` gives the numbers one would get by hand, and measures again only when it must."""

import itertools
import re
import warnings

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from torch import nn

from lib import records
from lib.cka import MinibatchCKA, cka
from lib.measure import Measurement, measure
from lib.measurements.attention import AttentionDistance, attention_taps
from lib.measurements.heads import HeadCKA
from lib.measurements.localisation import Localisation
from lib.measurements.norm_ratio import NormRatio
from lib.measurements.probes import Probes
from lib.records import between
from lib.studies.images import Images, scene_images
from lib.taps import TapError, collect


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.act = nn.Tanh()

    def forward(self, x):
        return x + self.act(self.fc(x))


class Net(nn.Module):
    def __init__(self, depth, width=6):
        super().__init__()
        self.stem = nn.Linear(12, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.passes = []
        self.register_forward_hook(lambda *_: self.passes.append(self.training))

    def forward(self, x):
        return self.blocks(self.stem(x.flatten(1)))


class Fake:
    """A study of tiny networks; every fact that a record depends on can be changed."""

    name = "fake"

    def __init__(self, weights=0, roles=None, scale=None, act=nn.Tanh):
        self.weights, self.act = weights, act
        self.roles = roles or {"a": 2, "b": 3}
        self.scale = scale or {"a": 1.0, "b": -2.0}
        self.shift = 0
        self.networks = []

    def images(self, n, seed=0):
        stream = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 200, (n, 3, 2, 2), generator=stream, dtype=torch.uint8)
        return Images(pixels + self.shift, torch.zeros(n, dtype=torch.long), torch.zeros(n, 4))

    def to_input(self, pixels, role):
        return torch.tanh(self.scale.get(role, 1.0) * (pixels.float() / 100 - 1))

    def model(self, role):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.weights * 100 + list(self.roles).index(role))
            model = Net(self.roles[role])
        for block in model.blocks:
            block.act = self.act()
        self.networks.append(model)
        return model

    @property
    def passes(self):
        """How many minibatches went through any of the networks."""
        return sum(len(model.passes) for model in self.networks)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


TAPS = ["stem", "blocks.*", "blocks.*.fc"]
LAYERS_A = ["stem", "blocks.0.fc", "blocks.0", "blocks.1.fc", "blocks.1"]
LAYERS_B = [*LAYERS_A, "blocks.2.fc", "blocks.2"]


def activations(study, role, pixels):
    model = study.model(role).eval()
    return collect(model, study.to_input(pixels, role), TAPS)


def hsic(x, y):
    """Unbiased HSIC as Song et al. (2012) print it, from its definition and in float64."""
    n = len(x)
    k, m = (np.asarray(z.flatten(1), dtype=np.float64) for z in (x, y))
    k, m = k @ k.T, m @ m.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    means = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + means - 2 * (k @ m).sum() / (n - 2)) / (n * (n - 3))


# The numbers --------------------------------------------------------------------------------------


def test_taps_that_differ_from_role_to_role():
    study, some = Fake(), MinibatchCKA({"b": ["blocks.*"]})
    record = measure(study, ["a", "b"], [some], n_images=40, batch_size=40)
    assert record["tap"].values.tolist() == ["b/blocks.0", "b/blocks.1", "b/blocks.2"]
    both = MinibatchCKA({"a": "stem", "b": ["blocks.2"]})
    record = measure(study, ["a", "b"], [both], n_images=40, batch_size=40)
    assert record["tap"].values.tolist() == ["a/stem", "b/blocks.2"]


def test_one_minibatch_is_the_cka_of_all_images():
    study = Fake()
    record = measure(study, ["a", "b"], [MinibatchCKA(TAPS)], n_images=40, batch_size=40)
    pixels = study.images(40).pixels
    values = {(role, k): v for role in "ab" for k, v in activations(study, role, pixels).items()}
    assert record["cka"].shape == (12, 12)
    names = list(zip(record["role"].values, record["layer"].values, strict=True))
    assert set(names) == set(values)
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            expected = cka(values[one], values[other])
            assert float(record["cka"][i, j]) == pytest.approx(expected, abs=1e-6)


def test_minibatches_are_summed_first_and_divided_once():
    # 16, 16, 16 and a smaller one of 6, each weighed by its images.
    study = Fake()
    record = measure(study, ["a", "b"], [MinibatchCKA(TAPS)], n_images=54, batch_size=16)
    sums = np.zeros((12, 12))
    for pixels in study.images(54).pixels.split(16):
        values = [v for role in "ab" for v in activations(study, role, pixels).values()]
        sums += len(pixels) * np.array([[hsic(x, y) for y in values] for x in values])
    own = np.sqrt(np.diag(sums))
    np.testing.assert_allclose(record["cka"], sums / own / own[:, None], atol=1e-5)
    np.testing.assert_allclose(record["hsic"].sum("group"), sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "batch_size"), [(54, 16), (64, 16), (40, 7), (20, 50)])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_the_record_is_that_of_a_measurement_fed_by_hand(n, batch_size, estimator):
    study = Fake()
    metric = MinibatchCKA(TAPS, estimator)
    record = measure(study, ["a", "b"], [metric], n, batch_size, seed=2, groups=3)
    metric.reset()
    for pixels in study.images(n, 2).pixels.split(batch_size):
        metric.update(
            {
                f"{role}/{name}": metric.reduce(value)
                for role in "ab"
                for name, value in activations(study, role, pixels).items()
            }
        )
    expected = metric.compute()
    assert record["tap"].values.tolist() == expected["tap"].values.tolist()
    for variable in ("cka", "low", "high", "hsic"):
        np.testing.assert_allclose(record[variable], expected[variable], rtol=1e-5, atol=1e-6)


def test_a_last_minibatch_that_is_too_small_is_left_out_with_a_warning():
    study = Fake()
    with pytest.warns(UserWarning, match="minibatch of 3 images is too small"):
        record = measure(study, ["a"], [MinibatchCKA()], n_images=35, batch_size=16)
    whole = measure(study, ["a"], [MinibatchCKA()], n_images=32, batch_size=16)
    np.testing.assert_allclose(record["cka"], whole["cka"], atol=1e-6)


def test_each_network_gets_the_input_of_its_role_in_evaluation_mode():
    study = Fake(scale={"a": 1.0, "b": 0.0})
    with pytest.warns(UserWarning, match="CKA is undefined for b/blocks.0"):
        record = measure(study, ["a", "b"], [MinibatchCKA("blocks")], 20, 10)
    assert np.isfinite(between(record, "a", "a")).all()
    assert np.isnan(between(record, "a", "b")).all()
    assert [model.passes for model in study.networks] == [[False] * 2] * 2


class Norms(Measurement):
    """Mean norm of every tap."""

    def reduce(self, value):
        return value.flatten(1).norm(dim=1)

    def make_room(self, reduced, images):
        self.room(reduced, norms=(len(reduced),), count=())

    def add(self, group, reduced, images):
        self.norms += torch.stack([reduced[name].sum() for name in self.names])
        self.count += len(images)

    def results(self):
        norms = (self.norms / self.count).numpy()
        return xr.Dataset({"norm": ("tap", norms)}, coords={"tap": self.names})


def test_one_pass_serves_all_measurements():
    study = Fake()
    roles = ["a", "b", "a"]  # a role that is named twice is measured once
    record = measure(study, roles, [MinibatchCKA("blocks"), Norms(TAPS)], 54, 16)
    assert study.passes == 2 * 4
    assert record["tap"].values.tolist() == [f"a/{n}" for n in LAYERS_A] + [
        f"b/{n}" for n in LAYERS_B
    ]
    values = activations(study, "b", study.images(54).pixels)
    for name, value in values.items():
        norm = record["norm"].sel(tap=f"b/{name}")
        assert float(norm) == pytest.approx(float(value.norm(dim=1).mean()), rel=1e-5)
    alone = measure(Fake(), ["a", "b"], [MinibatchCKA("blocks")], 54, 16)
    blocks = record["cka"].sel(tap=alone["tap"].values, other=alone["tap"].values)
    np.testing.assert_allclose(blocks, alone["cka"], atol=1e-6)


def test_a_measurement_is_given_the_images():
    seen = []

    class Labels(MinibatchCKA):
        def add(self, group, reduced, images):
            assert isinstance(images, Images)
            seen.append(images)
            super().add(group, reduced, images)

    study = Fake()
    measure(study, ["a"], [Labels("blocks")], 54, 16)
    assert [len(part) for part in seen] == [16, 16, 16, 6]
    assert torch.equal(torch.cat([part.pixels for part in seen]), study.images(54).pixels)


def ends_of_blocks(model):
    names = [f"blocks.{i}" for i in range(len(model.blocks))]
    return [part for name in names for part in (f"{name}:input", name)]


class Steps(Norms):
    """How far every block moves its input: sees two taps of one pass together."""

    def reducer(self, model, names, x):
        entered = {}
        assert x.shape == (1, 3, 2, 2)

        def reduce(name, value):
            if name.endswith(":input"):
                assert not entered, "left over from another pass"
                entered[name] = value
                return None
            return (value - entered.pop(f"{name}:input")).norm(dim=1)

        return reduce

    def results(self):
        return super().results().rename(norm="step")


def test_a_measurement_may_name_its_taps_and_see_several_of_one_pass_together():
    study = Fake()
    record = measure(study, ["a", "b"], [Steps(ends_of_blocks), MinibatchCKA("blocks")], 54, 16)
    assert study.passes == 2 * 4
    assert record["tap"].values.tolist() == [f"a/blocks.{i}" for i in (0, 1)] + [
        f"b/blocks.{i}" for i in (0, 1, 2)
    ]
    for role in "ab":
        values = activations(study, role, study.images(54).pixels)
        step = float((values["blocks.1"] - values["blocks.0"]).norm(dim=1).mean())
        assert float(record["step"].sel(tap=f"{role}/blocks.1")) == pytest.approx(step, rel=1e-5)


def small_vit():
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.models.VisionTransformer(**size)


class Small:
    """Scenes, and networks small enough to be measured many times."""

    name = "small"
    make = staticmethod(small_vit)

    def images(self, n, seed=0):
        return scene_images(n, seed=seed)

    def model(self, role):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return (
                timm.models.ResNet(
                    timm.models.resnet.BasicBlock,
                    (1, 1, 1, 1),
                    channels=(8, 8, 16, 16),
                    zero_init_last=False,
                )
                if role == "resnet"
                else self.make()
            )

    def to_input(self, pixels, role):
        return pixels.float() / 64 - 2


ALL = {
    "cka": lambda: MinibatchCKA("all"),
    "distance": lambda: AttentionDistance({"vit": attention_taps}),
    "heads": lambda: HeadCKA(),
    "norms": lambda: NormRatio(),
    "places": lambda: Localisation({"vit": "blocks", "resnet": ["layer1.0"]}, grid=4),
    "probes": lambda: Probes({"vit": "blocks", "resnet": ["layer1.0"]}, grid=4, shots=1, draws=2),
}


def of_all(names):
    return measure(Small(), ["vit", "resnet"], [ALL[name]() for name in names], 96, 24, groups=3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT_SEE_CACHE", str(tmp_path_factory.mktemp("alone")))
        return {name: of_all([name]) for name in ALL}


@pytest.mark.parametrize("names", [*itertools.combinations(ALL, 2), tuple(ALL)], ids="+".join)
def test_measurements_on_one_pass_equal_each_alone(names, alone):
    record = of_all(names)
    assert set(record) == {variable for name in names for variable in alone[name]}
    for name in names:
        where = {axis: alone[name][axis] for axis in ("tap", "other") if axis in alone[name].coords}
        for variable, expected in alone[name].items():
            found = record[variable].sel({k: v for k, v in where.items() if k in expected.dims})
            assert found.dims == expected.dims
            assert np.array_equal(found.isnull(), expected.isnull()), variable
            found, expected = (np.nan_to_num(one.astype(float)) for one in (found, expected))
            # Attention in one kernel rounds otherwise than attention whose maps are asked for.
            slack = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=slack, err_msg=variable)


def test_a_register_is_a_class_token_for_no_measurement():
    study = Small()
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    none = {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}
    study.make = lambda: timm.models.VisionTransformer(**size, **none)
    probes = Probes(["blocks.1"], shots=1, draws=2)
    record = measure(study, ["vit"], [NormRatio(), probes, AttentionDistance()], 96, 24)
    assert record["residual"].sel(token="class").isnull().all()
    assert record["residual"].sel(token="patch").notnull().all()
    assert record["right"].sel(tap="vit/blocks.1", readout="class token").isnull().all()
    assert record["right"].sel(tap="vit/blocks.1", readout="mean of all").notnull().all()
    # Both registers stand before the patches, and what they get has no distance.
    maps = collect(
        study.model("vit"), study.to_input(study.images(96).pixels, "vit"), attention_taps
    )
    for tap, value in maps.items():
        found = record.sel(tap=f"vit/{tap}")
        expected = value[:, :, 2:, :2].sum(-1).mean((0, 2))
        assert found["prefix_mass"].values == pytest.approx(expected.numpy(), rel=1e-4)
        assert (found["patches"] <= 16).all()


def test_a_measurement_that_wants_none_of_the_roles_says_nothing():
    record = measure(Fake(), ["a"], [MinibatchCKA("blocks"), Norms({"b": "blocks"})], 32, 16)
    assert "norm" not in record
    assert record["cka"].shape == (2, 2)
    assert not measure(Fake(), [], [MinibatchCKA("blocks")], 32, 16).variables


def test_a_measurement_can_be_used_again():
    metric = MinibatchCKA("blocks")
    study = Fake()
    first = measure(study, ["a"], [metric], 32, 16)
    other = measure(study, ["b"], [metric], 32, 16)
    again = measure(study, ["a"], [metric], 32, 16, seed=1)
    fresh = measure(Fake(), ["b"], [MinibatchCKA("blocks")], 32, 16, groups=19)
    np.testing.assert_allclose(other["cka"], fresh["cka"], atol=1e-6)
    assert first["tap"].equals(again["tap"])
    assert not np.allclose(first["cka"], again["cka"])


# Labels -------------------------------------------------------------------------------------------


def test_taps_are_labelled_with_role_layer_and_whether_they_end_a_block():
    record = measure(Fake(), ["a", "b"], [MinibatchCKA(TAPS)], 32, 16)
    assert record["layer"].values.tolist() == LAYERS_A + LAYERS_B
    assert record["role"].values.tolist() == ["a"] * 5 + ["b"] * 7
    ends = [bool(re.fullmatch(r"blocks\.\d", name)) for name in LAYERS_A + LAYERS_B]
    assert record["block"].dtype == bool
    assert record["block"].values.tolist() == ends
    assert record["other"].values.tolist() == record["tap"].values.tolist()


def test_between_has_the_first_role_in_its_rows():
    study = Fake(roles={"a": 2, "b": 2})
    record = measure(study, ["a", "b"], [MinibatchCKA(TAPS)], 40, 40)
    pixels = study.images(40).pixels
    a, b = activations(study, "a", pixels), activations(study, "b", pixels)
    expected = np.array([[cka(x, y) for y in b.values()] for x in a.values()])
    assert np.abs(expected - expected.T).max() > 0.05  # so that a transposed one would be noticed
    part = between(record, "a", "b")
    assert part.dims == ("tap", "other")
    np.testing.assert_allclose(part, expected, atol=1e-5)
    np.testing.assert_allclose(between(record, "b", "a"), expected.T, atol=1e-5)
    assert float(part.sel(tap="blocks.1", other="stem")) == pytest.approx(
        cka(a["blocks.1"], b["stem"]), abs=1e-5
    )
    blocks = between(record, "a", "b", blocks=True)
    assert blocks["tap"].values.tolist() == blocks["other"].values.tolist()
    np.testing.assert_allclose(blocks, expected[[2, 4]][:, [2, 4]], atol=1e-5)


def test_a_record_says_where_it_comes_from(cache):
    study = Fake()
    record = measure(study, ["a", "b"], [MinibatchCKA("blocks")], 32, 16, seed=3)
    facts = record.attrs
    assert facts["study"] == "fake"
    assert facts["images"] == records.tensor_hash(study.images(32, 3).pixels)
    assert (facts["n_images"], facts["batch_size"], facts["seed"]) == ("32", "16", "3")
    for role in "ab":
        assert f"'{role}': '{records.weights_hash(study.model(role))}" in facts["weights"]
    for part in ("MinibatchCKA", "blocks", "unbiased"):
        assert part in facts["measurements"]
    assert facts["device"].startswith("CPU, ")
    assert facts["code"] == records.code_hash("lib.measure")
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert {"python", "timm", "numpy", "torchmetrics"} <= facts.keys()


def test_mistakes_are_refused(cache):
    study = Fake()
    for n, size in ((0, 8), (8, 0), (-1, 8)):
        with pytest.raises(ValueError, match=f"^cannot measure {n} images in batches of {size}$"):
            measure(study, ["a"], [MinibatchCKA()], n, size)
    with pytest.raises(ValueError, match="at least 2 groups of minibatches, not 1"):
        measure(study, ["a"], [MinibatchCKA()], 8, 8, groups=1)
    with pytest.raises(TapError, match=r"^a \(Net\): no module of Net matches 'nothing'"):
        measure(study, ["a"], [MinibatchCKA("nothing")], 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="one minibatch of 4 images or more, and none"):
            measure(study, ["a"], [MinibatchCKA()], 9, 3)
    assert not list(cache.rglob("*"))


# The cache ----------------------------------------------------------------------------------------


def run(study, roles=("a", "b"), metric=None, n=32, size=16, seed=0, groups=20):
    before = study.passes
    record = measure(study, roles, [metric or MinibatchCKA("blocks")], n, size, seed, "cpu", groups)
    return record, study.passes - before


def test_nothing_is_measured_twice_and_the_record_is_the_same(cache):
    study = Fake()
    first, passes = run(study)
    assert passes == 4
    second, passes = run(study)
    assert passes == 0
    assert len(list(cache.iterdir())) == 1
    # To the last bit, or a chapter could print another digit when it is run again.
    xr.testing.assert_identical(first, second)
    assert run(Fake())[1] == 0


STUDY_FACTS = ["weights", "one weight", "architecture", "input", "images"]
ARGUMENTS = ["estimator", "groups", "taps", "roles", "n", "size", "seed"]


def change(name):
    """A study and arguments that differ from the default in one fact."""
    study, options = Fake(), {}
    if name == "weights":
        study = Fake(weights=1)
    elif name == "one weight":
        model = study.model

        def changed(role):
            network = model(role)
            with torch.no_grad():
                network.stem.bias[0] += 1e-6
            return network

        study.model = changed
    elif name == "architecture":
        study = Fake(act=nn.ReLU)
    elif name == "input":
        study = Fake(scale={"a": 1.0, "b": 2.0})
    elif name == "images":
        study.shift = 1
    elif name in ("estimator", "taps"):
        value = {"estimator": "biased", "taps": ["stem"]}[name]
        options["metric"] = MinibatchCKA(**({"taps": "blocks"} | {name: value}))
    else:
        options[name] = {"roles": ("b", "a"), "n": 33, "size": 8, "seed": 1, "groups": 10}[name]
    return study, options


@pytest.mark.parametrize("name", [*STUDY_FACTS, *ARGUMENTS])
def test_whatever_changes_a_record_makes_it_measured_anew(name, cache):
    run(Fake())
    study, options = change(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, passes = run(study, **options)
    assert passes > 0, f"a change of the {name} went unnoticed"
    assert len(list(cache.iterdir())) == 2


def test_another_study_of_the_same_networks_and_images_measures_nothing_anew():
    run(Fake())
    study = Fake()
    study.name = "another"
    record, passes = run(study)
    assert passes == 0
    assert record.attrs["study"] == "another"


@pytest.mark.parametrize("what", ["code_hash", "versions"])
def test_other_code_measures_anew(what, monkeypatch):
    run(Fake())
    value = "123" if what == "code_hash" else {"torch": "0.1"}
    monkeypatch.setattr(records, what, lambda *_: value)
    assert run(Fake())[1] == 4
    assert run(Fake())[1] == 0


DAMAGE = {
    "empty": lambda whole: b"",
    "a part": lambda whole: whole[: len(whole) // 1000],
    "a third": lambda whole: whole[: len(whole) // 3],
    "most": lambda whole: whole[: 9 * len(whole) // 10],
    "no such format": lambda whole: b"<html>" * 1000,
    "its head overwritten": lambda whole: bytes(64) + whole[64:],
    "its middle overwritten": lambda whole: whole[:2000] + bytes(6000) + whole[8000:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_again(damage, cache):
    expected, _ = run(Fake())
    (path,) = cache.iterdir()
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    record, passes = run(Fake())
    assert passes == 4
    xr.testing.assert_allclose(record, expected)
    assert run(Fake())[1] == 0


def test_a_cache_that_cannot_be_written_is_a_warning_and_the_record_comes_back(
    tmp_path, monkeypatch
):
    expected, _ = run(Fake())
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept in .*; set VIT_SEE_CACHE to a folder"):
        record, passes = run(Fake())
    assert passes == 4
    xr.testing.assert_allclose(record, expected)


# What a key holds ---------------------------------------------------------------------------------


def heads_of(number):
    study = Small()
    study.make = lambda: timm.models.VisionTransformer(
        32, 8, 3, 5, embed_dim=24, depth=2, num_heads=number
    )
    return study


def altered(**settings):
    """A small ViT whose first attention has other settings, which are neither weights nor repr."""
    study = Small()

    def make():
        model = small_vit()
        for name, value in settings.items():
            setattr(model.blocks[0].attn, name, value)
        return model

    study.make = make
    return study


def test_settings_that_are_no_weights_are_in_the_key():
    taps = AttentionDistance({"vit": attention_taps})
    for number in (6, 4, 3):
        record = measure(heads_of(number), ["vit"], [taps], 8, 4)
        assert record.sizes["head"] == number
    plain, scaled = (
        measure(study, ["vit"], [taps], 8, 4) for study in (altered(), altered(scale=5.0))
    )
    assert not np.allclose(plain["patches"], scaled["patches"])


def test_a_flag_that_takes_out_a_skip_connection_is_in_the_key():
    class Skipping(Block):
        skip = True

        def forward(self, x):
            return self.skip * x + self.act(self.fc(x))

    def study(skip):
        fake = Fake()
        model = fake.model

        def changed(role):
            network = model(role)
            block = Skipping(6)
            block.load_state_dict(network.blocks[0].state_dict())
            network.blocks[0] = block
            block.skip = skip
            return network

        fake.model = changed
        return fake

    with_skip, without = (run(study(skip))[0] for skip in (True, False))
    assert not np.allclose(with_skip["cka"], without["cka"])


class Shuffled(Small):
    """The same pixels with other labels or boxes."""

    def __init__(self, labels=None, boxes=None):
        self.labels, self.boxes = labels, boxes

    def images(self, n, seed=0):
        found = super().images(n, seed)
        labels = found.labels if self.labels is None else found.labels[self.labels]
        return Images(found.pixels, labels, found.boxes if self.boxes is None else self.boxes)


def test_labels_and_boxes_are_in_the_key():
    probes, order = Probes({"vit": ["blocks.1"]}, shots=1, draws=2), torch.randperm(96)
    one, other = (
        measure(study, ["vit"], [probes], 96, 24) for study in (Shuffled(), Shuffled(order))
    )
    assert not np.array_equal(one["penalty"], other["penalty"]) or not np.array_equal(
        one["right"], other["right"]
    )
    distance, boxes = AttentionDistance(), torch.tensor([[0.0, 0, 8, 8]]).expand(8, 4)
    first, second = (
        measure(study, ["vit"], [distance], 8, 4) for study in (Shuffled(), Shuffled(None, boxes))
    )
    assert first["object_area"].values != pytest.approx(second["object_area"].values)
    assert second["object_area"].values == pytest.approx(np.full((2, 3), 1 / 16))


def test_what_a_measurement_does_not_need_is_not_in_its_key(cache):
    for study in (Shuffled(), Shuffled(torch.arange(96).flip(0))):
        measure(study, ["vit"], [MinibatchCKA("blocks")], 96, 24)
    assert len(list(cache.iterdir())) == 1


def test_two_functions_that_name_taps_are_two_measurements():
    one, other = (
        measure(Small(), ["vit"], [AttentionDistance(taps)], 8, 4)
        for taps in (
            lambda model: ["blocks.0.attn.attn_drop"],
            lambda model: ["blocks.1.attn.attn_drop"],
        )
    )
    assert one["tap"].values.tolist() == ["vit/blocks.0.attn.attn_drop"]
    assert other["tap"].values.tolist() == ["vit/blocks.1.attn.attn_drop"]


OWN = """
import torch, xarray
from torch import nn
from lib.cka import MinibatchCKA

FACTOR = {factor}

class Body(nn.Module):
    def forward(self, x):
        return {forward}

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Sequential(nn.Linear(12, 4), Body()))
    def forward(self, x):
        return self.blocks(x.flatten(1))

class Measured(MinibatchCKA):
    def results(self):
        return super().results() * {times}
"""


def own(times="1", factor="1.0", forward="FACTOR * x.relu()"):
    """What a reader's own network, measured by a reader's own measurement, gives."""
    space = {"__name__": "__main__"}
    exec(OWN.format(times=times, factor=factor, forward=forward), space)
    fake = Fake()

    def model(role):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return space["Own"]()

    fake.model = model
    return measure(fake, ["a"], [space["Measured"](["blocks.0", "blocks.0.0"])], 32, 16)


def test_a_readers_own_code_is_in_the_key(cache):
    first = own()
    again = own()
    xr.testing.assert_identical(first, again)
    assert len(list(cache.iterdir())) == 1
    assert not np.allclose(own(forward="FACTOR * x.tanh()")["cka"], first["cka"])
    assert not np.allclose(own(factor="-1.0")["hsic"], own(factor="2.0")["hsic"])
    np.testing.assert_allclose(own(times="1000")["cka"], 1000 * first["cka"], rtol=1e-6)
    assert len(list(cache.iterdir())) == 5


def test_what_cannot_be_hashed_is_measured_every_time(cache):
    study, model = Fake(), Fake.model

    def odd(role):
        network = model(study, role)
        network.noise = torch.Generator()
        return network

    study.model = odd
    first, passes = run(study)
    second, more = run(study)
    assert (passes, more) == (4, 4)
    assert not cache.exists()
    np.testing.assert_array_equal(first["cka"], second["cka"])


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_resnet",
        "test_convnext",
        "test_efficientnet",
        "test_mambaout",
        "test_byobnet",
    ],
)
def test_the_networks_of_timm_have_keys_that_repeat(name):
    def key():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return records.digest(timm.create_model(name))

    assert key() == key()


# Taps that mix images with something else ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "tap"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "window_size": 4, "patch_size": 2, "embed_dim": 24, "depths": (1, 1)}
            | {"num_heads": (3, 6)},
            "layers.0.blocks.*.attn",
        ),
        ("mobilevit_xxs", {}, "stages.2.1.transformer.*"),
    ],
)
@pytest.mark.parametrize("n", [2, 8])
def test_a_tap_whose_first_axis_is_not_the_images_is_refused(name, options, tap, n):
    study = Small()
    study.make = lambda: timm.create_model(name, pretrained=False, **options)
    kind = {"swin_tiny_patch4_window7_224": "SwinTransformer", "mobilevit_xxs": "ByobNet"}[name]
    message = rf"^vit \({kind}\): tap '.*' has \d+ rows for {n} images"
    with pytest.raises(TapError, match=message):
        measure(study, ["vit"], [MinibatchCKA(tap)], n, n)


def test_an_interrupted_measurement_leaves_nothing(cache):
    study = Fake()
    to_input = study.to_input

    def interrupted(pixels, role):
        if study.passes == 3:
            raise KeyboardInterrupt
        return to_input(pixels, role)

    study.to_input = interrupted
    metric = MinibatchCKA("blocks")
    with pytest.raises(KeyboardInterrupt):
        measure(study, ["a", "b"], [metric], 32, 16)
    assert not list(cache.rglob("*"))
    assert study.passes == 3
    # And the measurement can be used again.
    record = measure(Fake(), ["a", "b"], [metric], 32, 16)
    expected = measure(Fake(), ["a", "b"], [MinibatchCKA("blocks")], 32, 16, groups=19)
    np.testing.assert_allclose(record["cka"], expected["cka"], atol=1e-6)


def test_the_cache_is_where_it_was_asked_to_be(cache, tmp_path, monkeypatch):
    assert records.cache_folder() == cache
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "elsewhere"))
    run(Fake())
    assert not cache.exists()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    monkeypatch.delenv("VIT_SEE_CACHE")
    assert records.cache_folder() == records.ROOT / ".cache"
