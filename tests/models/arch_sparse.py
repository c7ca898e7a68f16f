"""Architectures whose attention looks at a chosen few of the tokens."""

from __future__ import annotations

from .arch_common import deepseek3_keys, sigmoid_router
from .arch_further import windows
from .architecture import Architecture
from .container import MetadataValue
from .layout import MLA, Dims, TensorSpec, blk, gqa, mla
from .streams import index_keys, latent_indexer, plain_indexer


def _dsa(d: Dims, i: int) -> list[TensorSpec]:
    return [*mla(q_lora=True, absorbed=True)(d, i), *latent_indexer(d, i)]


def dsa_keys(d: Dims) -> dict[str, MetadataValue]:
    """Of multi-head latent attention with an indexer."""
    return {**deepseek3_keys(d), **index_keys()}


def _note_attention(d: Dims, i: int) -> list[TensorSpec]:
    more = [
        blk(i, "attn_k_norm.weight", (MLA.rope,), "norm"),
        blk(i, "attn_gate.weight", (d.n_embd, d.n_head)),
    ]
    windowed = i % 2 == 1
    return mla(q_lora=True, absorbed=True)(d, i) + more + ([] if windowed else latent_indexer(d, i))


def _note(d: Dims) -> dict[str, MetadataValue]:
    sizes = ("attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla")
    lengths = ("attention.key_length", "attention.value_length")
    keys = dsa_keys(d)
    return {
        **keys,
        **windows(d),
        **{f"{name}_swa": keys[name] for name in sizes + lengths},
        "rope.freq_base_swa": 10000.0,
        "attention.indexer.types": [int(i % 2 == 0) for i in range(d.n_layer)],
    }


def _m3_attention(d: Dims, i: int) -> list[TensorSpec]:
    return gqa(qk_norm="head")(d, i) + (plain_indexer(d, i, d.n_head_kv) if d.has_experts(i) else [])


def _m3(d: Dims) -> dict[str, MetadataValue]:
    return {
        **sigmoid_router(d),
        **index_keys(n_head=d.n_head_kv, top_k=2),
        "attention.indexer.block_size": 4,
        "attention.indexer.local_blocks": 1,
        "rope.dimension_count": d.head_dim // 2,
    }


SPARSE: dict[str, Architecture] = {
    "deepseek32": Architecture(
        "deepseek32",
        _dsa,
        keys=dsa_keys,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
        dense_lead=1,
    ),
    "glm-dsa": Architecture(
        "glm-dsa",
        _dsa,
        keys=dsa_keys,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
        dense_lead=1,
    ),
    "dots3note": Architecture(
        "dots3note",
        _note_attention,
        keys=_note,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
        dense_lead=1,
    ),
    "minimax-m3": Architecture(
        "minimax-m3", _m3_attention, keys=_m3, shared="plain", shared_count=1, selection_bias=True, dense_lead=1
    ),
}
