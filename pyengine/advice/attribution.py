"""Who chose what, when only the number of tokens that chose each expert is known: steps of several tokens are recorded
as such sums."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

#: Rounds of scaling; more change nothing that could be noticed.
_ROUNDS = 3
#: Of what all tokens use, how much is forgotten with every step.
_FADING = 0.02


def attributed(expected: Floats, pairs: npt.NDArray[np.int64], n_used: int) -> Floats:
    """The likeliest shares: scaled in turns (Sinkhorn) to the sums that are known.

    Args:
        expected: float32 [n_token, n_expert], the probability that each token chooses each expert.
        pairs: int64 [n_expert], tokens that chose each.
        n_used: experts that each token chose.

    Returns:
        float32 [n_token, n_expert], between 0 and 1; the sums by expert are `pairs`, those by token n_used, nearly.
    """
    out = np.maximum(expected, np.float32(1e-6))
    for _ in range(_ROUNDS):
        out = np.minimum(out * (pairs / np.maximum(out.sum(axis=0), 1e-9)), 1.0)
        out = np.minimum(out * (n_used / np.maximum(out.sum(axis=1, keepdims=True), 1e-9)), 1.0)
    return np.asarray(out, np.float32)


class Attribution:
    """What each token id uses in one layer, learned from sums over steps: where ids meet in ever other company, it
    becomes plain which of them brings which experts. An id's own record counts as many steps as it was met in, what all
    tokens use as one more.

    Args:
        most: ids remembered; those not met for longest are forgotten.
    """

    def __init__(self, n_expert: int, n_used: int, most: int = 1 << 13) -> None:
        self._n_used, self._most = n_used, most
        self._popular = np.full(n_expert, n_used / n_expert, np.float32)
        self._uses: OrderedDict[int, tuple[Floats, int]] = OrderedDict()  # and steps met in

    def add(self, tokens: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64], known: npt.NDArray[np.int16]) -> Floats:
        """Learn from a step.

        Args:
            tokens: int64 [n], ids that were computed together.
            pairs: int64 [n_expert], how many of them chose each expert.
            known: int16 [n, n_used], for ids that were not met here: experts it used once, -1 where that is not known.

        Returns:
            float32 [n, n_expert]: the share of its steps in which each id used each expert, as far as can be told.
        """
        for token, experts in zip(tokens.tolist(), known, strict=True):
            if token not in self._uses:
                uses = np.zeros(len(self._popular), np.float32)
                uses[experts[experts >= 0]] = 1
                self._uses[token] = (uses, int(experts[0] >= 0))
        shares = attributed(self._shares(tokens), pairs, self._n_used)
        self._popular += np.float32(_FADING) * ((pairs / len(tokens)).astype(np.float32) - self._popular)
        for token, share in zip(tokens.tolist(), shares, strict=True):
            uses, met = self._uses.pop(token)
            self._uses[token] = (uses + share, met + 1)
        found = self._shares(tokens)
        while len(self._uses) > self._most:
            self._uses.popitem(last=False)
        return found

    def forget(self, token: int) -> None:
        """Somebody knows better."""
        self._uses.pop(token, None)

    def _shares(self, tokens: npt.NDArray[np.int64]) -> Floats:
        rows = [self._uses[token] for token in tokens.tolist()]
        return np.array([(uses + self._popular) / (met + 1) for uses, met in rows], np.float32)
