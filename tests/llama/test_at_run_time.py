"""What pyengine.Llama adds while a model runs: counters, and a budget that changes under a stream."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pyengine import Llama
from pyengine.errors import BudgetError

from .probes import PROBES

PROMPT = "A recipe for bread:"
Opened = Callable[..., Llama]

KEYS = {
    "managed": bool,
    "hits": int,
    "misses": int,
    "hit_rate": float,
    "prefetches": int,
    "prefetch_hits": int,
    "prefetches_late": int,
    "prefetches_wasted": int,
    "prefetches_failed": int,
    "guesses": int,
    "guesses_right": int,
    "predict_seconds": float,
    "evictions": int,
    "bytes_read": int,
    "reads": int,
    "read_errors": int,
    "stall_seconds": float,
    "compute_seconds": float,
    "load_seconds": float,
    "io_seconds": float,
    "expert_ffns": int,
    "passes": int,
    "resident": int,
    "resident_bytes": int,
    "slots": int,
    "budget_bytes": int,
    "bundle": type(None),
    "experts": int,
    "expert_bytes": int,
    "least_budget": int,
    "layers": int,
    "gpu": type(None),
    "gpus": tuple,
    "link_bytes": int,
    "link_seconds": float,
    "syncs": int,
    "begun_ahead": int,
    "computed_again": int,
    "ram_hits": int,
    "ram_resident": int,
    "ram_slots": int,
    "ram_budget_bytes": int,
    "ram_demotions": int,
    "ram_fills": int,
    "back_bytes": int,
    "host_pairs": int,
    "host_seconds": float,
    "link_bytes_per_s": int,
}


def test_the_counters_are_the_documented_ones_and_add_up(opened: Opened) -> None:
    llm = opened(ram_budget="25%", policy="lru", look_ahead="off")
    fresh = llm.expert_stats()
    assert fresh["hit_rate"] is None
    assert fresh["hits"] == fresh["misses"] == fresh["resident"] == fresh["bytes_read"] == 0
    PROBES["greedy"](llm, PROMPT, 8)
    stats = llm.expert_stats()
    assert stats.keys() == KEYS.keys() == fresh.keys()
    assert all(name in (Llama.expert_stats.__doc__ or "") for name in KEYS)
    for name, kind in KEYS.items():
        assert isinstance(stats[name], kind), name
    assert stats["managed"] is True
    assert (stats["layers"], stats["experts"]) == (30, 960)
    assert stats["expert_ffns"] == 30 * 8  # the prompt and seven tokens; the eighth is not evaluated
    assert stats["hit_rate"] == stats["hits"] / (stats["hits"] + stats["misses"])
    assert stats["misses"] - stats["evictions"] == stats["resident"] == stats["slots"] == 240
    assert stats["resident_bytes"] == stats["budget_bytes"] == 240 * stats["least_budget"]
    assert stats["bytes_read"] >= stats["misses"] * stats["expert_bytes"] / stats["experts"]
    assert stats["read_errors"] == 0


def test_one_line_says_what_engaged(opened: Opened) -> None:
    llm = opened(ram_budget="12.5%")
    assert llm.engaged.startswith("30 layers x 4 of 32 experts (7.5 MiB")
    assert "\n" not in llm.engaged
    llm.set_ram_budget("100%")
    assert llm.engaged.startswith("30 layers x 32 of 32 experts (60.0 MiB")


def test_a_budget_that_cannot_be_leaves_the_old_one(opened: Opened) -> None:
    llm = opened(ram_budget="50%")
    for wrong in ("lots", "0%", 1, -5, True, None):
        with pytest.raises(BudgetError):
            llm.set_ram_budget(wrong)  # type: ignore[arg-type]
    assert llm.expert_stats()["slots"] == 480
    assert llm.__getstate__()["ram_budget"] == "50%"


def test_the_budget_changes_under_a_stream_and_the_text_does_not(opened: Opened) -> None:
    llm = opened(ram_budget="100%")
    question: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0.0}
    expected = PROBES["completion"](llm, **question)["choices"][0]["text"]
    done = threading.Event()
    slots: list[int] = []
    budgets: tuple[str | int, ...] = ("6.25%", "100%", "12.5%", 40_000_000, "25%")

    def change() -> None:
        for budget in itertools.cycle(budgets):
            llm.set_ram_budget(budget)
            slots.append(llm.expert_stats()["slots"])
            if done.wait(0.02):
                return

    llm.reset()
    thread = threading.Thread(target=change)
    thread.start()
    try:
        pieces = [chunk["choices"][0]["text"] for chunk in llm.create_completion(stream=True, **question)]  # type: ignore[index]
    finally:
        done.set()
        thread.join()
    assert "".join(pieces) == expected
    assert set(slots) >= {60, 960, 120, 610, 240}
    assert llm.expert_stats()["evictions"] > 0
