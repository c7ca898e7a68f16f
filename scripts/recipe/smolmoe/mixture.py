"""The mixture-of-experts model: routing as in llama.cpp's build_moe_ffn, blocks, weights by their GGUF names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .config import WEIGHT_BITS, ExpertLayout
from .dense import ModelShape, Rotation, attention, rms_norm
from .quantisation import fake_quantise


class MoeLayer(NamedTuple):
    """Weights of one layer, float32, under their GGUF names.

    Expert matrices are stacked: rows (columns, for down) e * width to (e + 1) * width belong to expert e. While
    training, down is 1 / n_used of what the file holds, because the routing weights are scaled to sum to n_used.
    """

    attn_norm: Tensor
    attn_q: Tensor
    attn_k: Tensor
    attn_v: Tensor
    attn_output: Tensor
    ffn_norm: Tensor
    ffn_gate_inp: Tensor
    """the router, [n_expert, width]"""
    ffn_gate_exps: Tensor
    """[n_expert * expert width, width]"""
    ffn_up_exps: Tensor
    """[n_expert * expert width, width]"""
    ffn_down_exps: Tensor
    """[width, n_expert * expert width]"""


class Experts(NamedTuple):
    """Router and expert matrices of one layer, as in MoeLayer."""

    router: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class MoeModel:
    """The student. The embedding is the output head, too."""

    shape: ModelShape
    layout: ExpertLayout
    embedding: Tensor
    output_norm: Tensor
    layers: list[MoeLayer]

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """All weights under their GGUF names, in the file's order, shapes and scale."""
        layout, width = self.layout, self.shape.width

        def array(tensor: Tensor) -> NDArray[np.float32]:
            return np.ascontiguousarray(tensor.detach().float().cpu().numpy())

        tensors = {"token_embd.weight": array(self.embedding)}
        for i, layer in enumerate(self.layers):
            stacked = (layout.n_expert, layout.width, width)
            down = layer.ffn_down_exps * layout.n_used
            in_file = layer._replace(
                ffn_gate_exps=layer.ffn_gate_exps.reshape(stacked),
                ffn_up_exps=layer.ffn_up_exps.reshape(stacked),
                ffn_down_exps=down.reshape(width, layout.n_expert, layout.width).transpose(0, 1),
            )
            tensors |= {f"blk.{i}.{name}.weight": array(tensor) for name, tensor in in_file._asdict().items()}
        tensors["output_norm.weight"] = array(self.output_norm)
        return tensors


class Routing(NamedTuple):
    """A router's decision for each token; all [..., n_expert], float32."""

    weights: Tensor
    """sum to 1, zero for experts that are not used"""
    logits: Tensor
    used: Tensor
    """1 for the experts that are used, 0 for the others"""
    probabilities: Tensor
    """softmax over all experts"""


class MoeOutput(NamedTuple):
    """An expert FFN's output (a block's: the residual), its auxiliary losses (scalars) and each expert's load."""

    output: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    load: Tensor
    """share of tokens that use each expert, [n_expert], no gradient"""


def route(hidden: Tensor, router: Tensor, n_used: int) -> Routing:
    """Softmax over all experts, the n_used best, weights renormalised to sum to 1.

    Args:
        hidden: the router's input, [..., width].
        router: [n_expert, width], float32.
        n_used: experts per token.
    """
    logits = hidden.float() @ router.t()
    probabilities = torch.softmax(logits, -1)
    better = (logits.unsqueeze(-2) > logits.unsqueeze(-1)).sum(-1)
    used = (better < n_used).float()
    weights = probabilities * used
    return Routing(weights / weights.sum(-1, keepdim=True), logits, used, probabilities)


def experts_of(layer: MoeLayer) -> Experts:
    """The expert FFN's part of a layer."""
    return Experts(layer.ffn_gate_inp, layer.ffn_gate_exps, layer.ffn_up_exps, layer.ffn_down_exps)


def expert_ffn(hidden: Tensor, experts: Experts, layout: ExpertLayout, quantised: bool) -> MoeOutput:
    """Router and experts, as dense products with the unused experts' activations set to zero.

    Args:
        hidden: normed residual, [..., width], at least two dimensions.
        experts: float32 weights.
        layout: the experts' number and size.
        quantised: round the expert matrices as the file will hold them.

    Returns:
        `output` is bfloat16 and has the shape of `hidden`.
    """

    def matrix(weight: Tensor, name: str) -> Tensor:
        return fake_quantise(weight, WEIGHT_BITS[name] if quantised else None)

    routing = route(hidden, experts.router, layout.n_used)
    low = hidden.to(torch.bfloat16)
    gate = low @ matrix(experts.gate, "ffn_gate_exps").t()
    up = low @ matrix(experts.up, "ffn_up_exps").t()
    weights = (routing.weights * layout.n_used).to(torch.bfloat16)
    activation = (functional.silu(gate) * up).unflatten(-1, (layout.n_expert, layout.width)) * weights.unsqueeze(-1)
    output = activation.flatten(-2) @ matrix(experts.down, "ffn_down_exps").t()
    tokens = tuple(range(hidden.dim() - 1))
    load = routing.used.mean(tokens).detach()
    balance = (layout.n_expert / layout.n_used) * (load * routing.probabilities.mean(tokens)).sum()
    z = torch.logsumexp(routing.logits, -1).square().mean()
    return MoeOutput(output, balance, z, load)


def moe_attention(x: Tensor, layer: MoeLayer, rope: Rotation, shape: ModelShape) -> Tensor:
    """The attention branch of an MoE layer with its quantised weights; see `dense.attention`."""
    q, k, v, output = (
        fake_quantise(getattr(layer, name), WEIGHT_BITS[name]) for name in ("attn_q", "attn_k", "attn_v", "attn_output")
    )
    return attention(x, layer.attn_norm, torch.cat([q, k, v]), output, rope, shape)


def moe_block(x: Tensor, layer: MoeLayer, rope: Rotation, shape: ModelShape, layout: ExpertLayout) -> MoeOutput:
    """One MoE layer with its quantised weights on the residual x, float32 [b, l, width].

    `output` is the new residual, float32.
    """
    x = x + moe_attention(x, layer, rope, shape)
    ffn = expert_ffn(rms_norm(x, layer.ffn_norm, shape.rms_eps), experts_of(layer), layout, quantised=True)
    return MoeOutput(x + ffn.output.float(), ffn.balance_loss, ffn.z_loss, ffn.load)
