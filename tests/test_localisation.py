"""Localisation maps against CKA computed one pair at a time, and scores of maps known by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lib.cka import centre, centred_gram, cka
from lib.measure import measure
from lib.measurements.localisation import (
    Localisation,
    coarsen,
    common_grid,
    contrast,
    edge_contrast,
    estimate,
    estimate_hits,
    expected_distance,
    hit,
    interior_cells,
    last_loss,
    own_hsic,
    patches,
    token_grams,
    uniform_distance,
)
from lib.measurements.places import Layout
from lib.studies import load_study
from lib.studies.images import Images
from lib.taps import TapError

GRID, SIZE = 4, 16  # patches of 4 x 4 pixels


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=stream, dtype=torch.uint8)


def local(pixels, noise=0.0, width=64, grid=GRID, seed=5):
    """Tokens that are random linear functions of their own patch."""
    cells = patches(pixels, grid) / 255
    tokens = cells @ draw(cells.shape[-1], width, seed=seed)
    return tokens + noise * draw(*tokens.shape, seed=seed + len(pixels))


def feed(metric, tokens, pixels, number=None):
    kept = {name: metric.reduce(x) for name, x in tokens.items()}
    metric.update(kept, Images(pixels), number)


def measured(tokens, pixels, batch=32, groups=20):
    metric = Localisation()
    metric.groups = groups
    for x, part in zip(tokens.split(batch), pixels.split(batch), strict=True):
        feed(metric, {"a": x}, part)
    return metric.compute()


# Tokens and patches -------------------------------------------------------------------------------


def test_a_patch_and_the_token_of_the_same_place_have_the_same_number():
    pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    pixels[0, :, 4:8, 12:16] = 9  # second row, last column
    assert patches(pixels, GRID).sum(-1).argmax() == 1 * GRID + 3
    assert patches(pixels, GRID).shape == (1, 16, 48)
    value = torch.zeros(1, 2, 4, 4)
    value[0, :, 1, 3] = 1
    assert Layout().split(value)[0].sum(-1).argmax() == 1 * GRID + 3


def test_a_finer_grid_is_averaged():
    value = draw(2, 3, 8, 8)
    cells = coarsen(Layout().split(value)[0], 4)
    assert cells.shape == (2, 16, 3)
    assert torch.allclose(cells[:, 6], value[:, :, 2:4, 4:6].mean((2, 3)), atol=1e-6)
    assert torch.equal(coarsen(cells, 4), cells)
    assert torch.equal(coarsen(cells, None), cells)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 60, 8), r"\(4, 60, 8\) with 0 tokens before the patches has no square grid"),
        ((4, 8), r"^a tensor of shape \(4, 8\) has no places in the image: tap tokens"),
        ((4, 8, 7, 5), r"\(4, 8, 7, 5\) .* has no square grid of places"),
        ((4, 2, 2, 2, 2), r"has no places in the image"),
    ],
)
def test_tensors_without_a_square_grid_are_refused(shape, message):
    with pytest.raises(TapError, match=message):
        Localisation().reduce(draw(*shape))


def test_the_common_grid_is_the_finest_that_all_average_to():
    assert common_grid([32, 16, 8, 8], 8) == 8
    assert common_grid([14, 56, 28, 7, 224], 8) == 7
    assert common_grid([16, 224], 8) == 8
    assert common_grid([14], 14) == 14
    assert common_grid([12], 8) == 6
    with pytest.raises(ValueError, match=r"^grids of 7 and 16 cells a side have nothing in common"):
        common_grid([16, 7, 16], 8)


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^cannot average a 4 x 4 grid down to 3 x 3$"):
        Localisation(grid=3).reduce(draw(8, 16, 2))
    with pytest.raises(ValueError, match=r"^cannot average a 4 x 4 grid down to 8 x 8$"):
        Localisation(grid=8).reduce(draw(8, 16, 2))
    with pytest.raises(ValueError, match=r"^a 16 x 16 image cannot be cut into 7 x 7 patches$"):
        feed(Localisation(), {"a": draw(8, 49, 2)}, images(8))
    both = {"early": draw(8, 3, 8, 8), "late": draw(8, 3, 4, 4)}
    with pytest.raises(ValueError, match=r"differ \(late: 4 x 4, early: 8 x 8\); .* with grid=4$"):
        feed(Localisation(), both, images(8))
    metric = Localisation(grid=4)
    feed(metric, both, images(8))
    assert metric.compute().sizes["cell"] == 16


# The maps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
@pytest.mark.parametrize("offset", [0, 100])
def test_grams_are_those_of_cka_one_token_at_a_time(dtype, offset):
    cells = (10 * draw(12, 9, 20) + offset).to(dtype)
    expected = torch.stack([centred_gram(cells[:, place]) for place in range(9)])
    found = token_grams(cells)
    assert found.dtype == (
        torch.float64 if dtype in (torch.float64, torch.int64) else torch.float32
    )
    found = found.double()
    assert torch.allclose(torch.stack([*map(centre, found)]), expected, rtol=1e-4, atol=1e-2)
    assert torch.allclose(own_hsic(found), expected.square().sum((1, 2)), rtol=1e-4)
    # One side centred is enough.
    one_side = torch.einsum("aij,bij->ab", found, expected)
    assert torch.allclose(one_side, torch.einsum("aij,bij->ab", expected, expected), rtol=1e-4)


def test_a_token_that_does_not_vary_has_a_gram_of_zeros():
    cells = draw(12, 9, 20)
    cells[:, 4] = 0.1
    cells[:, 5] = 0.1 + 1e-9 * draw(12, 20).double()  # less than the resolution of float32
    grams = token_grams(cells)
    assert not grams[[4, 5]].any()
    assert (own_hsic(grams) > 0).tolist() == [True] * 4 + [False] * 2 + [True] * 3


def test_maps_are_cka_of_every_pair():
    pixels = images(24)
    tokens = local(pixels, noise=2)
    record = measured(tokens, pixels)
    cells = patches(pixels, GRID)
    for token, patch in ((0, 0), (3, 7), (15, 2)):
        expected = cka(tokens[:, token].double(), cells[:, patch].double())
        found = record["localisation"].sel(tap="a").values[token, patch]
        assert found == pytest.approx(expected, abs=1e-5)
        pair = cka(cells[:, token].double(), cells[:, patch].double())
        assert record["pixels"].values[token, patch] == pytest.approx(pair, abs=1e-5)
    assert np.allclose(np.diag(record["pixels"]), 1)
    assert int(record["cell_size"]) == 4


def test_minibatches_add_up_whatever_their_group():
    pixels = images(96)
    tokens = local(pixels, noise=2)
    many = measured(tokens, pixels, groups=20)
    few = measured(tokens, pixels, groups=2)
    assert (many.sizes["group"], few.sizes["group"]) == (20, 2)
    assert not many["patch_hsic"][3:].any()
    assert np.allclose(many["localisation"], few["localisation"])
    for name in ("cross_hsic", "token_hsic", "patch_hsic"):
        assert np.allclose(many[name].sum("group"), few[name].sum("group"))


def test_the_class_token_and_shifts_and_scales_do_not_matter():
    pixels = images(32)
    tokens = local(pixels, noise=2)
    plain = measured(tokens, pixels)["localisation"]
    metric = Localisation()
    longer = torch.cat([draw(32, 1, 64), 30 * tokens + 7], dim=1)
    metric.update({"a": metric.reduce(longer, Layout(1, class_token=True))}, Images(pixels))
    assert np.allclose(plain, metric.compute()["localisation"], atol=1e-5)


def test_local_tokens_hit_and_shuffled_images_do_not():
    pixels = images(512)
    record = measured(local(pixels), pixels, batch=64)
    maps = record["localisation"].values
    assert hit(maps) == 1
    assert contrast(maps) > 0.5
    assert expected_distance(maps, 4) < uniform_distance(16, 4) / 4
    assert abs(record["shuffled"]).max() < 0.1
    assert abs(contrast(record["shuffled"].values)) < 0.01
    assert hit(record["shuffled"].values) < 0.5


def test_tokens_that_do_not_know_their_place_are_at_chance():
    pixels = images(512)
    mixed = local(pixels)[:, torch.randperm(16, generator=torch.Generator().manual_seed(3))]
    mean = local(pixels).mean(1, keepdim=True).expand(-1, 16, -1) + 0.01 * draw(512, 16, 64)
    for tokens, hits in ((mixed, 0.1), (draw(512, 16, 64), 0.4), (mean, 0.4)):
        record = measured(tokens, pixels, batch=64)
        assert hit(record["localisation"].values) <= hits
        assert abs(contrast(record["localisation"].values)) < 0.1


def test_a_token_or_patch_that_never_varies_has_no_cka():
    pixels = images(64)
    pixels[:, :, :4, :4] = 17
    tokens = local(pixels)
    tokens[:, 5] = 3.3
    tokens[:, 0] = draw(64, 64)
    record = measured(tokens, pixels)
    maps = record["localisation"].values[0]
    assert np.isnan(maps[5]).all()
    assert np.isnan(maps[:, 0]).all()
    assert np.isnan(maps).sum() == 31
    assert hit(maps) == 1  # of the 14 that have an own patch
    assert contrast(maps) > 0.5
    assert expected_distance(maps) < 1


def test_minibatches_too_small_are_left_out():
    pixels = images(35)
    tokens = local(pixels)
    with pytest.warns(UserWarning, match="a minibatch of 3 images is too small"):
        record = measured(tokens, pixels, batch=32)
    assert np.allclose(record["localisation"], measured(tokens[:32], pixels[:32])["localisation"])
    with pytest.raises(ValueError, match="one minibatch of 4 images or more, and none"):
        Localisation().compute()


def test_mistakes_are_refused():
    pixels = images(8)
    with pytest.raises(ValueError, match=r"all taps must see the same 8 images; got {'a': 7}$"):
        feed(Localisation(), {"a": draw(7, 16, 2)}, pixels)
    metric = Localisation()
    feed(metric, {"a": draw(8, 16, 2)}, pixels)
    with pytest.raises(ValueError, match=r"this differs in \['a', 'b'\]$"):
        feed(metric, {"b": draw(8, 16, 2)}, pixels)
    metric.reset()
    feed(metric, {"b": draw(8, 4, 2)}, pixels)
    assert metric.compute()["tap"].values.tolist() == ["b"]


def test_what_is_kept_does_not_grow_with_images():
    pixels = images(64)
    metric = Localisation()
    sizes = []
    for seed in range(4):
        feed(metric, {"a": local(pixels, seed=seed)}, pixels)
        sizes.append(sum(state.nbytes for state in metric.metric_state.values()))
    assert len(set(sizes)) == 1


# Scores -------------------------------------------------------------------------------------------


def test_hit_counts_tokens_whose_own_patch_is_best():
    maps = np.full((9, 9), 0.1)
    np.fill_diagonal(maps, 0.5)
    assert hit(maps) == 1
    maps[0, 3] = 0.6  # a corner
    assert hit(maps) == pytest.approx(8 / 9)
    assert hit(maps, interior=True) == 1
    maps[4, 3] = 0.6  # the only interior token
    assert hit(maps, interior=True) == 0
    assert hit(np.stack([maps, np.eye(9)])).tolist() == pytest.approx([7 / 9, 1])


def test_interior_cells_are_those_inside():
    assert interior_cells(16).nonzero()[0].tolist() == [5, 6, 9, 10]
    assert interior_cells(64).sum() == 36


def test_contrast_is_own_minus_others():
    maps = np.full((4, 4), 0.25)
    np.fill_diagonal(maps, 1)
    assert contrast(maps) == pytest.approx(0.75)


def test_edge_contrast_compares_patches_as_far_away():
    side = 8
    y, x = np.divmod(np.arange(side * side), side)
    inside = interior_cells(side * side)
    far = np.hypot(y[:, None] - y[None], x[:, None] - x[None])
    assert edge_contrast(np.ones((64, 64))) == pytest.approx(0)
    assert edge_contrast(np.exp(-far)) == pytest.approx(0)  # whatever depends on distance alone
    assert edge_contrast(np.exp(-far) + 0.25 * ~inside) == pytest.approx(0.25)
    assert edge_contrast(np.exp(-far) + 0.25 * inside) == pytest.approx(-0.25)
    of_interior_tokens = np.where(inside[:, None], draw(64, 64).numpy(), 0)
    assert edge_contrast(of_interior_tokens) == pytest.approx(0)
    stack = np.stack([np.zeros((64, 64)), 0.5 * np.ones((64, 1)) * ~inside])
    assert edge_contrast(stack).tolist() == pytest.approx([0, 0.5])


def test_last_loss_is_beyond_the_greatest_before():
    assert last_loss([0.9, 0.7, 0.6, 0.2]) == pytest.approx(0.2)
    assert last_loss([0.9, 0.3, 0.2]) == pytest.approx(-0.5)
    assert last_loss([0.2, 0.5, 0.5]) == pytest.approx(0)
    assert last_loss([0.2, 0.5, 0.4]) == pytest.approx(0.1)


def test_distance_is_that_of_the_mass_in_pixels():
    assert expected_distance(np.eye(4), 8) == 0
    other_corner = np.eye(4)[::-1]  # all mass on the opposite corner of a 2 x 2 grid
    assert expected_distance(other_corner, 8) == pytest.approx(8 * math.sqrt(2))
    negative = np.eye(4) - 0.5 * (1 - np.eye(4))
    assert expected_distance(negative, 8) == 0  # clipped
    assert expected_distance(np.ones((64, 64)), 4) == pytest.approx(uniform_distance(64, 4))
    # As published for uniform attention on 224 pixels.
    assert uniform_distance(49, 32) == pytest.approx(115.5, abs=0.1)
    assert uniform_distance(196, 16) == pytest.approx(116.5, abs=0.1)


class Fields:
    """Gaussian images of one pixel per patch, tokens that mix them, and the maps of all images."""

    def __init__(self, louder, noise, side=5, colours=3, width=24):
        self.side, self.width, self.noise = side, width, noise
        stream = np.random.default_rng(0)
        y, x = np.divmod(np.arange(side * side), side)
        far = np.hypot(y[:, None] - y[None], x[:, None] - x[None])
        spread = np.exp(-((far / 0.85) ** 2))
        self.spread = spread / np.linalg.norm(spread, axis=1, keepdims=True)
        self.readout = stream.normal(size=(colours, width)) / np.sqrt(width)
        # Each token hears its own patch and another one close by.
        louder = np.exp(stream.uniform(*np.log(louder), (side * side, 1)))
        rival = [stream.choice(np.flatnonzero((row > 0.9) & (row < 2.1))) for row in far]
        self.mixing = louder * np.eye(side * side) + np.eye(side * side)[rival]

    def record(self, seed, groups=20, batch=16):
        stream = np.random.default_rng(seed)
        metric, places = Localisation(), self.side**2
        metric.groups = groups
        for _ in range(groups):
            cells = self.spread @ stream.normal(size=(batch, places, len(self.readout)))
            noise = stream.normal(size=(batch, places, self.width)) / np.sqrt(self.width)
            tokens = torch.tensor(self.mixing @ cells @ self.readout + self.noise * noise)
            pixels = torch.tensor(cells).mT.unflatten(2, (self.side, self.side))
            feed(metric, {"a": tokens}, pixels)
        return metric.compute()

    def truth(self):
        """Linear CKA of Gaussian variables is |cov(x, y)|^2 / (|cov(x)| |cov(y)|)."""
        patch = self.spread @ self.spread.T
        strength = np.einsum("tp,pq,tq->t", self.mixing, patch, self.mixing)
        read = self.readout.T @ self.readout
        noise = self.noise**2 / self.width * np.eye(self.width)
        token = np.array([np.linalg.norm(one * read + noise) for one in strength])
        cross = np.linalg.norm(self.readout) ** 2 * (self.mixing @ patch) ** 2
        return cross / (token[:, None] * np.sqrt(len(self.readout)) * np.diag(patch))


WORLDS = {
    "own patch and another about equally loud": Fields(louder=(0.5, 2.0), noise=0.7),
    "own patch hardly louder": Fields(louder=(1.04, 1.1), noise=0.7),
    "faint": Fields(louder=(0.7, 2.0), noise=12),
}
each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def test_maps_of_many_images_are_those_of_all_images():
    fields = WORLDS["own patch hardly louder"]
    found = fields.record(0, groups=20, batch=200)["localisation"].values[0]
    assert abs(found - fields.truth()).max() < 0.05


def ends(estimate):
    return np.ravel([estimate.value, estimate.low, estimate.high])


@each_world
def test_intervals_cover_the_truth_as_often_as_they_say(world):
    # Bounds of hits are of the cautious sort.
    true = [contrast(world.truth()), hit(world.truth()), hit(world.truth(), interior=True)]
    found = []
    for seed in range(16):
        record = world.record(seed)
        alone = (estimate_hits(record), estimate_hits(record, interior=True))
        found.append(np.stack([ends(one) for one in (estimate(record, contrast), *alone)]))
    value, low, high = np.moveaxis(found, -1, 0)
    covered = ((low <= true) & (true <= high)).mean(0)
    assert covered[0] >= 0.8
    assert (covered[1:] >= 0.93).all()
    assert ((low <= value) & (value <= high)).all()
    needed = stats.t.ppf(0.975, 19) * value[:, 0].std(ddof=1)
    assert 0.7 < (high - value)[:, 0].mean() / needed < 1.4


def test_more_images_decide_more_tokens():
    world = WORLDS["own patch hardly louder"]
    few, many = (ends(estimate_hits(world.record(0, batch=batch))) for batch in (16, 200))
    assert few[2] - few[1] > 0.5
    assert many[2] - many[1] < 0.3
    assert many[1] <= hit(world.truth()) <= many[2]


def test_a_hit_is_certain_where_no_other_patch_comes_near():
    pixels = images(640)
    tokens = local(pixels)
    tokens[:, :4] = tokens[:, [1, 2, 3, 0]]  # these describe one another's patches
    record = measured(tokens, pixels, batch=32)
    assert ends(estimate_hits(record)) == pytest.approx([0.75] * 3)
    assert ends(estimate_hits(record, interior=True)) == pytest.approx([1] * 3)


def test_one_group_has_no_interval():
    pixels = images(16)
    record = measured(local(pixels), pixels)
    for value, low, high in map(ends, (estimate(record, contrast), estimate_hits(record))):
        assert value > 0.5
        assert np.isnan([low, high]).all()


def test_clipping_makes_sharp_maps_look_wider_when_images_are_few():
    def distance(n):
        pixels = images(n)
        return expected_distance(measured(local(pixels, noise=3, width=16), pixels)["localisation"])

    assert distance(64) > distance(256) > distance(1024)


def test_estimates_of_differences_are_paired():
    pixels = images(320)
    metric = Localisation()
    one, two = local(pixels, noise=3, width=16), local(pixels, noise=3, width=16, seed=6)
    for x, y, part in zip(one.split(16), two.split(16), pixels.split(16), strict=True):
        feed(metric, {"one": x, "two": y, "same": x}, part)
    record = metric.compute()
    assert np.allclose(estimate(record, contrast).value, contrast(record["localisation"].values))
    same = estimate(record.sel(tap=["one", "same"]), lambda m: np.diff(contrast(m)))
    assert np.allclose(ends(same), 0)
    value, low, high = ends(
        estimate(record.sel(tap=["one", "two"]), lambda m: np.diff(contrast(m)))
    )
    assert low < value < high


# In the book --------------------------------------------------------------------------------------


def test_networks_of_the_lab_are_measured_on_one_grid(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    study = load_study("lab")
    roles = ["vit_untrained", "resnet_untrained"]
    record = measure(study, roles, [Localisation(grid=8)], n_images=48, batch_size=16)
    assert record["localisation"].sizes == {"tap": 8 + 13, "cell": 64, "patch": 64}
    assert record["block"].all()
    assert int(record["cell_size"]) == 4
    # Before training every token still is its patch: a baseline that no finding may forget.
    first = record["localisation"].values[[0, 8]]
    assert (hit(first) > 0.9).all()
    assert hit(record["shuffled"].values[[0, 8]]).max() < 0.3
