"""Saves a conversation to a file."""

from __future__ import annotations

import json
import time
from pathlib import Path

_HEADINGS = {"system": "System", "user": "You", "assistant": "Model"}


def save_transcript(messages: list[dict[str, str]], name: str = "") -> Path:
    """Write `messages` to a new file and return its path: JSON if it ends in .json, Markdown otherwise.

    Without `name` the file is chat-<date>-<time>.md in the current directory.

    Raises:
        FileExistsError: the file is there already; nothing is overwritten.
        OSError: it cannot be written.
        ValueError: there is nothing to save.
    """
    if not messages:
        raise ValueError("there is nothing to save yet")
    path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.md")).expanduser()
    if path.suffix == ".json":
        text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "\n".join(f"## {_HEADINGS[message['role']]}\n\n{message['content']}\n" for message in messages)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{path} exists already; choose another name") from None
    return path
