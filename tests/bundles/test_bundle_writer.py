"""Making a bundle, whatever comes between: kills, signals, full disks, damage, others who do the same."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gguf_tools.bundles import partial, records, writer
from gguf_tools.bundles.partial import BusyError
from gguf_tools.bundles.progress import no_progress
from gguf_tools.bundles.writer import make_bundle
from gguf_tools.errors import ModelFileError, RequestError
from pyengine.bundles import partial_of

from .conftest import Pair
from .making import flip, make, planned, silent

_TESTS = Path(__file__).parents[1]


def child(after: int, what: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """writer_child with these arguments."""
    command = [sys.executable, "-m", "bundles.writer_child", str(after), what, *map(str, arguments)]
    return subprocess.Popen(command, cwd=_TESTS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def resume(model: Path, target: Path) -> tuple[int, list[str]]:
    """Make a bundle or its rest; the bytes kept, and what was said."""
    said: list[str] = []
    made = make_bundle(model, target, planned(model), threads=2, progress=no_progress, say=said.append)
    return made.bytes_kept, said


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record is a batch, and nearly every one a checkpoint."""
    monkeypatch.setattr(records, "BATCH_BYTES", 1)
    monkeypatch.setattr(writer, "CHECKPOINT_BYTES", 1 << 14)


def failing_after(n: int, number: int) -> Callable[..., None]:
    """A write_all that fails from its n-th call on."""
    calls = 0

    def write_all(descriptor: int, content: bytes, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls > n:
            raise OSError(number, os.strerror(number))
        os.pwrite(descriptor, content, offset)

    return write_all


@pytest.mark.parametrize("after", [1, 6, 15])
def test_killed_in_the_middle_and_continued(after: int, pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "continued.bundle"
    with child(after, "kill", "bundle", pair.model, "-o", target) as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    kept, said = resume(pair.model, target)
    assert (kept > 0) == (after > 4)
    assert any("going on after" in line for line in said) == (kept > 0)
    assert target.read_bytes() == pair.bundle.read_bytes()
    assert not partial_of(target).exists()


def test_a_link_to_a_shelf_is_kept_and_the_shelf_gets_the_bundle(pair: Pair, tmp_path: Path) -> None:
    shelf, target = tmp_path / "shelf", tmp_path / "linked.bundle"
    shelf.mkdir()
    (shelf / "old.bundle").write_bytes(pair.bundle.read_bytes())
    (shelf / "old.bundle").chmod(0o640)
    target.symlink_to(shelf / "old.bundle")
    with child(9, "kill", "bundle", pair.model, "-o", target, "--force") as process:
        process.communicate(timeout=120)
    assert os.listdir(shelf) != ["old.bundle"], "what is unfinished is on the shelf's disk"
    kept, _ = resume(pair.model, target)
    assert kept > 0 and target.is_symlink()
    assert os.listdir(shelf) == ["old.bundle"] and (shelf / "old.bundle").stat().st_mode & 0o777 == 0o640
    assert target.read_bytes() == pair.bundle.read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_signals_keep_what_is_done(number: int, code: int, pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "stopped.bundle"
    with child(9, "wait", "bundle", pair.model, "-o", target) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (code, "gguf_tools: interrupted; the same command goes on from here\n")
    kept, _ = resume(pair.model, target)
    assert kept > 0
    assert target.read_bytes() == pair.bundle.read_bytes()


def test_two_at_once(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "shared.bundle"
    with child(5, "wait", "bundle", pair.model, "-o", target) as first:
        assert first.stdout is not None and first.stdout.readline() == "waiting\n"
        with child(0, "no", "bundle", pair.model, "-o", target) as second:
            out, said = second.communicate(timeout=120)
        assert (second.returncode, out) == (3, "")
        assert said == f"gguf_tools: error: another process is making {target}\n"
        with pytest.raises(BusyError):
            make(pair.model, target)
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=120)
    make(pair.model, target)
    assert target.read_bytes() == pair.bundle.read_bytes()


@pytest.mark.usefixtures("small_steps")
def test_an_error_of_the_disk_keeps_what_is_done(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "full.bundle"
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_all", failing_after(7, errno.ENOSPC))
        with pytest.raises(RequestError, match=r"full\.bundle\.partial: No space left.*kept for the next time"):
            make(pair.model, target)
    assert not target.exists()
    kept, _ = resume(pair.model, target)
    assert kept > 0
    assert target.read_bytes() == pair.bundle.read_bytes()


def test_too_little_space_is_said_before_anything_is_written(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "large.bundle"
    needed = pair.bundle.stat().st_size
    usage = partial.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(partial.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(RequestError, match=rf"needs {needed:,} bytes.*{needed - 1:,} free"):
            make(pair.model, target)
    assert list(tmp_path.glob("large*")) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_space_that_the_system_refuses(
    number: int, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(RequestError, match=os.strerror(number)):
        make(pair.model, tmp_path / "large.bundle")
    assert list(tmp_path.glob("large*")) == []


def test_a_limit_on_file_sizes_is_one_line(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "large.bundle"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))

    with child(0, "no", "bundle", pair.model, "-o", target, preexec_fn=limit) as process:
        out, said = process.communicate(timeout=120)
    assert (process.returncode, out, said.count("\n")) == (1, "", 1)
    assert "File too large" in said
    assert list(tmp_path.glob("large*")) == []


@pytest.mark.parametrize("lacking", ["fallocate", "direct access"])
def test_file_systems_that_lack_something(
    lacking: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def open_indirectly(path: Path, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return real(path, flags, *rest, **more)

    if lacking == "fallocate":
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    else:
        monkeypatch.setattr(os, "open", open_indirectly)
    make(pair.model, tmp_path / "made.bundle")
    assert (tmp_path / "made.bundle").read_bytes() == pair.bundle.read_bytes()


@pytest.fixture
def half(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A bundle of which half the records are there; its final name and its name now."""
    target = tmp_path / "half.bundle"
    with monkeypatch.context() as patch:
        patch.setattr(records, "BATCH_BYTES", 1)
        patch.setattr(records, "write_all", failing_after(8, errno.EIO))
        with pytest.raises(RequestError, match=os.strerror(errno.EIO)):
            make(pair.model, target, threads=1)
    return target, partial_of(target)


def test_a_damaged_record_of_what_is_there_is_written_again(pair: Pair, half: tuple[Path, Path]) -> None:
    target, partial = half
    tables = planned(pair.model)
    third = tables.records()[3]
    flip(partial, int(third["offset"]) + 17)
    kept, said = resume(pair.model, target)
    assert kept == int(tables.records()["bytes"][:3].sum())
    assert any("damaged from record 3 of 8 on" in line for line in said)
    assert target.read_bytes() == pair.bundle.read_bytes()


@pytest.mark.parametrize("offset", [0, 9, 17, 40, 300, 2000])
def test_a_damaged_head_of_what_is_there_begins_anew(offset: int, pair: Pair, half: tuple[Path, Path]) -> None:
    target, partial = half
    flip(partial, offset)
    kept, said = resume(pair.model, target)
    assert kept == 0
    assert any("begun anew" in line for line in said)
    assert target.read_bytes() == pair.bundle.read_bytes()


@pytest.mark.parametrize("difference", ["order", "layout", "model"])
def test_what_is_there_of_another_bundle_begins_anew(difference: str, pair: Pair, half: tuple[Path, Path]) -> None:
    target, _ = half
    if difference == "model":
        os.utime(pair.model)
    form: dict[str, Any] = {"raw": difference == "layout", "shuffled": 3 if difference == "order" else None}
    tables = planned(pair.model, **form)
    said: list[str] = []
    made = make_bundle(pair.model, target, tables, threads=1, progress=no_progress, say=said.append)
    assert made.bytes_kept == 0
    assert any("begun anew" in line for line in said)
    make(pair.model, wanted := target.with_name("wanted"), **form)
    assert target.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("content", [b"", b"GGUF", bytes(5000), b"x" * 3_000_000])
def test_a_stray_file_of_that_name(content: bytes, pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "made.bundle"
    partial_of(target).write_bytes(content)
    make(pair.model, target)
    assert target.read_bytes() == pair.bundle.read_bytes()


@pytest.mark.usefixtures("small_steps")
def test_a_model_that_is_changed_meanwhile(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "made.bundle"

    @contextlib.contextmanager
    def touching(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
        yield lambda _n: os.utime(pair.model)

    with pytest.raises(ModelFileError, match="changed"):
        make_bundle(pair.model, target, planned(pair.model), threads=1, progress=touching, say=silent)
    assert not target.exists()
    kept, said = resume(pair.model, target)
    assert kept == 0 and any("begun anew" in line for line in said)
    make(pair.model, tmp_path / "wanted")
    assert target.read_bytes() == (tmp_path / "wanted").read_bytes()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_makes_no_difference(
    threads: int, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BATCH_BYTES", 30_000)
    make(pair.model, tmp_path / "made", threads=threads)
    assert (tmp_path / "made").read_bytes() == pair.bundle.read_bytes()


@pytest.mark.parametrize("content", [b"GGUF and so on", b"dear reader", None])
def test_what_is_no_bundle_is_not_replaced(content: bytes | None, pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "letter.txt"
    if content is None:
        target.mkdir()
    else:
        target.write_bytes(content)
    with pytest.raises(RequestError, match=r"not a bundle|not a regular file"):
        make(pair.model, target)
    with pytest.raises(RequestError, match="not a bundle"):
        make(pair.model, pair.model)
    assert not list(tmp_path.glob("*.partial"))
    assert content is None or target.read_bytes() == content


def test_a_folder_that_is_not_there(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make(pair.model, tmp_path / "none" / "made")
