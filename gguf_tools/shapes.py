"""Sizes of published mixture-of-experts models, from the config.json that came with each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

KeyValue = bool | int | float | str


@dataclass(frozen=True)
class Mla:
    """Sizes of multi-head latent attention (DeepSeek-V2, section 2.1), without a compressed query."""

    kv_lora: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. All counts are of values, heads, blocks, experts or tokens.

    architecture: GGUF key general.architecture. n_ff: width of dense FFNs. n_ff_exp: of one expert. n_dense_lead:
    leading blocks without experts. n_shared: shared experts, each as wide as any. expert_type, matrix_type: ggml types
    of experts and of the other matrices. keys: what else llama.cpp wants to know, without the `<architecture>.` prefix.
    """

    architecture: Literal["gpt-oss", "qwen3moe", "deepseek2", "llama"]
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ff_exp: int
    n_expert: int
    n_expert_used: int
    n_vocab: int
    n_context: int
    rope_base: float
    epsilon: float
    expert_type: Literal["Q4_0", "MXFP4"]
    matrix_type: Literal["Q4_0", "Q8_0"]
    n_dense_lead: int = 0
    n_shared: int = 0
    mla: Mla | None = None
    keys: dict[str, KeyValue] = field(default_factory=dict)


SHAPES: dict[str, Shape] = {
    # huggingface.co/openai/gpt-oss-20b
    "gpt-oss-20b": Shape(
        architecture="gpt-oss",
        n_layer=24,
        n_embd=2880,
        n_head=64,
        n_head_kv=8,
        head_dim=64,
        n_ff=2880,
        n_ff_exp=2880,
        n_expert=32,
        n_expert_used=4,
        n_vocab=201088,
        n_context=131072,
        rope_base=150000.0,
        epsilon=1e-5,
        expert_type="MXFP4",
        matrix_type="Q8_0",
        keys={
            "attention.sliding_window": 128,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
    ),
    # huggingface.co/Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": Shape(
        architecture="qwen3moe",
        n_layer=48,
        n_embd=2048,
        n_head=32,
        n_head_kv=4,
        head_dim=128,
        n_ff=6144,
        n_ff_exp=768,
        n_expert=128,
        n_expert_used=8,
        n_vocab=151936,
        n_context=40960,
        rope_base=1000000.0,
        epsilon=1e-6,
        expert_type="Q4_0",
        matrix_type="Q4_0",
    ),
    # huggingface.co/deepseek-ai/DeepSeek-V2-Lite
    "deepseek-v2-lite": Shape(
        architecture="deepseek2",
        n_layer=27,
        n_embd=2048,
        n_head=16,
        n_head_kv=1,  # with latent attention all heads share one compressed key
        head_dim=192,
        n_ff=10944,
        n_ff_exp=1408,
        n_expert=64,
        n_expert_used=6,
        n_vocab=102400,
        n_context=163840,
        rope_base=10000.0,
        epsilon=1e-6,
        expert_type="Q4_0",
        matrix_type="Q4_0",
        n_dense_lead=1,
        n_shared=2,
        mla=Mla(kv_lora=512, nope=128, rope=64, value=128),
        keys={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": 4096,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        },
    ),
    # huggingface.co/mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": Shape(
        architecture="llama",
        n_layer=32,
        n_embd=4096,
        n_head=32,
        n_head_kv=8,
        head_dim=128,
        n_ff=14336,
        n_ff_exp=14336,
        n_expert=8,
        n_expert_used=2,
        n_vocab=32000,
        n_context=32768,
        rope_base=1000000.0,
        epsilon=1e-5,
        expert_type="Q4_0",
        matrix_type="Q4_0",
    ),
}
