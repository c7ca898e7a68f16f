"""A model with a gigabyte of experts stays within its budget."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from models.big import write_big_model

from .children import Child

_MIB = 1 << 20
_FREE_DISK = 3 << 30
_SLACK = 100 * _MIB  # Python and libraries, read buffers, scratch of the kernels


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_resident_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """Prefill that wants every expert, and decoding, with a quarter of the experts in RAM."""
    if shutil.disk_usage(tmp_path).free < _FREE_DISK:
        pytest.skip("needs 3 GiB of free disk")
    facts = write_big_model(tmp_path / "big.gguf", 1.0)
    try:
        said = Child("measuring.remember", path=str(facts.path), ram_budget="25%", n_prompt=256, n_new=8).run(
            timeout=280
        )
    finally:
        facts.path.unlink()
    assert facts.expert_bytes >= 1 << 30
    stats = said["stats"]
    sizes = [re.search(r"(KV|compute|output) buffer size = +([0-9.]+) MiB", line) for line in said["log"]]
    buffers = {match[1]: float(match[2]) * _MIB for match in sizes if match}
    assert set(buffers) == {"KV", "compute", "output"}

    allowed = stats["budget_bytes"] + facts.other_bytes + sum(buffers.values()) + _SLACK
    most = said["decoded"]["VmHWM"]
    print(
        f"{most / _MIB:.0f} MiB at most, of {allowed / _MIB:.0f}: slots {stats['budget_bytes'] / _MIB:.0f}, "
        f"other weights {facts.other_bytes / _MIB:.0f}, llama.cpp's buffers {sum(buffers.values()) / _MIB:.0f}, "
        f"slack {_SLACK / _MIB:.0f}, which holds {said['at_start']['VmHWM'] / _MIB:.0f} of Python"
    )
    assert most <= allowed
    # It was a real test: the slots filled and turned over, and what filled them is counted.
    assert 0.24 * facts.expert_bytes < stats["budget_bytes"] < 0.26 * facts.expert_bytes
    assert stats["resident"] == stats["slots"] and stats["evictions"] > 2 * stats["slots"]
    assert said["decoded"]["RssAnon"] - said["loaded"]["RssAnon"] > 0.95 * stats["budget_bytes"]
