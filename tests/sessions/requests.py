"""Short ways to ask."""

from __future__ import annotations

from typing import Any

from models.vocabulary import N_VOCAB

from pyengine.sessions import Request, SamplingParams

#: The first readable token of the generated models.
_READABLE = 259


def prompt(n_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of a text that no other seed's begins like."""
    return [_READABLE + (7 * seed + 13 * i + i * i * (seed + 1)) % (N_VOCAB - _READABLE) for i in range(n_tokens)]


def greedy(tokens: list[int], max_tokens: int | None = 16, **sampling: Any) -> Request:
    return Request(tokens, SamplingParams(max_tokens=max_tokens, temperature=0, **sampling))
