"""Golden vectors of the published implementations, and how close is equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = [SHARED / "golden", Path(__file__).parent / "golden"]


class Golden:
    """One file of golden vectors: `config`, and `tensors("state.")` with the prefix taken off."""

    def __init__(self, path: Path):
        with safe_open(path, framework="pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
            self.all = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)

    def __getitem__(self, key: str) -> Tensor:
        return self.all[key]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.all.items() if key.startswith(prefix)}


def load_golden(name: str) -> Golden:
    for folder in GOLDEN:
        if (path := folder / f"{name}.safetensors").is_file():
            return Golden(path)
    pytest.skip(f"golden vectors {name} are in none of {', '.join(map(str, GOLDEN))}")


def as_map(vectors):
    """The input as (B, C, h, w), which the official Segmenter has as tokens."""
    if "input.x" in vectors.all:
        return vectors["input.x"]
    tokens, (h, w) = vectors["input.tokens"], vectors.config["grid"]
    return tokens.mT.reshape(*tokens.mT.shape[:2], h, w).contiguous()  # (B, N, C) -> (B, C, h, w)


def levels(vectors):
    """The four maps that go into a SenFormer."""
    return [vectors[f"input.level_{i}"] for i in range(4)]


def assert_parity(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The golden README's measure: max|difference| / max|reference tensor|."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()) + 1e-12)


def assert_best_class(labels, scores):
    """Labels are the argmax of scores `(B, K, H, W)` but for pixels whose best two scores differ by rounding alone."""
    same = labels == scores.argmax(1)
    best, second = scores.topk(2, dim=1).values.unbind(1)
    assert same[best - second > 1e-5].all()
    assert same.float().mean() > 0.99
