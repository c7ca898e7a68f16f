"""Texts as their routers saw them: expert ids and gate inputs of every token, computed one at a time. What a step of
several texts or a chunk of a prompt would have needed is put together from them: attention looks back only, so that a
token's routing is the same in whatever company it is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from passages import passages

from pyengine import Llama
from pyengine.bench.child import without_profiles
from pyengine.bench.texts import long_text
from pyengine.traces import Trace, save_trace
from pyengine.traces.recorder import TraceRecorder

#: Tokens of a passage and of an answer.
PASSAGE, ANSWER = 512, 128


def record(model: Path, n_passages: int, n_answers: int, out: Path) -> Trace:
    """Passages of Python's language reference, then what the model itself makes of sentences; alternately of use for
    fitting and for judging. Written to `out` too, with `starts` at every text's first token.

    Raises:
        ValueError: there are not so many passages.
        OSError: the model cannot be read, or `out` not be written.
    """
    with without_profiles():
        llm = Llama(str(model), n_ctx=PASSAGE, logits_all=False, verbose=False, look_ahead="off", policy="lru")
        if llm.engine is None:
            raise OSError(llm.engaged)
        recorder = TraceRecorder(llm.engine.routing_log, llm.engine.info, model, inputs=True)
        texts = []
        for tokens in passages(lambda text: llm.tokenize(text, add_bos=False), n_passages, PASSAGE, seed=5):
            llm.reset()
            for token in tokens:
                llm.eval([token])
            texts.append(tokens)
        sentences = [s for s in long_text().replace("\n", " ").split(". ") if len(s) > 20]
        for number in range(n_answers):
            llm.reset()
            llm.set_seed(number)
            tokens = []
            pending = llm.tokenize(sentences[number % len(sentences)].encode())
            while len(tokens) < ANSWER:
                for token in pending:
                    llm.eval([token])
                tokens += pending
                pending = [llm.sample(temp=0.8)]
            texts.append(tokens)
        trace = recorder.trace()
        llm.close()
    lengths = np.array([len(text) for text in texts])
    starts = np.concatenate([[0], lengths.cumsum()[:-1]]).astype("<i8")
    trace = replace(trace, tokens=np.concatenate(texts).astype("<i4"), starts=starts)
    save_trace(out, trace)
    return trace
