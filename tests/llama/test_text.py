"""What users ask for most: completions and chats give the text of stock llama.cpp, in the same wrapping."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import Ask

PROMPT = "The capital of France is"
MESSAGES = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Name three colours."}]
GREEDY: dict[str, Any] = {"temperature": 0.0}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "legs": {"enum": [2, 4]}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": 12},
        {"max_tokens": 5, "echo": True},
        {"max_tokens": 40, "stop": ["."]},
        {"max_tokens": 40, "stop": [" Eiffel", "\n"]},
        {"max_tokens": 12, "repeat_penalty": 1.4, "frequency_penalty": 0.5},
        {"max_tokens": 12, "logit_bias": {"7042": -100.0}},
        {"max_tokens": 12, "temperature": 1.3, "seed": 7},
        {"max_tokens": 12, "temperature": 1.0, "seed": 8, "top_k": 5, "min_p": 0.0},
        {"max_tokens": 12, "temperature": 0.9, "seed": 9, "mirostat_mode": 2},
    ],
    ids=str,
)
def test_completions_are_those_of_stock(ours: Ask, stock: Ask, arguments: dict[str, Any]) -> None:
    question = {"prompt": PROMPT, **GREEDY, **arguments}
    answer = ours("completion", **question)
    assert answer == stock("completion", **question)
    assert answer["choices"][0]["text"].strip()


def test_a_prompt_of_tokens_is_taken_as_it_is(ours: Ask, stock: Ask) -> None:
    tokens = stock("facts")["tokens"]
    answer = ours("completion", prompt=tokens, max_tokens=4, **GREEDY)
    assert answer == stock("completion", prompt=tokens, max_tokens=4, **GREEDY)
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def test_a_stop_string_ends_the_text_before_it(ours: Ask) -> None:
    whole = ours("completion", prompt=PROMPT, max_tokens=30, **GREEDY)["choices"][0]["text"]
    stop = whole[10:16]
    (choice,) = ours("completion", prompt=PROMPT, max_tokens=30, stop=stop, **GREEDY)["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("arguments", [{"max_tokens": 16}, {"max_tokens": 30, "stop": ["."]}], ids=str)
def test_streaming_gives_the_same_text_in_pieces(ours: Ask, stock: Ask, arguments: dict[str, Any]) -> None:
    whole = ours("completion", prompt=PROMPT, **arguments, **GREEDY)["choices"][0]
    chunks = ours("completion_stream", prompt=PROMPT, **arguments, **GREEDY)
    assert len(chunks) >= 3
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert chunks == stock("completion_stream", prompt=PROMPT, **arguments, **GREEDY)


def test_chats_are_those_of_stock_streamed_or_not(ours: Ask, stock: Ask) -> None:
    question = {"messages": MESSAGES, "max_tokens": 16, **GREEDY}
    whole, chunks = ours("chat", **question), ours("chat_stream", **question)
    assert whole == stock("chat", **question)
    assert chunks == stock("chat_stream", **question)
    pieces = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert pieces == whole["choices"][0]["message"]["content"]


def test_a_seed_decides_the_text(ours: Ask) -> None:
    question = {"prompt": "My favourite", "max_tokens": 16, "temperature": 1.5}
    one, again, other = (ours("completion", seed=seed, **question)["choices"][0]["text"] for seed in (3, 3, 4))
    assert one == again
    assert one != other


def test_a_grammar_holds(ours: Ask, stock: Ask) -> None:
    question = {"rules": 'root ::= "no" | "maybe"', "prompt": "Is the moon made of cheese? Answer:", "max_tokens": 8}
    answer = ours("constrained", **question, **GREEDY)
    assert answer["choices"][0]["text"] in ("no", "maybe")
    assert answer == stock("constrained", **question, **GREEDY)


def test_a_json_schema_holds(ours: Ask, stock: Ask) -> None:
    question = {
        "messages": [{"role": "user", "content": "Describe a cat as JSON."}],
        "response_format": {"type": "json_object", "schema": SCHEMA},
        "max_tokens": 60,
        **GREEDY,
    }
    answer = ours("chat", **question)
    animal = json.loads(answer["choices"][0]["message"]["content"])
    assert animal.keys() == {"name", "legs"}
    assert animal["legs"] in (2, 4)
    assert answer == stock("chat", **question)


@pytest.mark.parametrize(
    ("chat_format", "choice"),
    [
        (None, {"type": "function", "function": {"name": "weather"}}),
        (None, "auto"),
        ("chatml-function-calling", {"type": "function", "function": {"name": "weather"}}),
        ("chatml-function-calling", "auto"),
    ],
    ids=str,
)
def test_tools_are_called_as_in_stock(ours: Ask, stock: Ask, chat_format: str | None, choice: Any) -> None:
    options = {"chat_format": chat_format}
    question = {
        "messages": [{"role": "user", "content": "How will the weather be in Rome?"}],
        "tools": [WEATHER],
        "tool_choice": choice,
        "max_tokens": 40 if choice != "auto" else 16,
        **GREEDY,
    }
    answer = ours("chat", options, **question)
    assert answer == stock("chat", options, **question)
    if choice != "auto":
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


def test_a_prompt_that_does_not_fit_is_refused_as_in_stock(ours: Ask, stock: Ask) -> None:
    question = {"of": "completion", "prompt": "word " * 600}
    refusal = ours("refusal", **question)
    assert refusal == stock("refusal", **question)
    assert refusal[0] == "ValueError"
    assert "exceed context window" in refusal[1]
    assert ours("completion", prompt=PROMPT, max_tokens=2, **GREEDY)["choices"][0]["text"] == " Paris."


def test_an_answer_ends_where_the_context_does(ours: Ask, stock: Ask) -> None:
    options = {"n_ctx": 256}
    question = {"prompt": "word " * 240, "max_tokens": None, **GREEDY}
    answer = ours("completion", options, **question)
    assert answer == stock("completion", options, **question)
    assert answer["usage"]["total_tokens"] == 256
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_model_says_the_same_about_itself(ours: Ask, stock: Ask) -> None:
    assert ours("facts") == stock("facts")
