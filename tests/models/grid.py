"""The models that tests run over, as arguments of write_model() by id.

SMALL has every architecture once and every type once, and each kind of trouble once. FULL crosses all architectures
with all types.
"""

from __future__ import annotations

from typing import Any

from .architectures import ARCHITECTURES

Entry = dict[str, Any]

# Types the engine supports, and three more that stock llama.cpp computes on the CPU.
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4")
MORE_TYPES = ("F32", "BF16", "Q5_1", "Q5_K")

_K_TYPES = ("Q4_K", "Q5_K", "Q6_K")
_K_SIZES: Entry = {"n_embd": 256, "n_ff": 256, "n_expert": 5}  # blocks of 256 weights
_SIZES: tuple[Entry, ...] = (
    {"n_embd": 96, "n_ff": 64, "n_expert": 8},
    {"n_embd": 160, "n_ff": 32, "n_expert": 12},
    {"n_embd": 96, "n_ff": 96, "n_expert": 20},
    {"n_embd": 288, "n_ff": 32, "n_expert": 8},
)

_Q4_K_M: list[dict[str, str]] = [
    {"gate": "Q4_K", "up": "Q4_K", "gate_up": "Q4_K", "down": "Q6_K"},
    {"gate": "Q4_K", "up": "Q4_K", "gate_up": "Q4_K", "down": "Q4_K"},
]


def _entry(arch: str, expert_type: str, turn: int) -> Entry:
    entry: Entry = {"arch": arch, "expert_types": expert_type, "seed": turn}
    if expert_type not in _K_TYPES:
        return entry | _SIZES[turn % len(_SIZES)]
    a = ARCHITECTURES[arch]
    two_with_experts = a.dense_lead + 2 * a.moe_step  # K types are slow to encode: no more blocks than that
    return entry | _K_SIZES | {"n_layer": two_with_experts}


# Where the usual seed gives a model that idles: experts that no token of a short text wants, or a text of few words.
_SEEDS = {"bailingmoe2": 203, "deepseek4": 200, "rnd1": 200, "step35": 200}


def _file_id(arch: str) -> str:
    return arch.replace("/", "-")


_BY_ARCHITECTURE = {
    _file_id(arch): _entry(arch, "MXFP4" if arch == "gpt-oss" else ("Q4_0", "Q8_0", "F16")[i % 3], i)
    | ({"seed": _SEEDS[arch]} if arch in _SEEDS else {})
    for i, arch in enumerate(ARCHITECTURES)
}
_BY_TYPE = {f"llama-{t.lower()}": _entry("llama", t, 50 + i) for i, t in enumerate((*TYPES, *MORE_TYPES))}

_TROUBLE: dict[str, Entry] = {
    # Types and sizes that differ from block to block and from projection to projection.
    "q4_k_m": {"arch": "qwen2moe", "expert_types": _Q4_K_M, **_K_SIZES, "n_layer": 2},
    "q4_k_m-narrow": {  # rows of down too short for K types: converters fall back to others
        "arch": "qwen3moe",
        "expert_types": [
            {"gate": "Q4_K", "up": "Q4_K", "down": "Q8_0"},
            {"gate": "Q4_K", "up": "Q4_K", "down": "Q5_0"},
        ],
        **_K_SIZES,
        "n_ff": 96,
    },
    "unlike-projections": {
        "arch": "olmoe",
        "expert_types": [
            {"gate": "Q4_0", "up": "Q8_0", "down": "IQ4_NL"},
            {"gate": "Q5_0", "up": "Q4_0", "down": "F16"},
            "Q4_1",
        ],
        "n_embd": 160,
        "n_ff": 96,
        "n_expert": 10,
    },
    # Sizes no kernel likes: odd rows keep the CPU from repacking, and strides are multiples of nothing.
    "odd-f16": {"arch": "llama", "expert_types": "F16", "n_embd": 100, "n_ff": 37, "n_expert": 5},
    "odd-rows-q4_0": {
        "arch": "llama",
        "expert_types": {"gate": "Q4_0", "up": "Q4_0", "down": "F16"},
        "n_embd": 96,
        "n_ff": 36,
        "n_expert": 7,
    },
    "odd-rows-q4_k": {
        "arch": "qwen3moe",
        "expert_types": {"gate": "Q4_K", "up": "Q6_K", "down": "F16"},
        "n_embd": 256,
        "n_ff": 36,
        "n_expert": 9,
    },
    # Layouts.
    "merged-deepseek2": {"arch": "deepseek2", "merged_gate_up": True},
    "merged-deepseek2-lite-mxfp4": {"arch": "deepseek2/lite", "merged_gate_up": True, "expert_types": "MXFP4"},
    "merged-granite_swa-odd": {
        "arch": "granite_swa",
        "merged_gate_up": True,
        "expert_types": {"gate_up": "Q4_0", "down": "F16"},
        "n_ff": 34,
    },
    "merged-gemma4-scales": {
        "arch": "gemma4",
        "merged_gate_up": True,
        "expert_scales": True,
        "expert_types": _Q4_K_M,
        **_K_SIZES,
        "n_layer": 2,
    },
    "merged-mistral4": {"arch": "mistral4", "merged_gate_up": True, "expert_types": "F16", "n_expert": 6},
    "merged-qwen3next-q4_k_m": {
        "arch": "qwen3next",
        "merged_gate_up": True,
        "expert_types": _Q4_K_M,
        **_K_SIZES,
        "n_layer": 2,
    },
    "no-gate": {"arch": "llama", "gate": False, "expert_types": "Q4_0", "n_ff": 96},
    "scales": {"arch": "llama", "expert_scales": True, "expert_types": "Q8_0"},
    "mtp": {"arch": "glm4moe", "n_mtp": 1, "expert_types": "Q4_0"},
    # Files.
    "align64": {"arch": "qwen2moe", "alignment": 64, "expert_types": "Q5_0", "n_expert": 9},
    "gaps": {"arch": "olmoe", "alignment": 4096, "expert_types": "Q4_1", "n_embd": 160, "n_expert": 5},
    "split": {"arch": "qwen3moe", "split": 3, "expert_types": "Q4_0"},
    "split-align64": {"arch": "deepseek2", "split": 5, "alignment": 64, "expert_types": "Q8_0", "n_ff": 32},
    "model-order": {"arch": "llama", "shuffle": False, "expert_types": "Q4_0"},
    # Numbers of experts.
    "many-experts": {"arch": "qwen3moe", "n_expert": 64, "n_expert_used": 8, "expert_types": "Q4_0", "n_ff": 32},
    "all-experts": {"arch": "llama", "n_expert": 4, "n_expert_used": 4, "expert_types": "IQ4_NL"},
    "one-expert": {"arch": "llama", "n_expert": 1, "n_expert_used": 1, "expert_types": "Q8_0"},
    # Other matrices quantised too, as in real files.
    "dense-q8_0": {"arch": "qwen2moe", "dense_type": "Q8_0", "expert_types": "Q4_0"},
}

SMALL: dict[str, Entry] = {**_BY_ARCHITECTURE, **_BY_TYPE, **_TROUBLE}

_CROSSED = {
    f"{_file_id(arch)}-{t.lower()}": _entry(arch, t, 100 + 7 * i + j)
    for i, arch in enumerate(ARCHITECTURES)
    for j, t in enumerate((*TYPES, *MORE_TYPES))
}
FULL: dict[str, Entry] = {**SMALL, **{name: e for name, e in _CROSSED.items() if name not in SMALL}}
