"""``measure`` gives the numbers one would get by hand, and measures again only when it must."""

import re
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from lib import records
from lib.cka import MinibatchCKA, cka
from lib.measure import measure
from lib.records import between
from lib.studies.images import Images
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
    with pytest.raises(TapError, match="no tap is named"):
        measure(study, ["a", "b"], [some], n_images=40, batch_size=40)
    record = measure(study, ["b"], [some], n_images=40, batch_size=40)
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
    assert record.sizes["group"] == 4
    np.testing.assert_allclose(record["hsic"].sum("group"), sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "batch_size"), [(54, 16), (64, 16), (40, 7), (20, 50)])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_the_record_is_that_of_a_measurement_fed_by_hand(n, batch_size, estimator):
    study = Fake()
    settings = {"taps": TAPS, "estimator": estimator, "groups": 3}
    record = measure(study, ["a", "b"], [MinibatchCKA(**settings)], n, batch_size, seed=2)
    metric = MinibatchCKA(**settings)
    for pixels in study.images(n, 2).pixels.split(batch_size):
        metric.update(
            {
                f"{role}/{name}": value
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


def test_one_pass_serves_all_measurements():
    class Norms(MinibatchCKA):
        """Mean norm of every tap."""

        def reduce(self, value):
            return value.flatten(1).norm(dim=1)

        def update(self, *, reduced, batch):
            self.kept = [*getattr(self, "kept", []), reduced]

        def compute(self):
            names = list(self.kept[0])
            means = [float(torch.cat([part[n] for part in self.kept]).mean()) for n in names]
            return xr.Dataset({"norm": ("tap", means)}, coords={"tap": names})

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


def test_a_measurement_may_ask_for_the_images():
    seen = []

    class Labels(MinibatchCKA):
        def reduce_images(self, images):
            assert isinstance(images, Images)
            return images

        def update(self, *, reduced, batch):
            seen.append(reduced.pop("images"))
            super().update(reduced=reduced, batch=batch)

    study = Fake()
    measure(study, ["a"], [Labels("blocks"), MinibatchCKA(["stem"])][:1], 54, 16)
    assert [len(part) for part in seen] == [16, 16, 16, 6]
    assert torch.equal(torch.cat([part.pixels for part in seen]), study.images(54).pixels)


def test_a_measurement_may_name_its_taps_and_see_several_of_one_pass_together():
    class Steps:
        """How far every block moves its input."""

        def reset(self):
            self.kept = []

        def taps(self, model):
            names = [f"blocks.{i}" for i in range(len(model.blocks))]
            return [part for name in names for part in (f"{name}:input", name)]

        def reducer(self, model):
            entered = {}

            def reduce(name, value):
                if name.endswith(":input"):
                    assert not entered, "left over from another pass"
                    entered[name] = value
                    return None
                return value - entered.pop(f"{name}:input")

            return reduce

        def update(self, *, reduced, batch):
            self.kept.append(reduced)

        def compute(self):
            names = list(self.kept[0])
            means = [float(torch.cat([part[n] for part in self.kept]).norm()) for n in names]
            return xr.Dataset({"step": ("tap", means)}, coords={"tap": names})

    study = Fake()
    record = measure(study, ["a", "b"], [Steps(), MinibatchCKA("blocks")], 54, 16)
    assert study.passes == 2 * 4
    assert record["tap"].values.tolist() == [f"a/blocks.{i}" for i in (0, 1)] + [
        f"b/blocks.{i}" for i in (0, 1, 2)
    ]
    for role in "ab":
        values = activations(study, role, study.images(54).pixels)
        step = float((values["blocks.1"] - values["blocks.0"]).norm())
        assert float(record["step"].sel(tap=f"{role}/blocks.1")) == pytest.approx(step, rel=1e-5)


def test_a_measurement_can_be_used_again():
    metric = MinibatchCKA("blocks")
    study = Fake()
    first = measure(study, ["a"], [metric], 32, 16)
    other = measure(study, ["b"], [metric], 32, 16)
    again = measure(study, ["a"], [metric], 32, 16, seed=1)
    fresh = measure(Fake(), ["b"], [MinibatchCKA("blocks", groups=19)], 32, 16)
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
    record = measure(study, ["a", "b"], [MinibatchCKA("blocks", groups=5)], 32, 16, seed=3)
    facts = record.attrs
    assert facts["study"] == "fake"
    assert facts["images"] == records.tensor_hash(study.images(32, 3).pixels)
    assert (facts["n_images"], facts["batch_size"], facts["seed"]) == ("32", "16", "3")
    for role in "ab":
        assert f"'{role}': '{records.weights_hash(study.model(role))}" in facts["weights"]
    for part in ("MinibatchCKA", "blocks", "unbiased", "5"):
        assert part in facts["measurements"]
    assert facts["device"].startswith("CPU, ")
    assert facts["code"] == records.code_hash()
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", facts["date"])
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert {"python", "timm", "numpy", "torchmetrics"} <= facts.keys()


def test_mistakes_are_refused(cache):
    study = Fake()
    for n, size in ((0, 8), (8, 0), (-1, 8)):
        with pytest.raises(ValueError, match=f"^cannot measure {n} images in batches of {size}$"):
            measure(study, ["a"], [MinibatchCKA()], n, size)
    with pytest.raises(TapError, match="no module of Net matches 'nothing'"):
        measure(study, ["a"], [MinibatchCKA("nothing")], 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="at least one minibatch, and all were smaller"):
            measure(study, ["a"], [MinibatchCKA()], 9, 3)
    assert not list(cache.rglob("*"))


# The cache ----------------------------------------------------------------------------------------


def run(study, roles=("a", "b"), metric=None, n=32, size=16, seed=0):
    before = study.passes
    record = measure(study, roles, [metric or MinibatchCKA("blocks")], n, size, seed)
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


STUDY_FACTS = ["weights", "one weight", "architecture", "input", "images", "study"]
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
    elif name == "study":
        study.name = "another"
    elif name in ("estimator", "groups", "taps"):
        value = {"estimator": "biased", "groups": 10, "taps": ["stem"]}[name]
        options["metric"] = MinibatchCKA(**({"taps": "blocks"} | {name: value}))
    else:
        options[name] = {"roles": ("b", "a"), "n": 33, "size": 8, "seed": 1}[name]
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


@pytest.mark.parametrize("what", ["code_hash", "versions"])
def test_other_code_measures_anew(what, monkeypatch):
    run(Fake())
    value = "123" if what == "code_hash" else {"torch": "0.1"}
    monkeypatch.setattr(records, what, lambda: value)
    assert run(Fake())[1] == 4
    assert run(Fake())[1] == 0


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9])
def test_half_a_file_is_measured_again(share, cache):
    expected, _ = run(Fake())
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    record, passes = run(Fake())
    assert passes == 4
    xr.testing.assert_allclose(record, expected)
    assert run(Fake())[1] == 0


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
    expected = measure(Fake(), ["a", "b"], [MinibatchCKA("blocks", groups=19)], 32, 16)
    np.testing.assert_allclose(record["cka"], expected["cka"], atol=1e-6)


def test_the_cache_is_where_it_was_asked_to_be(cache, tmp_path, monkeypatch):
    assert records.cache_folder() == cache
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path / "elsewhere"))
    run(Fake())
    assert not cache.exists()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    monkeypatch.delenv("VIT_SEE_CACHE")
    assert records.cache_folder() == records.ROOT / ".cache"
