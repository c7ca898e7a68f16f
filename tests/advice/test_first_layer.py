"""The first layer's experts are guessed by token id; the text stays the same."""

from __future__ import annotations

import contextlib

import numpy as np

from pyengine import Llama
from pyengine.advice.profile import load_profile, profile_file
from pyengine.bundled import bundled_model

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
