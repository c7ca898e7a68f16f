"""Completes one prompt token by token and keeps the real ids and times."""

from __future__ import annotations

import codecs
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyengine.cli.conversation import Figures
from pyengine.cli.interrupt import StopRequest
from pyengine.cli.options import Sampling
from pyengine.cli.output import line_end, reading_prompt

if TYPE_CHECKING:
    from pyengine import Llama


@dataclass
class Completion:
    """What came of one prompt. Times in seconds; token_ids without the end-of-generation token."""

    seed: int
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    stopped: bool = False
    prompt_s: float = 0.0
    ttft_s: float | None = None
    decode_s: float = 0.0

    def add_text(self, piece: str, show: bool) -> None:
        """Append a piece of the text and, with `show`, print it at once."""
        self.text += piece
        if show and piece:
            print(piece, end="", flush=True)

    def timings(self) -> dict[str, Any]:
        """The figures under their names in the JSON report; a speed is None where nothing was timed."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_s": self.prompt_s,
            "prompt_tokens_per_s": self.prompt_tokens / self.prompt_s if self.prompt_s > 0 else None,
            "generated_tokens": len(self.token_ids),
            "decode_s": self.decode_s,
            "decode_tokens_per_s": self._decode_rate(),
            "ttft_s": self.ttft_s,
        }

    def figures(self, llm: Llama) -> Figures:
        """The same for the status line."""
        stats = llm.expert_stats()
        return Figures(
            tokens=len(self.token_ids),
            tokens_per_s=self._decode_rate(),
            first_token_s=self.ttft_s,
            hits=stats.get("hits", 0),
            misses=stats.get("misses", 0),
            context_used=llm.n_tokens,
            context_size=llm.n_ctx(),
            stats=stats,
        )

    def _decode_rate(self) -> float | None:
        steps = len(self.token_ids) - 1
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else None


def complete(llm: Llama, prompt: str, limit: int, sampling: Sampling, *, stream: bool) -> Completion:
    """Complete `prompt` with at most `limit` tokens (-1: as many as the context holds), ended by the model or Ctrl-C.

    With `stream` the text is printed as it comes.

    Raises:
        ValueError: the prompt is empty where the model has no beginning-of-text token, or exceeds the context.
        RuntimeError: the computation failed.
    """
    asked_at = time.perf_counter()
    prompt_ids = llm.tokenize(prompt.encode(), add_bos=True, special=True)
    room = llm.n_ctx() - len(prompt_ids)
    if not prompt_ids:
        raise ValueError("the prompt is empty, and this model has no token to begin a text with")
    if room < (0 if limit == 0 else 1):
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens and the context {llm.n_ctx()}; start with a larger -c/--ctx-size"
        )
    result = Completion(seed=sampling.resolved_seed(), prompt_tokens=len(prompt_ids))
    limit = room if limit < 0 else min(limit, room)
    ends = end_of_generation(llm)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
    with StopRequest(llm) as stop, reading_prompt(llm, len(prompt_ids)) as spinner:
        started_at = last_at = time.perf_counter()
        try:
            for token in _tokens(llm, prompt_ids, limit, sampling, result.seed):
                now = time.perf_counter()
                if result.ttft_s is None:
                    result.ttft_s, result.prompt_s, last_at = now - asked_at, now - started_at, now
                    spinner.stop()
                if ends(token):
                    result.finish_reason = "stop"
                    break
                result.token_ids.append(token)
                result.decode_s, last_at = result.decode_s + now - last_at, now
                result.add_text(decoder.decode(llm.detokenize([token])), stream)
                if stop.requested:
                    break
                stop.tick()
        except RuntimeError as error:
            if not stop.expected(error):
                raise
        if not limit:
            result.prompt_s = time.perf_counter() - started_at
        result.stopped = stop.requested
    result.add_text(decoder.decode(b"", final=True), stream)
    if stream:
        print(end=line_end(result.text), flush=True)
    return result


def _tokens(llm: Llama, prompt_ids: list[int], limit: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """The next `limit` tokens; the prompt is evaluated even if that is 0."""
    if limit == 0:
        llm.eval(prompt_ids)
        return
    llm.set_seed(seed)
    # islice does not ask for one token more, which would be evaluated for nothing.
    yield from itertools.islice(llm.generate(prompt_ids, **sampling.arguments()), limit)


def end_of_generation(llm: Llama) -> Callable[[int], bool]:
    """Tells the tokens that end a text (end of text, end of turn and the like) for this model."""
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    return lambda token: bool(llama_cpp.llama_vocab_is_eog(vocabulary, token))
