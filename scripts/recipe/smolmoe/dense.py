"""The dense model: reading its GGUF, and its blocks in PyTorch.

Weights keep GGUF's layout. The rows of the query and key projections are stored for llama.cpp's rotation of adjacent
pairs, so nothing is permuted on the way in or out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a llama-architecture model."""

    n_layer: int
    width: int
    n_head: int
    n_head_kv: int
    head_dim: int
    ffn_width: int
    rms_eps: float
    rope_base: float

    @property
    def q_width(self) -> int:
        """Rows of the query projection."""
        return self.n_head * self.head_dim

    @property
    def kv_width(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.n_head_kv * self.head_dim

    @classmethod
    def from_gguf(cls, reader: gguf.GGUFReader) -> ModelShape:
        """Read the shape from the metadata.

        Raises:
            ValueError: the architecture is not llama, or a key is missing.
        """

        def value(key: str) -> int | float:
            field = reader.get_field(f"llama.{key}")
            if field is None:
                raise ValueError(f"no llama.{key} in the base's metadata: not a model of the llama architecture")
            return field.contents()

        width, n_head = int(value("embedding_length")), int(value("attention.head_count"))
        return cls(
            n_layer=int(value("block_count")),
            width=width,
            n_head=n_head,
            n_head_kv=int(value("attention.head_count_kv")),
            head_dim=width // n_head,
            ffn_width=int(value("feed_forward_length")),
            rms_eps=float(value("attention.layer_norm_rms_epsilon")),
            rope_base=float(value("rope.freq_base")),
        )


class DenseLayer(NamedTuple):
    """Weights of one layer; matrices are [rows, columns] and map columns to rows."""

    attn_norm: Tensor
    attn_qkv: Tensor
    """query, key and value projections, stacked: [q_width + 2 * kv_width, width]"""
    attn_output: Tensor
    ffn_norm: Tensor
    ffn_gate_up: Tensor
    """gate and up projections, stacked: [2 * ffn_width, width]"""
    ffn_down: Tensor
    """[width, ffn_width]"""

    def matrices_to(self, dtype: torch.dtype) -> DenseLayer:
        """The same layer with its matrices in another dtype; norm gains stay float32."""
        return DenseLayer(
            self.attn_norm,
            self.attn_qkv.to(dtype),
            self.attn_output.to(dtype),
            self.ffn_norm,
            self.ffn_gate_up.to(dtype),
            self.ffn_down.to(dtype),
        )


@dataclass(frozen=True)
class DenseModel:
    """The base model, float32. The embedding is the output head, too."""

    shape: ModelShape
    embedding: Tensor
    """[vocabulary, width]"""
    output_norm: Tensor
    layers: list[DenseLayer]


class Rotation(NamedTuple):
    """Rotary position angles, float32, each [length, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


class DenseBlockOutput(NamedTuple):
    """What a dense block leaves behind: the residual [b, l, width] and the FFN's input and output."""

    residual: Tensor
    ffn_input: Tensor
    ffn_output: Tensor


def load_dense(path: Path, device: torch.device) -> DenseModel:
    """Read a dense llama-architecture GGUF and dequantise it to float32 on `device`."""
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def weight(name: str) -> Tensor:
        tensor = stored[f"{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(device)

    shape = ModelShape.from_gguf(reader)
    layers = []
    for i in range(shape.n_layer):
        block = f"blk.{i}"
        layers.append(
            DenseLayer(
                attn_norm=weight(f"{block}.attn_norm"),
                attn_qkv=torch.cat([weight(f"{block}.attn_{part}") for part in "qkv"]),
                attn_output=weight(f"{block}.attn_output"),
                ffn_norm=weight(f"{block}.ffn_norm"),
                ffn_gate_up=torch.cat([weight(f"{block}.ffn_gate"), weight(f"{block}.ffn_up")]),
                ffn_down=weight(f"{block}.ffn_down"),
            )
        )
    return DenseModel(shape, weight("token_embd"), weight("output_norm"), layers)


def rotation(shape: ModelShape, length: int, device: torch.device) -> Rotation:
    """Angles of positions 0 to length - 1."""
    pairs = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float64)
    frequency = shape.rope_base ** (-pairs / shape.head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequency[None]
    return Rotation(angle.cos().float(), angle.sin().float())


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, float32 in and out."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def rotate(x: Tensor, rope: Rotation) -> Tensor:
    """Rotate adjacent pairs of x, [b, l, heads, head_dim]; returns float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos[None, :, None], rope.sin[None, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def attention(
    x: Tensor, attn_norm: Tensor, attn_qkv: Tensor, attn_output: Tensor, rope: Rotation, shape: ModelShape
) -> Tensor:
    """Causal attention branch: residual x, float32 [b, l, width], to the branch's output, float32, same shape.

    Products are computed in the dtype of the projections.
    """
    rows, length, _ = x.shape
    dtype = attn_qkv.dtype
    qkv = rms_norm(x, attn_norm, shape.rms_eps).to(dtype) @ attn_qkv.t()
    q, k, v = qkv.split([shape.q_width, shape.kv_width, shape.kv_width], -1)
    q = rotate(q.view(rows, length, shape.n_head, shape.head_dim), rope).to(dtype).transpose(1, 2)
    k = rotate(k.view(rows, length, shape.n_head_kv, shape.head_dim), rope).to(dtype).transpose(1, 2)
    v = v.view(rows, length, shape.n_head_kv, shape.head_dim).transpose(1, 2)
    group = shape.n_head // shape.n_head_kv
    mixed = functional.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True
    )
    return (mixed.transpose(1, 2).reshape(rows, length, shape.q_width) @ attn_output.t()).float()


def dense_block(x: Tensor, layer: DenseLayer, rope: Rotation, shape: ModelShape) -> DenseBlockOutput:
    """One dense layer on the residual x, float32 [b, l, width]."""
    x = x + attention(x, layer.attn_norm, layer.attn_qkv, layer.attn_output, rope, shape)
    ffn_input = rms_norm(x, layer.ffn_norm, shape.rms_eps).to(layer.ffn_gate_up.dtype)
    gate, up = (ffn_input @ layer.ffn_gate_up.t()).chunk(2, -1)
    ffn_output = (functional.silu(gate) * up) @ layer.ffn_down.t()
    return DenseBlockOutput(x + ffn_output.float(), ffn_input, ffn_output)
