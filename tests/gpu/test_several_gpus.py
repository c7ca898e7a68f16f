"""Several GPUs, which the CPU plays with memory of its own for each: layers where llama.cpp puts them, same logits."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from engine.decoding import Logits, Model, llama_log, random_script
from engine.grid_settings import settings
from engine.managed import assert_same_bits, bytes_for, nmse
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine.bundled import bundled_model
from pyengine.errors import BudgetError, ExpertReadError, PyengineError, UsageError
from pyengine.native import NativeEngine

from .placed import placed

SPLIT = (1.0, 3.0)  # so that models of two layers have one on each
SCRIPT = random_script([1] * 16 + [2, 40] + [1] * 6, N_VOCAB)
ALONE = 16  # tokens of the script that are computed one by one at first

_ASSIGNED = re.compile(r"layer +(\d+) assigned to device (.*), is_swa")


def _stock(path: Path, script: list[list[int]], **how: object) -> Logits:
    with Model(path, plain=True) as model, model.context(**how) as context:  # type: ignore[arg-type]
        return context.run(script)


@pytest.mark.parametrize("split", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0, 4.0), (0.1, 0.9), (1.0, 0.0), (7.1e10, 8.3e10)])
def test_layers_lie_where_llama_cpp_puts_them(split: tuple[float, ...]) -> None:
    with llama_log() as lines, placed(bundled_model(), 0.2, 0.0, split) as (engine, _):
        parts = engine.gpus()
    log = "\n".join(lines)
    devices = {int(layer): device for layer, device in _ASSIGNED.findall(log)}
    layers = Counter(device for layer, device in devices.items() if layer < 30)  # and the output layer
    names = ["pyengine over CPU", *(f"pyengine over CPU ({n})" for n in range(2, len(split) + 1))]
    assert len(devices) == 31 and sum(part.n_layer for part in parts) == 30
    assert [part.n_layer for part in parts] == [layers[name] for name in names]


@pytest.mark.parametrize(
    ("model_id", "split"),
    [
        ("gpt-oss", SPLIT),
        ("jamba", SPLIT),
        ("llama-q4_0", SPLIT),
        ("merged-deepseek2", (1.0, 1.0)),  # its first layer has no experts
        ("q4_k_m", SPLIT),
        ("qwen3moe", SPLIT),
    ],
)
def test_same_bits_at_every_budget(model_id: str, split: tuple[float, ...], generated_model: ModelFactory) -> None:
    facts = generated_model(model_id)
    how = settings(facts, SCRIPT)
    wanted = _stock(facts.path, SCRIPT, **how)
    for share, ram_share in ((1.0, 1.0), (0.75, 1.0), (0.0, 0.3), (0.3, 0.0)):
        with placed(facts.path, share, ram_share, split) as (engine, model), model.context(**how) as context:
            got = context.run(SCRIPT)
            parts, stats = engine.gpus(), engine.stats()
        assert_same_bits(got[:ALONE], wanted[:ALONE])
        assert (error := nmse(got[ALONE:], wanted[ALONE:])) < 1e-6, f"NMSE {error:.2g} at {share}"
        assert all(part.n_layer > 0 and part.ffns > 0 and 0 < part.resident <= part.slots for part in parts)
        for total, of_parts in (("steps_layers", "ffns"), ("slots", "slots"), ("resident", "resident")):
            assert sum(getattr(part, of_parts) for part in parts) == stats[total]


def test_with_everything_there_nobody_waits(generated_model: ModelFactory) -> None:
    facts = generated_model("llama-q4_0")
    with placed(facts.path, 1.0, split=SPLIT) as (engine, model), model.context() as context:
        for layer in range(engine.info.n_layer):
            engine.expect(layer, range(engine.info.n_expert), keep=True)
        context.run(random_script([1] * 40, N_VOCAB, seed=4))
        before = engine.stats()
        assert all(part.resident == part.slots for part in engine.gpus())
        context.run(SCRIPT[:ALONE])
        after = engine.stats()
    assert after["syncs"] == before["syncs"] and after["link_bytes"] == before["link_bytes"]


def test_what_was_begun_ahead_is_repaired(generated_model: ModelFactory) -> None:
    facts = generated_model("many-experts")
    script = random_script([1] * 120, N_VOCAB, seed=3)
    wanted = _stock(facts.path, script)
    with placed(facts.path, 0.95, split=SPLIT) as (engine, model), model.context() as context:
        got = context.run(script)
        stats = engine.stats()
    assert stats["begun_ahead"] > stats["computed_again"] > 0
    assert_same_bits(got, wanted)


def test_budgets_change_while_it_runs(generated_model: ModelFactory) -> None:
    facts = generated_model("many-experts")
    script = random_script([1] * 60, N_VOCAB, seed=7)
    wanted = _stock(facts.path, script)
    with placed(facts.path, 1.0, 0.5, SPLIT) as (engine, model), model.context() as context:
        got = []
        for i, step in enumerate(script):
            if i % 20 == 5:
                engine.set_vram_budget(bytes_for(engine, (0.0, 0.6, 1.0)[i // 20]))
            if i % 20 == 15:  # one of them, the other stays
                one, other = (i // 20) % 2, 1 - (i // 20) % 2
                before = engine.gpus()[other]
                engine.set_vram_budget(engine.gpus()[one].least_budget, one)
                after = engine.gpus()
                assert after[other] == before and after[one].budget_bytes == after[one].least_budget
            got.append(context.run([step]))
        with pytest.raises(BudgetError):
            engine.set_vram_budget(1, 1)
        with pytest.raises(PyengineError, match="no GPU 2"):
            engine.set_vram_budget(engine.info.slot_bytes, 2)
    assert_same_bits(np.concatenate(got), wanted)


def test_one_that_could_not_take_its_memory_does_not_end_the_others(generated_model: ModelFactory) -> None:
    facts = generated_model("llama-q4_0")
    script = SCRIPT[:ALONE]
    wanted = _stock(facts.path, script)
    with placed(facts.path, 0.5, 1.0, SPLIT) as (engine, model), model.context() as context:
        context.run(script)
        context.clear()
        engine.limit_vram(0, 0)
        with pytest.raises(MemoryError, match="CPU may not take"):
            engine.set_vram_budget(engine.gpus()[0].slot_bytes, 0)
        for share in (1.0, 0.6):
            engine.set_vram_budget(int(share * engine.gpus()[1].slot_bytes), 1)
            assert engine.gpus()[0].slots == 0 < engine.gpus()[1].slots
            with pytest.raises(RuntimeError):
                context.run(script)
            assert isinstance(engine.take_failure(), MemoryError)
        engine.limit_vram(0, engine.gpus()[0].least_budget)
        assert engine.set_vram_budget(engine.gpus()[0].slot_bytes, 0) < engine.gpus()[0].slot_bytes
        assert engine.gpus()[0].budget_bytes == engine.gpus()[0].least_budget
        context.clear()
        got = context.run(script)
    assert_same_bits(got, wanted)


def test_a_failing_disk_is_an_error_and_no_wrong_token(generated_model: ModelFactory) -> None:
    facts = generated_model("llama-q4_0")
    script = SCRIPT[:ALONE]
    wanted = _stock(facts.path, script)
    with placed(facts.path, 0.0, 0.0, SPLIT) as (engine, model), model.context() as context:
        failed = 0
        got = []
        for i, step in enumerate(script):
            engine.inject_read_errors(i % 7, 1)  # sometimes on the one, sometimes on the other
            try:
                got.append(context.run([step]))
            except RuntimeError:
                failed += 1
                assert isinstance(engine.take_failure(), ExpertReadError)
                engine.inject_read_errors(0, 0)
                got.append(context.run([step]))
    assert failed > 1
    assert_same_bits(np.concatenate(got), wanted)


def test_impossible_choices_are_refused(generated_model: ModelFactory) -> None:
    engine = NativeEngine(generated_model("llama-q4_0").path)
    for shares in ([0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(PyengineError, match="share"):
            engine.use_gpus(["CPU", "CPU"], shares)
    with pytest.raises(UsageError, match="do not fit"):
        engine.use_gpus(["CPU", "CPU"], [1.0])
    engine.use_gpus(["CPU", "CPU"])
    with pytest.raises(UsageError, match="already"):
        engine.use_gpus(["CPU"])
    engine.close()
