"""CKA against float64 references, closed forms and known answers."""

import warnings
from datetime import timedelta
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lib.cka import MinibatchCKA, alignment, centred_gram, cka
from lib.intervals import jackknife

UNDEFINED = "CKA is undefined for"


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def related(n, p, q=None, seed=0, offset=0.0, scale=1.0, noise=2.0):
    """Two layers that share eight directions."""
    q = q or p
    shared = draw(n, 8, seed=seed, dtype=torch.float64)
    x = shared @ draw(8, p, seed=seed + 1, dtype=torch.float64)
    y = shared @ draw(8, q, seed=seed + 2, dtype=torch.float64)
    x = x + noise * draw(n, p, seed=seed + 3, dtype=torch.float64)
    y = y + noise * draw(n, q, seed=seed + 4, dtype=torch.float64)
    return (scale * (x + offset)).float(), (scale * (y + offset)).float()


def hsic1(x, y):
    """Unbiased HSIC as Song et al. (2012) write it, in float64, on features centred beforehand."""
    x, y = (torch.as_tensor(z).double().flatten(1) for z in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    n = len(x)
    k, m = (z @ z.T * (1 - torch.eye(n, dtype=torch.float64)) for z in (x, y))
    one = torch.ones(n, dtype=torch.float64)
    trace = torch.trace(k @ m)
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (one @ k @ m @ one)
    return float((trace + sums - cross) / (n * (n - 3)))


def reference(x, y, size=None):
    """Minibatch CKA: HSICs summed over batches, divided once."""
    size = size or len(x)
    parts = list(zip(x.split(size), y.split(size), strict=True))
    xy, xx, yy = (
        sum(len(pair[0]) * hsic1(pair[i], pair[j]) for pair in parts)
        for i, j in ((0, 1), (0, 0), (1, 1))
    )
    return xy / (xx * yy) ** 0.5


def in_groups(groups, **settings):
    metric = MinibatchCKA(**settings)
    metric.groups = groups
    return metric


def feed(metric, batch, number=None):
    metric.update({name: metric.reduce(x) for name, x in batch.items()}, batch=number)


def measured(batches, metric=None):
    metric = metric or MinibatchCKA()
    for batch in batches:
        feed(metric, batch)
    return metric.compute()


def between(record, a="x", b="y", what="cka"):
    return float(record[what].sel(tap=a, other=b))


# The estimator


def test_inner_products_of_centred_grams_are_the_hsic_of_song_et_al():
    x, y = related(17, 40, 25)
    grams = [centred_gram(z) for z in (x, y)]
    assert grams[0].dtype == torch.float64
    for a, gram_a in zip((x, y), grams, strict=True):
        for b, gram_b in zip((x, y), grams, strict=True):
            ours = float((gram_a * gram_b).sum()) / (17 * 14)
            assert ours == pytest.approx(hsic1(a, b), rel=1e-6)


def test_hsic_of_song_et_al_is_the_mean_over_quadruples_of_distinct_images():
    """The U-statistic it stands for, by brute force: no image meets itself."""
    x, y = (z.double() for z in related(6, 3, 4))
    k, m = x @ x.T, y @ y.T
    quadruples = [
        k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(6), 4)
    ]
    ours = float((centred_gram(x) * centred_gram(y)).sum()) / (6 * 3)
    assert ours == pytest.approx(float(torch.stack(quadruples).mean()), rel=1e-10)


def test_biased_estimator_is_the_one_printed_in_the_paper():
    x, y = related(20, 30, 50)
    centring = torch.eye(20, dtype=torch.float64) - 1 / 20
    k, m = (centring @ z.double() @ z.double().T @ centring for z in (x, y))
    expected = float((k * m).sum() / (k.norm() * m.norm()))
    assert cka(x, y, "biased") == pytest.approx(expected, abs=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = measured([{"x": x, "y": y}], MinibatchCKA(estimator="biased"))
    assert between(record) == pytest.approx(expected, abs=1e-7)
    hsic = float(record["hsic"].sel(tap="x", other="y").sum()) / 20
    assert hsic == pytest.approx(float((k * m).sum()) / 19**2, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x, id="identical"),
        pytest.param(lambda x: x @ torch.linalg.qr(draw(48, 48, seed=9))[0], id="rotated"),
        pytest.param(lambda x: x.flip(1), id="mirrored"),
        pytest.param(lambda x: -37.5 * x, id="scaled"),
        pytest.param(lambda x: x + 10 * draw(1, 48, seed=9), id="translated"),
        pytest.param(lambda x: torch.cat([x, x], 1).reshape(-1, 2, 6, 8), id="twice, as a map"),
    ],
)
def test_one_up_to_rotation_isotropic_scaling_and_translation(change):
    x = draw(24, 48)
    assert cka(x, change(x)) == pytest.approx(1, abs=1e-6)


def test_scaling_each_feature_by_itself_changes_it():
    x = draw(200, 20, dtype=torch.float64)
    factors = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    # Independent features of variances 1 and s^2: the population's CKA in closed form.
    expected = float((factors**2).sum() / (20**0.5 * (factors**4).sum().sqrt()))
    assert expected < 0.8
    assert cka(x, x * factors) == pytest.approx(expected, abs=0.05)


def test_symmetric():
    x, y = related(30, 50, 20)
    assert cka(x, y) == cka(y, x)


@pytest.mark.parametrize(("n", "draws", "biased"), [(64, 8, 0.92), (1024, 2, 0.43)])
def test_independent_layers(n, draws, biased):
    values = [cka(draw(n, 768, seed=s), draw(n, 768, seed=100 + s)) for s in range(draws)]
    spread = 2**0.5 / n  # the standard deviation of n (n - 1) / 2 products of independent entries
    assert np.abs(values).max() < 4 * spread
    assert abs(np.mean(values)) < 4 * spread / draws**0.5
    if draws > 2:
        assert min(values) < -spread / 4, "nothing is clamped"
    assert cka(draw(n, 768), draw(n, 768, seed=1), "biased") == pytest.approx(biased, abs=0.02)


# Rounding


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0, 10.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("pair", ["related", "independent", "identical"])
@pytest.mark.parametrize(("n", "p"), [(32, 768), (48, 6000), (100, 16)])
def test_float32_agrees_with_float64(n, p, pair, scale, offset):
    x, y = related(n, p, offset=offset, scale=scale)
    if pair == "independent":
        y = (scale * (draw(n, p, seed=7) + offset)).float()
    if pair == "identical":
        y = x
    assert cka(x, y) == pytest.approx(reference(x, y), abs=1e-6)


def test_an_outlying_first_image_costs_no_precision():
    for first in (0, 5):
        x, y = related(32, 768, offset=3)
        x[first] *= 10
        y[first] *= 10
        assert cka(x, y) == pytest.approx(reference(x, y), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-3, 0), (1, 100), (1e4, 0)])
def test_half_precision_input(dtype, scale, offset):
    x, y = (z.clamp(-6, 6) + offset for z in related(40, 500, noise=0.5))
    x, y = ((scale * z).to(dtype) for z in (x, y))  # the reference starts from the rounded ones
    assert x.isfinite().all()
    assert cka(x, y) == pytest.approx(reference(x, y), abs=1e-4)
    record = measured([{"x": x, "y": y}])
    assert between(record) == pytest.approx(reference(x, y), abs=1e-4)


def test_small_variation_on_a_large_offset_is_measured():
    x, y = related(32, 400, noise=0.5)
    x, y = 1000 + 0.05 * x, 1000 + 0.05 * y  # a step of float32 is 6e-5 there
    assert cka(x, y) == pytest.approx(reference(x, y), abs=1e-6)
    assert cka(x, y) > 0.5


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64, torch.bool])
def test_other_kinds_of_numbers(dtype):
    x, y = related(20, 30)
    x, y = ((x * 5 + 100).to(dtype), (y * 5 + 100).to(dtype))
    if dtype is torch.bool:
        x, y = (z > 0 for z in related(20, 30))
    assert cka(x, y) == pytest.approx(reference(x, y), abs=1e-9)
    assert cka(x.numpy(), y.numpy()) == cka(x, y)
    assert between(measured([{"x": x, "y": y}])) == pytest.approx(reference(x, y), abs=1e-9)


def test_a_vector_is_one_number_per_image():
    x, y = related(12, 1)
    assert cka(x[:, 0], y[:, 0]) == pytest.approx(reference(x, y), abs=1e-6)


def test_memory_layout_does_not_matter():
    maps = draw(12, 6, 5, 4) + 1
    expected = cka(maps, draw(12, 9, seed=5))
    there = maps.to(memory_format=torch.channels_last)
    assert not there.is_contiguous()
    assert cka(there, draw(12, 9, seed=5)) == pytest.approx(expected, abs=1e-7)
    other = draw(12, 9, seed=5).T.contiguous().T
    assert not other.is_contiguous()
    assert cka(maps, other) == pytest.approx(expected, abs=1e-7)


def test_inputs_are_left_alone():
    x, y = related(12, 30, offset=5)
    before = x.clone(), y.clone()
    cka(x, y)
    cka(x.double(), y.double(), "biased")
    measured([{"x": x, "y": y}])
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


# Layers that do not vary


def constant_layers():
    norm = nn.LayerNorm(64)
    row = draw(1, 64) * 50
    tiny = torch.finfo(torch.float32).eps
    return {
        "zeros": torch.zeros(16, 64),
        "ones": torch.ones(16, 64),
        "decimal": torch.full((16, 64), 1000.1),
        "large": torch.full((16, 64), 1e15),
        "tiny": torch.full((16, 64), 1e-12),
        "one row": row.expand(16, -1),
        "norm of one row": norm(row.expand(16, -1).contiguous()).detach(),
        "half": torch.full((16, 64), 1000.1, dtype=torch.float16),
        "brain": row.expand(16, -1).bfloat16(),
        "integer": torch.full((16, 64), 7),
        "rounding": 1000.1 * (1 + tiny / 2 * draw(16, 64).clamp(-1, 1)),
    }


@pytest.mark.parametrize("name", constant_layers())
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_cka_with_a_constant_layer_is_undefined_and_the_warning_names_it(name, estimator):
    layers = {"steady": constant_layers()[name], "other": draw(16, 20)}
    assert np.isnan(cka(layers["steady"], layers["other"], estimator))
    assert np.isnan(cka(layers["steady"], layers["steady"], estimator))
    with pytest.warns(UserWarning, match=f"{UNDEFINED} steady"):
        record = measured([layers] * 3, MinibatchCKA(estimator=estimator))
    undefined = np.isnan(record["cka"].values)
    assert undefined.tolist() == [[True, True], [True, False]]
    assert between(record, "other", "other") == pytest.approx(1)


def test_no_warning_where_all_layers_vary():
    x, y = related(16, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured([{"x": x, "y": y}] * 2)


def test_a_layer_that_rests_in_one_minibatch_is_still_measured():
    """A minibatch in which it does not vary has HSIC 0 and adds nothing."""
    x, y = related(60, 30)
    x[20:40] = 2.5
    record = measured({"x": a, "y": b} for a, b in zip(x.split(20), y.split(20), strict=True))
    assert between(record) == pytest.approx(reference(x, y, 20), abs=1e-6)


def test_numbers_that_are_not_finite_are_not_hidden():
    x, y = related(16, 20)
    x[3, 3] = torch.inf
    assert np.isnan(cka(x, y))
    x[3, 3] = torch.nan
    assert np.isnan(cka(x, y))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_warning_tells_numbers_that_are_not_finite_from_constant_ones(bad):
    x, y = related(16, 20)
    x[3, 3] = bad
    for layers in ({"x": x, "y": y}, {"x": x}):
        with pytest.warns(UserWarning, match=f"{UNDEFINED} x: numbers that are not finite"):
            assert np.isnan(between(measured([layers]), "x", "x"))


# Minibatches


def test_one_minibatch_is_cka():
    x, y = related(40, 100, 60)
    record = measured([{"x": x, "y": y}])
    assert between(record) == pytest.approx(cka(x, y), abs=1e-12)
    assert between(record, "y", "x") == between(record, "x", "y")
    assert between(record, "x", "x") == pytest.approx(1, abs=1e-12)


def test_minibatches_agree_with_all_images_at_once_and_the_biased_estimator_does_not():
    """Layers of p features that correlate by c have CKA c²; biased, (c² + p/n) / (1 + p/n)."""
    n, p, c = 2048, 293, 0.391**0.5
    x = draw(n, p, seed=1)
    y = c * x + (1 - c**2) ** 0.5 * draw(n, p, seed=2)
    whole = cka(x, y)
    assert whole == pytest.approx(0.391, abs=0.005)
    for size, biased in ((32, 0.94), (64, 0.89), (128, 0.815), (256, 0.715), (1024, 0.527)):
        assert biased == pytest.approx((c**2 + p / size) / (1 + p / size), abs=0.002)
        batches = [{"x": a, "y": b} for a, b in zip(x.split(size), y.split(size), strict=True)]
        assert between(measured(batches)) == pytest.approx(whole, abs=0.005), size
        wrong = between(measured(batches, MinibatchCKA(estimator="biased")))
        assert wrong == pytest.approx(biased, abs=0.01), size


def test_hsics_are_summed_before_one_division():
    x, y = related(96, 30, noise=6)
    batches = [{"x": a, "y": b} for a, b in zip(x.split(8), y.split(8), strict=True)]
    expected = reference(x, y, 8)
    ratios = np.mean([cka(batch["x"], batch["y"]) for batch in batches])
    assert abs(ratios - expected) > 0.03, "the mean of ratios is something else here"
    assert between(measured(batches)) == pytest.approx(expected, abs=1e-6)


def test_minibatches_are_weighed_by_their_images():
    x, y = related(52, 30, noise=4)
    x[40:] *= 3  # so that the weight of the short last minibatch shows
    batches = [{"x": a, "y": b} for a, b in zip(x.split(20), y.split(20), strict=True)]
    assert [len(batch["x"]) for batch in batches] == [20, 20, 12]
    weighed = reference(x, y, 20)
    pairs = [(batch["x"], batch["y"]) for batch in batches]
    xy, xx, yy = (sum(hsic1(p[i], p[j]) for p in pairs) for i, j in ((0, 1), (0, 0), (1, 1)))
    assert abs(xy / (xx * yy) ** 0.5 - weighed) > 0.01, "unweighed it is something else here"
    assert between(measured(batches)) == pytest.approx(weighed, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_minibatches_too_small_for_the_estimator_are_left_out(n):
    x, y = related(20 + n, 30)
    metric = MinibatchCKA()
    feed(metric, {"x": x[:20], "y": y[:20]})
    with pytest.warns(UserWarning, match=f"minibatch of {n} images is too small.*left out"):
        feed(metric, {"x": x[20:], "y": y[20:]})
    assert between(metric.compute()) == pytest.approx(reference(x[:20], y[:20]), abs=1e-6)

    metric = MinibatchCKA()
    with pytest.warns(UserWarning, match="left out"):
        feed(metric, {"x": (x[20:] * 9).long(), "y": y[20:]})
    with pytest.raises(ValueError, match="one minibatch of 4 images or more, and none was added"):
        metric.compute()
    with pytest.raises(ValueError, match=f"minibatch of {n} images is too small"):
        cka(x[20:], y[20:])


def test_four_images_are_enough():
    x, y = related(4, 30)
    assert cka(x, y) == pytest.approx(reference(x, y), abs=1e-6)
    assert between(measured([{"x": x, "y": y}])) == pytest.approx(reference(x, y), abs=1e-6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_mistakes_are_named():
    x, y = related(20, 30)
    with pytest.raises(ValueError, match="got 20 and 19"):
        cka(x, y[1:])
    with pytest.raises(ValueError, match="no estimator 'debiased'; use one of unbiased, biased"):
        cka(x, y, "debiased")
    with pytest.raises(ValueError, match="no estimator 'debiased'"):
        MinibatchCKA(estimator="debiased")
    with pytest.raises(ValueError, match="none was added"):
        MinibatchCKA().compute()

    metric = MinibatchCKA()
    with pytest.raises(ValueError, match=r"same 20 images.*'x': 20, 'y': 19"):
        feed(metric, {"x": x, "y": y[1:]})
    feed(metric, {"x": x, "y": y})
    for wrong in ({"x": x}, {"x": x, "y": y, "z": y}, {"x": x, "why": y}):
        with pytest.raises(ValueError, match="every minibatch must have the same taps"):
            feed(metric, wrong)
    assert between(metric.compute()) == pytest.approx(cka(x, y)), "mistakes leave no trace"


def test_order_of_taps_within_a_minibatch_does_not_matter():
    x, y = related(60, 30)
    batches = [{"x": a, "y": b} for a, b in zip(x.split(20), y.split(20), strict=True)]
    expected = measured(batches)
    batches[1] = dict(reversed(batches[1].items()))
    assert measured(batches).equals(expected)


def test_taps_of_several_models_at_once_are_all_pairs():
    layers = {f"{m}/{i}": draw(30, 20 + i, seed=i) + draw(30, 1) for i, m in enumerate("aabbc")}
    record = measured([layers])
    assert record["tap"].values.tolist() == record["other"].values.tolist() == list(layers)
    for one, x in layers.items():
        for other, y in layers.items():
            assert between(record, one, other) == pytest.approx(reference(x, y), abs=1e-6)


# As a torchmetrics metric


def stream(n=120, size=20, seed=0):
    x, y = related(n, 30, noise=4, seed=seed)
    return [{"x": a, "y": b} for a, b in zip(x.split(size), y.split(size), strict=True)]


def test_forward_gives_the_minibatch_and_adds_it():
    batches = stream()
    metric = in_groups(4)
    for batch in batches:
        kept = {name: metric.reduce(x) for name, x in batch.items()}
        assert between(metric(kept)) == pytest.approx(cka(batch["x"], batch["y"]), abs=1e-12)
    assert metric.compute().equals(measured(batches, in_groups(4)))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_everything():
    metric = MinibatchCKA()
    measured(stream(), metric)
    metric.reset()
    with pytest.raises(ValueError, match="none was added"):
        metric.compute()
    other = {"p": draw(20, 5, seed=3), "q": draw(20, 6, seed=4), "r": draw(20, 7, seed=5)}
    assert measured([other], metric).equals(measured([other]))


def test_states_add_up():
    batches = stream()
    expected = measured(batches)
    halves = MinibatchCKA(), MinibatchCKA()
    for number, batch in enumerate(batches):
        feed(halves[number % 2], batch, number)
    for name in ("hsic", "batches"):
        setattr(halves[0], name, getattr(halves[0], name) + getattr(halves[1], name))
    together = halves[0].compute()
    for what in ("cka", "low", "high", "hsic"):
        np.testing.assert_allclose(together[what], expected[what], rtol=1e-12, err_msg=what)


SHARES = {
    "uneven": [[0, 2, 4, 5], [1, 3]],
    "nothing of use in one": [[0, 1, 2, 3, 4, 5], [6]],
}


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(seconds=120), rank=rank, world_size=2
    )
    for case, shares in SHARES.items():
        metric = in_groups(4)
        for number in shares[rank]:
            feed(metric, stream(n=123)[number], number)
        record = metric.compute()
        torch.save(
            {what: values.values for what, values in record.items()}, folder / f"{case}{rank}"
        )
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    """A process that had less, or nothing of use, does not keep the other waiting."""
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    batches = stream(n=123)
    for case, (mine, yours) in SHARES.items():
        alone = in_groups(4)
        for number in sorted(mine + yours):
            if len(batches[number]["x"]) > 3:
                feed(alone, batches[number], number)
        for rank in range(2):
            record = torch.load(tmp_path / f"{case}{rank}", weights_only=False)
            for what, values in alone.compute().items():
                np.testing.assert_allclose(record[what], values, rtol=1e-12, err_msg=case)


# Intervals


def test_minibatches_are_dealt_to_groups_in_turn():
    batches = stream(n=140)
    record = measured(batches, in_groups(4))
    assert record["hsic"].shape == (4, 2, 2)
    for group in range(4):
        expected = measured(batches[group::4])["hsic"].sum("group")
        np.testing.assert_allclose(record["hsic"][group], expected, rtol=1e-12)
    numbered = in_groups(4)
    for number, batch in reversed(list(enumerate(batches))):
        feed(numbered, batch, number)
    np.testing.assert_allclose(numbered.compute()["hsic"], record["hsic"], rtol=1e-12)


def test_one_group_has_no_interval():
    record = measured(stream(n=20))
    assert np.isfinite(between(record))
    assert np.isnan(between(record, what="low"))
    assert np.isnan(between(record, what="high"))


def test_alignment_is_undefined_where_a_layer_has_no_positive_hsic_with_itself():
    hsic = np.array([[-1.0, 0.5, 0.0], [0.5, 4.0, 3.0], [0.0, 3.0, 9.0]])
    nan = np.nan
    np.testing.assert_array_equal(
        alignment(hsic), [[nan, nan, nan], [nan, 1.0, 0.5], [nan, 0.5, 1.0]]
    )


def test_a_layer_with_itself_is_one_without_doubt():
    record = measured(stream())
    assert between(record, "x", "x", "low") == pytest.approx(1, abs=1e-12)
    assert between(record, "x", "x", "high") == pytest.approx(1, abs=1e-12)
    assert between(record, what="low") < between(record) < between(record, what="high")


def gaussian_layers(strength, noise, own):
    """How to draw two Gaussian layers, and CKA of their population, in closed form."""
    a = strength * draw(6, 16, seed=1, dtype=torch.float64)
    b = a + own * draw(6, 16, seed=2, dtype=torch.float64)
    eye = torch.eye(16, dtype=torch.float64)
    x, y = a.T @ a + noise**2 * eye, b.T @ b + noise**2 * eye
    return a, b, float((a.T @ b).square().sum() / (x.norm() * y.norm()))


@pytest.mark.parametrize(
    ("strength", "noise", "own", "heavy", "least", "most"),
    [
        pytest.param(0, 1, 0, False, 0, 0, id="independent"),
        pytest.param(0.3, 2, 0.3, False, 0.05, 0.15, id="low"),
        pytest.param(1, 2, 0.7, False, 0.6, 0.8, id="middle"),
        pytest.param(1, 0.3, 0.1, False, 0.98, 0.995, id="high"),
        pytest.param(1, 0.03, 0.01, False, 0.9998, 1, id="next to one"),
        pytest.param(1, 2, 0.7, True, 0.6, 0.8, id="heavy tails"),
    ],
)
@pytest.mark.parametrize(("batches", "groups"), [(8, 8), (20, 20), (20, 8), (10, 8)])
def test_intervals_cover(strength, noise, own, heavy, least, most, batches, groups):
    """Nominally 95 %; what varies is which images were drawn."""
    a, b, truth = gaussian_layers(strength, noise, own)
    assert least <= truth <= most
    size, repeats = 32, 250
    generator = torch.Generator().manual_seed(batches * groups)

    def normal(*shape):
        return torch.randn(repeats, batches, size, *shape, generator=generator).double()

    shared, weight = normal(6), torch.exp(0.5 * normal(1) if heavy else torch.zeros(1))
    grams = []
    for mixing in (a, b):
        z = (shared @ mixing + noise * normal(16)) * weight
        gram = z @ z.transpose(-1, -2)
        gram.diagonal(dim1=-2, dim2=-1).zero_()
        rows = gram.sum(-1) / (size - 2)
        gram -= rows[..., None] + rows[..., None, :]
        gram += (rows.sum(-1) / (size - 1))[..., None, None]
        gram.diagonal(dim1=-2, dim2=-1).zero_()
        grams.append(gram.flatten(-2))
    grams = torch.stack(grams, 2)
    hsics = (grams @ grams.transpose(-1, -2)).numpy()
    dealt = np.zeros((repeats, groups, 2, 2))
    for batch in range(batches):
        dealt[:, batch % groups] += hsics[:, batch]
    covered = []
    for hsic in dealt:
        found = jackknife(hsic, alignment)
        covered.append(found.low[0, 1] <= truth <= found.high[0, 1])
    assert 0.90 <= np.mean(covered) <= 0.99
