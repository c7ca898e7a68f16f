"""One step: which tokens of whom are computed together, and llama.cpp's batch of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from llama_cpp import _internals

from pyengine.sessions.continuation import Continuation


class Share(NamedTuple):
    """What one session has of a step."""

    of: Continuation
    n_tokens: int


class StepSizes(NamedTuple):
    """Tokens."""

    batch: int
    """most of a step (n_batch)"""
    micro_batch: int
    """computed at once (n_ubatch): a step with more goes through all layers and their experts once more"""
    prompt_chunk: int
    """most of prompts, while somebody decodes"""


def plan_step(
    decoding: Sequence[Continuation], prefilling: deque[Continuation], sizes: StepSizes, free: int
) -> list[Share]:
    """A token of each that decodes, and of prompts as much as may be.

    The prompt whose turn is cut short goes to the end of `prefilling`: however long it is, the next one waits for one
    chunk of it.

    Args:
        free: KV cells; at least one for each that decodes.
    """
    shares = [Share(one, 1) for one in decoding]
    left = sizes.batch - len(shares)
    if shares:
        left = min(left, sizes.prompt_chunk, max(1, sizes.micro_batch - len(shares)))
    left = min(left, free - len(shares))
    for _ in range(len(prefilling)):
        if left <= 0:
            break
        one = prefilling[0]
        take = min(left, one.pending)
        shares.append(Share(one, take))
        left -= take
        prefilling.rotate(-1)
    return shares


class StepBatch:
    """llama.cpp's batch, filled anew for each step. Args: size: most tokens."""

    def __init__(self, size: int) -> None:
        self.batch = _internals.LlamaBatch(n_tokens=size, embd=0, n_seq_max=1, verbose=False)
        raw = self.batch.batch
        self._token, self._pos, self._n_seq_id, self._output = (
            np.ctypeslib.as_array(field, (size,)) for field in (raw.token, raw.pos, raw.n_seq_id, raw.logits)
        )
        self._seq_id = [raw.seq_id[i] for i in range(size)]

    def fill(self, shares: Sequence[Share]) -> list[int]:
        """Returns the row of each share's last token, which is an output (also where a prompt goes on: llama_cpp.Llama
        has it so)."""
        begin, rows = 0, []
        for one, n_tokens in shares:
            end = begin + n_tokens
            self._token[begin:end] = one.tokens[one.computed : one.computed + n_tokens]
            self._pos[begin:end] = np.arange(one.computed, one.computed + n_tokens)
            self._output[begin:end] = 0
            self._output[end - 1] = 1
            for i in range(begin, end):
                self._seq_id[i][0] = one.sequence
            rows.append(end - 1)
            begin = end
        self._n_seq_id[:begin] = 1
        self.batch.batch.n_tokens = begin
        return rows

    def close(self) -> None:
        self.batch.close()  # type: ignore[no-untyped-call]
