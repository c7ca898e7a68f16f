"""Routers read from files, against what llama.cpp's own graph makes of them: gate inputs and expert ids of a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from models.fixtures import ModelFactory

from pyengine import Llama
from pyengine.predictors import PredictorError
from pyengine.predictors.fate import correctable, fate
from pyengine.predictors.offsets import matched
from pyengine.predictors.recall import recall
from pyengine.predictors.routers import read_routers

N_TOKEN = 24


def recorded(generated_model: ModelFactory, name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16]]:
    """Gate inputs [n_token, n_layer, n_embd] and ids [n_token, n_layer, k] of single-token steps."""
    facts = generated_model(name)
    llm = Llama(str(facts.path), ram_budget="100%", n_ctx=64, n_threads=1, verbose=False)
    try:
        native = llm.engine.native
        native.set_recording(ids=True, inputs=True)
        for token in np.random.default_rng(0).integers(5, facts.n_vocab - 1, N_TOKEN):
            llm.eval([int(token)])
        ids, _, inputs = native.take_recording(N_TOKEN + 1, native.info, inputs=True)
    finally:
        llm.close()
    return inputs.astype(np.float32), ids


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma4", "phimoe", "dbrx", "arctic", "llama4"])
def test_the_fresh_gate_is_the_router(generated_model: ModelFactory, name: str) -> None:
    """Softmax or sigmoid routers, with bias, with a norm's bias, with gains of their own, after other norms."""
    inputs, ids = recorded(generated_model, name)
    routers = read_routers(generated_model(name).path, ids.shape[1])
    assert len(ids) == N_TOKEN
    for layer in range(ids.shape[1]):
        scores = fate(routers, layer, 0, corrected=False).scores(inputs[:, layer])
        assert recall(scores, ids[:, layer], ids.shape[2]) == 1.0
        assert layer == 0 or correctable(routers[layer - 1], routers[layer])


def test_a_bias_on_the_choice_needs_an_offset(generated_model: ModelFactory) -> None:
    inputs, ids = recorded(generated_model, "glm4moe")
    routers = read_routers(generated_model("glm4moe").path)
    assert all(r.choice_bias is not None for r in routers)
    unbiased = [replace(r, choice_bias=None) for r in routers]
    for layer in range(ids.shape[1]):
        mine = [fate(r, layer, 0, corrected=False).scores(inputs[:, layer]) for r in (unbiased, routers)]
        mine.append(mine[1] + matched(mine[1], ids[:, layer]))
        plain, guessed, fitted = (recall(scores, ids[:, layer], ids.shape[2]) for scores in mine)
        assert plain < 0.8 and guessed > plain + 0.1 and fitted > guessed


def test_a_single_expert_has_a_router_too(generated_model: ModelFactory) -> None:
    assert all(len(r.weight) == 1 for r in read_routers(generated_model("one-expert").path))


def test_more_layers_than_there_are_is_an_error(generated_model: ModelFactory) -> None:
    with pytest.raises(PredictorError, match="layers with experts, not 99"):
        read_routers(generated_model("llama").path, 99)
