"""Orders by co-activation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gguf_tools.bundles.order import chain, used_together


def test_used_together_counts_tokens() -> None:
    ids = np.array([[0, 1, 2], [2, 1, 3], [1, 0, 4]])
    together = used_together(ids, 6)
    assert together.shape == (6, 6)
    assert (together == together.T).all() and not together.diagonal().any()
    assert together[0, 1] == 2 and together[1, 2] == 2 and together[2, 3] == 1
    assert together[0, 3] == 0 and not together[5].any()


def neighbours(order: list[int], together: np.ndarray) -> int:
    return int(sum(together[a, b] for a, b in itertools.pairwise(order)))


@pytest.mark.parametrize("seed", range(6))
def test_no_piece_turned_round_makes_a_chain_better(seed: int) -> None:
    n = 12
    together = np.triu(np.random.default_rng(seed).integers(0, 100, (n, n)), 1)
    together += together.T
    order = chain(together)
    assert sorted(order) == list(range(n))
    here = neighbours(order, together)
    assert here > neighbours(list(range(n)), together)
    for i, j in itertools.combinations(range(n + 1), 2):
        assert neighbours([*order[:i], *order[i:j][::-1], *order[j:]], together) <= here


def test_a_hidden_chain_is_found() -> None:
    rng = np.random.default_rng(3)
    hidden = rng.permutation(64)
    together = np.zeros((64, 64), np.int64)
    for a, b in itertools.pairwise(hidden):
        together[a, b] = together[b, a] = 10
    together += 1 - np.eye(64, dtype=np.int64)
    found = chain(together)
    assert found in (hidden.tolist(), hidden.tolist()[::-1])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_experts(n: int) -> None:
    assert sorted(chain(np.zeros((n, n), np.int64))) == list(range(n))
