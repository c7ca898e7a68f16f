"""What somebody asks of a model: a prompt, and how its continuation is chosen. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyengine.errors import UsageError

#: Most alternatives told with a token.
MOST_LOGPROBS = 100


class PromptTooLongError(UsageError):
    """A prompt that leaves no room in the context for a single token of answer, whoever else is there."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The samplers are llama.cpp's, in the order in which llama_cpp.Llama has them.

    Raises:
        UsageError: a value out of its range.
    """

    max_tokens: int | None = None
    """tokens to generate at most; None: until the context is full; 0: only compute the prompt (a prefix to keep)"""
    temperature: float = 0.8
    """0: always the likeliest token; then top_k, top_p, min_p and seed do not matter"""
    top_k: int = 40
    """0 or less: all"""
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    """of the last 64 tokens generated, as the next two"""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None: another one each time"""
    stop: tuple[str, ...] = ()
    """the text ends before the first of these"""
    logprobs: int | None = None
    """tell the likeliest so many tokens with each token"""
    ignore_eos: bool = False
    """go on after the model's end token, for measurements"""

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 0, optional=True)
        _integer("top_k", self.top_k, -(2**31), 2**31 - 1)
        _integer("seed", self.seed, 0, 2**32 - 1, optional=True)
        _integer("logprobs", self.logprobs, 0, MOST_LOGPROBS, optional=True)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1)
        _number("min_p", self.min_p, 0, 1)
        _number("repeat_penalty", self.repeat_penalty, 0.01, 100)
        _number("presence_penalty", self.presence_penalty, -100, 100)
        _number("frequency_penalty", self.frequency_penalty, -100, 100)
        stop: object = self.stop
        if not isinstance(stop, tuple | list) or not all(isinstance(text, str) and text for text in stop):
            raise UsageError("stop must be a tuple of texts that are not empty")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Raises:
        UsageError: no tokens.
    """

    tokens: Sequence[int]
    """token ids of the prompt, with whatever the model wants at its beginning (see Llama.tokenize)"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    name: str = ""
    """the caller's own, for messages"""

    def __post_init__(self) -> None:
        tokens = tuple(int(token) for token in self.tokens)
        if not tokens:
            raise UsageError("a prompt needs at least one token")
        object.__setattr__(self, "tokens", tokens)


def _integer(name: str, value: object, least: int, most: int | None = None, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    sound = isinstance(value, int) and not isinstance(value, bool)
    if not sound or value < least or (most is not None and value > most):  # type: ignore[operator]
        span = f"at least {least}" if most is None else f"{least} to {most}"
        raise UsageError(f"{name} must be an integer, {span}, and is {value!r}")


def _number(name: str, value: object, least: float, most: float) -> None:
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not sound or not least <= value <= most:  # type: ignore[operator]
        raise UsageError(f"{name} must be a number, {least:g} to {most:g}, and is {value!r}")
