"""Texts from a routing trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pyengine.bench.replay_trace import PROMPT_TOKENS, TraceTexts
from pyengine.errors import PyengineError, UsageError


@pytest.fixture
def trace(tmp_path, facts):
    """100 tokens in five documents; token t uses the experts t % 8 and (t + 1) % 8 in every layer."""
    t = np.arange(100)[:, None, None]
    ids = np.concatenate([np.broadcast_to(t + r, (100, facts.n_layer, 1)) % 8 for r in (0, 1)], axis=2)
    path = tmp_path / "trace.npz"
    np.savez(path, ids=ids.astype(np.uint8), starts=np.array([0, 20, 40, 60, 80, 100]))
    return path


def test_texts_begin_at_documents_spread_over_the_trace(trace, facts):
    texts = TraceTexts(trace, n_prompts=3)
    texts.check(facts)
    begins = [texts.ids(text, 1)[0, 0, 0] for text in range(4)]
    assert begins == [0 % 8, 20 % 8, 40 % 8, 60 % 8]


def test_ids_are_consecutive_tokens_in_the_engine_s_form(trace, facts):
    ids = TraceTexts(trace, 3).ids(1, 6)
    assert (ids.dtype, ids.shape, ids.flags.c_contiguous) == (np.int32, (6, facts.n_layer, 2), True)
    assert ids[:, 0, :].tolist() == [[t % 8, (t + 1) % 8] for t in range(20, 26)]


def test_ids_run_on_past_the_end(trace):
    ids = TraceTexts(trace, 4).ids(4, 30)
    assert ids[:, 0, 0].tolist() == [t % 100 % 8 for t in range(80, 110)]


def test_token_ids_are_within_the_vocabulary(trace):
    texts = TraceTexts(trace, 3).texts(prefill_tokens=50, n_vocab=40)
    assert [len(prompt) for prompt in texts.prompts] == [PROMPT_TOKENS] * 3
    assert len(texts.prefill) == 50
    assert all(0 <= token < 40 for text in (*texts.prompts, texts.prefill) for token in text)
    assert texts.prompts[0] != texts.prompts[1]


@pytest.mark.parametrize("change", [{"n_layer": 11}, {"n_expert_used": 4}, {"n_expert": 7}])
def test_a_trace_of_another_shape_is_refused(trace, facts, change):
    with pytest.raises(UsageError, match="the trace has 10 layers, 2 experts per token and ids up to 7"):
        TraceTexts(trace, 3).check(replace(facts, **change))


def test_what_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "noise.npz"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(PyengineError, match=r"noise\.npz"):
        TraceTexts(path, 3)
    with pytest.raises(OSError, match="No such file"):
        TraceTexts(tmp_path / "missing.npz", 3)
