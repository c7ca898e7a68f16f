"""Times of a token on a GPU against what was measured on one; two levels of slots, by hand and by the engine."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import numpy as np
import pytest
from models.fixtures import ModelFactory

from pyengine import Llama
from pyengine.planning.link import LinkSpeed
from pyengine.planning.routing import Routing, uniform_routing
from pyengine.planning.shape import read_shape
from pyengine.planning.tier_replay import replay_tiers
from pyengine.planning.tiers import LOOK_S, TierCosts, token_time
from pyengine.planning.vram_needs import on_device
from pyengine.traces import Prompts

#: docs/gpu.md: gpt-oss-20b on an H100, stock all in VRAM 258 tok/s, 24 layers, experts of 13.3 MB, 54.8 GB/s.
COSTS = TierCosts(resident_s=1 / 258, look_s=LOOK_S, move_s=LinkSpeed(54.8e9, 0.0).seconds(13.3e6, 3), read_s=0.0)


@pytest.mark.parametrize(
    ("missing", "measured"),
    [(0.4, 195), (11.2, 119), (31.3, 70.1), (2.7, 165), (16.5, 98.5), (55.7, 54.1)],
    ids=["75 %, guesses", "50 %", "25 %", "50 %, guesses", "25 %, guesses", "12.5 %, guesses"],
)
def test_what_was_measured_is_predicted_within_a_quarter(missing: float, measured: float) -> None:
    time = token_time(COSTS, 24, missing, 0.0, everything=False)
    assert time.tokens_per_s == pytest.approx(measured, rel=0.25)


def test_with_everything_in_vram_it_is_stock() -> None:
    time = token_time(COSTS, 24, 0.0, 0.0, everything=True)
    assert time.tokens_per_s == pytest.approx(258) and time.bound == "compute"


def test_the_bound_is_what_takes_longest_alone() -> None:
    time = token_time(replace(COSTS, read_s=0.01), 24, 31.3, 2.0, everything=False)
    assert time.bound == "disk" and time.bound_tokens_per_s == pytest.approx(50)
    time = token_time(COSTS, 24, 31.3, 0.0, everything=False)
    assert time.bound == "link" and time.bound_tokens_per_s == pytest.approx(1 / 7.6e-3, rel=0.01)


def test_ram_behind_vram_by_hand() -> None:
    def counts(ram: int) -> list[tuple[int, int]]:
        return list(replay_tiers([[0], [1], [2], [0], [1], [2]], 2, ram, [], []))

    assert counts(0) == [(1, 1)] * 6, "VRAM alone: LRU of two slots never finds one of three"
    assert counts(1) == [(1, 1)] * 3 + [(1, 0)] * 3, "what leaves VRAM is copied back: together they hold all three"
    assert counts(3) == [(1, 1)] * 3 + [(1, 0)] * 3, "with room for all three none is read twice"
    assert list(replay_tiers([[2], [2]], 1, 1, [0], [2])) == [(1, 0), (0, 0)], "what lies in RAM is not read"


@pytest.mark.parametrize(("vram", "ram"), [(40, 30), (25, 60), (20, 100)])
def test_the_engine_finds_and_reads_as_many(vram: int, ram: int, generated_model: ModelFactory) -> None:
    path = generated_model("llama-q4_0").path
    shape = on_device(read_shape(path), "CPU")
    info = shape.info
    routing = uniform_routing(info.n_layer, info.n_expert, info.n_expert_used, n_token=64)
    how = {"vram_budget": f"{vram}%", "ram_budget": f"{ram}%", "policy": "lru", "look_ahead": "off", "n_ctx": 128}
    how["hybrid"] = False
    with contextlib.closing(Llama(path, gpu="CPU", n_threads=1, n_threads_batch=1, **how)) as llama:
        stats = llama.expert_stats()
        slots, ram_slots = stats["slots"], stats["ram_slots"]
        assert sum(shape.slots(int(vram / 100 * info.slot_bytes))) == pytest.approx(slots, abs=1)
        assert llama.engine is not None
        llama.engine.native.set_replay(routing.ids.astype(np.int32))
        for _ in range(16):
            llama.eval([5])
        deadline = time.monotonic() + 20  # what is read ahead waits until nothing else is read
        while (before := llama.expert_stats())["ram_resident"] < ram_slots and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(48):
            llama.eval([5])
        after = llama.expert_stats()
    uses = 48 * info.n_layer * info.n_expert_used
    found = (after["hits"] - before["hits"]) / uses
    behind = (after["ram_hits"] - before["ram_hits"]) / uses
    missing, read = Routing(routing.ids, info.n_expert, False, Prompts()).decode_tiers(
        [c.layers for c in shape.classes], [slots], [ram_slots]
    )
    wanted = float(missing.wanted.sum())
    assert missing.hit_rate == pytest.approx(found, abs=0.05)
    # The engine looks at all experts of a layer before one leaves; the replay takes one after the other.
    assert (missing.per_layer.sum() - read.sum()) / wanted == pytest.approx(behind, abs=0.08)
