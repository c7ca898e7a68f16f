"""Output lines in the form of OpenAI's Batch API."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pyengine.batch.errors import LineError
from pyengine.batch.grouping import Prompt
from pyengine.batch.lines import KEY_PREFIX
from pyengine.sessions import Session, TokenLogprobs

#: The bytes of a token.
TokenBytes = Callable[[int], bytes]


def error_answer(key: str, custom_id: str | None, error: LineError) -> dict[str, Any]:
    """The output line for a line that cannot be answered. Where a server would have refused the body, `response` says
    what it would have said; `error` is set in any case, so that one look at it is enough."""
    message = str(error)
    body = {"message": message, "type": "invalid_request_error", "param": error.param, "code": error.code}
    response = None if error.status is None else _response(key, error.status, {"error": body})
    return _answer(key, custom_id, response, {"code": error.code, "message": message})


def answer(prompt: Prompt, session: Session, model: str, token_bytes: TokenBytes) -> dict[str, Any]:
    """The output line for a finished session."""
    name = prompt.key.removeprefix(KEY_PREFIX)
    chosen: dict[str, Any]
    if prompt.is_chat:
        chosen = {"index": 0, "message": {"role": "assistant", "content": session.text}}
        chosen["logprobs"] = _chat_logprobs(session, token_bytes)
        body: dict[str, Any] = {"id": f"chatcmpl-{name}", "object": "chat.completion"}
    else:
        chosen = {"index": 0, "text": session.text, "logprobs": _text_logprobs(session, token_bytes)}
        body = {"id": f"cmpl-{name}", "object": "text_completion"}
    chosen["finish_reason"] = session.finish_reason
    generated = len(session.tokens)
    body |= {
        "created": int(time.time()),
        "model": model,
        "choices": [chosen],
        "usage": {
            "prompt_tokens": session.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": session.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": session.cached_tokens},
        },
    }
    return _answer(prompt.key, prompt.custom_id, _response(prompt.key, 200, body), None)


def _answer(key: str, custom_id: str | None, response: Any, error: Any) -> dict[str, Any]:
    # `id` comes first: an answers file is known by how it begins.
    return {"id": key, "custom_id": custom_id, "response": response, "error": error}


def _response(key: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{key.removeprefix(KEY_PREFIX)}", "body": body}


def _chat_logprobs(session: Session, token_bytes: TokenBytes) -> dict[str, Any] | None:
    if session.request.sampling.logprobs is None:
        return None

    def told(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def entry(found: TokenLogprobs) -> dict[str, Any]:
        return {**told(found.token, found.logprob), "top_logprobs": [told(*pair) for pair in found.likeliest]}

    return {"content": [entry(found) for found in session.logprobs]}


def _text_logprobs(session: Session, token_bytes: TokenBytes) -> dict[str, Any] | None:
    if session.request.sampling.logprobs is None:
        return None
    pieces = [token_bytes(found.token).decode(errors="replace") for found in session.logprobs]
    offsets, length = [], 0
    for piece in pieces:
        offsets.append(length)
        length += len(piece)
    return {
        "tokens": pieces,
        "token_logprobs": [found.logprob for found in session.logprobs],
        "top_logprobs": [
            {token_bytes(token).decode(errors="replace"): logprob for token, logprob in found.likeliest}
            for found in session.logprobs
        ],
        "text_offset": offsets,
    }
