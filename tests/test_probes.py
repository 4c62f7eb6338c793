"""Probes against scikit-learn, and on features of which it is known what can be read from them."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from lib.measure import measure
from lib.measurements.places import Layout
from lib.measurements.probes import (
    PENALTIES,
    READOUTS,
    Part,
    Probes,
    few_shot,
    into_channels,
    negative_error,
    read,
    read_out,
    ridge,
    signs,
)
from lib.studies import load_study
from lib.studies.images import Images
from lib.taps import TapError

CLASSES, CELLS, WIDTH = 4, 9, 12


def draw(*shape, seed=0, dtype=torch.float32):
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=stream, dtype=torch.float64).to(dtype)


def labelled(n, seed=0):
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


def planted(n=320, strength=2.0, cells=range(CELLS), seed=0, width=WIDTH, first=1):
    """Tokens (class token first) whose given cells carry the label along a random direction."""
    labels = labelled(n, seed)
    directions = draw(CLASSES, width, seed=77)
    tokens = draw(n, first + CELLS, width, seed=seed + 1)
    for cell in cells:
        tokens[:, first + cell] += strength * directions[labels]
    return tokens, labels, 8 + draw(n, 2, seed=seed + 2)


def around(labels, centres):
    """Images of objects that lie around some centres."""
    n = len(labels)
    return Images(torch.zeros(n, 3, 1, 1), labels, torch.cat([centres - 2, centres + 2], 1))


def feed(metric, tokens, images, batch=None, first=1):
    where = Layout(first, class_token=first > 0)
    metric.update({"a": metric.reduce(tokens, where)}, images, batch)


def probed(tokens, labels, centres, batch=48, first=1, **settings):
    metric, images = Probes(**settings), around(labels, centres)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        feed(metric, tokens[part], images[part], first=first)
    return metric.compute()


def r_squared(found, true):
    """Share of the variance of the true centres that the found ones explain."""
    return r2_score(true, found, multioutput="variance_weighted")


def by_chance(right) -> bool:
    """Whether hits can be chance: within the 99.9 % binomial interval around 1 / classes."""
    right = np.asarray(right).ravel()
    low, high = stats.binom.interval(0.999, right.size, 1 / CLASSES)
    return low <= right.sum() <= high


# The closed form ----------------------------------------------------------------------------------


def fitted(fit, penalty, new):
    return read(new, *ridge(fit, [penalty]))[..., 0, :]


narrow_and_wide = pytest.mark.parametrize("width", [10, 200], ids=["narrow", "wide"])


@narrow_and_wide
@pytest.mark.parametrize("penalty", [0.1, 10.0, 1e4])
def test_classes_are_those_of_scikit_learns_ridge_classifier(width, penalty):
    labels, new = labelled(80), 3 * draw(50, width, seed=4, dtype=torch.float64) + 5
    x = 3 * draw(80, width, seed=3, dtype=torch.float64) * torch.linspace(0.1, 9, width) + 5
    outputs = fitted(Part(x, signs(labels, CLASSES)), penalty, new)

    scaler = StandardScaler().fit(x.numpy())
    theirs = RidgeClassifier(alpha=penalty).fit(scaler.transform(x.numpy()), labels.numpy())
    expected = theirs.decision_function(scaler.transform(new.numpy()))
    assert np.allclose(outputs.numpy(), expected, rtol=0, atol=1e-6)
    assert (outputs.argmax(1).numpy() == theirs.predict(scaler.transform(new.numpy()))).all()


@narrow_and_wide
def test_weights_of_a_whole_grid_are_scikit_learns(width):
    x, y = 4 * draw(3, 60, width, dtype=torch.float64) + 2, draw(60, 2, dtype=torch.float64)
    weights, bias = ridge(Part(x, y), PENALTIES)
    assert weights.shape == (3, width, len(PENALTIES), 2)
    assert bias.shape == (3, len(PENALTIES), 2)
    for token in range(3):
        scaler = StandardScaler().fit(x[token].numpy())
        for place, penalty in enumerate(PENALTIES):
            theirs = Ridge(alpha=penalty).fit(scaler.transform(x[token].numpy()), y.numpy())
            expected = theirs.coef_ / scaler.scale_
            assert np.allclose(weights[token, :, place].numpy().T, expected, atol=1e-6)
            expected = theirs.intercept_ - expected @ scaler.mean_
            assert np.allclose(bias[token, place].numpy(), expected, atol=1e-6)


@narrow_and_wide
def test_the_appended_constant_of_the_reference_is_the_same_to_a_ten_thousandth(width):
    x, y = draw(60, width, dtype=torch.float64), signs(labelled(60), CLASSES).double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    extended = torch.cat([x, torch.full((60, 1), 100.0, dtype=torch.float64)], dim=1)
    theirs = Ridge(alpha=10.0, fit_intercept=False).fit(extended.numpy(), y.numpy())
    weights, bias = ridge(Part(x, y), [10.0])
    assert np.allclose(weights[:, 0].numpy().T, theirs.coef_[:, :-1], atol=1e-6)
    assert np.allclose(bias[0].numpy(), 100 * theirs.coef_[:, -1], rtol=1e-4)


@narrow_and_wide
def test_single_precision_is_enough(width):
    scale = torch.logspace(-3, 3, width)
    x, new = draw(200, width) * scale + 10, draw(50, width, seed=2) * scale + 10
    y = signs(labelled(200), CLASSES)
    exact = fitted(Part(x.double(), y), 8.0, new.double())
    assert torch.allclose(fitted(Part(x, y), 8.0, new), exact.float(), atol=1e-2)


def test_a_feature_that_never_varies_changes_nothing():
    x, y = draw(40, 6), signs(labelled(40), CLASSES)
    plain = fitted(Part(x, y), 1.0, x)
    x = torch.cat([x, torch.full((40, 1), 123.4)], dim=1)
    assert torch.allclose(fitted(Part(x, y), 1.0, x), plain, atol=1e-4)


@pytest.mark.parametrize("width", [6, 60], ids=["narrow", "wide"])
def test_many_probes_at_once_are_the_same_as_one_by_one(width):
    x, y, new = draw(5, 40, width), signs(labelled(40), CLASSES), draw(5, 30, width, seed=1)
    together = fitted(Part(x, y), 1.0, new)
    assert together.shape == (5, 30, CLASSES)
    for token in range(5):
        alone = fitted(Part(x[token], y), 1.0, new[token])
        assert torch.allclose(together[token], alone, atol=1e-5)


def test_the_penalty_is_the_best_on_held_out_images():
    # Few images, many features, a weak signal: neither end of the grid is best.
    x, new = draw(40, 100), draw(2000, 100, seed=1)
    y, held = x[:, :1] + 0.5 * draw(40, 1, seed=2), new[:, :1] + 0.5 * draw(2000, 1, seed=3)
    outputs, chosen = read_out(Part(x, y), Part(new, held), new, negative_error)
    merits = {p: float(negative_error(fitted(Part(x, y), p, new), held)) for p in PENALTIES}
    assert chosen == max(merits, key=merits.get)
    assert PENALTIES[0] < chosen < PENALTIES[-1]
    assert torch.allclose(outputs, fitted(Part(x, y), chosen, new), atol=1e-5)
    # A second probe that reads noise pulls the penalty that they share upwards.
    pair = torch.stack([new, 3 * draw(2000, 100, seed=9)])
    shared = read_out(Part(torch.stack([x, x]), y), Part(pair, held), pair, negative_error)[1]
    assert shared > chosen


def test_of_equal_penalties_the_strongest_is_chosen():
    fit = Part(draw(40, 6), torch.zeros(40, 1))
    assert read_out(fit, fit, fit.features, negative_error)[1] == PENALTIES[-1]


# Draws --------------------------------------------------------------------------------------------


def test_draws_are_balanced_disjoint_and_repeatable():
    labels = labelled(200)
    draws = few_shot(labels, 10, 3)
    for chosen in draws:
        assert torch.bincount(labels[chosen]).tolist() == [10] * CLASSES
    assert len(torch.cat(draws).unique()) == 3 * 10 * CLASSES
    assert all(map(torch.equal, draws, few_shot(labels, 10, 3)))
    assert not torch.equal(draws[0], few_shot(labels, 10, 3, seed=1)[0])


def test_too_few_images_are_refused():
    with pytest.raises(
        ValueError,
        match=r"^3 draws of 10 images per class, and images to test on, need more than 30 of each, "
        r"and there are only \d+ of class \d among 60: measure more images, or lower shots or "
        r"draws$",
    ):
        few_shot(labelled(60), 10, 3)


# What is read -------------------------------------------------------------------------------------


def test_a_planted_signal_is_found_where_it_is():
    record = probed(*planted(n=400, cells=[2, 7]), shots=10)
    by_cell = record["token_accuracy"].sel(tap="a").mean("draw").values
    assert by_cell[[2, 7]].min() > 0.9
    elsewhere = np.delete(by_cell, [2, 7])
    assert abs(elsewhere.mean() - 1 / CLASSES) < 0.05
    assert by_chance(record["right"].sel(readout="class token"))
    assert by_chance(record["right"].sel(readout="first patch"))
    # 2 of 9 cells: diluted in the mean, but it is there.
    assert record["right"].sel(readout="mean of patches").mean() > 0.6
    assert np.allclose(
        record["token_right"].mean("image"), record["token_accuracy"].mean("probe_cell")
    )


def test_random_features_are_at_chance():
    record = probed(*planted(n=600, strength=0.0), shots=10)
    for readout in READOUTS:
        assert by_chance(record["right"].sel(readout=readout, draw=0)), readout
    tokens = record["token_right"].mean("draw").values.ravel()
    assert abs(tokens.mean() - 1 / CLASSES) < 4 * tokens.std() / np.sqrt(tokens.size)
    assert abs(r_squared(record["centre"][0, 1], record["true_centre"])) < 0.1


def test_each_readout_reads_its_own_tokens():
    tokens, labels, centres = planted(n=400, strength=0.0)
    directions = draw(CLASSES, WIDTH, seed=77)
    for place, expected in ((0, "class token"), (1, "first patch")):
        marked = tokens.clone()
        marked[:, place] += 3 * directions[labels]
        right = probed(marked, labels, centres)["right"].mean(("draw", "image")).squeeze("tap")
        assert right.sel(readout=expected) > 0.9
        other = {"class token", "first patch"} - {expected}
        assert right.sel(readout=other.pop()) < 0.4
        # The class token is one of all tokens, and no patch.
        assert (right.sel(readout="mean of patches") > 0.4) == (expected == "first patch")
        assert right.sel(readout="mean of all") > 0.4


def test_without_a_class_token_it_cannot_be_read():
    tokens, labels, centres = planted(n=320, first=0)
    record = probed(tokens, labels, centres, first=0)
    assert record["right"].sel(readout="class token").isnull().all()
    assert record["penalty"].sel(probe="class token").isnull().all()
    same = [record["right"].sel(readout=one).values for one in ("mean of patches", "mean of all")]
    assert np.array_equal(*same)


def test_a_feature_map_is_read_like_tokens():
    tokens, labels, centres = planted(n=320, first=0)
    as_map = tokens.mT.unflatten(2, (3, 3))
    one, other = (probed(x, labels, centres, first=0) for x in (tokens, as_map))
    assert np.allclose(one["token_accuracy"], other["token_accuracy"])
    finer = as_map.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert np.allclose(
        one["token_accuracy"], probed(finer, labels, centres, first=0, grid=3)["token_accuracy"]
    )


def left_over(labels):
    drawn = torch.cat(few_shot(labels, 10, 3))
    return torch.tensor([image for image in range(len(labels)) if image not in set(drawn.tolist())])


def test_penalties_and_predictions_never_see_the_test_labels(monkeypatch):
    tokens, labels, centres = planted(n=320, strength=0.7)
    honest = probed(tokens, labels, centres)
    test = left_over(labels)
    # Every label is wrong, and none of them changes who is drawn.
    adversarial, misplaced = labels.clone(), centres.clone()
    adversarial[test] = (labels[test] + 1) % CLASSES
    misplaced[test] = 100 - centres[test]
    monkeypatch.setattr("lib.measurements.probes.few_shot", lambda *_: few_shot(labels, 10, 3))
    other = probed(tokens, adversarial, misplaced)
    assert np.array_equal(honest["penalty"], other["penalty"], equal_nan=True)
    assert np.array_equal(honest["centre"], other["centre"])
    # What was right is wrong now: the predictions themselves are the same.
    assert not (honest["right"].values.astype(bool) & other["right"].values.astype(bool)).any()


def test_penalties_never_see_the_test_images_either():
    tokens, labels, centres = planted(n=320, strength=0.7)
    honest = probed(tokens, labels, centres)
    test = left_over(labels)
    tokens[test] = 1e3 * draw(len(test), 1 + CELLS, WIDTH, seed=8)
    assert np.array_equal(honest["penalty"], probed(tokens, labels, centres)["penalty"])


def test_the_centre_is_read_from_where_the_object_is():
    # One bright spot on a 3 x 3 grid, invisible to the mean of the tokens.
    n = 600
    where = torch.randint(9, (n,), generator=torch.Generator().manual_seed(0))
    tokens = 0.1 * draw(n, 9, WIDTH)
    tokens[torch.arange(n), where, 0] += 1
    centres = torch.stack([where % 3, where // 3], dim=1) * 4.0 + 2
    record = probed(tokens, where % CLASSES, centres, first=0, shots=40)
    found, true = record["centre"].sel(tap="a"), record["true_centre"]
    assert true.shape == (600 - 3 * 40 * CLASSES, 2)
    assert r_squared(found.sel(arrangement="patches side by side"), true) > 0.8
    assert r_squared(found.sel(arrangement="mean of patches"), true) < 0.1
    apart = found.sel(arrangement="patches side by side") - true
    assert np.hypot(*apart.values.T).mean() < 2


# Keeping the features -----------------------------------------------------------------------------


def test_batches_may_come_in_any_order():
    tokens, labels, centres = planted(n=320)
    metric = Probes()
    images = around(labels, centres)
    for batch in (3, 0, 6, 4, 2, 5, 1):
        part = slice(batch * 48, (batch + 1) * 48)
        feed(metric, tokens[part], images[part], batch)
    dealt, straight = metric.compute(), probed(tokens, labels, centres)
    assert np.array_equal(dealt["right"], straight["right"])
    assert np.array_equal(dealt["true_centre"], straight["true_centre"])


def test_the_budget_is_kept():
    tokens, labels, centres = planted(n=320)
    size = 320 * (2 + CELLS) * WIDTH * 4
    probed(tokens, labels, centres, budget=size)
    with pytest.raises(
        ValueError, match=r"^the features of 1 taps need more than the budget of .*"
    ):
        probed(tokens, labels, centres, budget=size - 1)


def test_mistakes_are_refused():
    tokens, labels, centres = planted(n=320)
    images = around(labels, centres)
    with pytest.raises(ValueError, match=r"all taps must see the same 100 images; got {'a': 320}$"):
        feed(Probes(), tokens, images[:100])
    with pytest.raises(ValueError, match="at least 2 of them"):
        Probes(draws=1)
    with pytest.raises(TapError, match="has no places in the image"):
        Probes().reduce(draw(8, 5))
    metric = Probes()
    feed(metric, tokens, images)
    kept = {"b": metric.reduce(tokens, Layout(1, class_token=True))}
    with pytest.raises(ValueError, match=r"this differs in \['a', 'b'\]$"):
        metric.update(kept, images)
    metric.reset()
    metric.update(kept, images)
    assert metric.compute()["tap"].values.tolist() == ["b"]


@pytest.mark.parametrize(
    ("channels", "side", "expected"),
    [(64, 32, (256, 16)), (128, 16, (128, 16)), (256, 8, (256, 8)), (16, 32, (256, 8))],
)
def test_locations_become_channels_as_far_as_they_fit(channels, side, expected):
    value = into_channels(draw(2, channels, side, side), width=256, grid=8)
    assert value.shape == (2, expected[0], expected[1], expected[1])
    kept = Probes(grid=8, width=256).reduce(draw(2, channels, side, side))
    assert kept.shape == (2, 2 + 64, expected[0])


# What is no class token, and what is no number ----------------------------------------------------


def test_a_register_is_never_read_as_a_class_token():
    tokens, labels, centres = planted(n=320, strength=0.0)
    tokens[:, 0] += 3 * draw(CLASSES, WIDTH, seed=77)[labels]  # the label is in the first token
    metric, images = Probes(), around(labels, centres)
    metric.update({"a": metric.reduce(tokens, Layout(1, class_token=False))}, images)
    right = metric.compute()["right"]
    assert right.sel(readout="class token").isnull().all()
    assert right.sel(readout="mean of all").mean() > 0.4  # of which it is one
    assert by_chance(right.sel(readout="first patch", draw=0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["a training image", "the first image", "a test image", "all"])
def test_one_number_that_is_not_finite_leaves_no_accuracy(bad, where):
    tokens, labels, centres = planted(n=320)
    drawn = torch.cat(few_shot(labels, 10, 3))
    image = {"a training image": drawn[17], "the first image": 0, "a test image": left_over(labels)}
    tokens[image.get(where, slice(None)), 1] = bad  # of the first patch
    with pytest.warns(UserWarning, match="^features of a are not finite: not probed"):
        record = probed(tokens, labels, centres)
    for readout in ("mean of patches", "mean of all", "first patch"):
        assert record["right"].sel(readout=readout).isnull().all()
    assert record["right"].sel(readout="class token").mean() > 0.0
    assert record["token_right"].isnull().all()
    assert record["centre"].isnull().all()


def test_objects_whose_place_is_unknown_leave_no_centre():
    tokens, labels, centres = planted(n=320)
    record = probed(tokens, labels, centres * torch.nan)
    assert record["centre"].isnull().all()
    assert record["right"].mean() > 0.5


# In the book --------------------------------------------------------------------------------------


def test_networks_of_the_lab_are_probed_by_measure(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    study = load_study("lab")
    probes = Probes(["blocks.0", "blocks.7"], shots=1, draws=2)
    record = measure(study, ["vit_untrained"], [probes], n_images=96, batch_size=32)
    assert record["right"].sizes == {"tap": 2, "draw": 2, "readout": 4, "image": 96 - 2 * 16}
    assert record["role"].values.tolist() == ["vit_untrained"] * 2
    images = study.images(96)
    test = np.setdiff1d(np.arange(96), torch.cat(few_shot(images.labels, 1, 2)))
    centres = (images.boxes[test, :2] + images.boxes[test, 2:]) / 2
    assert np.allclose(record["true_centre"], centres)
    # Read back from the cache, it is the same.
    again = measure(study, ["vit_untrained"], [probes], n_images=96, batch_size=32)
    assert np.allclose(again["centre"], record["centre"], rtol=1e-5)
