"""The engine in llama.cpp's company: few scheduler splits, and stock models in the same process notice nothing."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import llama_cpp
import numpy as np
import pytest
from models.facts import ModelFacts
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine import Llama

from .decoding import Model, llama_log, random_script
from .grid_settings import settings
from .managed import assert_as_stock, assert_same_bits, managed
from .reference import StockProcess, what_is_ours

SCRIPT = random_script([1] * 8 + [40, 100] + [1] * 8, N_VOCAB, seed=6)

# llama.cpp looks the scales of experts up by expert id, on the CPU; where that comes between the multiplications, each
# of them stands alone.
SPLITS_OF_SCALED_LAYERS = {"scales": 8, "merged-gemma4-scales": 4}
FFNS_OF_SCALED_LAYERS = {"scales": 3}


def splits(log: list[str]) -> list[str]:
    """The splits that each context says when it is made: "7", or "9 / 7" if the graphs of many tokens and of one
    differ. (llama.cpp says "7 / 7" where these differ only in their nodes.)"""
    said = [match[1] for match in (re.search(r"graph.*: .*splits = ([0-9 /]+),", line) for line in log) if match]
    return [" / ".join(dict.fromkeys(counts.split(" / "))) for counts in said]


def what_stock_says(log: list[str]) -> list[str]:
    """Lines about buffers and graphs. Without the debug lines of a context's end, which list even devices that no
    graph has used, and ours is in every context's list."""
    return [line for line in log if re.match(r"\w+: .*(buffer size|splits = |nodes = )", line)]


def test_two_splits_for_each_layer_with_experts(grid_model: ModelFacts) -> None:
    """One for the expert FFN, one for what lies between two; at the end what comes after the last."""
    with llama_log() as log, managed(grid_model.path, 0.5) as (_, model), model.context():
        pass
    each = SPLITS_OF_SCALED_LAYERS.get(grid_model.path.stem, 2)
    assert splits(log) == [str(each * len(grid_model.expert_blocks) + 1)]


def test_one_ffn_for_each_layer_with_experts(grid_model: ModelFacts) -> None:
    """The whole FFN is computed at once, not multiplication by multiplication."""
    how = settings(grid_model, SCRIPT)
    with managed(grid_model.path, 1) as (engine, model), model.context(**how) as context:
        context.run(SCRIPT)
        stats = engine.stats()
    each = FFNS_OF_SCALED_LAYERS.get(grid_model.path.stem, 1)
    assert stats["steps_layers"] == each * len(SCRIPT) * len(grid_model.expert_blocks)


@pytest.mark.parametrize("model_id", ["llama-q4_0", "qwen2moe", "deepseek2", "gpt-oss", "q4_k_m"])
def test_stock_models_notice_nothing(model_id: str, generated_model: ModelFactory, stock: StockProcess) -> None:
    facts, other = generated_model(model_id), generated_model("qwen3moe")
    alone = stock.run(facts.path, SCRIPT)
    assert splits(alone.log) == ["1"]
    assert what_is_ours(), "this process is not a stock one"

    def check() -> None:
        with llama_log() as log, Model(facts.path) as model, model.context() as context:
            logits = context.run(SCRIPT)
        assert what_stock_says(log) == what_stock_says(alone.log)
        assert_same_bits(logits, alone.logits)

    with managed(facts.path, 0.3) as (_, model), managed(other.path, 1), model.context() as context:
        check()
        assert_as_stock(context.run(SCRIPT), alone.logits, SCRIPT)
        check()
    check()


def test_stock_and_ours_take_turns(generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model("qwen2moe")
    wanted = stock.run(facts.path, SCRIPT).logits
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(Model(facts.path))]
        models += [stack.enter_context(managed(facts.path, share)).model for share in (0.0, 0.5)]
        contexts = [stack.enter_context(model.context()) for model in models]
        turns = [[context.decode(chunk) for context in contexts] for chunk in SCRIPT]
    for of_one in zip(*turns, strict=True):
        assert_as_stock(np.concatenate(of_one), wanted, SCRIPT)


@pytest.mark.parametrize(("one", "two"), [("qwen2moe", "gpt-oss"), ("q4_k_m", "q4_k_m"), ("deepseek2", "split")])
def test_two_models_of_ours_take_turns(one: str, two: str, generated_model: ModelFactory, stock: StockProcess) -> None:
    paths = [generated_model(one).path, generated_model(two).path]
    wanted = [stock.run(path, SCRIPT).logits for path in paths]
    n_single = 8  # with many tokens at once, what is evicted depends on the disk's pace
    assert all(len(chunk) == 1 for chunk in SCRIPT[:n_single])
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(managed(path, 0.2)) for path in paths]
        contexts = [stack.enter_context(m.model.context()) for m in opened]
        turns = [[context.decode(chunk) for context in contexts] for chunk in SCRIPT[:n_single]]
        counted = [m.engine.stats() for m in opened]
        turns += [[context.decode(chunk) for context in contexts] for chunk in SCRIPT[n_single:]]
    for got, want in zip(zip(*turns, strict=True), wanted, strict=True):
        assert_as_stock(np.concatenate(got), want, SCRIPT)
    for path, stats in zip(paths, counted, strict=True):
        with managed(path, 0.2) as (engine, model), model.context() as context:
            context.run(SCRIPT[:n_single])
            alone = engine.stats()
        for name in ("hits", "misses", "evictions", "bytes_read", "steps_layers"):
            assert stats[name] == alone[name], "each model has its own slots"


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_two_contexts_of_one_model_take_turns(share: float, generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model("qwen2moe")
    scripts = [SCRIPT, random_script([len(chunk) for chunk in SCRIPT], N_VOCAB, seed=7)]
    wanted = [stock.run(facts.path, script).logits for script in scripts]
    with managed(facts.path, share) as (_, model), model.context() as first, model.context() as second:
        turns = [(first.decode(one), second.decode(two)) for one, two in zip(*scripts, strict=True)]
    for got, want in zip(zip(*turns, strict=True), wanted, strict=True):
        assert_as_stock(np.concatenate(got), want, SCRIPT)


def test_a_model_that_is_closed_leaves_the_others_alone(generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model("qwen2moe")
    wanted = stock.run(facts.path, SCRIPT).logits
    with managed(facts.path, 0.4) as (_, model), model.context() as context:
        got = []
        for chunk in SCRIPT:
            with managed(facts.path, 0.2) as (_, brief), brief.context() as passing:
                passing.decode(chunk)
            got.append(context.decode(chunk))
    assert_as_stock(np.concatenate(got), wanted, SCRIPT)


def test_llama_beside_llama_cpp(generated_model: ModelFactory, stock: StockProcess) -> None:
    """The Python classes, too: the stock one keeps its buffers, splits and text while ours lives."""
    facts = generated_model("qwen2moe")
    path = str(facts.path)
    sizes: dict[str, Any] = {"n_ctx": 128, "n_threads": 2, "n_threads_batch": 2, "seed": 1}

    def write(llama: llama_cpp.Llama) -> str:
        answer = llama.create_completion("the rain in an open field", max_tokens=40, temperature=0.0)
        assert isinstance(answer, dict)
        return answer["choices"][0]["text"]

    with contextlib.closing(Llama(path, ram_budget="30%", **sizes)) as ours:
        with llama_log() as log, contextlib.closing(llama_cpp.Llama(path, verbose=False, **sizes)) as theirs:
            texts = [write(theirs), write(ours), write(theirs), write(ours)]
        assert ours.expert_stats()["evictions"] > 0
    assert splits(log) == ["1"]
    assert not any("pyengine" in line for line in log)
    assert len(texts[0]) > 20 and len(set(texts)) == 1
