"""Miss counts of every policy on a slice of real routing, so that no change goes unnoticed. PYENGINE_WRITE_GOLDEN=1
writes them anew, for a change that is meant."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pyengine.policies import POLICIES, make_policy
from pyengine.replay.bounds import belady, sch
from pyengine.replay.hits import replay_policy
from pyengine.replay.layout import own_slots, shared_slots
from pyengine.replay.locality import locality
from pyengine.replay.steps import Steps, steps_of
from pyengine.traces import load_trace

HERE = Path(__file__).parent
GOLDEN = HERE / "golden_misses.json"
LAYOUTS = {
    "12 of 32 each": own_slots(24, 32, 4, 12),
    "half, shared": shared_slots(24, 32, 4, 384),
    "an eighth, shared": shared_slots(24, 32, 4, 96),
    "less than a token": shared_slots(24, 32, 4, 50),
}
#: Products of matrices are rounded differently from machine to machine, and a near tie may go the other way.
ROUNDING = {"activation-path": 2e-3, "expert-map": 2e-3}
#: Policies with something learned have files of their own to be tested with.
NAMES = [name for name in POLICIES if name != "learned"]


@pytest.fixture(scope="module")
def steps() -> Steps:
    return steps_of(load_trace(HERE / "gpt_oss_slice.npz"))


@pytest.fixture(scope="module")
def found(steps: Steps) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for title, layout in LAYOUTS.items():
        misses = {name: replay_policy(steps, layout, make_policy(name, layout.cache_shape)) for name in NAMES}
        misses |= {"belady": belady(steps, layout), "sch": sch(steps, layout)}
        counts[title] = {name: int(m.missing.sum()) for name, m in misses.items()}
    if os.environ.get("PYENGINE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(counts, indent=1) + "\n")
    return counts


@pytest.mark.parametrize("title", LAYOUTS)
def test_misses_are_those_of_last_time(title: str, found: dict[str, dict[str, int]]) -> None:
    golden = json.loads(GOLDEN.read_text())[title]
    assert found[title].keys() == golden.keys()
    for name, count in golden.items():
        assert found[title][name] == pytest.approx(count, rel=ROUNDING.get(name, 0), abs=0), name


@pytest.mark.parametrize("title", LAYOUTS)
def test_no_policy_beats_belady_on_real_routing(title: str, found: dict[str, dict[str, int]]) -> None:
    counts = found[title]
    assert min(counts.values()) == counts["belady"] > 0


def test_the_slice_is_cacheable(steps: Steps) -> None:
    locally = locality(steps)
    assert locally.verdict == "very cacheable"
    assert locally.srp > locally.srp_random
    rates = [rate for _, _, rate in locally.sch]
    assert rates == sorted(rates) and [slots for _, slots, _ in locally.sch] == [4, 6, 8, 12]
