"""What can be known of the first layer's experts before a step is computed: from its token ids, or from the last layer
of the step before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from foreseeing import Sources, table
from group_steps import Steps, of_chunks, of_texts, pairs_of

from pyengine.advice.attribution import Attribution

Floats = npt.NDArray[np.float32]

#: Occurrences that what all tokens use counts as, beside a token's own.
PRIOR = 1.0


def token_ways(of: Sources, steps: Steps) -> Iterator[tuple[str, Floats]]:
    """(way, scores float32 [n_step, n_expert]); -inf: not named.

    token is what the engine does, having met the texts learned from token by token: the experts that each token id used
    last. token-counts: all its uses, and popularity. token-sets: the same from steps of this very kind, of which only
    the number of tokens that chose each expert is known.
    """
    vocabulary = of.trace.tokens
    used = of.used(0).astype(np.float32)
    n_id = int(vocabulary.max()) + 1
    last = np.zeros((n_id, used.shape[1]), np.float32)
    last[vocabulary[of.fit]] = used[of.fit]
    counts = np.zeros((n_id, used.shape[1]), np.float32)
    np.add.at(counts, vocabulary[of.fit], used[of.fit])
    met = np.bincount(vocabulary[of.fit], minlength=n_id).astype(np.float32)
    popular = used[of.fit].mean(axis=0)
    ids = vocabulary[steps.tokens]
    named = last[ids].sum(axis=1)
    yield "token", np.where(named > 0, named, -np.inf).astype(np.float32)
    yield "token-counts", _shares(counts, met, popular)[ids].sum(axis=1)
    yield "token-sets", _from_sets(of, steps, popular)[ids].sum(axis=1)
    before = np.roll(of.used(of.trace.model.n_layer - 1), 1, axis=0)
    klotski, _ = table(before, of.used(0), of.fit)
    scores = klotski[np.minimum(steps.before + 1, len(klotski) - 1)].sum(axis=1)
    unknown = (steps.before == steps.tokens).all(axis=1, keepdims=True)
    yield "table", np.where(unknown, -np.inf, scores).astype(np.float32)


def _shares(counts: Floats, met: Floats, popular: Floats) -> Floats:
    return np.asarray((counts + PRIOR * popular) / (met + PRIOR)[:, None], np.float32)


def _from_sets(of: Sources, steps: Steps, popular: Floats) -> Floats:
    """float32 [n_token_id, n_expert]: what the engine learns about each token id from steps of the texts set apart for
    it, of which it knows sums only."""
    part = np.isin(np.arange(len(of.trace.ids)), of.fit)
    starts = [int(s) for s in of.trace.starts if part[s]]
    ends = np.append(of.trace.starts, len(of.trace.ids))
    texts = [(s, int(ends[np.searchsorted(ends, s, "right")]) - s) for s in starts]
    if steps.kind == "chunk":
        taught = of_chunks([text for text in texts if text[1] >= steps.size], steps.size)
    else:
        taught = of_texts(texts, min(steps.size, len(texts)), 120)
    n_id, n_used = int(of.trace.tokens.max()) + 1, of.trace.model.n_expert_used
    found = np.broadcast_to(popular, (n_id, len(popular))).copy()
    learned = Attribution(len(popular), n_used)
    for tokens, pairs in zip(taught.tokens, pairs_of(of.trace, taught)[:, 0], strict=True):
        ids = of.trace.tokens[tokens].astype(np.int64)
        found[ids] = learned.add(ids, pairs, np.full((len(ids), n_used), -1, np.int16))
    return found
