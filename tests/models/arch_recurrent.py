"""Architectures whose blocks are recurrent mixers and attention by turns, with experts in all or some of them."""

from __future__ import annotations

from .arch_common import SIGMOID, granite_scales, mla_keys, sigmoid_router
from .architecture import Architecture
from .container import MetadataValue
from .layout import MLA, Dims, ExpertLayout, TensorSpec, blk, gqa, mla
from .recurrent import (
    CONV,
    LINEAR_HEAD,
    SHORT_CONV,
    alternate,
    delta_net,
    delta_net_keys,
    heads_by_block,
    is_attention,
    kimi_delta,
    lightning,
    mamba1,
    mamba2,
    mamba_keys,
    short_convolution,
)

_POST_NORMS = ("attn_norm.weight", "post_attention_norm.weight")
_EVERY = 2  # second block has attention


def _jamba(d: Dims) -> dict[str, MetadataValue]:
    return {**mamba_keys(d, n_group=0), **heads_by_block(d, _EVERY)}


def _granite_hybrid(d: Dims) -> dict[str, MetadataValue]:
    return {**granite_scales(d), **mamba_keys(d, n_group=1), **heads_by_block(d, _EVERY)}


def _nemotron(d: Dims) -> dict[str, MetadataValue]:
    # By turns: Mamba-2, attention, experts. Blocks of experts are those of a width above 0.
    n_kv = [d.n_head_kv if i % 3 == 1 else 0 for i in range(d.n_layer)]
    widths = [d.n_ff_exp if d.has_experts(i) else 0 for i in range(d.n_layer)]
    return {
        **mamba_keys(d, n_group=2),
        "attention.layer_norm_epsilon": 1e-5,
        "attention.head_count_kv": n_kv,
        "feed_forward_length": widths,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.0,
    }


def _nemotron_latent(d: Dims) -> dict[str, MetadataValue]:
    return {**_nemotron(d), "moe_latent_size": d.n_latent}


def _nemotron_uneven(d: Dims) -> dict[str, MetadataValue]:
    # Pruned models: blocks differ in the width of experts and in how many of them work on a token.
    used = [d.n_expert_used + i // 3 if d.has_experts(i) else 0 for i in range(d.n_layer)]
    widths = [_uneven_width(d, i) if d.has_experts(i) else 0 for i in range(d.n_layer)]
    widths_and_counts = {"feed_forward_length": widths, "expert_feed_forward_length": widths, "expert_used_count": used}
    return {**_nemotron(d), **widths_and_counts}


def _uneven_width(d: Dims, i: int) -> int:
    return d.n_ff_exp * (1 + i // 3)


def _nemotron_mixer(d: Dims, i: int) -> list[TensorSpec]:
    if d.has_experts(i):
        return []
    return gqa()(d, i) if i % 3 == 1 else mamba2(n_group=2)(d, i)


def _latent(down: str, up: str, norm: str | None, d: Dims, i: int) -> list[TensorSpec]:
    if not d.has_experts(i):
        return []
    out = [blk(i, f"{down}.weight", (d.n_embd, d.n_latent)), blk(i, f"{up}.weight", (d.n_latent, d.n_embd))]
    return [*out, blk(i, f"{norm}.weight", (d.n_latent,), "norm")] if norm else out


def _nemotron_extra(d: Dims, i: int) -> list[TensorSpec]:
    return _latent("ffn_latent_down", "ffn_latent_up", None, d, i)


def _kimi(d: Dims) -> dict[str, MetadataValue]:
    return {
        **mla_keys(d, absorbed=True),
        **heads_by_block(d, _EVERY),
        "ssm.conv_kernel": CONV,
        "kda.head_dim": LINEAR_HEAD,
        **sigmoid_router(d),
    }


def _bailing3(d: Dims) -> dict[str, MetadataValue]:
    return {**_kimi(d), "kda.gate_lower_bound": -5.0, "attention.q_lora_rank": MLA.q_lora}


def _bailing3_mla(d: Dims, i: int) -> list[TensorSpec]:
    return [*mla(q_lora=True, absorbed=True)(d, i), blk(i, "attn_gate.weight", (d.n_embd, d.n_head))]


def _kimi3(d: Dims) -> dict[str, MetadataValue]:
    return {
        **_kimi(d),
        "expert_latent_length": d.n_latent,
        "attn_res.block_size": 2,
        "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 2.0,
    }


def _kimi3_extra(d: Dims, i: int) -> list[TensorSpec]:
    scores = [blk(i, f"{part}_res_score.weight", (d.n_embd,), "norm") for part in ("attn", "ffn")]
    return scores + _latent("ffn_routed_down", "ffn_routed_up", "ffn_routed_norm", d, i)


def _kimi3_mla(d: Dims, i: int) -> list[TensorSpec]:
    gate = blk(i, "attn_gate.weight", (d.n_embd, d.n_head * MLA.value))
    return [*mla(q_lora=False, absorbed=True)(d, i), gate]


def _lfm2(d: Dims) -> dict[str, MetadataValue]:
    return {**heads_by_block(d, _EVERY), "shortconv.l_cache": SHORT_CONV, "expert_gating_func": SIGMOID}


def _minimax1(d: Dims) -> dict[str, MetadataValue]:
    recurrent = [not is_attention(i, _EVERY) for i in range(d.n_layer)]
    return {"residual_scale": 1.5, "attention.recurrent_layers": recurrent}


def _qwen35(d: Dims) -> dict[str, MetadataValue]:
    quarter = d.head_dim // 4
    return {**delta_net_keys(_EVERY), "rope.dimension_sections": [quarter, d.head_dim // 2 - quarter, 0, 0]}


RECURRENT: dict[str, Architecture] = {
    "jamba": Architecture("jamba", alternate(mamba1, gqa(), _EVERY), keys=_jamba, experts_are_ff=True),
    "granitehybrid": Architecture(
        "granitehybrid",
        alternate(mamba2(n_group=1), gqa(), _EVERY),
        keys=_granite_hybrid,
        experts_are_ff=True,
        shared="plain",
        can_drop_gate=True,
    ),
    "nemotron_h_moe": Architecture(
        "nemotron_h_moe",
        _nemotron_mixer,
        norms=("attn_norm.weight",),
        keys=_nemotron,
        shared="ungated",
        selection_bias=True,
        layout=ExpertLayout(gate=False),
        mixers_alone=True,
        moe_step=3,
        n_layer=6,
    ),
    "nemotron_h_moe/uneven": Architecture(
        "nemotron_h_moe",
        _nemotron_mixer,
        norms=("attn_norm.weight",),
        keys=_nemotron_uneven,
        expert_width=_uneven_width,
        shared="ungated",
        selection_bias=True,
        layout=ExpertLayout(gate=False),
        mixers_alone=True,
        moe_step=3,
        n_layer=6,
    ),
    "nemotron_h": Architecture(
        "nemotron_h",
        _nemotron_mixer,
        norms=("attn_norm.weight",),
        extra=_nemotron_extra,
        keys=_nemotron_latent,
        shared="ungated",
        selection_bias=True,
        layout=ExpertLayout(gate=False),
        mixers_alone=True,
        latent=True,
        moe_step=3,
        n_layer=6,
    ),
    "kimi-linear": Architecture(
        "kimi-linear",
        alternate(kimi_delta(low_rank_decay=True, low_rank_gate=True), mla(q_lora=False, absorbed=True), _EVERY),
        keys=_kimi,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
        dense_lead=1,
    ),
    "kimi-k3": Architecture(
        "kimi-k3",
        alternate(kimi_delta(low_rank_decay=True, low_rank_gate=False, gate="g", flat_decay=True), _kimi3_mla, _EVERY),
        extra=_kimi3_extra,
        outside=lambda d: [TensorSpec("output_res_score.weight", (d.n_embd,), "norm")],
        keys=_kimi3,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
        dense_lead=1,
        latent=True,
    ),
    "bailingmoe3": Architecture(
        "bailingmoe3",
        alternate(kimi_delta(low_rank_decay=False, low_rank_gate=False), _bailing3_mla, _EVERY),
        keys=_bailing3,
        shared="plain",
        shared_count=1,
        selection_bias=True,
        kv_heads="one",
        dense_lead=1,
    ),
    "lfm2moe": Architecture(
        "lfm2moe",
        alternate(short_convolution, gqa(qk_norm="head"), _EVERY),
        output_norm="token_embd_norm",
        keys=_lfm2,
        selection_bias=True,
        dense_lead=1,
    ),
    "minimax-01": Architecture(
        "minimax-01", alternate(lightning, gqa(), _EVERY), keys=_minimax1, experts_are_ff=True, can_drop_gate=True
    ),
    "qwen3next": Architecture(
        "qwen3next",
        alternate(delta_net(joined=True), gqa(qk_norm="head", gate="query"), _EVERY),
        norms=_POST_NORMS,
        keys=lambda d: delta_net_keys(_EVERY),
        shared="gated",
        can_merge=True,
    ),
    "qwen35moe": Architecture(
        "qwen35moe",
        alternate(delta_net(joined=False), gqa(qk_norm="head", gate="query"), _EVERY),
        norms=_POST_NORMS,
        keys=_qwen35,
        shared="gated",
        can_merge=True,
    ),
}
