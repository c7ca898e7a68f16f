"""Residency changes time, never meaning: advice, budgets that change, and a slow disk leave every bit as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine.errors import PyengineError
from pyengine.native import NativeEngine

from .agitation import Agitation, random_budgets, random_priorities
from .children import Child
from .decoding import random_script
from .managed import assert_as_stock, assert_same_bits, managed
from .reference import StockProcess

SCRIPT = random_script([1] * 24 + [33, 100] + [1] * 24, N_VOCAB, seed=1)
N_UBATCH = 64
ROUNDS = 3

# Three experts a token; one kind of expert; two kinds in two arenas; biases; many experts in waves.
MODELS = ["deepseek2", "qwen2moe", "q4_k_m", "gpt-oss", "many-experts"]


@pytest.mark.parametrize("model_id", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_priorities_that_change_while_decoding(
    model_id: str, share: float, generated_model: ModelFactory, stock: StockProcess
) -> None:
    facts = generated_model(model_id)
    wanted = stock.run(facts.path, SCRIPT, n_ubatch=N_UBATCH).logits
    with managed(facts.path, share) as (engine, model), model.context(n_ubatch=N_UBATCH) as context:
        with Agitation(random_priorities(engine)) as agitation:
            for _ in range(ROUNDS):
                context.clear()
                assert_as_stock(context.run(SCRIPT), wanted, SCRIPT, N_UBATCH)
        assert agitation.times > 10


@pytest.mark.parametrize("model_id", MODELS)
def test_budgets_that_change_while_decoding(model_id: str, generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model(model_id)
    wanted = stock.run(facts.path, SCRIPT, n_ubatch=N_UBATCH).logits
    with managed(facts.path, 0.5) as (engine, model), model.context(n_ubatch=N_UBATCH) as context:
        budgets, priorities = Agitation(random_budgets(engine)), Agitation(random_priorities(engine))
        with budgets, priorities:
            for _ in range(ROUNDS):
                context.clear()
                assert_as_stock(context.run(SCRIPT), wanted, SCRIPT, N_UBATCH)
        assert budgets.times > 10 and priorities.times > 10


@pytest.mark.parametrize("model_id", MODELS)
def test_budgets_that_change_between_decodes(model_id: str, generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model(model_id)
    wanted = stock.run(facts.path, SCRIPT, n_ubatch=N_UBATCH).logits
    with managed(facts.path, 1) as (engine, model), model.context(n_ubatch=N_UBATCH) as context:
        change, seen, got = random_budgets(engine), set(), []
        for chunk in SCRIPT:
            change()
            got.append(context.decode(chunk))
            stats = engine.stats()
            seen.add(stats["slots"])
            assert stats["resident"] <= stats["slots"]
    assert_as_stock(np.concatenate(got), wanted, SCRIPT, N_UBATCH)
    assert len(seen) > 5


def test_lowering_the_budget_gives_the_memory_back(generated_model: ModelFactory) -> None:
    """Slots outside the budget have no pages."""
    facts = generated_model("many-experts")
    with managed(facts.path, 1) as (engine, model), model.context() as context:
        context.run(SCRIPT[:30])
        before = slot_pages(engine)
        resident = engine.stats()["resident_bytes"]
        engine.set_ram_budget(engine.info.least_budget)
        after = slot_pages(engine)
    assert before >= resident > 100 * engine_least(facts.path)
    assert after <= before - resident + 2 * engine_least(facts.path)


def engine_least(path: Path) -> int:
    """The least budget, bytes."""
    engine = NativeEngine(path)
    try:
        return engine.info.least_budget
    finally:
        engine.close()


def slot_pages(engine: NativeEngine) -> int:
    """Resident bytes of the mapping that has the slots: the only one as large as all slots and a page."""
    wanted = engine.info.slot_bytes + 4096
    found, size = [], 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, last = (int(address, 16) for address in name.split("-"))
            size = last - first
        elif name == "Rss:" and size == wanted:
            found.append(int(rest[0]) * 1024)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("budget", ["half a slot", "0"])
def test_a_budget_below_the_least_changes_nothing(
    budget: str, generated_model: ModelFactory, stock: StockProcess
) -> None:
    facts = generated_model("qwen2moe")
    wanted = stock.run(facts.path, SCRIPT[:24]).logits
    with managed(facts.path, 0.5) as (engine, model), model.context() as context:
        slots, least = engine.stats()["slots"], engine.info.least_budget
        with pytest.raises(PyengineError, match=str(least)):
            engine.set_ram_budget(0 if budget == "0" else least - 1)
        assert engine.stats()["slots"] == slots
        assert_same_bits(context.run(SCRIPT[:24]), wanted)


# ---- a slow disk, in a process of its own


@pytest.mark.parametrize("model_id", ["q4_k_m", "many-experts", "split-align64"])
@pytest.mark.parametrize(
    "trouble",
    [
        {"FAULTY_DISK_DELAY_US": "3000"},
        {"FAULTY_DISK_SHORT": "1"},
        {"FAULTY_DISK_DELAY_US": "1000", "FAULTY_DISK_SHORT": "1", "agitate": "1"},
    ],
    ids=["late", "short and interrupted", "everything at once"],
)
def test_a_slow_disk(
    model_id: str,
    trouble: dict[str, str],
    generated_model: ModelFactory,
    stock: StockProcess,
    faulty_disk: Path,
    tmp_path: Path,
) -> None:
    facts, script = generated_model(model_id), SCRIPT[16:34]
    wanted = stock.run(facts.path, script, n_ubatch=N_UBATCH).logits
    job = {"path": str(facts.path), "script": script, "share": 0.2, "out": str(tmp_path / "logits.npy")}
    environment = {"LD_PRELOAD": str(faulty_disk), **trouble}
    said = Child("disk.decode", agitate="agitate" in trouble, n_ubatch=N_UBATCH, **job).run(environment)
    assert_as_stock(np.load(tmp_path / "logits.npy"), wanted, script, N_UBATCH)
    assert said["reads"] >= said["stats"]["reads"] > 0, "our reads went through the faulty disk"
    assert said["faults"] > said["reads"] // 8
