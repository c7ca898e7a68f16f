"""Architectures of attention and experts whose models are widely used, and those like them."""

from __future__ import annotations

import math

from .architecture import Architecture
from .container import MetadataValue
from .layout import MLA, Dims, ExpertLayout, TensorSpec, blk, dense_ffn, gqa, mla

SIGMOID = 2  # value of the key expert_gating_func


def granite_scales(d: Dims) -> dict[str, MetadataValue]:
    return {"logit_scale": 2.0, "residual_scale": 0.8, "embedding_scale": 1.5, "attention.scale": 0.2}


def deepseek3_keys(d: Dims) -> dict[str, MetadataValue]:
    keys: dict[str, MetadataValue] = {
        **mla_keys(d, absorbed=True),
        "attention.q_lora_rank": MLA.q_lora,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": SIGMOID,
    }
    if d.n_expert % 4 == 0:
        keys |= {"expert_group_count": 4, "expert_group_used_count": 2}
    return keys


def _deepseek2_lite(d: Dims) -> dict[str, MetadataValue]:
    # A rank of 0 makes llama.cpp take the lite path at any depth; real lite files are known by their 26 or 27 blocks.
    return {**mla_keys(d, absorbed=False), "attention.q_lora_rank": 0, "expert_weights_scale": 1.0}


def mla_keys(d: Dims, *, absorbed: bool, rope: int = MLA.rope) -> dict[str, MetadataValue]:
    """Of multi-head latent attention, see layout.mla."""
    keys: dict[str, MetadataValue] = {"attention.kv_lora_rank": MLA.kv_lora, "rope.dimension_count": rope}
    if not absorbed:
        return keys | {"attention.key_length": MLA.nope + rope, "attention.value_length": MLA.value}
    return keys | {
        "attention.key_length": MLA.kv_lora + rope,
        "attention.value_length": MLA.kv_lora,
        "attention.key_length_mla": MLA.nope + rope,
        "attention.value_length_mla": MLA.value,
    }


def sigmoid_router(d: Dims) -> dict[str, MetadataValue]:
    return {"expert_gating_func": SIGMOID, "expert_weights_norm": True, "expert_weights_scale": 1.5}


def _gpt_oss(d: Dims) -> dict[str, MetadataValue]:
    return {"attention.sliding_window": 8}  # every other block looks back at 8 tokens


def _llama4(d: Dims) -> dict[str, MetadataValue]:
    return {"interleave_moe_layer_step": d.moe_step}


def _gemma4(d: Dims) -> dict[str, MetadataValue]:
    return {
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [_gemma4_slides(d, i) for i in range(d.n_layer)],
        "attention.key_length_swa": d.head_dim,
        "attention.value_length_swa": d.head_dim,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    }


def _gemma4_slides(d: Dims, i: int) -> bool:
    return i != d.n_layer - 1


def _gemma4_extra(d: Dims, i: int) -> list[TensorSpec]:
    # llama.cpp divides the router's input by the root of its length; the trained scale makes up for it.
    return [*dense_ffn(d, i, d.n_ff), blk(i, "ffn_gate_inp.scale", (d.n_embd,), "scale", math.sqrt(d.n_embd))]


def _arctic_extra(d: Dims, i: int) -> list[TensorSpec]:
    return dense_ffn(d, i, d.n_embd)


def _grok_extra(d: Dims, i: int) -> list[TensorSpec]:
    return dense_ffn(d, i, d.n_ff)


def _swa_sinks_keys(d: Dims) -> dict[str, MetadataValue]:
    pattern = [i % 2 == 0 for i in range(d.n_layer)]
    return {**granite_scales(d), "attention.sliding_window": 8, "attention.sliding_window_pattern": pattern}


COMMON: dict[str, Architecture] = {
    "llama": Architecture("llama", experts_are_ff=True, can_drop_gate=True, can_scale=True),
    "qwen2moe": Architecture("qwen2moe", gqa(bias=True), shared="gated"),
    "qwen3moe": Architecture("qwen3moe", gqa(qk_norm="head")),
    "olmoe": Architecture("olmoe", gqa(qk_norm="full"), experts_are_ff=True, kv_heads="all"),
    "deepseek2": Architecture(
        "deepseek2",
        mla(q_lora=True, absorbed=True),
        keys=deepseek3_keys,
        shared="plain",
        shared_count=2,
        selection_bias=True,
        can_merge=True,
        kv_heads="one",
        dense_lead=1,
        n_expert_used=3,
    ),
    "deepseek2/lite": Architecture(
        "deepseek2",
        mla(q_lora=False, absorbed=False),
        keys=_deepseek2_lite,
        shared="plain",
        shared_count=1,
        can_merge=True,
        kv_heads="all",
        dense_lead=1,
    ),
    "gpt-oss": Architecture(
        "gpt-oss",
        gqa(bias=True, out_bias=True, sinks=True),
        norms=("attn_norm.weight", "post_attention_norm.weight"),
        keys=_gpt_oss,
        router_bias=True,
        layout=ExpertLayout(bias=True),
    ),
    "granitemoe": Architecture("granitemoe", keys=granite_scales, experts_are_ff=True, can_drop_gate=True),
    "granitemoe/shared": Architecture("granitemoe", keys=granite_scales, experts_are_ff=True, shared="plain"),
    "granite_swa": Architecture(
        "granite_swa", gqa(sinks=True), keys=_swa_sinks_keys, experts_are_ff=True, can_merge=True
    ),
    "gemma4": Architecture(
        "gemma4",
        gqa(qk_norm="head", shared_kv_value=True),
        norms=(
            "attn_norm.weight",
            "post_attention_norm.weight",
            "ffn_norm.weight",
            "post_ffw_norm.weight",
            "pre_ffw_norm_2.weight",
            "post_ffw_norm_1.weight",
            "post_ffw_norm_2.weight",
        ),
        extra=_gemma4_extra,
        outside=lambda d: [TensorSpec("rope_freqs.weight", (d.head_dim // 2,), "scale")],
        root_scaled_embedding=True,
        keys=_gemma4,
        can_merge=True,
        can_scale=True,
    ),
    "ernie4_5-moe": Architecture(
        "ernie4_5-moe",
        keys=lambda d: {"interleave_moe_layer_step": 1},
        shared="plain",
        selection_bias=True,
        dense_lead=1,
        can_drop_gate=True,
    ),
    "glm4moe": Architecture(
        "glm4moe",
        gqa(bias=True, qk_norm="head"),
        norms=("attn_norm.weight", "post_attention_norm.weight"),
        keys=lambda d: {**sigmoid_router(d), "rope.dimension_count": d.head_dim // 2},
        shared="plain",
        shared_count=1,
        selection_bias=True,
        dense_lead=1,
    ),
    "bailingmoe": Architecture(
        "bailingmoe", keys=lambda d: {"expert_weights_norm": True}, shared="plain", shared_count=1
    ),
    "dots1": Architecture(
        "dots1",
        gqa(qk_norm="head"),
        keys=sigmoid_router,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="all",
        dense_lead=1,
    ),
    "hunyuan-moe": Architecture("hunyuan-moe", gqa(qk_norm="head"), experts_are_ff=True, shared="plain"),
    "llama4": Architecture(
        "llama4", keys=_llama4, shared="plain", shared_count=1, moe_step=2, n_layer=4, n_expert_used=1
    ),
    "smallthinker": Architecture("smallthinker", keys=lambda d: {"expert_gating_func": SIGMOID}),
    "minimax-m2": Architecture(
        "minimax-m2",
        gqa(qk_norm="full"),
        keys=lambda d: {"expert_gating_func": SIGMOID, "rope.dimension_count": d.head_dim // 2},
        experts_are_ff=True,
        selection_bias=True,
    ),
    "mellum": Architecture("mellum", gqa(qk_norm="head"), can_scale=True),
    "deepseek": Architecture("deepseek", shared="plain", shared_count=1, dense_lead=1),
    "phimoe": Architecture(
        "phimoe",
        gqa(bias=True, out_bias=True),
        norms=("attn_norm.weight", "attn_norm.bias", "ffn_norm.weight", "ffn_norm.bias"),
        experts_are_ff=True,
        output_bias=True,
    ),
    "dbrx": Architecture(
        "dbrx",
        gqa(fused=True),
        norms=("attn_norm.weight", "attn_output_norm.weight"),
        keys=lambda d: {"attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": 8.0},
        experts_are_ff=True,
    ),
    "arctic": Architecture(
        "arctic",
        norms=("attn_norm.weight", "ffn_norm.weight", "ffn_norm_exps.weight"),
        extra=_arctic_extra,
        experts_are_ff=True,
    ),
    "grok": Architecture(
        "grok",
        norms=("attn_norm.weight", "attn_output_norm.weight", "ffn_norm.weight", "post_ffw_norm.weight"),
        extra=_grok_extra,
        keys=lambda d: {"embedding_scale": 2.0},
        can_drop_gate=True,
    ),
}
