"""What an architecture is to the generator, and how its tensors and metadata keys follow from that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .container import MetadataValue
from .layout import Block, Dims, ExpertLayout, SharedStyle, TensorSpec, blk, dense_ffn, experts, gqa, shared_experts

Keys = Callable[[Dims], Mapping[str, MetadataValue]]
Tensors = Callable[[Dims], list[TensorSpec]]

_NORMS = ("attn_norm.weight", "ffn_norm.weight")


def _nothing(_d: Dims, _i: int) -> list[TensorSpec]:
    return []


def _same_width(d: Dims, _i: int) -> int:
    return d.n_ff_exp


def _no_tensors(_d: Dims) -> list[TensorSpec]:
    return []


def _no_keys(_d: Dims) -> Mapping[str, MetadataValue]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """What one architecture needs.

    attention, extra: tensors of every block. norms: names of a block's vectors of n_embd values. keys: metadata without
    the `<architecture>.` prefix. experts_are_ff: `feed_forward_length` is the width of one expert. shared_count: the
    shared experts are announced by number, not by width. outside: tensors that belong to no block. mixers_alone: a
    block without experts has no FFN at all. latent: experts work on a projection of the residual. causal: False for
    models that look at all tokens of a batch and remember none. embeds: the result is embeddings, there is no output
    matrix. n_hashed: leading blocks whose experts follow from the token alone, without a router.
    """

    name: str
    attention: Block = field(default_factory=gqa)
    extra: Block = _nothing
    keys: Keys = _no_keys
    norms: tuple[str, ...] = _NORMS
    shared: SharedStyle = "none"
    shared_count: int = 0
    experts_are_ff: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    can_merge: bool = False
    can_drop_gate: bool = False
    can_scale: bool = False
    kv_heads: Literal["fewer", "all", "one"] = "fewer"
    dense_lead: int = 0
    moe_step: int = 1
    n_layer: int = 3
    n_expert_used: int = 2
    output_bias: bool = False
    output_norm: str | None = "output_norm"
    outside: Tensors = _no_tensors
    mixers_alone: bool = False
    dense_gate: bool = True
    latent: bool = False
    expert_width: Callable[[Dims, int], int] = _same_width
    causal: bool = True
    embeds: bool = False
    n_hashed: int = 0
    root_scaled_embedding: bool = False  # llama.cpp multiplies embeddings by the root of their length


def block_tensors(arch: Architecture, d: Dims, i: int, layout: ExpertLayout) -> list[TensorSpec]:
    """All tensors of block i, in the order a converter would write them."""
    out = [blk(i, name, (d.n_embd,), "bias" if name.endswith(".bias") else "norm") for name in arch.norms]
    out += arch.attention(d, i)
    out += arch.extra(d, i)
    if not d.has_experts(i):
        n_ff = d.n_ff_exp if arch.experts_are_ff else d.n_ff
        return out if arch.mixers_alone else out + dense_ffn(d, i, n_ff, gate=arch.dense_gate)
    out.append(blk(i, "ffn_gate_inp.weight", (d.n_embd, d.n_expert), "router"))
    if arch.router_bias:
        out.append(blk(i, "ffn_gate_inp.bias", (d.n_expert,), "bias"))
    if i < arch.n_hashed:
        out.append(blk(i, "ffn_gate_tid2eid.weight", (d.n_expert_used, d.n_vocab), "expert_ids", d.n_expert))
    elif arch.selection_bias:
        out.append(blk(i, "exp_probs_b.bias", (d.n_expert,), "bias"))
    out += experts(d, i, layout, d.n_latent if arch.latent else d.n_embd, arch.expert_width(d, i))
    out += shared_experts(d, i, arch.shared)
    if i >= d.n_layer:
        out.append(blk(i, "nextn.eh_proj.weight", (2 * d.n_embd, d.n_embd)))
        out += [blk(i, f"nextn.{n}.weight", (d.n_embd,), "norm") for n in ("enorm", "hnorm", "shared_head_norm")]
    return out


def model_tensors(arch: Architecture, d: Dims, layout: ExpertLayout) -> list[TensorSpec]:
    """All tensors of the model, in the order a converter would write them."""
    embedding_gain = 1 / math.sqrt(d.n_embd) if arch.root_scaled_embedding else 1.0
    out = [
        TensorSpec("token_embd.weight", (d.n_embd, d.n_vocab), "embedding", embedding_gain),
    ]
    if arch.output_norm is not None:
        out.append(TensorSpec(f"{arch.output_norm}.weight", (d.n_embd,), "norm"))
    if not arch.embeds:
        out.append(TensorSpec("output.weight", (d.n_embd, d.n_vocab), "output"))
    if arch.output_bias:
        out.append(TensorSpec("output_norm.bias", (d.n_embd,), "bias"))
        out.append(TensorSpec("output.bias", (d.n_vocab,), "output_bias"))
    out += arch.outside(d)
    for i in range(d.n_layer + d.n_mtp):
        out += block_tensors(arch, d, i, layout)
    return out


def model_keys(arch: Architecture, d: Dims) -> dict[str, MetadataValue]:
    """All metadata keys of the architecture, without the `<architecture>.` prefix."""
    keys: dict[str, MetadataValue] = {
        "context_length": 512,
        "embedding_length": d.n_embd,
        "block_count": d.n_layer + d.n_mtp,
        "feed_forward_length": d.n_ff_exp if arch.experts_are_ff else d.n_ff,
        "attention.head_count": d.n_head,
        "attention.head_count_kv": d.n_head_kv,
        "attention.key_length": d.head_dim,
        "attention.value_length": d.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": d.head_dim,
        "rope.freq_base": 10000.0,
        "expert_count": d.n_expert,
        "expert_used_count": d.n_expert_used,
        "expert_feed_forward_length": d.n_ff_exp,
    }
    if arch.shared_count:
        keys["expert_shared_count"] = arch.shared_count
    elif arch.shared != "none":
        keys["expert_shared_feed_forward_length"] = d.n_ff_shexp
    if arch.dense_lead:
        keys["leading_dense_block_count"] = d.n_dense_lead
    if d.n_mtp:
        keys["nextn_predict_layers"] = d.n_mtp
    return {**keys, **arch.keys(d)}
