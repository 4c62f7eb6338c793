"""Sets of heads against CKA of their concatenation."""

import pytest
import timm
import torch

from lib.cka import cka
from lib.measure import measure
from lib.measurements.attention import AttentionDistance, attention_taps
from lib.measurements.heads import (
    HeadCKA,
    head_contexts,
    head_taps,
    sliding_windows,
    subset_cka,
    window_means,
)
from lib.studies import load_study
from lib.taps import collect


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(**options):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**size | options).eval()


def test_contexts_are_what_attention_makes_of_the_values():
    model = vit(reg_tokens=4)
    names = ["blocks.1.norm1", "blocks.1.attn.attn_drop", "blocks.1.attn.norm:input"]
    values = collect(model, draw(2, 3, 32, 32), names)
    v = model.blocks[1].attn.qkv(values["blocks.1.norm1"])[..., 48:].unflatten(-1, (3, 8))
    expected = values["blocks.1.attn.attn_drop"] @ v.transpose(1, 2)
    found = head_contexts(values["blocks.1.attn.norm:input"], 3, prefix=5)
    assert found.shape == (3, 2, 16, 8)
    assert torch.allclose(found, expected[:, :, 5:].transpose(0, 1), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(2, 17, 50\) is no context of 3 heads"):
        head_contexts(draw(2, 17, 50), 3)


@pytest.mark.parametrize("normed", [False, True])
def test_the_taps_of_heads_are_those_of_the_first_block(normed):
    """Before a normalisation, where there is one between the heads and their projection."""
    model = vit(scale_attn_norm=normed)
    assert head_taps(model) == ["blocks.0.attn.norm:input"]
    values = collect(
        model, draw(2, 3, 32, 32), [*head_taps(model), "blocks.0.norm1", "blocks.0.attn.attn_drop"]
    )
    v = model.blocks[0].attn.qkv(values["blocks.0.norm1"])[..., 48:].unflatten(-1, (3, 8))
    expected = values["blocks.0.attn.attn_drop"] @ v.transpose(1, 2)
    found = head_contexts(values["blocks.0.attn.norm:input"], 3)
    assert torch.allclose(found, expected.transpose(0, 1), atol=1e-5)
    units = timm.create_model("resnet18", pretrained=False)
    assert head_taps(units) == [f"layer{1 + i // 2}.{i % 2}" for i in range(5)]


def test_cka_of_a_set_of_heads_is_that_of_their_concatenation():
    value, layer = draw(24, 17, 6 * 5), draw(24, 3, 8, 8, seed=1)
    layer[:, 0, :4, :4] += value[:, 1:, 7].unflatten(1, (4, 4))  # belongs to the second head
    metric = HeadCKA()
    contexts = head_contexts(value, 6, prefix=1)
    kept = {"vit": torch.stack([metric.reduce(one) for one in contexts])}
    metric.update(kept | {"resnet": metric.reduce(layer)})
    record = metric.compute()
    names = record["part"].values.tolist()
    assert names == [f"vit/{k}" for k in range(6)] + ["resnet"]
    subsets = [[0], [1], [2, 4], [0, 1, 5], range(6)]
    found = subset_cka(record["head_hsic"].values.sum(0), subsets, [6])
    assert found.shape == (5, 1)
    for members, ours in zip(subsets, found[:, 0], strict=True):
        together = torch.cat([contexts[k] for k in members], dim=-1)
        assert ours == pytest.approx(cka(together, layer), abs=1e-6)
    assert found[1] > found[0] + 0.1


def test_pixels_averaged_over_windows():
    patches = draw(2, 5, 4, 4)
    assert torch.equal(window_means(patches, 1), patches)
    inner = patches[:, :, 0:3, 1:4].mean((2, 3))
    corner = patches[:, :, :2, :2].mean((2, 3))
    three = window_means(patches, 3)
    assert torch.allclose(three[:, :, 1, 2], inner, atol=1e-6)
    assert torch.allclose(three[:, :, 0, 0], corner, atol=1e-6)
    everything = patches.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)
    assert torch.allclose(window_means(patches, 7), everything, atol=1e-6)


def test_the_baseline_is_measured_in_the_same_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SEE_CACHE", str(tmp_path))
    taps = {"vit_untrained": head_taps, "resnet_untrained": ["stages.0.blocks.0"]}
    distances = AttentionDistance({"vit_untrained": attention_taps})
    heads = HeadCKA(taps)
    study = load_study("lab")
    record = measure(study, list(taps), [distances, heads], n_images=16, batch_size=8)
    parts = record["part"].values.tolist()
    assert parts[:6] == [f"vit_untrained/blocks.0.attn.norm:input/{head}" for head in range(6)]
    assert parts[6] == "resnet_untrained/stages.0.blocks.0"
    assert parts[7:] == [f"pixels/{window}" for window in range(1, 16, 2)]
    assert set(record["role"].values) == {"vit_untrained"}
    assert record.sizes["tap"] == 8
    model = study.model("resnet_untrained")
    pixels = study.images(16).pixels
    layer = collect(model, study.to_input(pixels, "resnet_untrained"), ["stages.0.blocks.0"])
    own = torch.nn.functional.pixel_unshuffle(pixels.float(), 4)
    single = measure(study, list(taps), [distances, heads], n_images=16, batch_size=16)
    found = subset_cka(single["head_hsic"].values.sum(0), [[7]], [6])
    assert found.item() == pytest.approx(cka(own, layer["stages.0.blocks.0"]), abs=1e-4)


def test_sliding_windows_go_from_local_to_global():
    windows = sliding_windows([3.0, 1.0, 4.0, 2.0], 2)
    assert [window.tolist() for window in windows] == [[1, 3], [3, 0], [0, 2]]
    assert len(sliding_windows([3.0, 1.0, 4.0, 2.0], 4)) == 1
