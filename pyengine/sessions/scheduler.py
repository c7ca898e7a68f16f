"""Continuous batching, step by step: every step is one computation with a token of each session that decodes and a
chunk of the prompts that wait, so that no prompt, however long, freezes the others.

Nothing here depends on time: the same requests in the same order are computed in the same batches.
"""

from __future__ import annotations

import bisect
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

import pyengine
from pyengine.errors import UsageError
from pyengine.sessions.cells import KvCells
from pyengine.sessions.continuation import Continuation
from pyengine.sessions.prefixes import PrefixCache
from pyengine.sessions.request import PromptTooLongError, Request
from pyengine.sessions.room import Room
from pyengine.sessions.session import FinishReason, Session, SessionState
from pyengine.sessions.step import Share, StepBatch, StepSizes, plan_step

#: Tokens of prompts in a step in which somebody decodes, unless told otherwise.
PROMPT_CHUNK = 128
#: Of those that wait, how many times as many as can run at once are looked at in a step.
_LOOKED_AT = 4

#: Who has which model's context, by the Llama's id().
_open: weakref.WeakValueDictionary[int, Scheduler] = weakref.WeakValueDictionary()


class Scheduler:
    """Several sessions with one model. Open the model with `n_sequences` for as many as shall run at once.

    One thread steps, and computes nothing else with the model meanwhile; any thread may submit, cancel and wait. The
    model's context belongs to the scheduler until it is closed; what was in it is cleared.

    A session begins when there are a sequence and KV cells for its prompt and some growth. Sessions begin in the order
    in which they came, but one whose beginning another one is just computing waits for that, if there is a
    PrefixCache. Should cells run out, kept prefixes go first; then the youngest session gives back its cells and is
    computed again later.

    Args:
        max_sequences: sessions that run at once; None: as many as the model was opened for, half of them with a
            PrefixCache, whose prefixes need sequences, too.
        prompt_chunk: most tokens of prompts in a step in which somebody decodes; alone, prompts have whole batches.
        prefixes: keeps prompts that were computed; None: nothing is shared.

    Raises:
        UsageError: another scheduler has this model, it has a vocabulary only, or a value is out of its range.
    """

    def __init__(
        self,
        llama: pyengine.Llama,
        *,
        max_sequences: int | None = None,
        prompt_chunk: int | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        if id(llama) in _open:
            raise UsageError("another Scheduler has this model; close it first")
        if llama.model_params.vocab_only:
            raise UsageError("this Llama was opened with vocab_only, and can compute nothing")
        if prompt_chunk is not None and prompt_chunk < 1:
            raise UsageError(f"prompt_chunk must be at least 1, and is {prompt_chunk}")
        self._cells = KvCells(llama)
        most = self._cells.n_sequences
        if max_sequences is None:
            max_sequences = most if prefixes is None else max(1, most // 2)
        if not 1 <= max_sequences <= most:
            raise UsageError(
                f"max_sequences must be 1 to {most}, and is {max_sequences}; n_sequences of Llama gives more"
            )
        if prefixes is not None:
            prefixes.attach(llama, self._cells)
        self._llama = llama
        self._prefixes = prefixes
        self._max_sequences = max_sequences
        self._room = Room(self._cells, prefixes, self._cells.n_cells // max_sequences)
        self._sizes = StepSizes(llama.n_batch, llama.context_params.n_ubatch, prompt_chunk or PROMPT_CHUNK)
        self._batch = StepBatch(llama.n_batch)
        self._changed = threading.Condition()
        # Under the condition's lock; the rest belongs to the thread that steps.
        self._submitted: deque[Continuation] = deque()
        self._number = 0
        self._cancelled: list[Continuation] = []
        self._live: dict[Session, Continuation] = {}
        self._closed = False
        self._waiting: list[Continuation] = []  # oldest first
        self._prefilling: deque[Continuation] = deque()  # whose turn it is first
        self._decoding: list[Continuation] = []  # oldest first
        _open[id(llama)] = self

    # ---- from any thread

    def submit(self, request: Request, on_progress: Callable[[Session], None] | None = None) -> Session:
        """Let a prompt be continued.

        Args:
            on_progress: called on the stepping thread after each step in which the session gained a token or ended. It
                must be quick and raise nothing.

        Raises:
            PromptTooLongError: it can never fit.
            UsageError: the scheduler is closed, or a token is none of this model's.
        """
        room = self._cells.n_cells
        if len(request.tokens) >= room:
            raise PromptTooLongError(
                f"the prompt has {len(request.tokens)} tokens, and the context has room for {room - 1}"
            )
        n_vocab = self._llama.n_vocab()
        if not 0 <= min(request.tokens) <= max(request.tokens) < n_vocab:
            raise UsageError(f"the prompt has token ids that are not 0 to {n_vocab - 1}")
        session = Session(request, time.monotonic(), self._changed, on_progress)
        with self._changed:
            if self._closed:
                raise UsageError("the Scheduler is closed")
            one = Continuation(self._llama, session, self._number)
            self._number += 1
            self._live[session] = one
            self._submitted.append(one)
            self._changed.notify_all()
        return session

    def cancel(self, session: Session) -> None:
        """End a session with the next step; it keeps what it has. Does nothing if it is finished."""
        with self._changed:
            if session in self._live:
                self._cancelled.append(self._live[session])

    @property
    def idle(self) -> bool:
        """Nothing is left to do."""
        with self._changed:
            return not self._live

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """For the thread that steps: until it is not idle, or closed. Returns whether there is work."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._live) or self._closed, timeout)
            return bool(self._live)

    # ---- from the thread that steps

    def step(self) -> list[Session]:
        """Compute once, if there is anything to compute.

        Returns: sessions that gained a token or ended. A computation that fails ends the sessions that were part of it,
        with the reason in their `error`; the others go on.

        Raises:
            UsageError: the model is closed, or another thread computes with it.
        """
        with self._cells.using():
            told = self._end_cancelled()
            self._begin()
            shares = self._plan()
            if shares:
                told += self._compute(shares)
        self._tell(told)
        if self.idle:
            self._cells.done()
        return told

    def run(self) -> Iterator[Session]:
        """Step until idle; sessions as they finish."""
        while not self.idle:
            yield from (session for session in self.step() if session.finished)

    def close(self) -> None:
        """End all sessions and give the model back; what prefixes hold is gone. Harmless when repeated."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            rest = list(self._live.values())
        for one in rest:
            self._end(one, "cancelled", release=False)
        self._tell([one.session for one in rest])
        if self._prefixes is not None:
            self._prefixes.detach()
        self._batch.close()
        self._cells.close()
        _open.pop(id(self._llama), None)

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- parts of a step

    @property
    def _active(self) -> list[Continuation]:
        return [*self._decoding, *self._prefilling]

    def _end_cancelled(self) -> list[Session]:
        with self._changed:
            self._waiting.extend(self._submitted)
            self._submitted.clear()
            gone = [one for one in dict.fromkeys(self._cancelled) if one.session in self._live]
            self._cancelled.clear()
        for one in gone:
            self._end(one, "cancelled")
        return [one.session for one in gone]

    def _begin(self) -> None:
        """Of those that wait, those there is room for."""
        for one in self._waiting[: _LOOKED_AT * self._max_sequences]:
            active = self._active
            if len(active) >= self._max_sequences:
                return
            if self._room.awaited(one, active):
                continue
            if not self._room.begin(one, active):
                return
            self._waiting.remove(one)
            if not one.session.tokens:
                one.session.cached_tokens = one.computed
            one.session.state = SessionState.PREFILLING
            self._prefilling.append(one)

    def _plan(self) -> list[Share]:
        for one in self._room.make(self._active, len(self._decoding) + bool(self._prefilling)):
            self._forget(one)
            one.session.preemptions += 1
            one.session.state = SessionState.WAITING
            bisect.insort(self._waiting, one, key=lambda other: other.number)
        wanted = len(self._decoding) + sum(one.pending for one in self._prefilling)
        self._room.make([], min(self._sizes.batch, wanted))
        return plan_step(self._decoding, self._prefilling, self._sizes, self._cells.free)

    def _compute(self, shares: list[Share]) -> list[Session]:
        rows = self._batch.fill(shares)
        if self._llama.engine is not None:
            self._llama.engine.routing_log.expect([n_tokens for _, n_tokens in shares])
        try:
            self._llama._ctx.decode(self._batch.batch)
        except UsageError:
            raise  # nothing was computed
        except Exception as error:
            for one, _ in shares:
                self._end(one, "error", error)
            return [one.session for one, _ in shares]
        except BaseException:
            self._give_up(shares)
            raise
        for one, n_tokens in shares:
            self._cells.extend(one.sequence, n_tokens)
            one.computed += n_tokens
        told = []
        for (one, _), row in zip(shares, rows, strict=True):
            if one.pending:
                continue
            if one.session.state is SessionState.PREFILLING:
                self._prefilling.remove(one)
                self._room.keep(one)
                one.session.state = SessionState.DECODING
                bisect.insort(self._decoding, one, key=lambda other: other.number)
            reason = one.choose(row)
            if reason is not None:
                self._room.keep(one)
                self._end(one, reason)
            told.append(one.session)
        return told

    def _give_up(self, shares: list[Share]) -> None:
        """Ctrl-C in the middle: as if this step had not begun."""
        for one, _ in shares:
            if not self._cells.roll_back(one.sequence):
                self._room.give_back(one)
                self._forget(one)
                one.session.state = SessionState.WAITING
                bisect.insort(self._waiting, one, key=lambda other: other.number)

    def _end(
        self, one: Continuation, reason: FinishReason, error: Exception | None = None, *, release: bool = True
    ) -> None:
        self._forget(one)
        if release:
            self._room.give_back(one)
        with self._changed:
            one.end(reason, error)
            self._live.pop(one.session, None)

    def _forget(self, one: Continuation) -> None:
        for group in (self._waiting, self._prefilling, self._decoding):
            if one in group:
                group.remove(one)

    def _tell(self, sessions: list[Session]) -> None:
        with self._changed:
            self._changed.notify_all()
        for session in sessions:
            if session.on_progress is not None:
                session.on_progress(session)
