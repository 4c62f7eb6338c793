"""Weights on disk: matrices in 8 bits, all else in 16, and a model card beside them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def write(model: nn.Module, card: dict, path: Path) -> None:
    """Write weights and then, beside them, their model card (JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file(pack(model.state_dict()), partial)
    partial.replace(path)
    partial.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    partial.replace(path.with_suffix(".json"))


def read(model: nn.Module, path: Path) -> nn.Module:
    """Load written weights into a float32 model, strictly."""
    model.load_state_dict(unpack(load_file(path)))
    return model


def pack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with a scale per output channel (``<name>.scale``), all else in 16 bits."""
    packed = {}
    for name, value in weights.items():
        value = value.detach().cpu().float()
        if value.ndim > 1 and len(value) > 1:
            scale = value.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
            packed[f"{name}.scale"] = scale
            packed[name] = (value / _per_channel(scale, value)).round().to(torch.int8)
        else:
            packed[name] = value.half().contiguous()
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights that :func:`pack` wrote."""
    return {
        name: value.float() * _per_channel(packed[f"{name}.scale"], value)
        if value.dtype == torch.int8
        else value.float()
        for name, value in packed.items()
        if not name.endswith(".scale")
    }


def _per_channel(scale: Tensor, weights: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weights.ndim - 1))
