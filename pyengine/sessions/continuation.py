"""What the scheduler knows of a session besides what everybody may see: its sequence, sampler and text under way."""

from __future__ import annotations

import time

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals

import pyengine
from pyengine.sessions.sampling import make_sampler, token_logprobs
from pyengine.sessions.session import FinishReason, Session, SessionState
from pyengine.sessions.text import TextStream, token_bytes


class Continuation:
    """
    Args:
        number: sessions submitted before it: a smaller one is older and goes first.

    Attributes:
        tokens: the prompt, then what was generated.
        computed: of these, how many are in KV cells.
        sequence: llama.cpp's, or -1.
        reserve: cells that it is expected to need in all.
    """

    def __init__(self, llama: pyengine.Llama, session: Session, number: int) -> None:
        self._llama = llama
        self._sampling = session.request.sampling
        self._text = TextStream(self._sampling.stop)
        self._sampler: _internals.LlamaSampler | None = None
        self.session = session
        self.number = number
        self.tokens = list(session.request.tokens)
        self.computed = 0
        self.sequence = -1
        room = llama.n_ctx() - len(self.tokens)
        wanted = self._sampling.max_tokens
        self.most_tokens = room if wanted is None else min(wanted, room)
        self.reserve = 0

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        return np.asarray(self.tokens, np.int32)

    def choose(self, row: int) -> FinishReason | None:
        """All tokens are computed, the last one as this row of the batch: choose the next. Returns why that was the
        end, if it was."""
        if not self.most_tokens:
            return "length"
        if self._sampler is None:
            self._sampler = make_sampler(self._llama, self._sampling)
        token = int(self._sampler.sample(self._llama._ctx, row))
        session = self.session
        if session.times.first_token is None:
            session.times.first_token = time.monotonic()
        vocab = self._llama._model.vocab
        if not self._sampling.ignore_eos and llama_cpp.llama_vocab_is_eog(vocab, token):
            return "stop"
        self.tokens.append(token)
        if self._sampling.logprobs is not None:
            session.logprobs.append(token_logprobs(self._llama, row, token, self._sampling.logprobs))
        session.text += self._text.add(token_bytes(vocab, token))
        session.tokens.append(token)
        if self._text.stopped:
            return "stop"
        return "length" if len(session.tokens) >= self.most_tokens else None

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """The session is finished; its sequence is the caller's to release."""
        if self._sampler is not None:
            self._sampler.close()  # type: ignore[no-untyped-call]
            self._sampler = None
        session = self.session
        session.text += self._text.end()
        session.finish_reason, session.error = reason, error
        session.times.finished = time.monotonic()
        session.state = SessionState.FINISHED  # last: who sees it sees all
