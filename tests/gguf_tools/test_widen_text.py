"""The wider model says what the model says: the same logits, bit for bit, in stock llama.cpp and in pyengine."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama.probes import PROBES, as_json, options_for
from llama.stock_process import StockProcess
from models.fixtures import ModelFactory
from models.stock import StockModel

from gguf_tools.widen import plan_widening
from pyengine import Llama, bundled_model

PROMPT = "the rain in an open field"
ALL_LOGITS = {"logits_all": True}
GREEDY: dict[str, Any] = {"prompt": "Once upon a time there was a small", "n": 48}
PREFILL: dict[str, Any] = {"prompt": "The capital of France is Paris, and the capital of Italy is"}

# Every layout that llama.cpp has for experts, and every way that it works out the width of shared ones.
LAYOUTS = (
    "llama qwen2moe qwen3moe olmoe deepseek2 deepseek2-lite gpt-oss granitemoe granitemoe-shared granite_swa gemma4 "
    "ernie4_5-moe glm4moe bailingmoe dots1 hunyuan-moe llama4 smallthinker minimax-m2 mellum phimoe dbrx arctic grok "
    "merged-deepseek2 merged-deepseek2-lite-mxfp4 merged-granite_swa-odd merged-gemma4-scales no-gate scales mtp "
    "align64 gaps split split-align64 many-experts one-expert dense-q8_0 q4_k_m q4_k_m-narrow unlike-projections "
    "odd-f16 odd-rows-q4_0"
).split()
TYPES = [
    f"llama-{t}" for t in "f16 q8_0 q4_0 q4_1 q5_0 q4_k q6_k iq4_nl mxfp4 f32 bf16 q5_1 q5_k".split()
]  # of the generator

# Where rows of down are no whole number of the kernels' steps, rounding differs, and F16 activations amplify it.
ROUNDING = 0.1


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with experts of 256 neurons instead of 64."""
    path = tmp_path_factory.mktemp("widened") / "smolmoe-ff256.gguf"
    plan_widening(bundled_model(), 256).write(path, lambda n: None)
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with StockProcess() as process:
        yield process


def as_stock(llm: Llama, probe: str, **arguments: Any) -> Any:
    return json.loads(as_json(PROBES[probe](llm, **arguments)))


def test_the_bundled_model_says_the_same(widened: Path, stock: StockProcess) -> None:
    before = [stock.ask(bundled_model(), ALL_LOGITS, "greedy", **GREEDY)]
    before.append(stock.ask(bundled_model(), ALL_LOGITS, "logits", **PREFILL))
    after = [stock.ask(widened, ALL_LOGITS, "greedy", **GREEDY)]
    after.append(stock.ask(widened, ALL_LOGITS, "logits", **PREFILL))
    assert after == before
    assert len(set(before[0])) > 10, "a text, not one word again and again"
    with contextlib.closing(Llama(widened, ram_budget="50%", **options_for(ALL_LOGITS))) as llm:
        assert llm.expert_stats()["managed"]
        assert as_stock(llm, "greedy", **GREEDY) == before[0]
        assert as_stock(llm, "logits", **PREFILL) == before[1]


def answer(path: Path) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits of each of them and of a prompt of several."""
    with StockModel(path, n_threads=1) as model:
        prompt = model.tokenize(PROMPT)
        tokens, logits = model.greedy(prompt, 5)
        return tokens, np.concatenate([logits, model.decode(prompt)])


@functools.cache
def _width(model_id: str) -> int:
    from models.grid import FULL

    return int(FULL[model_id].get("n_ff", 64))


@pytest.mark.parametrize("model_id", [*LAYOUTS, *TYPES])
def test_generated_models_say_the_same(model_id: str, generated_model: ModelFactory, tmp_path: Path) -> None:
    source = generated_model(model_id).path
    widening = plan_widening(source, 3 * _width(model_id))
    assert widening.expert_bytes > 2.5 * widening.expert_bytes_before
    widening.write(tmp_path / "wide.gguf", lambda n: None)
    tokens, logits = answer(source)
    wide_tokens, wide_logits = answer(tmp_path / "wide.gguf")
    assert np.isfinite(logits).all() and logits.std() > 0.1
    if any("another order" in remark for remark in widening.remarks):
        np.testing.assert_allclose(wide_logits, logits, atol=ROUNDING)
    else:
        np.testing.assert_array_equal(wide_logits, logits)
        assert wide_tokens == tokens


def test_most_generated_models_are_bit_identical(generated_model: ModelFactory) -> None:
    """Remarks about rounding are for odd sizes only, so that the exact comparison is the rule."""
    exact = [
        model_id
        for model_id in (*LAYOUTS, *TYPES)
        if not any(
            "another order" in r for r in plan_widening(generated_model(model_id).path, 3 * _width(model_id)).remarks
        )
    ]
    assert {f"llama-{t}" for t in "q8_0 q4_0 q4_1 q5_0 q4_k q6_k iq4_nl mxfp4 q5_1 q5_k".split()} <= set(exact)
    assert {"gpt-oss", "deepseek2", "qwen2moe", "merged-deepseek2", "merged-gemma4-scales", "split", "mtp"} <= set(
        exact
    )
