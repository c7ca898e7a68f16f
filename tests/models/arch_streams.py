"""Architectures that keep several streams of the residual, with sparse attention."""

from __future__ import annotations

from .arch_common import mla_keys, sigmoid_router
from .arch_sparse import dsa_keys
from .architecture import Architecture
from .container import MetadataValue
from .layout import MLA, Dims, TensorSpec, blk, gqa, mla
from .recurrent import CONV, LINEAR_HEAD, alternate, delta_net, delta_net_keys, heads_by_block, is_attention, kimi_delta
from .streams import (
    INDEX_HEAD,
    INDEX_HEADS,
    LOW_RANK,
    STREAMS,
    index_keys,
    latent_indexer,
    low_rank_streams,
    mixed_streams,
    plain_indexer,
    stream_head,
    stream_keys,
)

_EVERY = 2
_N_MIX = (2 + STREAMS) * STREAMS
_SQRT_SOFTPLUS = 4  # value of the key expert_gating_func
_COMPRESSION = (4, 128, 0)  # tokens in one compressed key, block by block in turn; 0: not compressed
_O_LORA = 32
_V4_HEAD = 64  # llama.cpp rotates 64 values at once


def _mla_gate(d: Dims, i: int) -> list[TensorSpec]:
    return [blk(i, "attn_gate.weight", (d.n_embd, d.n_head * MLA.value))]


def _hy_v4_attention(d: Dims, i: int) -> list[TensorSpec]:
    sinks = blk(i, "attn_sinks.weight", (d.n_head,), "bias")
    indexer = latent_indexer(d, i) if i % 2 == 0 else []  # the others use the choice of the block before
    streams = mixed_streams(d, i, n_mix=2 * STREAMS, n_scale=2)
    return [*mla(q_lora=True, absorbed=True)(d, i), sinks, *_mla_gate(d, i), *indexer, *streams]


def _hy_v4(d: Dims) -> dict[str, MetadataValue]:
    return {
        **dsa_keys(d),
        **stream_keys(magnitude=2.0),
        "swiglu_clamp_exp": 0.5,
        "attention.indexer.types": [int(i % 2 == 0) for i in range(d.n_layer)],
    }


def _compression(block: int) -> int:
    return _COMPRESSION[block % len(_COMPRESSION)]


def _v4_attention(d: Dims, i: int) -> list[TensorSpec]:
    out = [
        blk(i, "attn_sinks.weight", (d.n_head,), "bias"),
        blk(i, "attn_q_a.weight", (d.n_embd, MLA.q_lora)),
        blk(i, "attn_q_a_norm.weight", (MLA.q_lora,), "norm"),
        blk(i, "attn_q_b.weight", (MLA.q_lora, d.n_head * _V4_HEAD)),
        blk(i, "attn_kv.weight", (d.n_embd, _V4_HEAD)),
        blk(i, "attn_kv_a_norm.weight", (_V4_HEAD,), "norm"),
        blk(i, "attn_output_a.weight", (d.n_head * _V4_HEAD, _O_LORA, 1)),
        blk(i, "attn_output_b.weight", (_O_LORA, d.n_embd)),
        *mixed_streams(d, i, n_mix=_N_MIX, n_scale=3),
    ]
    ratio = _compression(i)
    if ratio:
        out += _compressor(d, i, "attn_compressor", _V4_HEAD, ratio)
    if ratio == 4:  # short enough to be chosen from
        out += [
            blk(i, "indexer.proj.weight", (d.n_embd, INDEX_HEADS)),
            blk(i, "indexer.attn_q_b.weight", (MLA.q_lora, INDEX_HEADS * INDEX_HEAD)),
            *_compressor(d, i, "indexer_compressor", INDEX_HEAD, ratio),
        ]
    return out


def _compressor(d: Dims, i: int, prefix: str, size: int, ratio: int) -> list[TensorSpec]:
    wide = size * (2 if ratio == 4 else 1)  # short ones overlap
    return [
        blk(i, f"{prefix}_kv.weight", (d.n_embd, wide)),
        blk(i, f"{prefix}_gate.weight", (d.n_embd, wide)),
        blk(i, f"{prefix}_ape.weight", (wide, ratio), "kernel"),
        blk(i, f"{prefix}_norm.weight", (size,), "norm"),
    ]


def _v4(d: Dims) -> dict[str, MetadataValue]:
    return {
        **index_keys(),
        **stream_keys(sinkhorn_iterations=2),
        "attention.q_lora_rank": MLA.q_lora,
        "attention.sliding_window": 8,
        "attention.output_group_count": 1,
        "attention.output_lora_rank": _O_LORA,
        "attention.compress_rope_freq_base": 160000.0,
        "attention.compress_ratios": [_compression(i) for i in range(d.n_layer)],
        "attention.key_length": _V4_HEAD,
        "attention.value_length": _V4_HEAD,
        "rope.dimension_count": _V4_HEAD // 2,
        "hash_layer_count": 0,
        "expert_weights_scale": 1.5,
        "expert_weights_norm": True,
        "expert_gating_func": _SQRT_SOFTPLUS,
        "swiglu_clamp_exp": 0.5,
    }


def _glm5_attention(d: Dims, i: int) -> list[TensorSpec]:
    return [
        *mla(q_lora=True, absorbed=True, rope=0)(d, i),
        *latent_indexer(d, i),
        blk(i, "indexer_compressor_gate.weight", (d.n_embd, INDEX_HEAD)),
        blk(i, "indexer_compressor_ape.weight", (INDEX_HEAD, 4), "kernel"),
    ]


def _glm5_streams(d: Dims, i: int) -> list[TensorSpec]:
    return mixed_streams(d, i, n_mix=_N_MIX, n_scale=3)


def _glm5(d: Dims) -> dict[str, MetadataValue]:
    return {
        **mla_keys(d, absorbed=True, rope=0),
        **heads_by_block(d, _EVERY),
        **sigmoid_router(d),
        **index_keys(),
        **stream_keys(sinkhorn_iterations=2),
        "attention.q_lora_rank": MLA.q_lora,
        "attention.indexer.kpool": 4,
        "attention.indexer.types": [int(is_attention(i, _EVERY)) for i in range(d.n_layer)],
        "ssm.conv_kernel": CONV,
        "kda.head_dim": LINEAR_HEAD,
        "swiglu_clamp_exp": 0.5,
    }


def _qwen4_attention(d: Dims, i: int) -> list[TensorSpec]:
    return gqa(qk_norm="head", gate="query")(d, i) + plain_indexer(d, i, INDEX_HEADS)


def _qwen4_streams(d: Dims, i: int) -> list[TensorSpec]:
    return low_rank_streams(d, i, "attn") + low_rank_streams(d, i, "ffn")


def _qwen4(d: Dims) -> dict[str, MetadataValue]:
    quarter = d.head_dim // 4
    return {
        **delta_net_keys(_EVERY),
        **index_keys(),
        **stream_keys(low_rank=LOW_RANK),
        "rope.dimension_sections": [quarter, d.head_dim // 2 - quarter, 0, 0],
        "attention.compress_ratios": [4] * d.n_layer,
    }


STREAMED: dict[str, Architecture] = {
    "hy_v4": Architecture(
        "hy_v4",
        _hy_v4_attention,
        outside=stream_head,
        keys=_hy_v4,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
        dense_lead=1,
    ),
    "deepseek4": Architecture(
        "deepseek4",
        _v4_attention,
        outside=stream_head,
        keys=_v4,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
    ),
    "deepseek4/hashed": Architecture(
        "deepseek4",
        _v4_attention,
        outside=stream_head,
        keys=lambda d: {**_v4(d), "hash_layer_count": 1},
        shared="plain",
        shared_count=1,
        selection_bias=True,
        n_hashed=1,
        kv_heads="one",
    ),
    "glm5-next": Architecture(
        "glm5-next",
        alternate(kimi_delta(low_rank_decay=True, low_rank_gate=True, flat_decay=True), _glm5_attention, _EVERY),
        extra=_glm5_streams,
        keys=_glm5,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
        dense_lead=1,
        n_layer=4,
    ),
    "qwen4exp": Architecture(
        "qwen4exp",
        alternate(delta_net(joined=False), _qwen4_attention, _EVERY),
        norms=(),
        output_norm=None,
        extra=_qwen4_streams,
        outside=lambda d: low_rank_streams(d, None, "output"),
        keys=_qwen4,
        shared="gated",
        can_merge=True,
    ),
}
