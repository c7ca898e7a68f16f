"""What llama.cpp is told about experts in the place of the file's own metadata, and the engine must know, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyengine.native import NativeEngine


def apply_overrides(native: NativeEngine, overrides: Mapping[str, Any]) -> int | None:
    """Tell an engine that was not started what llama_cpp.Llama is told as kv_overrides (GGUF key -> value).

    Returns:
        Experts that routers choose for each token, if they are not as many as the file says.

    Raises:
        ValueError: a number of experts that would end the process inside llama.cpp.
    """
    info = native.info
    for name, least in (("expert_count", info.n_expert), ("expert_used_count", 1)):
        key = f"{info.architecture}.{name}"
        value = overrides.get(key, least)
        if isinstance(value, int) and not least <= value <= info.n_expert:
            raise ValueError(f"kv_overrides: {key} must be {least} to {info.n_expert} in this model")
    used = overrides.get(f"{info.architecture}.expert_used_count")
    if type(used) is not int or used == info.n_expert_used:  # llama.cpp takes no other type for it
        return None
    native.use_experts(used)
    return used
