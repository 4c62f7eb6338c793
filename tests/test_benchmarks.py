"""The benchmarks run, small, and their records hold what chapter 99 reads."""

import json
import re

import numpy as np
import pytest
import timm
import torch

from benchmarks import book, precision, public, shared
from lib.site import RESULTS

NAMES = ("cost-cka", "cost-book", "cost-large", "cost-attention", "cost-precision", "cost-public")


@pytest.mark.parametrize("name", NAMES)
def test_records_say_where_they_come_from_and_name_no_machine(name):
    text = (RESULTS / f"{name}.json").read_text()
    record = json.loads(text)
    fields = {"what", "batch", "repeats", "threads", "processor", "versions", "date", "rows"}
    assert fields <= set(record)
    assert not re.search(r"/\w+/|https?:", text)
    assert set(record["versions"]) == {"torch", "timm"}


def test_all_measurements_share_one_pass_and_their_shares_add_up():
    study = book.Drawn(16)
    few = {name: one for name, one in book.measurements(study).items() if name != book.PROBES}
    seconds, _, clock = shared.cost(book.measured, study, few, 16, 8)
    assert list(clock) == ["passes with taps", *few]
    assert all(value > 0 for value in clock.values())
    assert sum(clock.values()) == pytest.approx(seconds, rel=0.2)
    for measurement in few.values():
        assert measurement.batches == 2


@pytest.mark.parametrize(
    ("name", "study", "grows"), [("cost-book", book.Drawn, 4), ("cost-large", book.Large, 2)]
)
def test_the_record_of_the_book_has_a_share_for_every_measurement(name, study, grows):
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert record["what"] == study.what
    study = study(1)
    names = [row["name"] for row in record["rows"]]
    assert names == ["passes with taps", *book.measurements(study)]
    total = sum(row["ratio"] for row in record["rows"])
    assert total == pytest.approx(record["ratio"], rel=0.1)
    few, many = record["memory"]
    assert many["images"] == grows * few["images"]


def test_large_networks_are_measured_as_the_labs_are():
    large, small = book.Large(8), book.Drawn(8)
    assert list(book.measurements(large)) == list(book.measurements(small))
    for role, model in large.networks.items():
        assert model(large.to_input(large.images(1).pixels, role)).shape == (1, 1000)


def test_counts_of_a_network_that_can_be_counted_by_hand():
    """Gram: 2 n width FLOP per picture and tap; ViT-Ti/16 has 197 tokens of width 192."""
    name, batch = "vit_tiny_patch16_224", 8
    found = public.cost(name, "blocks", batch)
    assert found["count"] == 12
    assert found["gram"] == pytest.approx(2 * batch * 12 * 197 * 192 / 1e9, abs=0.005)
    tokens, width, depth = 197, 192, 12
    per_block = 12 * tokens * width**2 + 2 * tokens**2 * width
    by_hand = 2 * (depth * per_block + 196 * 3 * 16**2 * width + width * 1000) / 1e9
    assert found["forward"] == pytest.approx(by_hand, rel=0.005)
    weights = sum(p.numel() for p in timm.create_model(name).parameters())
    memory = 4 * weights + 8 * 12 * batch**2 + 2 * 4 * batch * tokens * width
    assert found["memory_gib"] == pytest.approx(memory / 2**30, abs=0.006)


def test_the_public_record_has_every_network_of_the_studies_with_both_lists():
    rows = json.loads((RESULTS / "cost-public.json").read_text())
    found = [(row["model"], row["taps"]) for row in rows["rows"]]
    assert found == [(model, taps) for model in public.models() for taps in public.TAPS]
    for row in rows["rows"]:
        work = row["forward"] + row["gram"]
        assert row["images_per_s_gpu"] == pytest.approx(1e3 * rows["gpu_tflops"] / work, rel=0.01)
        assert row["images_per_s_core"] == pytest.approx(rows["core_gflops"] / work, rel=0.01)


def test_factors_of_products_are_rounded_to_ten_bits_and_what_is_added_is_not():
    step = 2.0**-10
    given = torch.tensor([1 + 0.4 * step, 1 + 0.5 * step, 1 + 0.6 * step, 1 + 1.5 * step, -3, 0.1])
    nearest = [1, 1, 1 + step, 1 + 2 * step, -3, round(0.1 * 2**14) / 2**14]  # halves to even
    assert precision.rounded(given).tolist() == nearest
    assert torch.equal(precision.rounded(given.double()), given.double())
    torch.manual_seed(0)
    a, b, c = torch.rand(3, 7, 7).unbind()
    lower = precision.rounded(a) @ precision.rounded(b)
    assert not torch.equal(lower, a @ b)
    layer, conv = torch.nn.Linear(7, 7), torch.nn.Conv1d(7, 7, 3)
    with torch.no_grad(), precision.TF32():
        for product in (a @ b, (a[None] @ b[None])[0], torch.addmm(c, a, b) - c):
            assert torch.allclose(product, lower, rtol=0, atol=1e-6)
        rounded = precision.rounded(a) @ precision.rounded(layer.weight).T + layer.bias
        assert torch.allclose(layer(a), rounded, rtol=0, atol=1e-6)
        with precision.TF32.paused():
            assert not torch.allclose(a @ b, lower, rtol=0, atol=1e-6)
            exact = conv(a[None])
        assert (conv(a[None]) - exact).abs().max() > 1e-6


def test_lower_precision_reaches_what_it_is_said_to_reach():
    study = precision.Drawn(16)
    exact = precision.cka(study, 8)
    assert np.array_equal(exact, precision.cka(study, 8), equal_nan=True)
    for lower in (precision.bfloat16, precision.TF32):
        networks = precision.cka(study, 8, lower)
        everything = precision.cka(study, 8, lower, networks_alone=False)
        assert 0 < np.nanmax(np.abs(networks - exact)) < 0.1
        assert not np.array_equal(networks, everything, equal_nan=True)


def test_cost_counts_time_and_memory():
    def work():
        return torch.ones(2**24).sum().item()  # 64 MiB

    seconds, peak, result = shared.cost(work)
    assert result == 2**24
    assert seconds > 0
    assert peak > 2**24
