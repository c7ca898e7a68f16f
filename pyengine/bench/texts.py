"""The texts that are measured with: real prose and code, the same for every row."""

from __future__ import annotations

from importlib import resources


def short_prompts() -> list[str]:
    """Beginnings of texts, about 30 tokens each, for decoding."""
    return [line.replace("\\n", "\n") for line in _read("prompts.txt").splitlines()]


def long_text() -> str:
    """An essay of about 1,200 tokens, for prefill."""
    return _read("long.txt")


def stretch(tokens: list[int], count: int) -> list[int]:
    """`count` tokens; after the last comes the first again.

    Raises:
        ValueError: there are no tokens.
    """
    if not tokens:
        raise ValueError("there is no text to measure with")
    return [tokens[i % len(tokens)] for i in range(count)]


def _read(name: str) -> str:
    return resources.files("pyengine.bench").joinpath("texts", name).read_text(encoding="utf-8")
