"""How good a prediction of experts is. Pure functions of scores, expert ids and what lay in slots.

Recall is the share of a token's experts that were named; on the miss stream, only experts count that were not in a slot
anyway. GoodPred is ProMoE's figure (arXiv 2410.22134, section 3).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint16]
Flags = npt.NDArray[np.bool_]

#: Experts named beyond the k that a token uses, for which recall is reported.
BEYOND = (0, 2, 4, 8)


def ranking(scores: Scores) -> npt.NDArray[np.int64]:
    """Expert ids by descending score, equal scores by ascending id; NaN ranks last.

    Args:
        scores: float32 [n, n_expert].

    Returns:
        int64 [n, n_expert].
    """
    return np.argsort(-scores, axis=1, kind="stable").astype(np.int64)


def chosen(ids: Ids, n_expert: int) -> Flags:
    """bool [n, n_expert]: which experts each token used, from their ids, [n, k]."""
    flags = np.zeros((len(ids), n_expert), bool)
    np.put_along_axis(flags, ids.astype(np.int64), True, axis=1)
    return flags


def right_by_rank(scores: Scores, ids: Ids) -> Flags:
    """bool [n, n_expert]: whether the expert at each rank of the prediction was used by the token."""
    return np.take_along_axis(chosen(ids, scores.shape[1]), ranking(scores), axis=1)


def recall(scores: Scores, ids: Ids, named: int) -> float:
    """Share of the experts used that are among the `named` with the highest scores; NaN of no tokens.

    Args:
        scores: float32 [n, n_expert].
        ids: [n, k], the experts used.
        named: how many experts are predicted; more than n_expert means all.
    """
    return _share(right_by_rank(scores, ids)[:, :named].sum(), ids.size)


def exact_set(scores: Scores, ids: Ids) -> float:
    """Share of tokens whose k experts are exactly the k with the highest scores; NaN of no tokens."""
    return _share(right_by_rank(scores, ids)[:, : ids.shape[1]].all(axis=1).sum(), len(ids))


def miss_recall(scores: Scores, ids: Ids, resident: Flags, named: int) -> float:
    """Share of used experts that were not resident and are among the `named` with the highest scores; NaN if none was
    missing.

    Args:
        scores: float32 [n, n_expert].
        ids: [n, k].
        resident: bool [n, n_expert], what lay in slots before the layer's experts were looked up.
        named: how many experts are predicted, resident ones included.
    """
    order = ranking(scores)
    missing = np.take_along_axis(chosen(ids, scores.shape[1]) & ~resident, order, axis=1)
    return _share(missing[:, :named].sum(), missing.sum())


def miss_precision(scores: Scores, ids: Ids, resident: Flags, named: int) -> float:
    """Share of right ones among the `named` highest-scored experts that were not resident: of what a prefetcher would
    have loaded, what was of use. NaN if it would have loaded nothing. Arguments as in miss_recall."""
    order = ranking(scores)[:, :named]
    absent = ~np.take_along_axis(resident, order, axis=1)
    right = np.take_along_axis(chosen(ids, scores.shape[1]), order, axis=1)
    return _share((absent & right).sum(), absent.sum())


@dataclass(frozen=True)
class GoodPred:
    """ProMoE's figures for one layer or a whole run; NaN of nothing."""

    accuracy: float
    """share of predicted experts that were used"""
    fetch_rate: float
    """share of predicted experts that were there before they were needed"""
    right_in_time: float
    """experts both right and there in time, over the k used: the direct count, which no product can flatter"""

    @property
    def product(self) -> float:
        """GoodPred as the paper defines it: accuracy x fetch rate."""
        return self.accuracy * self.fetch_rate


def good_pred(predicted: Flags, used: Flags, in_time: Flags) -> GoodPred:
    """GoodPred both ways.

    Args:
        predicted: bool [n, n_expert], experts named in advance.
        used: bool [n, n_expert], experts the router chose.
        in_time: bool [n, n_expert], experts that had arrived (or were resident) when the router had chosen.
    """
    n = predicted.sum()
    return GoodPred(
        accuracy=_share((predicted & used).sum(), n),
        fetch_rate=_share((predicted & in_time).sum(), n),
        right_in_time=_share((predicted & used & in_time).sum(), used.sum()),
    )


def lru_residents(ids: Ids, n_expert: int, slots: int) -> Flags:
    """What an LRU cache shared by all layers holds when each layer's experts are looked up.

    The rules are the engine's with experts of one shape: a token's experts of a layer arrive as a set, hits are touched
    first, no member of the set is a victim as long as another expert is there.

    Args:
        ids: [n_token, n_layer, k].
        n_expert: per layer.
        slots: of the cache, at least 1.

    Returns:
        bool [n_token, n_layer, n_expert].
    """
    n_token, n_layer, _ = ids.shape
    held = np.zeros((n_layer, n_expert), bool)
    flat = held.reshape(-1)
    out = np.zeros((n_token, n_layer, n_expert), bool)
    used: OrderedDict[int, None] = OrderedDict()
    sets = (np.sort(ids, axis=2).astype(np.int64) + n_expert * np.arange(n_layer)[None, :, None]).tolist()
    for token, layers in enumerate(sets):
        for layer, wanted in enumerate(layers):
            out[token, layer] = held[layer]
            missing = []
            for expert in wanted:
                if expert in used:
                    used.move_to_end(expert)
                else:
                    missing.append(expert)
            for expert in missing:
                if len(used) >= slots:
                    flat[used.popitem(last=False)[0]] = False
                used[expert] = None
                flat[expert] = True
    return out


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")
