"""Rounding in the training loop against the reference quantisers of gguf."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from smolmoe.quantisation import fake_quantise, round_trip

TYPES = pytest.mark.parametrize(
    ("bits", "stored"), [(4, gguf.GGMLQuantizationType.Q4_0), (5, gguf.GGMLQuantizationType.Q5_0)]
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@TYPES
def test_as_gguf_rounds(bits: int, stored: gguf.GGMLQuantizationType) -> None:
    weight = torch.randn(64, 96) * torch.logspace(-6, 3, 64)[:, None]
    weight[3, :32] = 0
    packed = gguf.quants.quantize(weight.numpy(), stored)
    expected = gguf.quants.dequantize(packed, stored)
    np.testing.assert_array_equal(round_trip(weight, bits).numpy(), expected)


@TYPES
def test_rounding_twice_changes_nothing(bits: int, stored: gguf.GGMLQuantizationType) -> None:
    once = round_trip(torch.randn(64, 96), bits)
    assert torch.equal(round_trip(once, bits), once)


def test_gradient_passes_straight_through() -> None:
    weight = torch.randn(4, 32, requires_grad=True)
    factor = torch.randn(4, 32)
    (fake_quantise(weight, 4).float() * factor).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, factor, rtol=1e-2, atol=1e-2)
