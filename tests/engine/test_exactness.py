"""The same logits as stock llama.cpp whatever the budget, every architecture and type of the grid: bit by bit up to the
first long prompt, from there up to rounding, and bit by bit the same at every budget.

Stock computes in a process that never loads pyengine. `--grid full` crosses all architectures with all types.
docs/architectures.md is made from a run of these tests.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.architectures import ARCHITECTURES
from models.facts import ModelFacts
from models.fixtures import ModelFactory
from models.mutation import mutate_first_layer
from models.vocabulary import N_VOCAB

from pyengine import Llama, bundled_model
from pyengine.architectures import MANAGED

from .decoding import Logits, Model, random_script
from .grid_settings import settings
from .managed import EVICT, assert_as_stock, assert_same_bits, managed, same_bits
from .reference import StockProcess, write

# Token by token, then many at once: few, an odd number, and more than a micro-batch of 64; then token by token again.
SCRIPT = random_script([1] * 12 + [2, 33, 200] + [1] * 4, N_VOCAB)

# Share of the experts that are resident (0: one slot for each shape of expert) and tokens in a micro-batch.
CASES = {
    "least budget, ubatch 64": (0.0, 64),
    "least budget, ubatch 512": (0.0, 512),
    "12.5 %, ubatch 64": (0.125, 64),
    "50 %, ubatch 512": (0.5, 512),
    "100 %, ubatch 64": (1.0, 64),
    "100 %, ubatch 512": (1.0, 512),
}


@pytest.fixture(scope="module")
def at_first_budget() -> dict[tuple[Path, int], Logits]:
    """Logits of a model in micro-batches of so many tokens, at the first budget that was tried."""
    return {}


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_stock(
    grid_model: ModelFacts, case: str, stock: StockProcess, at_first_budget: dict[tuple[Path, int], Logits]
) -> None:
    share, n_ubatch = CASES[case]
    how = settings(grid_model, SCRIPT, n_ubatch)
    wanted = stock.run(grid_model.path, SCRIPT, **how).logits
    with managed(grid_model.path, share) as (engine, model), model.context(**how) as context:
        got = context.run(SCRIPT)
        info, stats = engine.info, engine.stats()
    assert_as_stock(got, wanted, SCRIPT, how["n_ubatch"])
    assert_same_bits(got, at_first_budget.setdefault((grid_model.path, how["n_ubatch"]), got))
    # The budget was what the case says.
    if share == 1:
        assert stats["slots"] == info.n_experts_total
        assert stats["evictions"] == 0 and stats["misses"] == stats["resident"] <= info.n_experts_total
    else:
        assert stats["budget_bytes"] <= max(info.least_budget, share * info.slot_bytes)
        assert stats["resident"] <= stats["slots"] < info.n_experts_total
        assert stats["evictions"] > 0
    if stats["slots"] < info.n_expert_used:
        assert stats["passes"] > stats["steps_layers"], "one token's ranks needed several passes"


@pytest.mark.parametrize("case", ["least budget, ubatch 64", "12.5 %, ubatch 64", "100 %, ubatch 512"])
def test_same_bits_as_stock_of_the_bundled_model(case: str, stock: StockProcess) -> None:
    share, n_ubatch = CASES[case]
    script = random_script([1] * 8 + [90] + [1] * 4, 49152, seed=13)
    wanted = stock.run(bundled_model(), script, n_ubatch=n_ubatch).logits
    with managed(bundled_model(), share) as (_, model), model.context(n_ubatch=n_ubatch) as context:
        assert_as_stock(context.run(script), wanted, script, n_ubatch)


@pytest.mark.parametrize("ram_budget", ["12.5%", "50%"])
def test_same_tokens_as_stock_from_the_bundled_model(ram_budget: str, stock: StockProcess) -> None:
    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 2, "n_threads_batch": 2}
    with contextlib.closing(Llama(ram_budget=ram_budget, **settings)) as llama:
        prompt = llama.tokenize(b"<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
        got = list(write(llama, prompt, 40))
        assert llama.expert_stats()["evictions"] > 0
    assert got == stock.write(bundled_model(), prompt, 40, **settings)


def test_the_grid_has_every_managed_architecture() -> None:
    assert {a.name for a in ARCHITECTURES.values()} >= MANAGED


@pytest.mark.parametrize("model_id", ["llama-q4_0", "llama-f16", "llama-q4_k", "gpt-oss", "merged-deepseek2", "split"])
@pytest.mark.parametrize("direction", ["inward", "down"])
def test_one_mutated_weight_is_noticed(
    model_id: str, direction: str, generated_model: ModelFactory, stock: StockProcess, tmp_path: Path
) -> None:
    """The comparison can fail: it does for a file that differs from stock's in one weight of one expert."""
    facts = generated_model(model_id)
    script = SCRIPT[:12]
    wanted = stock.run(facts.path, script).logits
    with managed(facts.path, 0.5) as (engine, model), model.context() as context:
        assert_same_bits(context.run(script), wanted)
        events = engine.events()
    used = events[(events["layer"] == 0) & (events["kind"] != EVICT)]
    expert = int(used["expert"][-1])
    mutated = mutate_first_layer(facts, tmp_path / "mutated.gguf", expert=expert, direction=direction)
    for share in (0.0, 1.0):
        with managed(mutated.path, share) as (_, model), model.context() as context:
            got = context.run(script)
        assert not same_bits(got, wanted)
        with pytest.raises(AssertionError, match="other logits"):
            assert_same_bits(got, wanted)
        assert_same_bits(got, stock.run(mutated.path, script).logits)


def test_a_long_prompt_whose_slots_lie_far_apart(generated_model: ModelFactory, stock: StockProcess) -> None:
    """More activations and a wider span of slots than one pass may take, with everything resident: it takes several."""
    facts = generated_model("many-experts")
    sizes: dict[str, Any] = {"n_ctx": 4096, "n_ubatch": 4096}
    script = random_script([4096], N_VOCAB, seed=14)
    wanted = stock.run(facts.path, script, **sizes).logits
    with managed(facts.path, 0.9) as (engine, model), model.context(**sizes) as context:
        first = context.run(script)  # evictions scatter the layers' experts over the slots
        assert_as_stock(first, wanted, script, 4096)
        engine.set_ram_budget(engine.info.slot_bytes)
        for _ in range(2):
            before = engine.stats()
            context.clear()
            assert_same_bits(context.run(script), first)
        after = engine.stats()
    assert after["misses"] == before["misses"], "everything was resident"
    assert after["passes"] - before["passes"] > after["steps_layers"] - before["steps_layers"]


WARMED = ["llama", "qwen2moe", "qwen3moe", "olmoe", "deepseek2", "gpt-oss", "granitemoe", "many-experts", "q4_k_m"]
WARMED += ["nemotron_h_moe-uneven", "qwen3next", "grovemoe", "step35"]


@pytest.mark.parametrize("model_id", WARMED)
def test_a_warm_up_with_all_experts_at_the_least_budget(
    model_id: str, generated_model: ModelFactory, stock: StockProcess
) -> None:
    """Stock programs warm up with every expert of a layer at once, however few slots there are."""
    facts = generated_model(model_id)
    warm_up = SCRIPT[12:14]
    with Model(facts.path) as model, model.context() as context:
        context.set_warmup(True)
        wanted = context.run(warm_up)
    with managed(facts.path, 0) as (engine, model), model.context() as context:
        context.set_warmup(True)
        got = context.run(warm_up)
        events = engine.events()
        context.set_warmup(False)
        context.clear()
        afterwards = context.run(SCRIPT)
    assert_same_bits(got, wanted)
    chosen = events[events["kind"] != EVICT]
    assert len(np.unique(chosen[["layer", "expert"]])) == engine_experts(facts)
    assert_as_stock(afterwards, stock.run(facts.path, SCRIPT).logits, SCRIPT)


def engine_experts(facts: ModelFacts) -> int:
    """Experts in all computed blocks."""
    return len(facts.expert_blocks) * facts.n_expert
