"""The dense model's decoding step for many rows in lockstep, with a static KV cache."""

from __future__ import annotations

import os

import torch
import triton
from torch import Tensor

from . import kernels
from .dense import DenseModel, Rotation, dense_block, rms_norm, rotation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton kernels run in its interpreter, on the CPU: very slow, for checks"""

_LEAST_DOT = 16
_KEY_BLOCK = 64


def decoding_device() -> torch.device:
    """The CPU where Triton's interpreter runs, else the GPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")


def decoding_dtype() -> torch.dtype:
    """Dtype of weights and activations."""
    return torch.float32 if INTERPRETED else torch.bfloat16


class LockstepDecoder:
    """All rows are at the same position; one call computes their next logits.

    Buffers are allocated once, so that a call can be captured in a CUDA graph.
    """

    def __init__(self, model: DenseModel, rows: int, length: int) -> None:
        device, dtype = decoding_device(), decoding_dtype()
        shape = model.shape
        self._shape = shape
        self._rows = rows
        self._length = length
        self._embedding = model.embedding.to(dtype)
        self._output_norm = model.output_norm
        self._layers = [layer.matrices_to(dtype) for layer in model.layers]
        self._rope = rotation(shape, length, device)

        def buffer(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*size, device=device, dtype=dtype)

        cache = (rows, shape.n_head_kv, length, shape.head_dim)
        self._keys = [buffer(*cache) for _ in model.layers]
        self._values = [buffer(*cache) for _ in model.layers]
        self._residual = buffer(rows, shape.width, dtype=torch.float32)
        self._normed = buffer(rows, shape.width)
        self._queries = buffer(rows, shape.q_width)
        self._mixed = buffer(rows, shape.q_width)
        self._activation = buffer(rows, shape.ffn_width)

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after `token`, int64 [rows], at `position`, int64 [1]; fills the cache there."""
        shape = self._shape
        self._residual.copy_(self._embedding[token])
        branch: Tensor | None = None
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            self._add_and_norm(branch, layer.attn_norm)
            self._attend(self._normed @ layer.attn_qkv.t(), keys, values, position)
            self._add_and_norm(self._mixed @ layer.attn_output.t(), layer.ffn_norm)
            gate_up = self._normed @ layer.ffn_gate_up.t()
            kernels.gated_silu[(self._rows,)](
                gate_up, self._activation, width=shape.ffn_width, block=triton.next_power_of_2(shape.ffn_width)
            )
            branch = self._activation @ layer.ffn_down.t()
        self._add_and_norm(branch, self._output_norm)
        return self._normed @ self._embedding.t()

    def reference_logits(self, tokens: Tensor) -> Tensor:
        """The last position's logits by the plain forward pass over `tokens`, int64 [n, length]."""
        rope = Rotation(*(table[: tokens.shape[1]] for table in self._rope))
        residual = self._embedding[tokens].float()
        for layer in self._layers:
            residual = dense_block(residual, layer, rope, self._shape).residual
        hidden = rms_norm(residual[:, -1], self._output_norm, self._shape.rms_eps)
        return hidden.to(self._embedding.dtype) @ self._embedding.t()

    def _add_and_norm(self, branch: Tensor | None, gain: Tensor) -> None:
        width = self._shape.width
        kernels.add_and_norm[(self._rows,)](
            self._residual,
            self._normed if branch is None else branch,
            gain,
            self._normed,
            add=branch is not None,
            width=width,
            block=triton.next_power_of_2(width),
            eps=self._shape.rms_eps,
        )

    def _attend(self, qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
        shape = self._shape
        kernels.rotate_and_cache[(self._rows,)](
            qkv,
            self._rope.cos,
            self._rope.sin,
            position,
            keys,
            values,
            self._queries,
            length=self._length,
            n_head=shape.n_head,
            n_head_kv=shape.n_head_kv,
            head_dim=shape.head_dim,
            pair_block=triton.next_power_of_2((shape.q_width + shape.kv_width) // 2),
            value_block=triton.next_power_of_2(shape.kv_width),
        )
        group = shape.n_head // shape.n_head_kv
        kernels.attend[(self._rows * shape.n_head_kv,)](
            self._queries,
            keys,
            values,
            self._mixed,
            position,
            length=self._length,
            group=group,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            group_block=max(_LEAST_DOT, triton.next_power_of_2(group)),
            key_block=_KEY_BLOCK,
        )
