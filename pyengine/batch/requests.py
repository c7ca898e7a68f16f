"""What one line asks for: OpenAI's batch line, or a bare prompt, checked field by field.

Fields that would change the answer and that nothing here obeys are errors: nobody should find out from the answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyengine.batch.errors import LineError, invalid_body
from pyengine.batch.lines import MOST_LINE_BYTES, Line
from pyengine.batch.messages import is_text, read_messages, read_prompt
from pyengine.errors import UsageError, one_line
from pyengine.sessions import SamplingParams

CHAT_URL = "/v1/chat/completions"
TEXT_URL = "/v1/completions"

_ENVELOPE = ("custom_id", "method", "url", "body")

#: Fields of a body -> fields of SamplingParams.
_SAMPLING = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
}

#: Fields that are read by themselves.
_OBEYED = frozenset(("stop", "logprobs", "top_logprobs"))

#: Fields that concern an account or a server, and change no answer.
_WITHOUT_EFFECT = frozenset(
    "model user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls stream_options".split()
)

#: Fields that are obeyed by doing what is done anyway: their only permitted values, besides null.
_FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


@dataclass(frozen=True)
class BatchRequest:
    """A line that can be asked. Either `messages` (for the model's chat template) or `prompt` (text, or token ids) is
    given; `sampling` has no stop texts of the template yet, and `has_seed` says whether its seed is the line's own."""

    custom_id: str
    sampling: SamplingParams
    has_seed: bool = False
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None


def read_envelope(line: Line) -> tuple[str, dict[str, Any]]:
    """The line's custom_id (its number if it gives none) and its JSON object.

    Raises:
        LineError: it is not a JSON object, or its custom_id is no text.
    """
    if line.data is None:
        raise LineError("invalid_json_line", f"line {line.number} is longer than {MOST_LINE_BYTES >> 20} MiB")
    try:
        found = json.loads(line.data)
    except UnicodeDecodeError:
        raise LineError("invalid_json_line", f"line {line.number} is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "too long a number, or nested too deeply"
        raise LineError("invalid_json_line", f"line {line.number} is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise LineError("invalid_json_line", f"line {line.number} is not a JSON object")
    custom_id = found.get("custom_id")
    if custom_id is None:
        return str(line.number), found
    if not isinstance(custom_id, str) or not is_text(custom_id):
        raise LineError("invalid_custom_id", f"line {line.number}: custom_id must be a text that is not empty")
    return custom_id, found


def read_request(custom_id: str, envelope: Mapping[str, Any], defaults: SamplingParams) -> BatchRequest:
    """The request in a line's JSON object.

    Args:
        defaults: for what the line leaves open.

    Raises:
        LineError: something in it is wrong, or cannot be obeyed.
    """
    body = _body(envelope)
    method, url = envelope.get("method"), envelope.get("url")
    if method not in (None, "POST"):
        raise LineError("invalid_method", f"method must be POST, and is {_shown(method)}")
    if url is None:
        url = CHAT_URL if "messages" in body else TEXT_URL
    if url not in (CHAT_URL, TEXT_URL):
        raise LineError("invalid_url", f"url must be {CHAT_URL} or {TEXT_URL}, and is {_shown(url)}")
    given = "messages" if url == CHAT_URL else "prompt"
    if body.get(given) is None:
        raise invalid_body("missing_required_parameter", f"{url} needs {given}", given)
    _refuse_what_is_not_obeyed(body, given)
    sampling = _logprobs(body, url == CHAT_URL, _sampling(body, defaults))
    has_seed = body.get("seed") is not None
    if url == CHAT_URL:
        return BatchRequest(custom_id, sampling, has_seed, messages=read_messages(body["messages"]))
    return BatchRequest(custom_id, sampling, has_seed, prompt=read_prompt(body["prompt"]))


def _body(envelope: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body, which is the line itself where that is a bare prompt."""
    if "body" not in envelope:
        bare = {name: value for name, value in envelope.items() if name not in _ENVELOPE}
        if ("prompt" in bare) == ("messages" in bare):
            raise LineError("missing_required_parameter", "a line needs a body, or else one of messages and prompt")
        return bare
    body = envelope["body"]
    if not isinstance(body, dict):
        raise LineError("invalid_body", "body must be an object")
    return body


def _refuse_what_is_not_obeyed(body: Mapping[str, Any], given: str) -> None:
    for name, value in body.items():
        if value is None or name == given or name in _SAMPLING or name in _OBEYED or name in _WITHOUT_EFFECT:
            continue
        if name not in _FIXED:
            raise invalid_body("unknown_parameter", f"{_shown(name)} is not known here", one_line(name))
        # By type too: True is 1 for Python.
        if not any(type(value) is type(only) and value == only for only in _FIXED[name]):
            only = " or ".join(json.dumps(only) for only in _FIXED[name])
            raise invalid_body("unsupported_parameter", f"{name} must be {only} here, and is {_shown(value)}", name)


def _sampling(body: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    sampling = defaults
    for name, field in _SAMPLING.items():
        value = body.get(name)
        if value is not None:
            if field == "max_tokens" and value == 0:
                raise invalid_body("invalid_value", f"{name} must be at least 1", name)
            sampling = _changed(sampling, name, **{field: value})
    stop = body.get("stop")
    if stop is not None:
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) and is_text(text) for text in texts):
            raise invalid_body("invalid_type", "stop must be a text or a list of texts that are not empty", "stop")
        sampling = _changed(sampling, "stop", stop=tuple(texts))
    return sampling


def _logprobs(body: Mapping[str, Any], is_chat: bool, sampling: SamplingParams) -> SamplingParams:
    """A chat asks with a truth value and top_logprobs, a text completion with a number."""
    wanted, likeliest = body.get("logprobs"), body.get("top_logprobs")
    if likeliest is not None and not (is_chat and wanted is True):
        raise invalid_body("invalid_value", f"top_logprobs needs logprobs of {CHAT_URL}", "top_logprobs")
    if wanted is None or wanted is False:
        return sampling
    if is_chat:
        if wanted is not True:
            raise invalid_body("invalid_type", "logprobs must be true or false", "logprobs")
        return _changed(sampling, "top_logprobs", logprobs=0 if likeliest is None else likeliest)
    return _changed(sampling, "logprobs", logprobs=wanted)


def _changed(sampling: SamplingParams, name: str, **change: Any) -> SamplingParams:
    try:
        return replace(sampling, **change)
    except UsageError as error:
        raise invalid_body("invalid_value", one_line(str(error)), name) from None


def _shown(value: Any) -> str:
    """A value from a file as part of a message."""
    text = one_line(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
