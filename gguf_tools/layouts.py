"""The tensors and metadata keys that llama.cpp wants for a Shape (its src/models/*.cpp).

A tensor's shape is written as ggml writes it, `ne[0]` first: a matrix from n_in to n_out values is (n_in, n_out), and
the experts of one projection are (n_in, n_out, n_expert).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gguf_tools.shapes import KeyValue, Mla, Shape

Role = Literal["matrix", "embedding", "output", "expert", "router", "norm", "bias"]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to make, and what it is for, which decides its type and values."""

    name: str
    shape: tuple[int, ...]
    role: Role


def model_tensors(s: Shape) -> Iterator[TensorSpec]:
    """All tensors of the model, in the order a converter writes them."""
    yield TensorSpec("token_embd.weight", (s.n_embd, s.n_vocab), "embedding")
    for block in range(s.n_layer):
        for name, shape, role in _block(s, block):
            yield TensorSpec(f"blk.{block}.{name}", shape, role)
    yield TensorSpec("output_norm.weight", (s.n_embd,), "norm")
    yield TensorSpec("output.weight", (s.n_embd, s.n_vocab), "output")


_Parts = Iterator[tuple[str, tuple[int, ...], Role]]


def _block(s: Shape, block: int) -> _Parts:
    yield "attn_norm.weight", (s.n_embd,), "norm"
    yield from _grouped_attention(s) if s.mla is None else _latent_attention(s, s.mla)
    second = "post_attention_norm" if s.architecture == "gpt-oss" else "ffn_norm"
    yield f"{second}.weight", (s.n_embd,), "norm"
    if block < s.n_dense_lead:
        yield from _ffn(s, s.n_ff, "")
    else:
        yield from _experts(s)


def _grouped_attention(s: Shape) -> _Parts:
    n_q, n_kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    for name, n_in, n_out in (
        ("q", s.n_embd, n_q),
        ("k", s.n_embd, n_kv),
        ("v", s.n_embd, n_kv),
        ("output", n_q, s.n_embd),
    ):
        yield f"attn_{name}.weight", (n_in, n_out), "matrix"
        if s.architecture == "gpt-oss":
            yield f"attn_{name}.bias", (n_out,), "bias"
    if s.architecture == "gpt-oss":
        yield "attn_sinks.weight", (s.n_head,), "bias"
    if s.architecture == "qwen3moe":
        yield "attn_q_norm.weight", (s.head_dim,), "norm"
        yield "attn_k_norm.weight", (s.head_dim,), "norm"


def _latent_attention(s: Shape, mla: Mla) -> _Parts:
    yield "attn_q.weight", (s.n_embd, s.n_head * (mla.nope + mla.rope)), "matrix"
    yield "attn_kv_a_mqa.weight", (s.n_embd, mla.kv_lora + mla.rope), "matrix"
    yield "attn_kv_a_norm.weight", (mla.kv_lora,), "norm"
    yield "attn_k_b.weight", (mla.nope, mla.kv_lora, s.n_head), "matrix"
    yield "attn_v_b.weight", (mla.kv_lora, mla.value, s.n_head), "matrix"
    yield "attn_output.weight", (s.n_head * mla.value, s.n_embd), "matrix"


def _ffn(s: Shape, n_ff: int, suffix: str) -> _Parts:
    yield f"ffn_gate{suffix}.weight", (s.n_embd, n_ff), "matrix"
    yield f"ffn_up{suffix}.weight", (s.n_embd, n_ff), "matrix"
    yield f"ffn_down{suffix}.weight", (n_ff, s.n_embd), "matrix"


def _experts(s: Shape) -> _Parts:
    yield "ffn_gate_inp.weight", (s.n_embd, s.n_expert), "router"
    yield "ffn_gate_exps.weight", (s.n_embd, s.n_ff_exp, s.n_expert), "expert"
    yield "ffn_up_exps.weight", (s.n_embd, s.n_ff_exp, s.n_expert), "expert"
    yield "ffn_down_exps.weight", (s.n_ff_exp, s.n_embd, s.n_expert), "expert"
    if s.architecture == "gpt-oss":
        yield "ffn_gate_inp.bias", (s.n_expert,), "bias"
        yield "ffn_gate_exps.bias", (s.n_ff_exp, s.n_expert), "bias"
        yield "ffn_up_exps.bias", (s.n_ff_exp, s.n_expert), "bias"
        yield "ffn_down_exps.bias", (s.n_embd, s.n_expert), "bias"
    if s.n_shared:
        yield from _ffn(s, s.n_shared * s.n_ff_exp, "_shexp")


def model_keys(s: Shape) -> dict[str, KeyValue]:
    """Metadata without the `<architecture>.` prefix."""
    keys: dict[str, KeyValue] = {
        "block_count": s.n_layer,
        "context_length": s.n_context,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.layer_norm_rms_epsilon": s.epsilon,
        "rope.freq_base": s.rope_base,
        "expert_count": s.n_expert,
        "expert_used_count": s.n_expert_used,
    }
    if s.architecture != "llama":
        keys["expert_feed_forward_length"] = s.n_ff_exp
    if s.n_dense_lead:
        keys["leading_dense_block_count"] = s.n_dense_lead
    if s.n_shared:
        keys["expert_shared_count"] = s.n_shared
    if s.mla is None:
        keys |= {
            "attention.key_length": s.head_dim,
            "attention.value_length": s.head_dim,
            "rope.dimension_count": s.head_dim,
        }
    else:
        keys |= {
            "attention.q_lora_rank": 0,  # says "no compressed query" at any depth; llama.cpp knows real ones by theirs
            "attention.kv_lora_rank": s.mla.kv_lora,
            "attention.key_length": s.mla.kv_lora + s.mla.rope,
            "attention.value_length": s.mla.kv_lora,
            "attention.key_length_mla": s.mla.nope + s.mla.rope,
            "attention.value_length_mla": s.mla.value,
            "rope.dimension_count": s.mla.rope,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": False,
            "expert_gating_func": 1,  # softmax
        }
    return {**keys, **s.keys}
