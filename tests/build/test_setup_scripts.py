"""The scripts behind `make`: what they trust, what they refuse, what they say."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import find_llama_cpp
import ggml_headers
import llama_wheel
import pinned
import pytest


@pytest.fixture
def setup(root: Path) -> Path:
    return root / "scripts" / "setup"


# ---- the wheel of llama-cpp-python


def put_wheel(folder: Path, content: bytes, noted: bytes) -> Path:
    wheel = folder / "llama_cpp_python-0-py3-none-any.whl"
    wheel.write_bytes(content)
    wheel.with_name(wheel.name + ".sha256").write_text(f"{hashlib.sha256(noted).hexdigest()}  {wheel.name}\n")
    return wheel


def test_whole_cached_wheel_is_used(tmp_path: Path) -> None:
    wheel = put_wheel(tmp_path, b"whole", b"whole")
    assert llama_wheel.cached_wheel(tmp_path) == wheel


def test_damaged_or_unknown_cached_wheel_is_not_used(tmp_path: Path) -> None:
    wheel = put_wheel(tmp_path, b"half", b"whole")
    assert llama_wheel.cached_wheel(tmp_path) is None
    wheel.with_name(wheel.name + ".sha256").unlink()
    assert llama_wheel.cached_wheel(tmp_path) is None
    assert llama_wheel.cached_wheel(tmp_path / "absent") is None


def test_built_wheel_is_kept_with_what_identifies_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environments = []

    def download_and_compile(command: list[str], *_: object) -> int:
        if "download" in command:
            Path(command[command.index("-d") + 1], "llama_cpp_python-0.tar.gz").write_bytes(b"source")
        else:
            assert Path(command[-1]).read_bytes() == b"source"
            environments.append(os.environ["CMAKE_ARGS"])
            Path(command[command.index("-w") + 1], "llama_cpp_python-0-py3-none-any.whl").write_bytes(b"built")
        return 0

    monkeypatch.setenv("CMAKE_ARGS", "-DFROM_ELSEWHERE=ON")
    monkeypatch.setattr(llama_wheel.quietly, "run", download_and_compile)
    folder = tmp_path / "wheels" / "key"
    (folder.parent / "building-killed").mkdir(parents=True)
    os.utime(folder.parent / "building-killed", (0, 0))
    built = llama_wheel.build(folder, {"version": "0"})
    assert built.read_bytes() == b"built"
    assert llama_wheel.cached_wheel(folder) == built
    assert json.loads((folder / "built-from.json").read_text()) == {"version": "0"}
    assert [shlex.split(arguments) for arguments in environments] == [llama_wheel.cmake_args()]
    assert list(folder.parent.iterdir()) == [folder]


def test_failed_build_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "")
    monkeypatch.setattr(llama_wheel.quietly, "run", lambda *_: 3)
    with pytest.raises(SystemExit) as end:
        llama_wheel.build(tmp_path / "wheels" / "key", {})
    assert end.value.code == 3
    assert list((tmp_path / "wheels").iterdir()) == []


def test_key_tells_builds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    before = llama_wheel.key()
    assert llama_wheel.key() == before
    monkeypatch.setenv("CFLAGS", "-O1")
    with_flags = llama_wheel.key()
    monkeypatch.setattr(llama_wheel, "processor", lambda: ["another"])
    assert before != with_flags != llama_wheel.key()


def test_safe_flags_are_only_those_the_compiler_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama_wheel.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CC", "true")
    assert llama_wheel.safe_flags() == llama_wheel.NO_AMX
    monkeypatch.setenv("CC", "false")
    assert llama_wheel.safe_flags() == []
    monkeypatch.setattr(llama_wheel.platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("CC", "true")
    assert llama_wheel.safe_flags() == []
    assert llama_wheel.cmake_args() == llama_wheel.OPTIONS


# ---- headers


def run_headers(setup: Path, out: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    command = [sys.executable, str(setup / "ggml_headers.py"), str(out)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_digest_notices_any_change(tmp_path: Path) -> None:
    header = tmp_path / "a.h"
    digests = []
    for name, content in (("a.h", "one"), ("a.h", "two"), ("b.h", "two")):
        header = header.rename(tmp_path / name) if header.exists() else header
        header.write_text(content)
        digests.append(ggml_headers.digest(tmp_path))
    assert len(set(digests)) == 3


def test_headers_come_from_the_cache_only_if_whole(setup: Path, tmp_path: Path) -> None:
    """Without an index to fetch from: the cached copy is enough, a changed one is not used."""
    cached = pinned.cache_dir() / "headers" / f"llama-cpp-python-{pinned.VERSION}"
    copy = tmp_path / "cache" / "pyengine" / "headers" / cached.name
    copy.mkdir(parents=True)
    for header in cached.iterdir():
        (copy / header.name).write_bytes(header.read_bytes())
    whole = run_headers(setup, tmp_path / "whole", tmp_path / "cache")
    assert whole.returncode == 0, whole.stderr
    assert ggml_headers.digest(tmp_path / "whole") == ggml_headers.HEADERS_SHA256

    (copy / "ggml.h").write_text("/* something else */")
    changed = run_headers(setup, tmp_path / "changed", tmp_path / "cache")
    assert changed.returncode != 0
    assert "PYENGINE_GGML_HEADERS" in changed.stderr
    assert not (tmp_path / "changed").exists()


# ---- the llama_cpp to link with


def find(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, find_llama_cpp.__file__, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_installed_llama_cpp_is_found() -> None:
    found = Path(find(pinned.VERSION).stdout.strip())
    assert (found / "lib" / "libggml.so").is_file()
    assert find(pinned.VERSION, str(found)).stdout.strip() == str(found)


def test_no_other_llama_cpp_is_taken(tmp_path: Path) -> None:
    installed = find(pinned.VERSION).stdout.strip()
    assert find("0.0.1").stdout.strip() == ""
    assert find("0.0.1", installed).returncode != 0
    assert find(pinned.VERSION, str(tmp_path)).returncode != 0
    assert find(pinned.VERSION, "OFF").stdout.strip() == ""


# ---- quietly


def quietly(setup: Path, log: Path, *command: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, str(setup / "quietly.py"), "Doing it", str(log), *command]
    return subprocess.run(arguments, check=False, capture_output=True, text=True)


def test_quick_success_says_nothing(setup: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "it.log"
    result = quietly(setup, log, "sh", "-c", "echo fine")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert log.read_text().splitlines()[1:] == ["fine"]


def test_slow_step_is_named(setup: Path, tmp_path: Path) -> None:
    result = quietly(setup, tmp_path / "it.log", "sleep", "2")
    assert (result.returncode, result.stdout) == (0, "Doing it\n")


def test_failure_shows_the_end_of_the_log(setup: Path, tmp_path: Path) -> None:
    log = tmp_path / "it.log"
    result = quietly(setup, log, "sh", "-c", "seq 1000; exit 7")
    assert result.returncode == 7
    assert str(log) in result.stderr
    assert "    1000\n" in result.stderr
    assert "    900\n" not in result.stderr


def test_end_by_a_signal_is_a_failure(setup: Path, tmp_path: Path) -> None:
    assert quietly(setup, tmp_path / "it.log", "sh", "-c", "kill -TERM $$").returncode == 128 + 15


# ---- .venv


def drop_stale(setup: Path, clone: Path, *python: str) -> bool:
    """Run the script in the clone; whether .venv is still there afterwards."""
    subprocess.run(["sh", str(setup / "drop_stale_venv.sh"), *python], cwd=clone, check=True, capture_output=True)
    return (clone / ".venv").exists()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with a .venv as `make` leaves it, without pip."""
    folder = tmp_path / "clone"
    folder.mkdir()
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (folder / ".venv" / ".stamps").mkdir()
    (folder / ".venv" / ".stamps" / "venv").write_text(f"{folder}\n")
    return folder


def test_good_venv_stays(setup: Path, clone: Path) -> None:
    assert drop_stale(setup, clone)
    assert drop_stale(setup, clone, sys.executable)


def test_moved_venv_goes(setup: Path, clone: Path, tmp_path: Path) -> None:
    moved = clone.rename(tmp_path / "moved")
    assert not drop_stale(setup, moved)


def test_unfinished_venv_goes(setup: Path, clone: Path) -> None:
    (clone / ".venv" / ".stamps" / "venv").unlink()
    assert not drop_stale(setup, clone)


def test_venv_of_a_lost_python_goes(setup: Path, clone: Path) -> None:
    for python in (clone / ".venv" / "bin").glob("python*"):
        python.unlink()
    assert not drop_stale(setup, clone)


def test_venv_of_another_python_goes(setup: Path, clone: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-python"
    other.write_text("#!/bin/sh\necho /elsewhere 3.10.0\n")
    other.chmod(0o755)
    assert not drop_stale(setup, clone, str(other))


def test_prerequisites_refuse_an_unsupported_python(setup: Path, tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    for python, words in ((str(old), "Python 3.9.2 is not supported"), ("no-such-python", "no 'no-such-python' here")):
        command = ["sh", str(setup / "prerequisites.sh"), python, str(tmp_path / "log")]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 1
        assert words in result.stderr
        assert "make PYTHON=" in result.stderr


def test_metadata_names_the_pin() -> None:
    requirements = importlib.metadata.requires("pyengine") or []
    assert f"llama-cpp-python=={pinned.VERSION}" in requirements
