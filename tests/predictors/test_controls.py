"""Predictions from expert ids alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pyengine.predictors import PredictorError
from pyengine.predictors.controls import CorrelationTable, Popularity, RepeatLast, TokenTable, score_tokens
from pyengine.predictors.recall import chosen, recall

from .synthetic import N_EXPERT, N_LAYER, K, routers, trace

CHANCE = K / N_EXPERT


def test_controls_score_what_they_must() -> None:
    model_trace = trace(routers(), n_token=300)
    ids = model_trace.ids
    tokens = np.arange(1, 300)
    size = (N_LAYER, N_EXPERT)
    last = score_tokens(RepeatLast(*size), model_trace, tokens)
    for layer in range(N_LAYER):
        expected = (chosen(ids[1:, layer], N_EXPERT) & chosen(ids[:-1, layer], N_EXPERT)).sum() / ids[1:, layer].size
        assert recall(last[:, layer], ids[1:, layer], K) == pytest.approx(expected)
    popular = score_tokens(Popularity(*size, half_life=1e9), model_trace, np.array([299]))
    counts = np.stack([chosen(ids[:299, layer], N_EXPERT).sum(axis=0) for layer in range(N_LAYER)])
    np.testing.assert_allclose(popular[0], counts, rtol=1e-3)


def test_a_token_table_knows_tokens_that_always_route_alike() -> None:
    random = np.random.default_rng(8)
    of_token = np.argsort(random.random((20, N_LAYER, N_EXPERT)), axis=2)[:, :, :K].astype(np.uint16)
    tokens = random.integers(0, 20, 400).astype("<i4")
    alike = replace(trace(routers(), n_token=400), ids=of_token[tokens], tokens=tokens)
    table = TokenTable(N_LAYER, N_EXPERT, layers=N_LAYER)
    scores = score_tokens(table, alike, np.arange(200, 400))
    assert all(recall(scores[:, n], alike.ids[200:, n], K) == 1.0 for n in range(N_LAYER))
    again = TokenTable(N_LAYER, N_EXPERT, layers=N_LAYER)
    again.restore(table.arrays())
    for token in range(20):
        assert chosen(of_token[token], N_EXPERT)[0, np.argsort(-again.scores(of_token[token], token)[0])[:K]].all()
    with pytest.raises(PredictorError, match="table of tokens"):
        TokenTable(N_LAYER, N_EXPERT, layers=1).restore(table.arrays())
    few = TokenTable(N_LAYER, N_EXPERT, layers=1, most=3)
    forgetful = score_tokens(few, alike, np.arange(200, 400))
    assert 2 * CHANCE < recall(forgetful[:, 0], alike.ids[200:, 0], K) + CHANCE < 1.0


def test_the_correlation_table_counts_what_follows_what() -> None:
    table = CorrelationTable(3, 4)
    ids = np.array([[0, 1], [2, 3], [1, 0]], np.uint16)
    assert not table.scores(ids, -1).any()  # nothing came before
    table.observe(ids, -1)
    assert not table.counts.any()
    table.observe(ids, -1)
    assert table.counts[1].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0] * 4, [0] * 4]
    assert table.counts[0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]  # after the last layer's 1 and 0
    assert table.after(1, np.array([0, 1], np.uint16)).tolist() == [0, 0, 2, 2]
    assert table.scores(ids, -1)[2].tolist() == [2, 2, 0, 0]
