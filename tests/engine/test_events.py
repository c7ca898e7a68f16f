"""Hits, misses and evictions are those that the routing, the slots and the priorities ask for; counters agree."""

from __future__ import annotations

import numpy as np
import pytest
from models.facts import ModelFacts
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB
from numpy.typing import NDArray

from .decoding import random_script
from .managed import EVICT, HIT, MISS, managed
from .simulation import engine_path_alignment, simulate, stock_accesses

TOKEN_BY_TOKEN = random_script([1] * 40, N_VOCAB, seed=2)
MIXED = random_script([1] * 6 + [2, 40, 100] + [1] * 6, N_VOCAB, seed=3)


def zeros(shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


def noise(shape: tuple[int, int]) -> NDArray[np.float32]:
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def coarse(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Many ties, and values that need care."""
    return np.random.default_rng(5).choice(np.array([np.nan, np.inf, -np.inf, 0, -1], np.float32), shape)


@pytest.mark.parametrize("priorities", [zeros, noise, coarse], ids=["LRU", "random", "ties, NaN and infinities"])
@pytest.mark.parametrize("model_id", ["qwen2moe", "deepseek2", "many-experts", "gpt-oss"])
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_the_events_of_decoding_are_as_simulated(
    model_id: str, share: float, priorities: object, generated_model: ModelFactory
) -> None:
    assert callable(priorities)
    facts = generated_model(model_id)
    accesses = stock_accesses(facts, TOKEN_BY_TOKEN)
    with managed(facts.path, share) as (engine, model), model.context() as context:
        advice = priorities((engine.info.n_layer, engine.info.n_expert))
        engine.set_priorities(advice)
        context.run(TOKEN_BY_TOKEN)
        stats, events = engine.stats(), engine.events()
    assert stats["slots"] >= facts.n_expert_used
    wanted = list(simulate(accesses, stats["slots"], advice))
    assert [tuple(int(n) for n in e) for e in events] == wanted
    kinds = {kind for _, _, _, kind, _ in wanted}
    assert MISS in kinds and (HIT in kinds or share < 0.5) and (EVICT in kinds) == (share < 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("model_id", ["llama", "qwen2moe", "deepseek2", "many-experts", "q4_k_m", "unlike-projections"])
def test_events_and_counters_agree_with_the_routing(model_id: str, share: float, generated_model: ModelFactory) -> None:
    """Prefill in waves and several shape classes included: every access once, nothing else; a replay of the events
    finds residents where hits are, and nowhere else."""
    facts = generated_model(model_id)
    accesses = [access for chunk in stock_accesses(facts, MIXED) for access in chunk]
    with managed(facts.path, share) as (engine, model), model.context() as context:
        context.run(MIXED)
        stats, info, events = engine.stats(), engine.info, engine.events()

    assert stats["steps_layers"] == len(accesses)
    assert np.all(np.diff(events["step"].astype(int)) >= 0), "events come in order"
    resident: set[tuple[int, int]] = set()
    for step, wanted in enumerate(accesses):
        of_step = events[events["step"] == step]
        chosen, evicted = of_step[of_step["kind"] != EVICT], of_step[of_step["kind"] == EVICT]
        assert {int(e["expert"]): int(e["tokens"]) for e in chosen} == wanted
        assert len(chosen) == len(wanted)
        assert set(chosen["layer"]) == {step % info.n_layer}
        hits = {(int(e["layer"]), int(e["expert"])) for e in chosen[chosen["kind"] == HIT]}
        misses = {(int(e["layer"]), int(e["expert"])) for e in chosen[chosen["kind"] == MISS]}
        assert hits <= resident and not misses & resident
        resident |= misses
        for e in evicted:
            resident.remove((int(e["layer"]), int(e["expert"])))
            assert e["tokens"] == 0
        assert len(resident) <= stats["slots"]

    kinds = np.bincount(events["kind"], minlength=3)
    assert stats["hits"] + stats["misses"] == sum(len(wanted) for wanted in accesses)
    assert (stats["hits"], stats["misses"], stats["evictions"]) == tuple(kinds)
    assert stats["resident"] == len(resident) == stats["misses"] - stats["evictions"]
    assert stats["events_lost"] == stats["read_errors"] == 0
    check_bytes(facts, events, stats)


def check_bytes(facts: ModelFacts, events: NDArray[np.void], stats: dict[str, int]) -> None:
    """Each miss reads its expert once: the bytes of its matrices, and at most what alignment adds."""
    wanted = n_read = 0
    for layer in events[events["kind"] == MISS]["layer"]:
        matrices = [t for t in facts.expert_tensors if t.block == facts.expert_blocks[layer]]
        wanted += sum(t.stride for t in matrices)
        n_read += len(matrices)
    assert stats["reads"] == n_read
    assert wanted <= stats["bytes_read"] <= wanted + n_read * engine_path_alignment(facts.path)


def test_a_priority_of_infinity_outlives_everything_finite(generated_model: ModelFactory) -> None:
    facts = generated_model("many-experts")
    with managed(facts.path, 0.4) as (engine, model), model.context() as context:
        context.run(TOKEN_BY_TOKEN[:2])
        first = {(int(e["layer"]), int(e["expert"])) for e in engine.events()}
        advice = zeros((engine.info.n_layer, engine.info.n_expert))
        advice[tuple(zip(*first, strict=True))] = np.inf
        engine.set_priorities(advice)
        assert len(first) < engine.stats()["slots"] - facts.n_expert_used
        context.run(TOKEN_BY_TOKEN[2:])
        evicted = [(int(e["layer"]), int(e["expert"])) for e in engine.events() if e["kind"] == EVICT]
    assert len(evicted) > 20
    assert not first & set(evicted)


def test_events_come_in_the_same_order_however_few_are_taken(generated_model: ModelFactory) -> None:
    facts = generated_model("qwen2moe")
    taken = []
    for capacity in (7, 1 << 16):
        with managed(facts.path, 0.3) as (engine, model), model.context() as context:
            parts = []
            for chunk in TOKEN_BY_TOKEN:
                context.decode(chunk)
                parts += list(engine.events(capacity))
            while len(part := engine.events(capacity)):
                parts += list(part)
            taken.append([tuple(e) for e in parts])
    assert len(taken[0]) > 7 * len(TOKEN_BY_TOKEN)
    assert taken[0] == taken[1]


def test_events_nobody_takes_are_counted_as_lost(generated_model: ModelFactory) -> None:
    facts = generated_model("many-experts")
    with managed(facts.path, 1) as (engine, model), model.context(n_ctx=512, n_threads=1) as context:
        context.set_warmup(True)  # 64 experts of each layer for every token
        context.run(random_script([1] * 400, N_VOCAB))
        stats, events = engine.stats(), engine.events()
    happened = stats["hits"] + stats["misses"] + stats["evictions"]
    assert stats["events_lost"] > 0
    assert len(events) + stats["events_lost"] == happened
    assert int(events["step"][-1]) == stats["steps_layers"] - 1, "the newest stay"
    assert np.all(np.diff(events["step"].astype(int)) >= 0)


@pytest.mark.parametrize("shape", ["too few", "too many"])
def test_priorities_of_another_shape_are_refused(shape: str, generated_model: ModelFactory) -> None:
    facts = generated_model("qwen2moe")
    with managed(facts.path, 0.5) as (engine, _):
        n = engine.info.n_expert + (1 if shape == "too many" else -1)
        with pytest.raises(Exception, match=f"{engine.info.n_layer} x {engine.info.n_expert} floats"):
            engine.set_priorities(zeros((engine.info.n_layer, n)))
