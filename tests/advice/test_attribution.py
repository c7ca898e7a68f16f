"""Who chose what, found out from sums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.advice.attribution import Attribution, attributed

N_EXPERT, N_USED = 12, 3


def test_shares_add_up_to_what_is_known() -> None:
    random = np.random.default_rng(1)
    chosen = np.array([random.permutation(N_EXPERT)[:N_USED] for _ in range(6)])
    pairs = np.bincount(chosen.reshape(-1), minlength=N_EXPERT)
    shares = attributed(random.random((6, N_EXPERT)).astype(np.float32), pairs, N_USED)
    np.testing.assert_allclose(shares.sum(axis=1), N_USED, rtol=0.05)
    np.testing.assert_allclose(shares.sum(axis=0), pairs, rtol=0.2, atol=1e-3)
    assert shares.min() >= 0 and shares.max() <= 1
    assert not shares[:, pairs == 0].any()


def _taught(table: npt.NDArray[np.int64], steps: int, together: int, **options: int) -> Attribution:
    """Shown random groups of ids that use what the table, [n_id, N_USED], says."""
    random = np.random.default_rng(2)
    learned = Attribution(N_EXPERT, N_USED, **options)
    for _ in range(steps):
        _show(learned, table, random.integers(0, len(table), together))
    return learned


def _show(learned: Attribution, table: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    pairs = np.bincount(table[tokens].reshape(-1), minlength=N_EXPERT)
    return learned.add(tokens, pairs, np.full((len(tokens), N_USED), -1, np.int16))


def test_ids_that_meet_in_changing_company_are_told_apart() -> None:
    random = np.random.default_rng(3)
    table = np.array([random.permutation(N_EXPERT)[:N_USED] for _ in range(20)])
    learned = _taught(table, steps=120, together=4)
    found = np.concatenate([_show(learned, table, np.array([token, (token + 1) % 20])) for token in range(20)])[::2]
    named = np.argsort(-found, axis=1)[:, :N_USED]
    right = [len(set(a) & set(b)) for a, b in zip(named.tolist(), table.tolist(), strict=True)]
    assert sum(right) > 0.95 * table.size


def test_what_an_id_used_alone_is_where_it_begins() -> None:
    learned = Attribution(N_EXPERT, N_USED)
    pairs = np.zeros(N_EXPERT, np.int64)
    pairs[:6] = 1
    known = np.array([[0, 1, 2], [-1, -1, -1]], np.int16)
    found = learned.add(np.array([5, 9]), pairs, known)
    assert set(np.argsort(-found[0])[:3]) == {0, 1, 2}
    assert set(np.argsort(-found[1])[:3]) == {3, 4, 5}  # what is left for the other


def test_only_so_many_ids_are_remembered() -> None:
    table = np.arange(40)[:, None] % N_EXPERT + np.arange(N_USED)
    table %= N_EXPERT
    learned = _taught(table, steps=50, together=4, most=8)
    assert len(learned._uses) <= 8
    learned.forget(0)
    learned.forget(10_000)  # never met
