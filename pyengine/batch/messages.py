"""Messages and prompts as the JSON of a line gives them, checked."""

from __future__ import annotations

from typing import Any

from pyengine.batch.errors import invalid_body


def read_messages(messages: Any) -> tuple[dict[str, Any], ...]:
    """The messages of a chat, each with a role and one text as its content, as chat templates want them.

    Raises:
        LineError: they are something else.
    """
    if not isinstance(messages, list) or not messages:
        raise invalid_body("invalid_type", "messages must be a list that is not empty", "messages")
    return tuple(_message(message, f"messages[{place}]") for place, message in enumerate(messages))


def _message(message: Any, param: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise invalid_body("invalid_type", f"{param} must be an object with a role", param)
    if message.get("tool_calls") or message.get("function_call"):
        raise invalid_body("unsupported_parameter", f"{param}: calls of tools are not supported", param)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{param}.content[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str):
        raise invalid_body("invalid_type", f"{param}.content must be a text", f"{param}.content")
    _require_unicode(content, f"{param}.content")
    return {**message, "content": content}


def _part(part: Any, param: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise invalid_body("unsupported_parameter", f"{param}: only parts of type text are supported", param)


def read_prompt(prompt: Any) -> str | tuple[int, ...]:
    """The prompt of a text completion: a text, or token ids.

    Raises:
        LineError: it is something else, or several prompts.
    """
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        _require_unicode(prompt, "prompt")
        return prompt
    if isinstance(prompt, list) and prompt and all(type(value) is int for value in prompt):  # True is no token
        return tuple(prompt)
    raise invalid_body("invalid_type", "prompt must be one text, or a list of token ids", "prompt")


def _require_unicode(text: str, param: str) -> None:
    if not _is_unicode(text):
        raise invalid_body("invalid_value", f"{param} holds half of a surrogate pair, which is no character", param)


def is_text(text: str) -> bool:
    """Whether it is not empty, and can be written as UTF-8."""
    return bool(text) and _is_unicode(text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
