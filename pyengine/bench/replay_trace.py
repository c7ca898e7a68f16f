"""A routing trace in the place of the router: which experts each token of each text uses. The text means nothing
then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyengine.bench.measuring import Texts
from pyengine.bench.rows import ModelFacts
from pyengine.errors import UsageError
from pyengine.traces import load_trace

if TYPE_CHECKING:
    import numpy.typing as npt

#: Tokens of a document that serve as the prompt; decoding goes on with the ones after.
PROMPT_TOKENS = 32


class TraceTexts:
    """Documents of a trace as texts: `n_prompts` for decoding first, then one for prefill, spread evenly over the
    trace.

    Raises:
        OSError, TraceError: the file cannot be read, or is no routing trace.
    """

    def __init__(self, path: Path, n_prompts: int) -> None:
        trace = load_trace(path)
        self._ids = trace.ids
        self._n_prompts = n_prompts
        starts = [int(start) for start in trace.starts if start < len(trace.ids)] or [0]
        n = n_prompts + 1
        self._starts = [starts[i * len(starts) // n] for i in range(n)]

    def check(self, model: ModelFacts) -> None:
        """Raise UsageError if the trace is not of a model of this shape, or holds no tokens."""
        n_token, layers, used = self._ids.shape
        if not n_token:
            raise UsageError("the trace holds no decoded tokens")
        most = int(self._ids.max())
        if (layers, used) != (model.n_layer, model.n_expert_used) or most >= model.n_expert:
            raise UsageError(
                f"the trace has {layers} layers, {used} experts per token and ids up to {most}; {model.path.name} has "
                f"{model.n_layer} layers and uses {model.n_expert_used} of {model.n_expert} experts"
            )

    def ids(self, text: int, tokens: int) -> npt.NDArray[np.int32]:
        """int32 [tokens, layers, used] for the tokens of one text; they run on into the next document if need be."""
        at = (self._starts[text] + np.arange(tokens)) % len(self._ids)
        return np.ascontiguousarray(self._ids[at], dtype=np.int32)

    def texts(self, prefill_tokens: int, n_vocab: int) -> Texts:
        """Token ids without meaning, of the right number."""
        prompts = [[(7919 * (i + 1) + text) % n_vocab for i in range(PROMPT_TOKENS)] for text in range(self._n_prompts)]
        prefill = [104729 * (i + 1) % n_vocab for i in range(prefill_tokens)]
        return Texts(prompts, prefill)
