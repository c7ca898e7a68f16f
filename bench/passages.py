"""Prose to measure with, as much of it as anybody needs: Python's language reference, which comes with Python."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from pydoc_data.topics import topics

#: More characters than a token has, usually; and more are taken if that was not enough.
_CHARACTERS = 6


@cache
def _paragraphs() -> Sequence[str]:
    text = "\n\n".join(str(topics[name]) for name in sorted(topics))
    return [part for part in text.split("\n\n") if len(part) > 100]


def passages(tokenize: Callable[[bytes], list[int]], count: int, n_tokens: int, seed: int) -> list[list[int]]:
    """Token ids of `count` passages of n_tokens each that begin with different paragraphs. The same seed gives the same
    ones; they run on into each other's text only if they are long.

    Raises:
        ValueError: there are not so many paragraphs.
    """
    paragraphs = _paragraphs()
    if count > len(paragraphs):
        raise ValueError(f"there are {len(paragraphs)} paragraphs to begin with, and {count} were asked for")
    begins = random.Random(seed).sample(range(len(paragraphs)), count)
    return [_passage(tokenize, paragraphs, begin, n_tokens) for begin in begins]


def _passage(tokenize: Callable[[bytes], list[int]], paragraphs: Sequence[str], begin: int, n_tokens: int) -> list[int]:
    wanted, text, at = _CHARACTERS * n_tokens, "", begin
    while True:
        while len(text) < wanted:
            text += paragraphs[at % len(paragraphs)] + "\n\n"  # after the last one comes the first
            at += 1
        tokens = tokenize(text.encode())
        if len(tokens) >= n_tokens:
            return tokens[:n_tokens]
        wanted *= 2
