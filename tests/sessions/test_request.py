"""Requests that make no sense are refused in one sentence, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest

from pyengine.errors import UsageError
from pyengine.sessions import Request, SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": 0.5},
        {"top_p": 1.01},
        {"min_p": -1},
        {"repeat_penalty": 0},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": None},
        {"seed": 1 << 32},
        {"stop": "text"},
        {"stop": ("",)},
        {"stop": (1,)},
        {"logprobs": 101},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_the_bounds_themselves_are_fine() -> None:
    SamplingParams(max_tokens=0, temperature=0, top_k=-1, top_p=1, min_p=0, seed=(1 << 32) - 1, logprobs=0)


def test_a_request_keeps_its_own_copy_of_the_prompt() -> None:
    tokens = [1, 2, 3]
    request = Request(tokens)
    tokens.append(4)
    assert request.tokens == (1, 2, 3)


def test_a_prompt_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one token"):
        Request([])
