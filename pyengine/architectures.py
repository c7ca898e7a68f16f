"""Which architectures the engine manages: those whose experts the tests prove bit-identical to stock llama.cpp.

Another architecture runs as stock llama.cpp runs it. To add one, give tests/models an entry and let the exactness tests
pass.
"""

from __future__ import annotations

#: Values of the GGUF key general.architecture.
MANAGED = frozenset(
    {
        "deepseek2",
        "gpt-oss",
        "granitemoe",
        "llama",
        "olmoe",
        "qwen2moe",
        "qwen3moe",
    }
)
