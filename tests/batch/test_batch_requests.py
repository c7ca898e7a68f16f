"""What lines ask for, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from pyengine.batch.errors import LineError
from pyengine.batch.lines import Line
from pyengine.batch.requests import CHAT_URL, TEXT_URL, read_envelope, read_request
from pyengine.sessions import SamplingParams

DEFAULTS = SamplingParams(max_tokens=7, temperature=0.5, seed=3)
HELLO = [{"role": "user", "content": "hello"}]


def line(data):
    return Line(5, data if data is None or isinstance(data, bytes) else json.dumps(data).encode(), "0" * 16)


def read(found):
    return read_request(*read_envelope(line(found)), DEFAULTS)


def chat(**body):
    return {"custom_id": "a", "method": "POST", "url": CHAT_URL, "body": {"model": "any", "messages": HELLO, **body}}


def refused(found):
    with pytest.raises(LineError) as caught:
        read(found)
    return caught.value


def test_a_chat_line():
    request = read(
        chat(max_completion_tokens=9, temperature=0, top_p=0.5, stop="x", seed=4, user="me", n=1, stream=False)
    )
    assert request.custom_id == "a"
    assert request.messages == tuple(HELLO)
    assert request.prompt is None
    wanted = SamplingParams(max_tokens=9, temperature=0, top_p=0.5, stop=("x",), seed=4)
    assert request.sampling == wanted
    assert request.has_seed


def test_a_completion_line():
    body = {"prompt": "once", "stop": ["a", "b"], "max_tokens": 2, "logprobs": 3}
    request = read({"custom_id": "b", "url": TEXT_URL, "body": body})
    assert (request.custom_id, request.prompt, request.messages) == ("b", "once", None)
    assert request.sampling == SamplingParams(max_tokens=2, temperature=0.5, seed=3, stop=("a", "b"), logprobs=3)
    assert not request.has_seed
    assert read({"prompt": [1, 2]}).prompt == (1, 2)
    assert read({"prompt": ["only"]}).prompt == "only"


@pytest.mark.parametrize("bare", [{"prompt": "once"}, {"messages": HELLO}])
def test_a_bare_line_is_named_by_its_number(bare):
    request = read(bare | {"temperature": 0.25})
    assert request.custom_id == "5"
    assert request.sampling.temperature == 0.25
    assert request.sampling.max_tokens == 7
    assert read(bare | {"custom_id": "mine"}).custom_id == "mine"


def test_parts_of_text_become_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = read(chat(messages=[{"role": "user", "content": parts}])).messages
    assert message["content"] == "ab"


def test_logprobs_of_a_chat():
    assert read(chat(logprobs=True, top_logprobs=4)).sampling.logprobs == 4
    assert read(chat(logprobs=True)).sampling.logprobs == 0
    assert read(chat(logprobs=False)).sampling.logprobs is None


def test_null_is_as_good_as_absent():
    nothing = dict.fromkeys(("max_tokens", "seed", "stop", "tools", "logit_bias", "response_format", "no_such"), None)
    assert read(chat(**nothing)).sampling == DEFAULTS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{oops", "line 5 is not valid JSON: Expecting property name"),
        (b'{"a": "\xff"}', "line 5 is not valid UTF-8"),
        (b"[" * 100_000, "line 5 is not valid JSON"),
        (b"9" * 5_000, "line 5 is not"),
        (b"[1]", "line 5 is not a JSON object"),
        (None, "line 5 is longer than 64 MiB"),
    ],
)
def test_lines_that_are_no_json_objects(data, message):
    with pytest.raises(LineError, match=message) as caught:
        read_envelope(line(data))
    assert (caught.value.code, caught.value.status) == ("invalid_json_line", None)


@pytest.mark.parametrize("custom_id", [7, "", ["a"], "\ud800"])
def test_a_custom_id_is_a_text(custom_id):
    assert refused({"custom_id": custom_id, "prompt": "a"}).code == "invalid_custom_id"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": "GET"}, "invalid_method"),
        ({"url": "/v1/embeddings"}, "invalid_url"),
        ({"url": ["/v1"]}, "invalid_url"),
        ({"body": "text"}, "invalid_body"),
        ({"body": None}, "invalid_body"),
    ],
)
def test_envelopes_that_are_no_requests(change, code):
    error = refused(chat() | change)
    assert (error.code, error.status) == (code, None)


@pytest.mark.parametrize("bare", [{}, {"custom_id": "a"}, {"prompt": "a", "messages": HELLO}])
def test_a_bare_line_has_one_prompt(bare):
    assert refused(bare).code == "missing_required_parameter"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": []}, "invalid_type", "messages"),
        ({"messages": "hello"}, "invalid_type", "messages"),
        ({"messages": [{"content": "a"}]}, "invalid_type", "messages[0]"),
        ({"messages": [*HELLO, {"role": "user"}]}, "invalid_type", "messages[1].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_value", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_parameter",
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "unsupported_parameter", "messages[0]"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"n": True}, "unsupported_parameter", "n"),
        ({"stream": True}, "unsupported_parameter", "stream"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"logit_bias": {"50256": -100}}, "unsupported_parameter", "logit_bias"),
        ({"temperatur": 0}, "unknown_parameter", "temperatur"),
        ({"prompt": "both"}, "unknown_parameter", "prompt"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"top_p": 1.5}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 1.5}, "invalid_value", "max_completion_tokens"),
        ({"seed": "x"}, "invalid_value", "seed"),
        ({"stop": 5}, "invalid_type", "stop"),
        ({"stop": ["a", ""]}, "invalid_type", "stop"),
        ({"logprobs": 5}, "invalid_type", "logprobs"),
        ({"top_logprobs": 5}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": "all"}, "invalid_value", "top_logprobs"),
    ],
)
def test_bodies_that_cannot_be_obeyed(body, code, param):
    error = refused(chat(**body))
    assert (error.code, error.param, error.status) == (code, param, 400)


@pytest.mark.parametrize("prompt", [[], 5, ["a", "b"], [1, "a"], [True], [1.5], {"a": 1}])
def test_prompts_of_another_kind(prompt):
    assert refused({"prompt": prompt}).code == "invalid_type"


def test_a_message_shows_little_of_a_wild_value_and_nothing_that_steers_a_terminal():
    text = str(refused(chat(n="\x1b[2J" * 1000)))
    assert len(text) < 120
    assert text.isprintable()
