"""What a tensor is for, by its name in llama.cpp (llama-arch.cpp)."""

from __future__ import annotations

import re

EXPERT_CLASSES = {
    "gate_up": "expert gate and up",
    "gate": "expert gate",
    "up": "expert up",
    "down": "expert down",
}

# The first pattern that fits decides: a norm inside attention is a norm, the router of shared experts belongs to them.
_PATTERNS = (
    (r"(token_embd|output|position_embd|token_types|per_layer_token_embd)\.\w+", "embeddings and output"),
    (r".*norm.*", "norms"),
    (r"blk\.\d+\.ffn_gate_up_exps\.weight", EXPERT_CLASSES["gate_up"]),
    (r"blk\.\d+\.ffn_gate_exps\.weight", EXPERT_CLASSES["gate"]),
    (r"blk\.\d+\.ffn_up_exps\.weight", EXPERT_CLASSES["up"]),
    (r"blk\.\d+\.ffn_down_exps\.weight", EXPERT_CLASSES["down"]),
    (r"blk\.\d+\.ffn_\w+_exps\.\w+", "expert biases and scales"),
    (r"blk\.\d+\.ffn_\w+_shexp\.\w+", "shared experts"),
    (r"blk\.\d+\.(ffn_gate_inp|exp_probs_b|ffn_exp_probs_b)(\.\w+)?", "router"),
    (r"blk\.\d+\.ffn_(gate|up|down)\.\w+", "dense FFN"),
    (r"blk\.\d+\.attn_.*", "attention"),
)
_COMPILED = tuple((re.compile(pattern), name) for pattern, name in _PATTERNS)

OTHER = "other"

#: All classes in the order in which a reader wants them.
CLASSES = (
    "embeddings and output",
    "attention",
    "norms",
    "dense FFN",
    "shared experts",
    "router",
    *EXPERT_CLASSES.values(),
    "expert biases and scales",
    OTHER,
)


def tensor_class(name: str) -> str:
    """The class, one of CLASSES, of the tensor of that name."""
    return next((class_ for pattern, class_ in _COMPILED if pattern.fullmatch(name)), OTHER)
