"""Makes a trace of what a running model's routers choose."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np

from pyengine.native import ModelInfo
from pyengine.traces.routing_log import Prompt, RoutingLog, Token
from pyengine.traces.trace import Prompts, Trace, TracedModel, TraceError

#: Tokens kept; of a longer run the last ones. Gate inputs are large: of them fewer.
MOST_TOKENS = 1 << 16
MOST_INPUT_BYTES = 1 << 30

_MOST_PAIRS = (1 << 16) - 1


class TraceRecorder:
    """Listens to a model's routing from now on.

    Args:
        log: of the model.
        info: of its engine.
        model_path: only its name is kept.
        inputs: keep gate inputs too.
    """

    def __init__(self, log: RoutingLog, info: ModelInfo, model_path: Path, *, inputs: bool = False) -> None:
        self._log = log
        self._info = info
        self._name = model_path.name
        most = MOST_TOKENS
        if inputs:
            most = min(most, max(1, MOST_INPUT_BYTES // (2 * info.n_layer * info.n_embd)))
        self._tokens: deque[Token] = deque(maxlen=most)
        self._n_token = 0
        self._prompts: list[tuple[int, Prompt]] = []  # after so many tokens
        log.listen(self, inputs=inputs)

    def token(self, token: Token) -> None:
        self._tokens.append(token)
        self._n_token += 1

    def prompt(self, prompt: Prompt) -> None:
        self._prompts.append((self._n_token, prompt))

    def trace(self) -> Trace:
        """What was recorded; only while nobody computes. Raises TraceError if that is nothing."""
        self._log.flush()
        if not self._tokens and not self._prompts:
            raise TraceError("nothing was computed, so there is no routing to write")
        info = self._info
        first = self._n_token - len(self._tokens)
        prompts = [(at - first, prompt) for at, prompt in self._prompts if at >= first]
        shape = (len(self._tokens), info.n_layer, info.n_expert_used)
        return Trace(
            TracedModel(self._name, info.architecture, info.n_layer, info.n_expert, info.n_expert_used),
            ids=np.array([t.ids for t in self._tokens], "<u2").reshape(shape),
            starts=np.array(sorted({at for at, _ in prompts}), "<i8"),
            prompts=Prompts(
                at=np.array([at for at, _ in prompts], "<i8"),
                tokens=np.array([p.tokens for _, p in prompts], "<i8"),
                offsets=np.concatenate([[0], *(p.counts for _, p in prompts)]).cumsum().astype("<i8"),
                experts=np.concatenate([np.zeros(0, "<u2"), *(p.experts for _, p in prompts)]),
                pairs=np.concatenate(
                    [np.zeros(0, "<u2"), *(np.minimum(p.pairs, _MOST_PAIRS).astype("<u2") for _, p in prompts)]
                ),
            ),
            weights=np.array([t.weights for t in self._tokens], "<f2").reshape(shape),
            inputs=np.array([t.inputs for t in self._tokens], "<f2").reshape(*shape[:2], -1)
            if any(t.inputs.size for t in self._tokens)
            else np.zeros((0, 0, 0), "<f2"),
            seconds=np.array([t.seconds for t in self._tokens], "<f4"),
        )
