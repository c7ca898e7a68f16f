"""The first layer's experts are guessed by token id; the text stays the same."""

from __future__ import annotations

import contextlib

import numpy as np

from pyengine import Llama
from pyengine.advice.profile import load_profile, profile_file
from pyengine.bundled import bundled_model
from pyengine.sessions import Request, SamplingParams, Scheduler
from pyengine.traces.routing_log import Prompt, RoutingLog, Token

TEXT = b"The lighthouse stood on a rock far out in the sea. Every evening its keeper climbed the stairs."


def test_what_a_token_chose_is_guessed_when_it_comes_again() -> None:
    settings = {"n_ctx": 256, "n_threads": 2, "n_threads_batch": 2}
    with contextlib.closing(Llama(ram_budget="40%", look_ahead="fate", **settings)) as llama:
        assert llama.engine is not None and llama.engine.foresight == "fate"
        native = llama.engine.native
        native.set_predictors([])  # only the table guesses
        tokens = llama.tokenize(TEXT)
        for token in tokens:
            llama.eval([token])
        first = native.stats()
        for _ in range(3):
            llama.reset()
            for token in tokens:
                llama.eval([token])
        again = native.stats()
        n = again["guesses"] - first["guesses"]
        assert n > 3 * len(tokens) / 2
        assert again["guesses_right"] - first["guesses_right"] > 0.5 * n
        assert llama.engine._first_layer is not None
        table = llama.engine._first_layer.table
        assert {int(t) for t in np.flatnonzero(table[:, 0] >= 0)} == set(tokens)
        llama.reset()
        llama.eval(tokens)  # a prompt: the union of what is known
        assert native.stats()["guesses"] > again["guesses"]
        info = llama.engine.info
    profile = load_profile(profile_file(bundled_model()), info)
    assert profile is not None and profile.first_layer is not None
    np.testing.assert_array_equal(profile.first_layer, table)


def test_nothing_is_guessed_when_told_so() -> None:
    with contextlib.closing(Llama(ram_budget="40%", look_ahead="off", n_ctx=256)) as llama:
        for token in llama.tokenize(TEXT)[:4] * 2:
            llama.eval([token])
        assert llama.expert_stats()["guesses"] == 0


def test_steps_of_several_texts_teach_what_their_tokens_use() -> None:
    texts = [b"The lighthouse stood on a rock.", b"Bread is made of flour and water.", b"In winter the sea is grey."]
    with contextlib.closing(Llama(ram_budget="40%", look_ahead="fate", n_ctx=512, n_sequences=3)) as llama:
        with Scheduler(llama) as scheduler:
            sampling = SamplingParams(max_tokens=24, temperature=0.0)
            sessions = [scheduler.submit(Request(tuple(llama.tokenize(text)), sampling)) for text in texts]
            for _ in scheduler.run():
                pass
        assert llama.engine is not None and llama.engine._first_layer is not None
        table = llama.engine._first_layer.table.copy()
        met = {token for session in sessions for token in session.tokens[:-1]}
        assert len(met) > 10 and met <= {int(t) for t in np.flatnonzero(table[:, 0] >= 0)}
        for token in met:
            assert len(set(table[token].tolist())) == llama.engine.info.n_expert_used
        # The same tokens alone: what was found out from sums is mostly what they use.
        seen = Recorder(llama.engine.routing_log)
        for session in sessions:
            llama.reset()
            llama.eval(session.request.tokens)
            for token in session.tokens[:-1]:
                llama.eval([token])
        alone = [token for session in sessions for token in session.tokens[:-1]]
        used = seen.first_layers[-len(alone) :]
        right = sum(len(set(table[token]) & set(ids)) for token, ids in zip(alone, used, strict=True))
        popular = np.bincount(np.concatenate(used)).argsort()[::-1][: llama.engine.info.n_expert_used]
        by_chance = sum(len(set(popular) & set(ids)) for ids in used)
        assert right > 1.2 * by_chance


class Recorder:
    """Keeps what the first layer chose for every token computed alone."""

    def __init__(self, log: RoutingLog) -> None:
        self.first_layers: list[list[int]] = []
        log.listen(self)

    def token(self, token: Token) -> None:
        self.first_layers.append(token.ids[0].tolist())

    def prompt(self, prompt: Prompt) -> None:
        pass
