"""Further architectures whose blocks are attention and experts: relatives of the common ones, sliding windows, gated
attention, models that see all tokens at once."""

from __future__ import annotations

from .arch_common import deepseek3_keys, granite_scales, sigmoid_router
from .architecture import Architecture, Keys
from .container import MetadataValue
from .layout import Dims, ExpertLayout, TensorSpec, blk, gqa, mla
from .vocabulary import N_TOKEN_TYPES

_WINDOW = 8  # tokens


def windows(d: Dims) -> dict[str, MetadataValue]:
    """Every other block looks back at a few tokens only."""
    pattern = [i % 2 == 1 for i in range(d.n_layer + d.n_mtp)]
    return {"attention.sliding_window": _WINDOW, "attention.sliding_window_pattern": pattern}


def _windows_and_sigmoid(d: Dims) -> dict[str, MetadataValue]:
    return {**windows(d), **sigmoid_router(d)}


def _cohere2(d: Dims) -> dict[str, MetadataValue]:
    return {**_windows_and_sigmoid(d), "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5}


def _window_of_every_fourth(d: Dims) -> dict[str, MetadataValue]:
    return {**sigmoid_router(d), "attention.sliding_window": _WINDOW}


def _step35(d: Dims) -> dict[str, MetadataValue]:
    # The clamp takes SwiGLU apart into its steps. Low, so that it has something to do.
    clamps = [0.0 if i % 2 == 1 else 0.5 for i in range(d.n_layer + d.n_mtp)]
    shared: dict[str, MetadataValue] = {"expert_shared_feed_forward_length": d.n_ff_shexp, "swiglu_clamp_shexp": clamps}
    return {**_windows_and_sigmoid(d), "swiglu_clamp_exp": clamps, **shared}


def _grove(d: Dims) -> dict[str, MetadataValue]:
    return {"experts_per_group": _grove_group(d), "expert_group_scale": 0.05, "expert_chunk_feed_forward_length": 32}


def _grove_group(d: Dims) -> int:
    """Experts that share one chunk expert."""
    return next(n for n in (4, 3, 2, 1) if d.n_expert % n == 0)


def _grove_extra(d: Dims, i: int) -> list[TensorSpec]:
    # Chunk experts: one for each group of experts. Their tensors are ordinary ones to us.
    n_chunk = d.n_expert // _grove_group(d)
    shapes = {"gate": (d.n_embd, 32, n_chunk), "up": (d.n_embd, 32, n_chunk), "down": (32, d.n_embd, n_chunk)}
    return [blk(i, f"ffn_{part}_chexps.weight", shape) for part, shape in shapes.items()]


def _mrope(d: Dims) -> dict[str, MetadataValue]:
    quarter = d.head_dim // 4
    return {"rope.dimension_sections": [quarter, quarter, d.head_dim // 2 - 2 * quarter, 0]}


def _hy_v3_extra(d: Dims, i: int) -> list[TensorSpec]:
    return [blk(i, "exp_probs_b", (d.n_expert,), "bias")] if d.has_experts(i) else []  # a name without ending


def _attention_scale(scale: float) -> Keys:
    return lambda d: {"attention.value_scale": scale, **_windows_and_sigmoid(d)}


def _nomic(d: Dims) -> dict[str, MetadataValue]:
    return {"attention.layer_norm_epsilon": 1e-5, "attention.causal": False, "moe_every_n_layers": d.moe_step}


def _nomic_outside(d: Dims) -> list[TensorSpec]:
    return [
        TensorSpec("token_types.weight", (d.n_embd, N_TOKEN_TYPES), "kernel"),
        TensorSpec("token_embd_norm.weight", (d.n_embd,), "norm"),
        TensorSpec("token_embd_norm.bias", (d.n_embd,), "bias"),
    ]


FURTHER: dict[str, Architecture] = {
    "afmoe": Architecture(
        "afmoe",
        gqa(qk_norm="head", gate="full"),
        norms=("attn_norm.weight", "post_attention_norm.weight", "ffn_norm.weight", "post_ffw_norm.weight"),
        keys=_window_of_every_fourth,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        dense_lead=1,
        root_scaled_embedding=True,
    ),
    "bailingmoe2": Architecture(
        "bailingmoe2",
        gqa(qk_norm="head", fused=True),
        keys=sigmoid_router,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        dense_lead=1,
    ),
    "cohere2moe": Architecture(
        "cohere2moe",
        norms=("attn_norm.weight",),
        keys=_cohere2,
        shared="plain",
        shared_count=1,
        dense_lead=1,
        can_merge=True,
    ),
    "deepseek2-ocr": Architecture(
        "deepseek2-ocr", kv_heads="all", shared="plain", shared_count=2, dense_lead=1, can_merge=True
    ),
    "exaone-moe": Architecture(
        "exaone-moe",
        gqa(qk_norm="head"),
        keys=_windows_and_sigmoid,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        dense_lead=1,
    ),
    "granite": Architecture("granite", keys=granite_scales, experts_are_ff=True, shared="plain", can_drop_gate=True),
    "minicpm": Architecture("minicpm", keys=granite_scales, experts_are_ff=True, can_drop_gate=True),
    "mistral3": Architecture("mistral3", experts_are_ff=True, can_drop_gate=True),
    "mistral4": Architecture(
        "mistral4",
        mla(q_lora=True, absorbed=True),
        keys=deepseek3_keys,
        shared="plain",
        shared_count=1,
        can_merge=True,
        kv_heads="one",
        dense_lead=1,
    ),
    "hy_v3": Architecture(
        "hy_v3",
        gqa(qk_norm="head"),
        extra=_hy_v3_extra,
        keys=sigmoid_router,
        shared="plain",
        dense_lead=1,
        can_merge=True,
    ),
    "laguna": Architecture(
        "laguna",
        gqa(qk_norm="head", gate="head"),
        keys=_window_of_every_fourth,
        shared="plain",
        selection_bias=True,
        dense_lead=1,
    ),
    "mimo2": Architecture("mimo2", gqa(sinks=True), keys=_attention_scale(0.7), selection_bias=True, dense_lead=1),
    "qwen3vlmoe": Architecture("qwen3vlmoe", gqa(qk_norm="head"), keys=_mrope),
    "step35": Architecture(
        "step35",
        gqa(qk_norm="head", gate="head"),
        keys=_step35,
        shared="plain",
        selection_bias=True,
        dense_lead=1,
        n_layer=4,
    ),
    "maple": Architecture("maple", gqa(qk_norm="head"), keys=lambda d: {**windows(d), "swiglu_clamp_exp": 0.5}),
    "grovemoe": Architecture("grovemoe", gqa(qk_norm="head"), extra=_grove_extra, keys=_grove),
    "llada-moe": Architecture("llada-moe", gqa(qk_norm="head"), causal=False),
    "rnd1": Architecture("rnd1", gqa(qk_norm="head"), causal=False),
    "llama-embed": Architecture(
        "llama-embed", keys=lambda d: {"attention.causal": False}, experts_are_ff=True, causal=False, embeds=True
    ),
    "nomic-bert-moe": Architecture(
        "nomic-bert-moe",
        gqa(bias=True, out_bias=True),
        norms=(
            "attn_output_norm.weight",
            "attn_output_norm.bias",
            "layer_output_norm.weight",
            "layer_output_norm.bias",
        ),
        outside=_nomic_outside,
        output_norm=None,
        keys=_nomic,
        experts_are_ff=True,
        layout=ExpertLayout(gate=False),
        dense_gate=False,
        kv_heads="all",
        moe_step=2,
        n_layer=4,
        causal=False,
        embeds=True,
    ),
}
