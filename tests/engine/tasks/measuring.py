"""What loading reads and what a model takes. Imports nothing early, so that a measurement finds nothing else there."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(path: str, files: list[str]) -> dict[str, Any]:
    """Load a model that is not in the page cache: what that reads, until it is ready to decode."""
    import time

    from pyengine import Llama, startup

    from .. import page_cache

    startup.check()  # runs a program once in a process
    page_cache.drop(map(Path, files))
    cold = not any(page_cache.resident(Path(file)).any() for file in files)
    before, start = _io(), time.perf_counter()
    llama = Llama(path, n_ctx=512)
    seconds, after = time.perf_counter() - start, _io()
    reads_of_experts = llama.expert_stats()["reads"]
    pages = {file: page_cache.resident(Path(file)).nonzero()[0].tolist() for file in files}
    llama.eval([1, 2, 3])
    llama.close()
    return {
        "cold": cold,
        "seconds": seconds,
        "io": {name: after[name] - before[name] for name in after},
        "reads_of_experts": reads_of_experts,
        "pages": pages,
    }


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def remember(path: str, ram_budget: str, n_prompt: int, n_new: int) -> dict[str, Any]:
    """Answer a long prompt: how much memory that takes, bytes, and what llama.cpp says of its buffers."""
    import contextlib
    import io

    from pyengine import Llama

    said = io.StringIO()
    at_start = _memory()
    with contextlib.redirect_stderr(said):
        llama = Llama(path, ram_budget=ram_budget, n_ctx=1024, n_batch=512, n_ubatch=512, verbose=True)
    loaded = _memory()
    llama.eval([3 + i % 300 for i in range(n_prompt)])
    prefilled = _memory()
    for i in range(n_new):
        llama.eval([3 + 7 * i % 300])
    return {
        "at_start": at_start,
        "loaded": loaded,
        "prefilled": prefilled,
        "decoded": _memory(),
        "stats": llama.expert_stats(),
        "log": said.getvalue().splitlines(),
    }


def _memory() -> dict[str, int]:
    """Resident bytes: the most so far, now, and of that what belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(values[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssAnon")}
