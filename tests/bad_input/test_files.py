"""Files that are no models at all, or only a part of one."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest

from .conftest import Refused, Write
from .gguf_bytes import Gguf
from .victim import Attempt, attempt, attempts, in_process

NOBODY = 65534


def test_the_sound_model_works(sound_path: Path) -> None:
    outcome = in_process(attempt, sound_path)
    assert outcome.result.kinds == (), outcome
    assert len(outcome.result.text) >= 3
    assert (outcome.exit_code, outcome.result.left, outcome.litter, outcome.output) == (0, {}, (), "")


def test_a_file_that_is_missing(refused: Refused, tmp_path: Path) -> None:
    refused(tmp_path / "missing.gguf", "No such file or directory")
    refused(tmp_path / "no folder" / "missing.gguf", "No such file or directory")


def test_a_link_to_nowhere_or_to_itself(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "missing")
    refused(tmp_path / "nowhere.gguf", "No such file or directory")
    (tmp_path / "itself.gguf").symlink_to(tmp_path / "itself.gguf")
    refused(tmp_path / "itself.gguf", "Too many levels of symbolic links")


def test_a_folder(refused: Refused, tmp_path: Path) -> None:
    refused(tmp_path, "is not a regular file")


def test_a_pipe_without_a_writer_is_not_waited_for(refused: Refused, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "is not a regular file")


def test_a_name_that_is_too_long_or_has_odd_characters(refused: Refused, tmp_path: Path) -> None:
    long_name = tmp_path / ("x" * 300)
    outcome = in_process(attempt, long_name)
    assert "ModelFileError" in outcome.result.kinds
    assert "File name too long" in outcome.result.message
    outcome = in_process(attempt, tmp_path / "line\nbreak\x1b[31m.gguf")
    assert "ModelFileError" in outcome.result.kinds
    assert outcome.result.message.isprintable()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"G", "is not a GGUF file"),
        (b"# A model\nThis is no model.\n" * 100, "is not a GGUF file"),
        (random.Random(1).randbytes(50_000), "is not a GGUF file"),
        (b"FUGG" + bytes(1000), "is not a GGUF file"),
        (b"GGUF", "damaged or truncated"),
        *[(b"GGUF" + random.Random(seed).randbytes(20_000), "damaged or truncated") for seed in range(5)],
        (b"GGUF" + (3).to_bytes(4, "little") + random.Random(2).randbytes(20_000), "damaged or truncated"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(1000), "damaged or truncated"),
        (b"GGUF" + (2**31).to_bytes(4, "little") + bytes(1000), "damaged or truncated"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16 + bytes(1000), "damaged or truncated"),
        (b"GGUF" + (3).to_bytes(4, "little") + bytes(1000), "general.architecture"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_content_that_is_no_model(refused: Refused, write: Write, content: bytes, part: str) -> None:
    refused(write(content), part)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_metadata_that_ends_early(refused: Refused, write: Write, sound: Gguf, share: float) -> None:
    header = sound.header()
    refused(write(header[: int(share * len(header))]), "damaged or truncated")


@pytest.mark.parametrize("missing", [1, 31, 32, 1000, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_tensor_data_that_ends_early(refused: Refused, write: Write, sound: Gguf, missing: float) -> None:
    data = sound.data
    kept = len(data) - (missing if isinstance(missing, int) else int(missing * len(data)))
    message = refused(write(sound.header() + data[:kept]), "lies past the end of the file")
    assert "truncated?" in message


def without_rights(path: Path) -> Attempt:
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    return attempt(path)


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_no_permission(sound_path: Path, closed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        inner = Path(folder) / "inner"
        inner.mkdir()
        path = inner / "private.gguf"
        path.write_bytes(sound_path.read_bytes())
        Path(folder).chmod(0o755)
        (path if closed == "file" else inner).chmod(0)
        outcome = in_process(without_rights, path)
        inner.chmod(0o755)
    assert outcome.exit_code == 0, outcome
    assert "ModelFileError" in outcome.result.kinds, outcome
    assert outcome.result.message == f"cannot open {path}: Permission denied"
    assert (outcome.result.left, outcome.litter, outcome.output) == ({}, (), "")


def test_failures_leave_no_memory_behind(sound: Gguf, sound_path: Path, write: Write) -> None:
    paths = [
        write(b"GGUF" + bytes(1000), "metadata.gguf"),
        write(sound.header() + sound.data[:-1000], "data.gguf"),
        # Found by llama.cpp only after the engine has made its slots and started its threads.
        write(sound.with_tensor("blk.1.attn_q.weight", name="blk.1.attn_p.weight"), "loading.gguf"),
        sound_path,
    ]
    outcome = in_process(attempts, paths, 8)
    last, growth = outcome.result
    assert [bool(one.kinds) for one in last] == [True, True, True, False], outcome
    assert all(one.left == {} for one in last), outcome
    assert growth < 4 << 20, (
        f"{growth} bytes"
    )  # a leaked thread's stack alone has 8 MiB, an arena gigabytes of addresses
