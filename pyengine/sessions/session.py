"""One prompt on its way to an answer. The scheduler's thread writes it; any thread may read it or wait for it."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pyengine.sessions.request import Request

FinishReason = Literal["stop", "length", "cancelled", "error"]


class SessionState(enum.Enum):
    WAITING = "waiting"
    """for a sequence and KV cells"""
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, before any sampler."""

    token: int
    logprob: float
    """natural logarithm"""
    likeliest: tuple[tuple[int, float], ...]
    """(token id, logprob) of the likeliest tokens, best first"""


@dataclass
class Times:
    """Seconds of time.monotonic(); None: not yet, or never."""

    submitted: float
    first_token: float | None = None
    finished: float | None = None


class Session:
    """A submitted request; Scheduler.submit makes it.

    Attributes:
        request: as submitted.
        text: the answer so far that is sure: no half of a character, nothing that may begin a stop text. Only grows.
        tokens: ids generated so far, without the token that ended the answer. Only grows.
        logprobs: one per token, if the request wants them.
        state: see SessionState.
        finish_reason: "stop" (the model's end token or a stop text), "length" (max_tokens, or the context is full),
            "cancelled", "error"; None before.
        error: what went wrong, if something did.
        cached_tokens: of the prompt's, how many were not computed because a kept prefix had them.
        times: when what happened.
        preemptions: how often it gave its KV cells to older sessions and was computed again.
    """

    def __init__(
        self,
        request: Request,
        submitted: float,
        changed: threading.Condition,
        on_progress: Callable[[Session], None] | None = None,
    ) -> None:
        self.request = request
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.state = SessionState.WAITING
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.cached_tokens = 0
        self.times = Times(submitted)
        self.preemptions = 0
        self.on_progress = on_progress
        self._changed = changed

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.tokens)

    @property
    def finished(self) -> bool:
        return self.state is SessionState.FINISHED

    def wait(self, n_tokens: int | None = None, timeout: float | None = None) -> bool:
        """Until it has more than `n_tokens` tokens or is finished; None: until it is finished. For threads other than
        the one that steps. Returns False if `timeout` seconds passed before."""

        def reached() -> bool:
            return self.finished or (n_tokens is not None and len(self.tokens) > n_tokens)

        with self._changed:
            return self._changed.wait_for(reached, timeout)

    def pieces(self) -> Iterator[str]:
        """The text piece by piece, until it is finished. For threads other than the one that steps.

        Raises:
            Exception: `error`, after all text, if it ended with one.
        """
        told = 0
        while True:
            with self._changed:
                while not self.finished and len(self.text) <= told:
                    self._changed.wait()
                finished = self.finished  # first: then the text is all of it
                text = self.text
            if len(text) > told:
                yield text[told:]
                told = len(text)
            if finished:
                if self.error is not None:
                    raise self.error
                return

    def __repr__(self) -> str:
        name = f" {self.request.name!r}" if self.request.name else ""
        return f"<Session{name} {self.state.value}, {self.prompt_tokens} + {len(self.tokens)} tokens>"
