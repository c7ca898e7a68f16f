"""Prompts long enough for their experts to be computed one by one: where that begins, and that a wrong weight shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from models.fixtures import ModelFactory
from models.mutation import mutate_first_layer
from models.vocabulary import N_VOCAB

from .decoding import random_script
from .managed import EVICT, MOST_TOKENS_BY_ROW, assert_as_stock, assert_same_bits, managed, nmse
from .reference import StockProcess

# Kernels that round as stock does; floats, computed as stock does; biases; gate and up in one tensor; many experts.
MODELS = ["llama-q4_0", "llama-f16", "gpt-oss", "merged-deepseek2", "many-experts"]


@pytest.mark.parametrize("model_id", MODELS)
def test_lengths_around_the_least_long_prompt(
    model_id: str, generated_model: ModelFactory, stock: StockProcess
) -> None:
    facts = generated_model(model_id)
    lengths = range(MOST_TOKENS_BY_ROW - 1, MOST_TOKENS_BY_ROW + 3)
    scripts = [random_script([n], N_VOCAB, seed=n) for n in lengths]
    found = []
    for share in (0.0, 0.4, 1.0):
        with managed(facts.path, share) as (_, model), model.context() as context:
            for script in scripts:
                context.clear()
                found.append(context.run(script))
    for i, script in enumerate(scripts):
        least, some, full = found[i :: len(scripts)]
        assert_as_stock(full, stock.run(facts.path, script).logits, script)
        assert_same_bits(some, full)
        assert_same_bits(least, full)


@pytest.mark.parametrize("model_id", MODELS)
@pytest.mark.parametrize("direction", ["inward", "down"])
def test_one_mutated_weight_shows_in_a_prompt(
    model_id: str, direction: str, generated_model: ModelFactory, stock: StockProcess, tmp_path: Path
) -> None:
    """The comparison up to rounding can fail, too."""
    facts, script = generated_model(model_id), random_script([60], N_VOCAB, seed=41)
    wanted = stock.run(facts.path, script).logits
    with managed(facts.path, 1) as (engine, model), model.context() as context:
        assert_as_stock(context.run(script), wanted, script)
        events = engine.events()
    used = events[(events["layer"] == 0) & (events["kind"] != EVICT)]
    expert = int(used["expert"][used["tokens"].argmax()])
    mutated = mutate_first_layer(facts, tmp_path / "mutated.gguf", expert=expert, direction=direction)
    for share in (0.0, 1.0):
        with managed(mutated.path, share) as (_, model), model.context() as context:
            got = context.run(script)
        assert nmse(got, wanted) > 1e-6
        with pytest.raises(AssertionError, match="NMSE"):
            assert_as_stock(got, wanted, script)
        assert_as_stock(got, stock.run(mutated.path, script).logits, script)
