"""Rounding weights in the training loop as the exported file will hold them."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""weights that share a scale in Q4_0 and Q5_0"""


def round_trip(weight: Tensor, bits: int) -> Tensor:
    """A weight's values after ggml's reference quantisation to Q4_0 (bits = 4) or Q5_0 (bits = 5) and back.

    Args:
        weight: float32, its size a multiple of BLOCK.
        bits: bits per weight; the scale of a block is a float16.

    Returns:
        float32, the same shape, no gradient.
    """
    blocks = weight.detach().reshape(-1, BLOCK)
    largest, smallest = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    half = 2 ** (bits - 1)
    # the weight of the largest magnitude, sign kept, becomes the most negative code
    scale = torch.where(largest >= -smallest, largest, smallest) / -half
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
    codes = torch.clamp(torch.floor(blocks * inverse + (half + 0.5)), 0, 2 * half - 1) - half
    return (codes * scale.half().float()).reshape(weight.shape)


def fake_quantise(weight: Tensor, bits: int | None) -> Tensor:
    """The rounded weight as bfloat16, with the gradient passed straight through to `weight` (float32).

    Without bits the weight is only cast.
    """
    if bits is None:
        return weight.to(torch.bfloat16)
    return (weight + (round_trip(weight, bits) - weight.detach())).to(torch.bfloat16)
