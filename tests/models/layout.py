"""Sizes of a generated model and the building blocks of its tensors.

A shape is written as ggml writes it, `ne[0]` first: a matrix that maps n_in values to n_out values is (n_in, n_out),
and the experts of one projection are (n_in, n_out, n_expert).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "matrix",
    "kernel",
    "expert",
    "router",
    "embedding",
    "output",
    "norm",
    "bias",
    "output_bias",
    "scale",
    "decay",
    "expert_ids",
]
SharedStyle = Literal["none", "plain", "gated", "ungated"]


@dataclass(frozen=True)
class Dims:
    """Sizes of one model. All counts are of elements, heads, layers or experts."""

    n_layer: int  # blocks that llama.cpp computes
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int  # width of dense FFNs
    n_ff_exp: int  # width of one expert
    n_ff_shexp: int  # width of the shared experts together, 0 without them
    n_expert: int
    n_expert_used: int
    n_dense_lead: int  # leading blocks without experts
    moe_step: int  # after the leading ones, every moe_step-th block has experts
    n_mtp: int  # blocks after the last one for multi-token prediction, which llama.cpp skips by default
    n_vocab: int

    @property
    def n_latent(self) -> int:
        """Values of the projection that experts work on, where they do not work on the residual itself."""
        return self.n_embd if self.n_embd % 256 == 0 else self.n_embd - 32

    def has_experts(self, block: int) -> bool:
        """Whether this block's FFN is made of experts. Blocks for multi-token prediction are."""
        return block >= self.n_dense_lead and (block + 1) % self.moe_step == 0


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to write: its name, its shape (`ne[0]` first), what it is for, which decides its values, and a factor
    on them where an architecture scales its activations unusually.

    A kernel is a matrix that is never quantised, a decay a vector of negative values; expert_ids are different ids of
    experts in every row.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    gain: float = 1.0


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of a model are stored."""

    merged_gate_up: bool = False  # one tensor ffn_gate_up_exps for gate and up
    gate: bool = True  # False: an FFN of up and down only
    bias: bool = False
    scales: bool = False  # one factor per expert and projection (of a merged gate and up llama.cpp knows none)


Block = Callable[[Dims, int], list[TensorSpec]]


def blk(block: int, suffix: str, shape: tuple[int, ...], role: Role = "matrix", gain: float = 1.0) -> TensorSpec:
    """A tensor of one block; `suffix` is the name after `blk.N.`."""
    return TensorSpec(f"blk.{block}.{suffix}", shape, role, gain)


def gqa(
    *,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: Literal["none", "head", "full"] = "none",
    fused: bool = False,
    sinks: bool = False,
    shared_kv_value: bool = False,
    gate: Literal["none", "head", "full", "query"] = "none",
) -> Block:
    """Attention with grouped queries.

    bias: query, key and value have biases. qk_norm: one norm per head size or over all heads. fused: one tensor for
    query, key and value. sinks: one learned sink per head. shared_kv_value: the keys serve as values. gate: what gates
    the output: one value for each head, or one for each of its values, which may also come from a query twice as wide.
    """

    def tensors(d: Dims, i: int) -> list[TensorSpec]:
        n_q, n_kv = d.n_head * d.head_dim, d.n_head_kv * d.head_dim
        sizes = {"qkv": n_q + 2 * n_kv} if fused else {"q": n_q * (1 + (gate == "query")), "k": n_kv, "v": n_kv}
        if shared_kv_value:
            del sizes["v"]
        out = [blk(i, f"attn_{part}.weight", (d.n_embd, size)) for part, size in sizes.items()]
        if bias:
            out += [blk(i, f"attn_{part}.bias", (size,), "bias") for part, size in sizes.items()]
        out.append(blk(i, "attn_output.weight", (n_q, d.n_embd)))
        if out_bias:
            out.append(blk(i, "attn_output.bias", (d.n_embd,), "bias"))
        if qk_norm != "none":
            per_head = qk_norm == "head"
            out.append(blk(i, "attn_q_norm.weight", (d.head_dim if per_head else n_q,), "norm"))
            out.append(blk(i, "attn_k_norm.weight", (d.head_dim if per_head else n_kv,), "norm"))
        if sinks:
            out.append(blk(i, "attn_sinks.weight", (d.n_head,), "bias"))
        if gate in ("head", "full"):
            out.append(blk(i, "attn_gate.weight", (d.n_embd, d.n_head if gate == "head" else n_q)))
        return out

    return tensors


@dataclass(frozen=True)
class MlaDims:
    """Sizes of multi-head latent attention, chosen small."""

    q_lora: int = 32
    kv_lora: int = 32
    nope: int = 16
    rope: int = 16
    value: int = 24


MLA = MlaDims()


def mla(*, q_lora: bool, absorbed: bool, rope: int = MLA.rope) -> Block:
    """Multi-head latent attention. absorbed: key and value up-projections as two tensors per head, as llama.cpp wants
    them today, else the one `attn_kv_b` of older files. rope: values of a key that turn with the position."""

    def tensors(d: Dims, i: int) -> list[TensorSpec]:
        n_q = d.n_head * (MLA.nope + rope)
        if q_lora:
            out = [
                blk(i, "attn_q_a.weight", (d.n_embd, MLA.q_lora)),
                blk(i, "attn_q_a_norm.weight", (MLA.q_lora,), "norm"),
                blk(i, "attn_q_b.weight", (MLA.q_lora, n_q)),
            ]
        else:
            out = [blk(i, "attn_q.weight", (d.n_embd, n_q))]
        out += [
            blk(i, "attn_kv_a_mqa.weight", (d.n_embd, MLA.kv_lora + rope)),
            blk(i, "attn_kv_a_norm.weight", (MLA.kv_lora,), "norm"),
        ]
        if absorbed:
            out += [
                blk(i, "attn_k_b.weight", (MLA.nope, MLA.kv_lora, d.n_head)),
                blk(i, "attn_v_b.weight", (MLA.kv_lora, MLA.value, d.n_head)),
            ]
        else:
            out.append(blk(i, "attn_kv_b.weight", (MLA.kv_lora, d.n_head * (MLA.nope + MLA.value))))
        return [*out, blk(i, "attn_output.weight", (d.n_head * MLA.value, d.n_embd))]

    return tensors


def dense_ffn(d: Dims, i: int, n_ff: int, suffix: str = "", *, gate: bool = True) -> list[TensorSpec]:
    """A dense FFN of width n_ff; suffix `_shexp` makes it the shared experts. gate: False for up and down only."""
    return [
        *([blk(i, f"ffn_gate{suffix}.weight", (d.n_embd, n_ff))] if gate else []),
        blk(i, f"ffn_up{suffix}.weight", (d.n_embd, n_ff)),
        blk(i, f"ffn_down{suffix}.weight", (n_ff, d.n_embd)),
    ]


def shared_experts(d: Dims, i: int, style: SharedStyle) -> list[TensorSpec]:
    """The experts that work on every token. gated: weighted by a sigmoid of their own router; ungated: an FFN of up and
    down only."""
    if style == "none" or d.n_ff_shexp == 0:
        return []
    out = dense_ffn(d, i, d.n_ff_shexp, "_shexp", gate=style != "ungated")
    return [*out, blk(i, "ffn_gate_inp_shexp.weight", (d.n_embd,), "router")] if style == "gated" else out


def experts(d: Dims, i: int, layout: ExpertLayout, n_in: int, n_ff: int) -> list[TensorSpec]:
    """The expert tensors of one block, with their biases and scales. n_in: values that an expert takes and gives. n_ff:
    its width."""
    if layout.merged_gate_up:
        inward = {"gate_up": 2 * n_ff}
    elif layout.gate:
        inward = {"gate": n_ff, "up": n_ff}
    else:
        inward = {"up": n_ff}
    out = [blk(i, f"ffn_{p}_exps.weight", (n_in, rows, d.n_expert), "expert") for p, rows in inward.items()]
    out.append(blk(i, "ffn_down_exps.weight", (n_ff, n_in, d.n_expert), "expert"))
    outputs = {**inward, "down": n_in}
    if layout.bias:
        out += [blk(i, f"ffn_{p}_exps.bias", (rows, d.n_expert), "bias") for p, rows in outputs.items()]
    if layout.scales:
        out += [blk(i, f"ffn_{p}_exps.scale", (d.n_expert,), "scale") for p in outputs if p != "gate_up"]
    return out
