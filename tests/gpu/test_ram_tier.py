"""RAM smaller than the model behind a smaller VRAM: what leaves VRAM falls back to RAM, RAM is filled ahead, and the
logits are stock's whichever tier an expert came from."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bundles.making import make
from engine.decoding import Model, random_script
from engine.managed import MISS, assert_same_bits
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine.errors import ExpertReadError
from pyengine.native import NativeEngine

from .placed import placed

SCRIPT = random_script([1] * 40, N_VOCAB, seed=11)


@pytest.fixture(scope="module")
def wanted(generated_model: ModelFactory) -> np.ndarray:
    with Model(generated_model("many-experts").path, plain=True) as model, model.context() as context:
        return context.run(SCRIPT)


def _filled(engine: NativeEngine) -> dict[str, int]:
    """Counters once RAM is full and nothing is read ahead any more."""
    engine.fill_ram()
    for _ in range(2000):
        stats = engine.stats()
        if stats["ram_resident"] == stats["ram_slots"]:
            return stats
        time.sleep(0.005)
    raise AssertionError(f"RAM was not filled: {stats['ram_resident']} of {stats['ram_slots']} slots")


def test_every_tier_serves_experts(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    path = generated_model("many-experts").path
    with placed(path, 0.3, 0.4) as (engine, model), model.context() as context:
        got = context.run(SCRIPT)
        stats = engine.stats()
    assert_same_bits(got, wanted)
    assert stats["hits"] > 0 and stats["ram_hits"] > 0 and stats["reads"] > 0
    assert stats["ram_demotions"] > 0
    each = stats["back_bytes"] / stats["ram_demotions"]
    assert each == pytest.approx(stats["link_bytes"] / (stats["misses"] + stats["prefetches"]), rel=0.2)
    assert stats["ram_resident"] <= stats["ram_slots"]


def test_what_leaves_vram_is_found_in_ram(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    """VRAM and RAM together hold all experts only if they hold different ones: then the disk is read no more."""
    path = generated_model("many-experts").path
    with placed(path, 0.6, 0.6) as (engine, model), model.context() as context:
        context.run(SCRIPT)
        context.clear()
        before = _filled(engine)
        got = context.run(SCRIPT)
        after = engine.stats()
    assert_same_bits(got, wanted)
    assert after["misses"] > before["misses"]
    assert after["reads"] == before["reads"]


def test_filled_ahead_nobody_waits_for_the_disk(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    path = generated_model("many-experts").path
    with placed(path, 0.0, 1.0) as (engine, model), model.context() as context:
        before = _filled(engine)
        assert before["ram_fills"] == before["ram_slots"] == engine.info.n_experts_total
        got = context.run(SCRIPT)
        after = engine.stats()
    assert_same_bits(got, wanted)
    assert after["reads"] == before["reads"]
    assert after["ram_hits"] - before["ram_hits"] == after["misses"] + after["prefetches"]
    assert after["ram_demotions"] == 0


def test_what_is_about_to_be_read_ahead_is_read_once(
    generated_model: ModelFactory, wanted: np.ndarray, tmp_path: Path
) -> None:
    """A token that needs it reads it, into RAM too, instead of beside it. An expert is one read here: a record."""
    path, bundle = generated_model("many-experts").path, tmp_path / "raw.pyeb"
    make(path, bundle, raw=True)
    with placed(path, 0.0, 1.0, bundle=bundle) as (engine, model), model.context() as context:
        got = [context.run(SCRIPT[:1])]  # the disk was not quiet just now
        engine.fill_ram()
        got.append(context.run(SCRIPT[1:]))
        after = _filled(engine)
    assert_same_bits(np.concatenate(got), wanted)
    assert after["ram_fills"] < after["ram_slots"]
    assert after["reads"] == after["ram_slots"] == after["ram_resident"]


def test_the_best_are_filled_first(generated_model: ModelFactory) -> None:
    """And stay: who leaves VRAM is worth less here."""
    path = generated_model("many-experts").path
    n_layer = NativeEngine(path).info.n_layer
    with placed(path, 0.0, 1 / n_layer) as (engine, model), model.context() as context:
        best = np.zeros((n_layer, engine.info.n_expert), np.float32)
        best[-1] = 1.0
        engine.set_priorities(best)
        assert _filled(engine)["ram_slots"] == engine.info.n_expert
        context.run(SCRIPT[:8])
        events, stats = engine.events(), engine.stats()
    missed = events[events["kind"] == MISS]
    assert stats["ram_hits"] == np.count_nonzero(missed["layer"] == n_layer - 1) > 0
    assert stats["ram_demotions"] == 0


def test_a_failing_disk_is_an_error_from_which_it_recovers(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    path = generated_model("many-experts").path
    failed, got = 0, []
    with placed(path, 0.0, 0.3) as (engine, model), model.context() as context:
        for i, step in enumerate(SCRIPT):
            if i in (5, 20):
                engine.inject_read_errors(2, 3)
            for _ in range(10):
                try:
                    got.append(context.run([step]))
                    break
                except RuntimeError:
                    assert isinstance(engine.take_failure(), ExpertReadError)
                    failed += 1
        stats = engine.stats()
    assert failed >= 2 and stats["read_errors"] >= 2 and stats["ram_demotions"] > 0
    assert_same_bits(np.concatenate(got), wanted)


def test_what_cannot_be_read_ahead_is_left_to_who_needs_it(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    path = generated_model("many-experts").path
    with placed(path, 0.0, 1.0) as (engine, model), model.context() as context:
        engine.inject_read_errors(0, 1)  # counted in demand loads: every fill before the first of those fails
        engine.fill_ram()
        while (before := engine.stats())["read_errors"] < engine.info.n_experts_total:
            time.sleep(0.005)
        engine.inject_read_errors(0, 0)
        assert before["ram_fills"] == 0
        assert_same_bits(context.run(SCRIPT), wanted)


def test_closing_in_the_middle_of_filling_is_quick_and_whole(generated_model: ModelFactory) -> None:
    engine = NativeEngine(generated_model("many-experts").path)
    engine.use_gpus(["CPU"])
    engine.start_on_gpu(engine.info.least_budget, engine.info.slot_bytes)
    engine.fill_ram()
    engine.fill_ram()  # once is enough
    engine.close()


def test_ram_grows_and_shrinks_while_it_is_filled_and_used(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    path = generated_model("many-experts").path
    with placed(path, 0.3, 0.4, host_threads=1) as (engine, model), model.context() as context:
        n_experts, got = engine.info.n_experts_total, []
        for i, step in enumerate(SCRIPT):
            if i == 3:
                engine.fill_ram()
            if i % 3 == 1:
                share = (0.0, 1.0, 0.2, 0.6, 0.6)[i // 3 % 5]
                engine.set_ram_budget(int(share * engine.info.slot_bytes))
                assert engine.stats()["ram_slots"] == int(share * n_experts)
            got.append(context.run([step]))
    assert_same_bits(np.concatenate(got), wanted)


def test_ram_that_has_grown_is_read_ahead_again(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    path = generated_model("many-experts").path
    with placed(path, 0.0, 0.3) as (engine, model), model.context() as context:
        assert _filled(engine)["ram_slots"] < engine.info.n_experts_total
        time.sleep(0.05)  # nobody looks for more to read any longer
        engine.set_ram_budget(engine.info.slot_bytes)
        before = _filled(engine)
        assert before["ram_slots"] == engine.info.n_experts_total
        engine.set_ram_budget(engine.info.slot_bytes)
        assert engine.stats()["ram_resident"] == before["ram_slots"], "as many as before: nothing is lost"
        got = context.run(SCRIPT)
        assert engine.stats()["reads"] == before["reads"]
    assert_same_bits(got, wanted)


def test_ram_changes_while_another_thread_decodes(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    path = generated_model("many-experts").path
    with placed(path, 0.3, 0.4) as (engine, model), model.context() as context:
        engine.fill_ram()
        sizes = [int(share * engine.info.slot_bytes) for share in (0.1, 0.9, 0.0, 0.5)]
        ended = threading.Event()

        def change() -> None:
            n = 0
            while not ended.is_set():
                engine.set_ram_budget(sizes[n % len(sizes)])
                n += 1
            assert n > 5

        with ThreadPoolExecutor(1) as other:
            changing = other.submit(change)
            try:
                for _ in range(5):
                    assert_same_bits(context.run(SCRIPT), wanted)
                    context.clear()
            finally:
                ended.set()
            changing.result()


def test_tiers_change_under_way(generated_model: ModelFactory, wanted: np.ndarray) -> None:
    path = generated_model("many-experts").path
    with placed(path, 0.5, 0.3) as (engine, model), model.context() as context:
        got = []
        for i, step in enumerate(SCRIPT):
            if i % 10 == 5:
                share = (0.2, 0.7)[i // 10 % 2]
                engine.set_vram_budget(max(engine.info.least_budget, int(share * engine.info.slot_bytes)))
            if i == 17:
                engine.fill_ram()
            got.append(context.run([step]))
    assert_same_bits(np.concatenate(got), wanted)
