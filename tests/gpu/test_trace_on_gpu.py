"""On a GPU tokens wait to be told together: a trace has the last ones, too."""

from __future__ import annotations

import contextlib

import pytest
from models.fixtures import ModelFactory

from pyengine import Llama, engine
from pyengine.traces.recorder import TraceRecorder


@pytest.mark.parametrize("closed", [False, True])
def test_a_trace_has_every_token(generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    monkeypatch.setattr(engine, "_PAUSE_ON_GPU", 3600.0)
    path = generated_model("llama-q4_0").path
    options = {"gpu": "CPU", "vram_budget": "50%", "policy": "lru", "look_ahead": "off", "n_ctx": 256, "n_threads": 1}
    with contextlib.closing(Llama(path, **options)) as llm:
        assert llm.engine is not None
        recorder = TraceRecorder(llm.engine.routing_log, llm.engine.info, path)
        tokens = [1 + n % 7 for n in range(40)]
        for token in tokens:
            llm.eval([token])
        if closed:
            llm.close()
        assert len(recorder.trace().ids) == len(tokens)
