"""The same logits as stock llama.cpp, whatever is in VRAM, RAM or on disk. Stock computes from the same layout here:
plain weights, as a GPU has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine.decoding import Logits, Model, random_script
from engine.grid_settings import settings
from engine.managed import assert_same_bits, bytes_for, nmse, same_bits
from models.architectures import ARCHITECTURES
from models.fixtures import ModelFactory
from models.mutation import mutate_first_layer
from models.vocabulary import N_VOCAB

from pyengine.errors import BudgetError, ExpertReadError, PyengineError, UsageError
from pyengine.native import NativeEngine

from .placed import placed

SCRIPT = random_script([1] * 16 + [2, 40] + [1] * 6, N_VOCAB)
ALONE = 16  # tokens of the script that are computed one by one at first

#: Every fourth, and those whose pieces of graphs cannot be computed twice or whose experts have other forms.
_NAMES = [name.replace("/", "-") for name in ARCHITECTURES]
MODELS = sorted({*_NAMES[::4], "gpt-oss", "qwen3moe", "split", "merged-deepseek2", "llama-q4_k", "llama-f16", "q4_k_m"})


def _stock(path: Path, **how: object) -> Logits:
    with Model(path, plain=True) as model, model.context(**how) as context:  # type: ignore[arg-type]
        return context.run(SCRIPT)


@pytest.mark.parametrize("model_id", MODELS)
def test_same_bits_at_every_budget(model_id: str, generated_model: ModelFactory) -> None:
    facts = generated_model(model_id)
    how = settings(facts, SCRIPT)
    wanted = _stock(facts.path, **how)
    first: Logits | None = None
    for share, ram_share in ((1.0, 1.0), (0.75, 1.0), (0.0, 0.3), (0.3, 0.0)):
        with placed(facts.path, share, ram_share) as (engine, model), model.context(**how) as context:
            got = context.run(SCRIPT)
            stats = engine.stats()
        assert_same_bits(got[:ALONE], wanted[:ALONE])
        assert (error := nmse(got[ALONE:], wanted[ALONE:])) < 1e-6, f"NMSE {error:.2g} at {share}"
        first = got if first is None else first
        assert_same_bits(got, first)
        assert stats["misses"] > 0 and stats["link_bytes"] > 0


def test_recurrent_models_are_not_computed_ahead(generated_model: ModelFactory) -> None:
    """Their state would be that of two tokens."""
    script = random_script([1] * 60, N_VOCAB, seed=2)
    for name in ("jamba", "qwen35moe", "lfm2moe", "kimi-linear"):
        facts = generated_model(name)
        how = settings(facts, script)
        with Model(facts.path, plain=True) as model, model.context(**how) as context:
            wanted = context.run(script)
        with placed(facts.path, 0.95) as (_, model), model.context(**how) as context:
            assert_same_bits(context.run(script), wanted)


def test_what_was_begun_ahead_is_repaired(generated_model: ModelFactory) -> None:
    facts = generated_model("many-experts")
    script = random_script([1] * 120, N_VOCAB, seed=3)
    with Model(facts.path, plain=True) as model, model.context() as context:
        wanted = context.run(script)
    with placed(facts.path, 0.95) as (engine, model), model.context() as context:
        got = context.run(script)
        stats = engine.stats()
    assert stats["begun_ahead"] > stats["computed_again"] > 0
    assert_same_bits(got, wanted)


def test_with_everything_there_nobody_waits(generated_model: ModelFactory) -> None:
    facts = generated_model("llama-q4_0")
    with placed(facts.path, 1.0) as (engine, model), model.context() as context:
        for layer in range(engine.info.n_layer):
            engine.expect(layer, range(engine.info.n_expert), keep=True)
        context.run(random_script([1] * 40, N_VOCAB, seed=4))
        before = engine.stats()
        assert before["resident"] == engine.info.n_experts_total
        context.run(SCRIPT[:ALONE])
        after = engine.stats()
    assert after["syncs"] == before["syncs"]
    assert after["link_bytes"] == before["link_bytes"]


def test_a_mutated_weight_is_noticed(generated_model: ModelFactory, tmp_path: Path) -> None:
    facts = generated_model("llama-q4_0")
    wanted = _stock(facts.path)
    with placed(facts.path, 0.5) as (engine, model), model.context() as context:
        context.run(SCRIPT[:ALONE])
        events = engine.events()
    expert = int(events["expert"][(events["layer"] == 0) & (events["kind"] < 2)][-1])
    mutated = mutate_first_layer(facts, tmp_path / "mutated.gguf", expert=expert, direction="down")
    with placed(mutated.path, 0.5) as (_, model), model.context() as context:
        got = context.run(SCRIPT)
    assert not same_bits(got[:ALONE], wanted[:ALONE])


def test_random_advice_changes_nothing(generated_model: ModelFactory) -> None:
    facts = generated_model("many-experts")
    script = random_script([1] * 60, N_VOCAB, seed=5)
    with Model(facts.path, plain=True) as model, model.context() as context:
        wanted = context.run(script)
    rng = np.random.default_rng(6)
    with placed(facts.path, 0.5, 0.4) as (engine, model), model.context() as context:
        got = []
        for step in script:
            shape = (engine.info.n_layer, engine.info.n_expert)
            engine.set_priorities(rng.choice([0.0, 1.0, -1.0, np.nan, np.inf], shape).astype(np.float32))
            some = rng.integers(shape[1], size=3).tolist()
            engine.expect(int(rng.integers(shape[0])), some, keep=bool(rng.integers(2)))
            got.append(context.run([step]))
    assert_same_bits(np.concatenate(got), wanted)


@pytest.mark.parametrize("used", [1, 3, 12])
def test_another_number_of_experts_than_the_file_says(generated_model: ModelFactory, used: int) -> None:
    facts = generated_model("many-experts")
    metadata = {f"{facts.arch}.expert_used_count": used}
    with Model(facts.path, plain=True, metadata=metadata) as model, model.context() as context:
        wanted = context.run(SCRIPT)
    for share in (0.0, 0.4, 1.0):
        with placed(facts.path, share, experts_used=used) as (engine, model), model.context() as context:
            got = context.run(SCRIPT)
            assert engine.info.n_expert_used == used
        assert_same_bits(got[:ALONE], wanted[:ALONE])
        assert (error := nmse(got[ALONE:], wanted[ALONE:])) < 1e-6, f"NMSE {error:.2g} at {share}"


def test_the_budget_can_change_while_it_runs(generated_model: ModelFactory) -> None:
    facts = generated_model("many-experts")
    script = random_script([1] * 50, N_VOCAB, seed=7)
    with Model(facts.path, plain=True) as model, model.context() as context:
        wanted = context.run(script)
    with placed(facts.path, 1.0, 0.5) as (engine, model), model.context() as context:
        got = []
        for i, step in enumerate(script):
            if i % 10 == 5:
                engine.set_vram_budget(bytes_for(engine, (0.0, 0.6, 1.0)[i // 10 % 3]))
            got.append(context.run([step]))
        with pytest.raises(BudgetError):
            engine.set_vram_budget(1)
    assert_same_bits(np.concatenate(got), wanted)


def test_a_failing_disk_is_an_error_and_no_wrong_token(generated_model: ModelFactory) -> None:
    facts = generated_model("llama-q4_0")
    wanted = _stock(facts.path)
    with placed(facts.path, 0.3, 0.2) as (engine, model), model.context() as context:
        engine.inject_read_errors(5, 1)
        got = []
        for step in SCRIPT[:ALONE]:
            try:
                got.append(context.run([step]))
            except RuntimeError:
                assert isinstance(engine.take_failure(), ExpertReadError)
                got.append(context.run([step]))
    assert_same_bits(np.concatenate(got), wanted[:ALONE])


def test_an_unknown_device_is_an_error(generated_model: ModelFactory) -> None:
    engine = NativeEngine(generated_model("llama-q4_0").path)
    with pytest.raises(PyengineError, match="no device"):
        engine.use_gpus(["nothing"])
    with pytest.raises(UsageError, match="no GPU"):
        engine.start_on_gpu(engine.info.slot_bytes, 0)
    engine.close()
