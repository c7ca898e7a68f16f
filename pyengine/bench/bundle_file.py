"""The bundle that a model's lru-bundle rows read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyengine.bench.rows import ModelFacts
from pyengine.bench.widened import require_space, run_gguf_tools


def find_bundle(facts: ModelFacts, *, make: bool, say: Callable[[str], None]) -> Path | None:
    """The bundle of a model, where the engine would find it, or None.

    Args:
        make: make it with gguf_tools if there is none that fits, in the cache folder.

    Raises:
        UsageError: no room on the disk.
        PyengineError: making it failed.
    """
    from pyengine.bundles import candidates, in_cache

    found = next((path for path in candidates(facts.path) if path.is_file()), None)
    if make:
        target = found or in_cache(facts.path)
        if found is None:
            require_space(target, facts.slot_bytes)
            say(f"making {target.name}")
        run_gguf_tools("bundle", str(facts.path), "-o", str(target), "--quiet")  # at once if it is there and fits
        return target
    return found
