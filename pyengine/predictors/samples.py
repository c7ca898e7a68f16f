"""What predictors are fitted to and judged by: gate inputs and expert ids of a trace, divided by whole sequences.

Nine parts of ten are for fitting and choosing (of these one part is never fitted to: it stops training, chooses forms
and calibrates), one part is held out for the figures. Sequences are kept whole, because neighbouring tokens are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine.predictors.predictor import PredictorError
from pyengine.predictors.recall import Flags, lru_residents
from pyengine.traces import Trace

Indices = npt.NDArray[np.int64]

#: Tokens without which figures are noise.
LEAST_TOKENS = 40
_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Split:
    """Token numbers of a trace, ascending, without overlap."""

    fit: Indices
    choose: Indices
    held_out: Indices
    by_sequence: bool
    """False if the trace has too few sequences: then the last tokens are held out, those before choose"""


def split(trace: Trace, seed: int = 0) -> Split:
    """Divide a trace's tokens 8 : 1 : 1 by whole sequences, in an order drawn with `seed`.

    Raises:
        PredictorError: the trace has too few tokens.
    """
    n = len(trace.ids)
    if n < LEAST_TOKENS:
        raise PredictorError(
            f"the trace has {n} tokens; predictors need at least {LEAST_TOKENS}, better some thousands"
        )
    bounds = np.unique(np.concatenate([[0], trace.starts, [n]]))
    sizes = np.diff(bounds)
    order = np.random.default_rng(seed).permutation(len(sizes))
    want = max(1, round(_SHARE * n))
    # A part takes sequences until it has its tenth; one too long for two parts of ten would leave nothing to fit.
    usable = [i for i in order if sizes[i] <= 2 * want]
    parts: list[list[int]] = [[], []]
    for part in parts:
        while usable and sum(sizes[i] for i in part) < want:
            part.append(int(usable.pop()))
    if not all(sum(sizes[i] for i in part) >= want // 2 for part in parts):
        tokens = np.arange(n, dtype=np.int64)
        return Split(tokens[: n - 2 * want], tokens[n - 2 * want : n - want], tokens[n - want :], False)
    held, choose = (_tokens(bounds, part) for part in parts)
    rest = _tokens(bounds, sorted(set(range(len(sizes))) - set(parts[0]) - set(parts[1])))
    return Split(rest, choose, held, True)


def _tokens(bounds: Indices, sequences: list[int]) -> Indices:
    return np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in sorted(sequences)]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Samples:
    """A trace with gate inputs, made ready."""

    trace: Trace
    split: Split
    resident: Flags
    """bool [n_token, n_layer, n_expert]: with half the experts in LRU slots, what lay there before the look-up"""

    @property
    def k(self) -> int:
        return self.trace.model.n_expert_used

    def inputs(self, layer: int, tokens: Indices) -> npt.NDArray[np.float32]:
        """float32 [n, n_embd]: gate inputs of a layer."""
        return np.asarray(self.trace.inputs[tokens, layer], np.float32)

    def ids(self, layer: int, tokens: Indices) -> npt.NDArray[np.uint16]:
        """uint16 [n, k]."""
        return np.asarray(self.trace.ids[tokens, layer], np.uint16)


def make_samples(trace: Trace, seed: int = 0) -> Samples:
    """Raises PredictorError: no gate inputs, some that are not finite, or too few tokens."""
    if not trace.inputs.size:
        raise PredictorError("the trace has no gate inputs; record one with them")
    if not np.isfinite(trace.inputs).all():
        raise PredictorError("the trace has gate inputs that are not finite")
    model = trace.model
    slots = max(1, model.n_layer * model.n_expert // 2)
    return Samples(trace, split(trace, seed), lru_residents(trace.ids, model.n_expert, slots))
