"""What is fetched ahead changes time, never tokens: whatever is guessed, kept or read too late."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine import Llama, bundled_model
from pyengine.errors import BudgetError, PyengineError, UsageError
from pyengine.native import EVENT, NativeEngine, NativePredictor
from pyengine.policies import POLICIES

from .agitation import Agitation, random_budgets, random_priorities
from .decoding import Script, random_script
from .managed import assert_as_stock, managed
from .reference import StockProcess, write

PREFETCH = 3
SCRIPT: Script = random_script([1] * 16 + [70] + [1] * 8, N_VOCAB, seed=21)
BUNDLED: Script = random_script([1] * 16 + [90] + [1] * 8, 49152, seed=21)
PROMPT = b"The lighthouse stood on a rock far out in the sea. Every evening"


def wild(engine: NativeEngine, distance: int = 1, hidden: int = 0, seed: int = 0) -> list[NativePredictor]:
    """Predictors for every layer that know nothing, a few numbers of them not finite."""
    info, rng = engine.info, np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        values = rng.standard_normal(shape).astype(np.float32)
        values[rng.random(shape) < 0.01] = np.nan
        return values

    found = []
    for target in range(distance, info.n_layer):
        first = (some(hidden, info.n_embd), some(hidden)) if hidden else (None, None)
        second = some(info.n_expert, hidden or info.n_embd), some(info.n_expert)
        found.append(NativePredictor(target - distance, target, info.n_expert, *first, *second, None))
    return found


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.7])
@pytest.mark.parametrize("model_id", ["llama-q4_0", "deepseek2", "gpt-oss", "many-experts", "nemotron_h_moe-uneven"])
def test_senseless_guesses_change_no_bit(
    model_id: str, share: float, generated_model: ModelFactory, stock: StockProcess
) -> None:
    facts = generated_model(model_id)
    wanted = stock.run(facts.path, SCRIPT).logits
    with managed(facts.path, share) as (engine, model), model.context() as context:
        try:
            engine.set_predictors([*wild(engine), *wild(engine, 2, hidden=24, seed=1)])
        except PyengineError as error:  # layers with fewer experts than the widest
            assert "experts" in str(error)
            pytest.skip("its layers differ in their number of experts")
        engine.set_prefetch_rules(least_chance=0.0)
        with Agitation(random_priorities(engine)):
            got = context.run(SCRIPT)
        stats = engine.stats()
    assert_as_stock(got, wanted, SCRIPT)
    assert stats["guesses"] > 0
    assert stats["prefetches"] > 0 or stats["slots"] < 8
    counted = stats["prefetch_hits"] + stats["prefetches_late"] + stats["prefetches_wasted"]
    assert counted <= stats["prefetches"] and stats["prefetches_failed"] == 0


def test_budgets_that_change_while_experts_are_fetched_ahead(stock: StockProcess) -> None:
    wanted = stock.run(bundled_model(), BUNDLED).logits
    with managed(bundled_model(), 0.4) as (engine, model), model.context() as context:
        engine.set_predictors(wild(engine))
        engine.set_prefetch_rules(least_chance=0.0)
        with Agitation(random_budgets(engine)) as budgets:
            got = context.run(BUNDLED)
        assert budgets.times > 3
        assert engine.stats()["prefetches"] > 0
    assert_as_stock(got, wanted, BUNDLED)


@pytest.mark.parametrize("policy", [*POLICIES, "auto"])
@pytest.mark.parametrize("ram_budget", ["20%", "60%"])
def test_every_policy_writes_what_stock_writes(policy: str, ram_budget: str, stock: StockProcess) -> None:
    settings = {"n_ctx": 256, "n_threads": 2, "n_threads_batch": 2}
    with contextlib.closing(Llama(ram_budget=ram_budget, policy=policy, look_ahead="fate", **settings)) as llama:
        prompt = llama.tokenize(PROMPT)
        got = list(write(llama, prompt, 24))
        stats = llama.expert_stats()
    assert got == stock.write(bundled_model(), prompt, 24, **settings)
    assert stats["evictions"] > 0 and stats["guesses"] > 0


def test_fate_guesses_what_comes(stock: StockProcess) -> None:
    """Far more often than by chance, and experts are there in time because of it."""
    with contextlib.closing(Llama(ram_budget="50%", policy="lru", look_ahead="fate", n_ctx=256)) as llama:
        list(write(llama, llama.tokenize(PROMPT), 32))
        stats = llama.expert_stats()
    assert stats["guesses_right"] / stats["guesses"] > 0.4
    assert stats["prefetch_hits"] + stats["prefetches_late"] > 0.5 * stats["prefetches"]
    assert stats["predict_seconds"] > 0


def test_nothing_is_guessed_when_told_so_or_when_everything_fits() -> None:
    for settings in ({"ram_budget": "50%", "look_ahead": "off"}, {"ram_budget": "100%"}):
        with contextlib.closing(Llama(n_ctx=256, **settings)) as llama:
            list(write(llama, llama.tokenize(PROMPT), 4))
            stats = llama.expert_stats()
        assert stats["guesses"] == stats["prefetches"] == 0


@pytest.mark.parametrize(("recall", "least", "most"), [(1.0, 0.99, 1.0), (0.66, 0.3, 0.8), (0.0, 0.0, 0.0)])
def test_replayed_guesses_are_as_good_as_stated(recall: float, least: float, most: float) -> None:
    """Of absent experts; there are fewer of those among the right guesses."""
    with contextlib.closing(Llama(ram_budget="50%", policy="lru", look_ahead="off", n_ctx=256)) as llama:
        assert llama.engine is not None
        native, info = llama.engine.native, llama.engine.info
        chance = np.random.default_rng(5)
        ids = np.stack([[chance.permutation(32)[:8] for _ in range(info.n_layer)] for _ in range(60)])
        native.set_replay(ids)
        native.set_prefetch_rules(least_chance=0.0, replay_recall=recall)
        for token in range(60):
            llama.eval([token + 5])
        stats = native.stats()
    assert least <= stats["guesses_right"] / stats["guesses"] <= most


def test_expected_experts_are_there_when_they_are_needed() -> None:
    with contextlib.closing(Llama(ram_budget="50%", policy="lru", look_ahead="off", n_ctx=256)) as llama:
        assert llama.engine is not None
        native, info = llama.engine.native, llama.engine.info
        for layer in range(info.n_layer):
            native.expect(layer, range(8), keep=True)
        ids = np.tile(np.arange(8, dtype=np.int32), (1, info.n_layer, 1))
        native.set_replay(ids)
        llama.eval([5])
        stats = native.stats()
        assert stats["prefetches"] == 8 * info.n_layer
        assert stats["prefetch_hits"] + stats["prefetches_late"] == 8 * info.n_layer
        kinds = native.events()
    assert kinds.dtype == EVENT and int((kinds["kind"] == PREFETCH).sum()) == 8 * info.n_layer


def test_what_is_kept_warm_pushes_nothing_out() -> None:
    with contextlib.closing(Llama(ram_budget="50%", policy="lru", look_ahead="off", n_ctx=256)) as llama:
        assert llama.engine is not None
        native, info = llama.engine.native, llama.engine.info
        for layer in range(info.n_layer):
            native.expect(layer, range(32), keep=True)
        llama.eval([5])
        stats = native.stats()
        assert stats["prefetches"] <= stats["slots"]


def test_a_failed_prefetch_is_counted_and_forgotten(tmp_path: Path, stock: StockProcess) -> None:
    """The file loses an expert's bytes while it is open: who guesses it goes on, who needs it gets an error."""
    path = tmp_path / "model.gguf"
    path.write_bytes(Path(bundled_model()).read_bytes())
    with contextlib.closing(Llama(path, ram_budget="50%", policy="lru", look_ahead="off", n_ctx=256)) as llama:
        assert llama.engine is not None
        native, info = llama.engine.native, llama.engine.info
        native.set_prefetch_rules(least_chance=0)
        ids = np.tile(np.arange(8, dtype=np.int32), (1, info.n_layer, 1))
        native.set_replay(ids)
        llama.eval([5])
        before = native.stats()
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 4)
        for layer in range(info.n_layer):
            native.expect(layer, [20, 21], keep=False)
        llama.eval([6])  # nothing that is missing is needed
        stats = native.stats()
        assert stats["misses"] == before["misses"]
        assert stats["prefetches_failed"] + stats["prefetches_wasted"] == 2 * info.n_layer
        native.set_replay(ids + 10)
        with pytest.raises(PyengineError, match=r"model\.gguf"):
            llama.eval([7])


def test_predictors_that_do_not_fit_are_refused() -> None:
    with contextlib.closing(Llama(ram_budget="50%", n_ctx=256)) as llama:
        assert llama.engine is not None
        native, info = llama.engine.native, llama.engine.info
        good = wild(native)[0]
        square = np.zeros((info.n_expert, info.n_embd), np.float32)

        def bad(**changes: object) -> NativePredictor:
            return NativePredictor(**(vars(good) | changes))  # type: ignore[arg-type]

        for predictor in (
            bad(target=0),
            bad(target=info.n_layer),
            bad(w2=square[:, :-1]),
            bad(w2=square[:-1]),
        ):
            with pytest.raises(PyengineError, match=r"predictor"):
                native.set_predictors([predictor])
        with pytest.raises(PyengineError, match="no layer"):
            native.expect(info.n_layer, [0], keep=False)
        with pytest.raises(PyengineError, match="no expert"):
            native.expect(0, [info.n_expert], keep=False)


def test_words_that_are_no_policy_and_no_way_to_look_ahead() -> None:
    for settings in ({"policy": "mru"}, {"look_ahead": "crystal ball"}):
        with pytest.raises(UsageError, match="there are"):
            Llama(**settings)


def test_a_budget_below_the_least_gives_nothing_up() -> None:
    with contextlib.closing(Llama(ram_budget="50%", look_ahead="fate", n_ctx=256)) as llama:
        list(write(llama, llama.tokenize(PROMPT), 3))
        with pytest.raises(BudgetError):
            llama.set_ram_budget(1)
        list(write(llama, llama.tokenize(PROMPT), 3))
