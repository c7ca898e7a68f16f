"""What a probe measured of one model on one machine, and the file it is kept in."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyengine.cache import cache_dir
from pyengine.native import built_for
from pyengine.whole_file import written_whole

_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """Seconds unless the name says otherwise. Layers are those that have experts."""

    token_s: float
    """one decoded token with nothing missing, at the start of a context"""
    token_past_s: float
    """more per token of context before it"""
    expert_share: float
    """of token_s, what expert kernels take"""
    missing: tuple[tuple[int, float], ...]
    """(experts missing in a layer, seconds that it takes longer), ascending"""
    prompt_token_s: float
    """all but experts, per token of a prompt"""
    prompt_past_s: float
    """more per token of context before it"""
    pair_s: float
    """expert kernels in a prompt, per (token, expert) pair of one layer"""
    prompt_miss_s: float
    """what a missing expert adds to a prompt whose kernels are slower than the disk"""
    bytes_per_miss: float
    """read from disk, alignment included"""
    overhead_bytes: int
    """memory of the loaded model besides weights, slots and KV cache"""
    disk_bytes_per_s: float
    """random direct reads of whole experts, several at a time"""
    disk_latency_s: float
    """one such read alone"""
    n_threads: int
    direct_io: bool
    bundle: bool
    took_s: float

    @property
    def load_s(self) -> float:
        """Per expert while several are being loaded."""
        if len(self.missing) == 1:
            return self.missing[0][1] / self.missing[0][0]
        (m0, s0), (m1, s1) = self.missing[0], self.missing[-1]
        return max(0.0, (s1 - s0) / (m1 - m0)) or s1 / m1


def machine_key(path: Path, bundle: bool) -> dict[str, Any]:
    """What must be equal for a measurement to hold: the model's file, the processor, the versions."""
    status = path.stat()
    return {
        "version": _VERSION,
        "model": [path.name, status.st_size, status.st_mtime_ns],
        "machine": [platform.node(), platform.machine(), _processor(), len(os.sched_getaffinity(0))],
        "built_for": built_for(),
        "kernel": platform.release(),
        "bundle": bundle,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def probe_file(model: Path) -> Path:
    """Where what was measured with this model is kept. Raises OSError: no such model."""
    return cache_dir() / "probes" / f"{model.stem}-{model.stat().st_size:x}.json"


def save(path: Path, key: dict[str, Any], measured: Any) -> None:
    """Keep a measurement: Measured, or another dataclass of numbers. Raises OSError."""
    with written_whole(path, durable=False) as file:
        file.write(json.dumps({"key": key, "measured": asdict(measured)}, indent=1).encode())


def load(path: Path, key: dict[str, Any]) -> Measured | None:
    """The measurement of that key; None if there is none, or the file is not as it should be."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        values = dict(kept["measured"])
        values["missing"] = tuple((int(m), float(s)) for m, s in values["missing"])
        measured = Measured(**values)
        numbers = [v for v in values.values() if isinstance(v, float)] + [s for _, s in measured.missing]
        sane = all(isinstance(n, float) and math.isfinite(n) and n >= 0 for n in numbers)
        return measured if sane and measured.missing and measured.token_s > 0 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
