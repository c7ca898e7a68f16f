"""A conversation with a model: its turns, room in the context, and streamed answers with their figures."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyengine.cli.interrupt import StopRequest
from pyengine.cli.options import Sampling

if TYPE_CHECKING:
    from pyengine import Llama

# What a chat template adds to a message (role, separators), in tokens. Only an estimate is needed: a prompt that turns
# out too long is shortened again.
_TEMPLATE_TOKENS = 8


@dataclass
class Figures:
    """What one answer cost. Times in seconds; hits and misses are expert accesses during this answer."""

    tokens: int = 0
    tokens_per_s: float | None = None
    first_token_s: float | None = None
    hits: int = 0
    misses: int = 0
    context_used: int = 0
    context_size: int = 0
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass
class Turn:
    user: str
    assistant: str


class Answer:
    """One answer as it comes. Iterate over it for pieces of text; the other attributes are final after that.

    finish_reason is "stop" when the model ended its answer, "length" when max_tokens or the context did, and None when
    the user stopped it (`stopped`).
    """

    def __init__(self, llm: Llama, chunks: Generator[Any, None, None], stop: StopRequest) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.stopped = False
        self.figures = Figures(context_size=llm.n_ctx())
        self._llm = llm
        self._chunks = chunks
        self._stop = stop

    def __iter__(self) -> Iterator[str]:
        started = time.perf_counter()
        before = self._llm.expert_stats()
        first_at, first_position, last_at = 0.0, 0, 0.0
        try:
            for chunk in self._chunks:
                choice = chunk["choices"][0]
                last_at = time.perf_counter()
                piece = choice["delta"].get("content")
                if piece:
                    if not self.text:
                        first_at, first_position = last_at, self._llm.n_tokens
                        self.figures.first_token_s = first_at - started
                    self.text += piece
                    yield piece
                self.finish_reason = choice["finish_reason"]
                if self._stop.requested and self.finish_reason is None:
                    self.stopped = True
                    break
                self._stop.tick()
        except RuntimeError as error:
            if not self._stop.expected(error):
                raise
            self.stopped = True
        finally:
            self._chunks.close()
        if self.text:
            self._count(first_at, first_position, last_at)
        after = self._llm.expert_stats()
        self.figures.stats = after
        self.figures.hits = after.get("hits", 0) - before.get("hits", 0)
        self.figures.misses = after.get("misses", 0) - before.get("misses", 0)
        self.figures.context_used = self._llm.n_tokens

    def _count(self, first_at: float, first_position: int, last_at: float) -> None:
        """Tokens and speed, from the positions llama.cpp counts: a chunk of text may hold several tokens."""
        steps = self._llm.n_tokens - first_position
        # The end-of-turn token was sampled after the last step but is no part of the answer; otherwise the token
        # sampled last is one, though it has not been evaluated.
        self.figures.tokens = max(1, steps if self.finish_reason == "stop" else steps + 1)
        if steps > 0 and last_at > first_at:
            self.figures.tokens_per_s = steps / (last_at - first_at)


class Conversation:
    """Turns of one chat and how the next answer is made from them."""

    def __init__(self, llm: Llama, sampling: Sampling, *, max_tokens: int = -1, system: str | None = None) -> None:
        """`max_tokens` limits each answer; -1 lets it grow as long as the context allows."""
        self.system = system
        self.turns: list[Turn] = []
        self.dropped = 0  # turns forgotten for the present answer
        self.seed = sampling.resolved_seed()
        self._llm = llm
        self._sampling = sampling.chat_arguments()
        self._max_tokens = max_tokens
        self._asked = 0

    def ask(self, text: str, stop: StopRequest) -> Answer:
        """Begin the answer to `text`; nothing is computed until it is iterated over.

        Oldest turns are dropped where the context is too small for all; `dropped` says how many once the first piece
        has come. The turn becomes part of the conversation by record().

        Raises (when iterated over):
            ValueError: `text` alone does not fit the context.
            RuntimeError: the computation failed.
        """
        self._make_room(text)
        return Answer(self._llm, self._chunks(text), stop)

    def record(self, text: str, answer: Answer) -> None:
        """Add the finished turn; one that was stopped before its first word leaves no trace."""
        if answer.text or not answer.stopped:
            self.turns.append(Turn(text, answer.text))

    def messages(self, text: str | None = None) -> list[dict[str, str]]:
        """The conversation in the form of create_chat_completion, with `text` as the newest message of the user."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant})
        if text is not None:
            messages.append({"role": "user", "content": text})
        return messages

    def _chunks(self, text: str) -> Generator[Any, None, None]:
        seed = (self.seed + self._asked) % 2**32  # a new one for every answer, so that asking again may differ
        self._asked += 1
        while True:
            try:
                chunks = self._llm.create_chat_completion(
                    messages=self.messages(text),  # type: ignore[arg-type]
                    stream=True,
                    seed=seed,
                    max_tokens=self._max_tokens if self._max_tokens > 0 else None,
                    **self._sampling,
                )
                first = next(chunks)  # type: ignore[arg-type]
            except ValueError as error:
                if "exceed context window" not in str(error):
                    raise
                if not self.turns:
                    raise ValueError(
                        f"the message does not fit the context of {self._llm.n_ctx()} tokens; "
                        "start with a larger -c/--ctx-size"
                    ) from None
                self._drop_oldest()
                continue
            yield first
            yield from chunks
            return

    def _make_room(self, text: str) -> None:
        """Drop oldest turns until the prompt leaves a quarter of the context to the answer.

        If any must go, go down to half of the context: every drop changes the beginning of the prompt, so that all of
        it is computed anew, and that should not happen at every turn.
        """
        self.dropped = 0
        size = self._llm.n_ctx()
        if self._estimate(text) <= size - size // 4:
            return
        while self.turns and self._estimate(text) > size // 2:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        del self.turns[0]
        self.dropped += 1

    def _estimate(self, text: str) -> int:
        """About how many tokens the prompt will have."""
        return sum(
            len(self._llm.tokenize(message["content"].encode(), add_bos=False, special=False)) + _TEMPLATE_TOKENS
            for message in self.messages(text)
        )
