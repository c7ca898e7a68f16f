"""A sound tiny model, and ways to break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models.generator import write_model

from .gguf_bytes import Gguf
from .victim import Attempt, attempt, in_process

Refused = Callable[..., str]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def sound_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 experts, 2 of them used, in 2 blocks. Tests must not change it."""
    path = tmp_path_factory.mktemp("sound") / "sound.gguf"
    return write_model(path, "llama", n_layer=2, n_expert=4, n_expert_used=2, n_embd=64, n_ff=32).path


@pytest.fixture(scope="session")
def sound(sound_path: Path) -> Gguf:
    """The same, taken apart."""
    return Gguf.read(sound_path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(content, name): a file of these bytes or GGUF parts; its path."""

    def write_file(content: bytes | Gguf, name: str = "broken.gguf") -> Path:
        path = tmp_path / name
        if isinstance(content, Gguf):
            return content.write(path)
        path.write_bytes(content)
        return path

    return write_file


@pytest.fixture
def refused() -> Refused:
    """refused(path, part, kind=..., options=...): the message with which pyengine.Llama refuses the model.

    Fails unless it is an exception of that kind with one line that has `part` and the file's name in it, and the
    process goes on with nothing printed and nothing left behind.
    """

    def check(
        path: Path, part: str = "", *, kind: str = "ModelFileError", options: dict[str, Any] | None = None
    ) -> str:
        outcome = in_process(attempt, path, options)
        assert outcome.exit_code == 0, outcome
        result = outcome.result
        assert isinstance(result, Attempt), outcome
        assert kind in result.kinds, outcome
        message = result.message
        assert message.isprintable(), message  # no line breaks either
        assert part in message, message
        assert path.name in message or kind != "ModelFileError", message
        assert len(message) < 400, message
        assert (result.left, outcome.litter, outcome.output) == ({}, (), ""), outcome
        return message

    return check
