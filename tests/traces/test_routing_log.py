"""What listeners hear is what the engine's events say, in the router's order and with what the router saw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pyengine import Llama, bundled_model
from pyengine.traces import Trace, load_trace, save_trace
from pyengine.traces.recorder import TraceRecorder
from pyengine.traces.routing_log import Prompt, RoutingLog, Token

TEXT = b"The lighthouse stood on a rock far out in the sea. Every evening its keeper climbed the stairs."


class Heard:
    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.prompts: list[Prompt] = []

    def token(self, token: Token) -> None:
        self.tokens.append(token)

    def prompt(self, prompt: Prompt) -> None:
        self.prompts.append(prompt)


@pytest.fixture
def llm() -> Iterator[Llama]:
    with contextlib.closing(Llama(ram_budget="60%", policy="lru", look_ahead="off", n_ctx=256, n_batch=8)) as opened:
        yield opened


def test_tokens_and_prompts(llm: Llama) -> None:
    assert llm.engine is not None
    heard, info = Heard(), llm.engine.info
    tokens = llm.tokenize(TEXT)
    llm.eval(tokens[:3])  # nobody listens yet
    llm.engine.routing_log.listen(heard)
    llm.eval(tokens[3:12])  # a micro-batch of eight and one of one
    llm.eval(tokens[12:13])
    assert [p.tokens for p in heard.prompts] == [8] and len(heard.tokens) == 2
    prompt = heard.prompts[0]
    assert int(prompt.pairs[: prompt.counts[0]].sum()) == 8 * info.n_expert_used
    assert len(prompt.experts) == len(prompt.pairs) == int(prompt.counts.sum())
    for token in heard.tokens:
        assert token.ids.shape == token.weights.shape == (info.n_layer, info.n_expert_used)
        assert token.inputs.size == 0 and token.seconds > 0
        assert all(len(set(row.tolist())) == info.n_expert_used for row in token.ids)
        weights = token.weights.astype(np.float32)
        assert np.all(weights > 0) and np.all(np.diff(weights, axis=1) <= 1e-3), "most probable first"


def test_what_a_step_of_several_texts_is_made_of(llm: Llama) -> None:
    """Whoever computes them together says so before; what is said holds for one computation, if it fits."""
    assert llm.engine is not None
    heard, log = Heard(), llm.engine.routing_log
    log.listen(heard)
    tokens = llm.tokenize(TEXT)
    log.expect([3, 1, 1])
    llm.eval(tokens[:5])
    llm.eval(tokens[5:10])
    log.expect([5, 1])
    llm.eval(tokens[10:13])
    log.expect([5])
    llm.eval(tokens[13:18])
    assert [(p.tokens, p.shares) for p in heard.prompts] == [(5, (3, 1, 1)), (5, ()), (3, ()), (5, ())]
    assert all(p.seconds > 0 for p in heard.prompts)


def test_tokens_can_wait_to_be_told_together(llm: Llama) -> None:
    assert llm.engine is not None
    log = RoutingLog(llm.engine.native, pause=3600.0)
    more: list[bool] = []

    class Counting(Heard):
        def token(self, token: Token) -> None:
            super().token(token)
            more.append(log.more)

    later = Counting()
    log.listen(later)
    tokens = llm.tokenize(TEXT)
    for token in tokens[:3]:
        llm.eval([token])
        log.drain()
    assert later.tokens == []
    log.expect([2, 1])  # whoever says what comes next must not have it mixed with what was before
    assert len(later.tokens) == 3 and more == [True, True, False]
    assert len({token.seconds for token in later.tokens}) == 1
    llm.eval(tokens[3:6])
    log.drain()
    assert [(p.tokens, p.shares) for p in later.prompts] == [(3, (2, 1))]


def test_gate_inputs_are_what_routers_read(llm: Llama) -> None:
    """The model's own routers, on the recorded inputs, choose the recorded experts, in their order; also after
    a prompt, whose last layer is computed for one token alone."""
    from pyengine.predictors.routers import read_routers

    assert llm.engine is not None
    recorder = TraceRecorder(llm.engine.routing_log, llm.engine.info, bundled_model(), inputs=True)
    tokens = llm.tokenize(TEXT)
    llm.eval(tokens[:5])
    for token in tokens[5:17]:
        llm.eval([token])
    trace = recorder.trace()
    n_layer, n_used = trace.model.n_layer, trace.model.n_expert_used
    assert trace.inputs.shape == (12, n_layer, llm.engine.info.n_embd)
    same = 0
    for layer, router in enumerate(read_routers(bundled_model())):
        scores = trace.inputs[:, layer].astype(np.float32) @ router.weight.T + router.bias
        top = np.argsort(-scores, axis=1)[:, :n_used]
        same += sum(set(a) == set(b) for a, b in zip(top.tolist(), trace.ids[:, layer].tolist(), strict=True))
    assert same >= 0.97 * 12 * n_layer, "half precision may exchange neighbours"


def test_a_trace_with_everything_comes_back(llm: Llama, tmp_path: Any) -> None:
    assert llm.engine is not None
    recorder = TraceRecorder(llm.engine.routing_log, llm.engine.info, bundled_model(), inputs=True)
    tokens = llm.tokenize(TEXT)
    llm.eval(tokens[:8])
    for token in tokens[8:14]:
        llm.eval([token])
    trace = recorder.trace()
    save_trace(tmp_path / "t.npz", trace)
    back: Trace = load_trace(tmp_path / "t.npz")
    for name in ("ids", "weights", "inputs", "seconds", "starts"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))
    assert back.prompts.tokens.tolist() == [8] and back.prompts.at.tolist() == [0] and back.starts.tolist() == [0]
