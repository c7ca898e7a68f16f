"""pyengine.startup refuses a llama.cpp that does not fit, and names the line that repairs it."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import llama_wheel
import pinned
import pytest

from pyengine import startup
from pyengine.errors import StartupError

on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is a feature of x86-64")


@pytest.fixture(autouse=True)
def forget_earlier_checks() -> Iterator[None]:
    startup.check.cache_clear()
    yield
    startup.check.cache_clear()


@pytest.fixture
def with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama.cpp that says it was compiled with AMX."""
    said = llama_cpp.llama_print_system_info()
    assert b"AMX_INT8" not in said, "the llama.cpp under test must not use AMX"
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: said + b"AMX_INT8 = 1 | ")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a shell script in the place of the amx_probe program."""

    def put(script: str) -> None:
        path = tmp_path / "amx_probe"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(startup, "_native_folder", lambda: tmp_path)

    return put


def test_this_installation_passes() -> None:
    startup.check()


def test_other_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.99")
    with pytest.raises(StartupError, match=r"0\.3\.99") as refused:
        startup.check()
    assert startup.rebuild_command() in str(refused.value)


@pytest.mark.parametrize("found", ["0.99.1", None])
def test_other_ggml_is_refused(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    monkeypatch.setattr(startup, "_ggml_version", lambda: found)
    with pytest.raises(StartupError, match=r"ggml 0\.99\.1" if found else r"no libggml-base\.so") as refused:
        startup.check()
    assert startup.rebuild_command() in str(refused.value)


def test_library_of_another_major_version_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "GGML_LIBRARY", "libggml-base.so.99")
    with pytest.raises(StartupError, match=r"no libggml-base\.so\.99"):
        startup.check()


def test_native_part_for_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "LLAMA_CPP_PYTHON", "0.3.99")
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.99")
    with pytest.raises(StartupError, match="different versions of pyengine"):
        startup.check()


def test_missing_llama_cpp_is_refused(tmp_path: Path) -> None:
    """In a process of its own, where importing llama_cpp fails as it does when one of its libraries is missing."""
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('libllama.so is gone')")
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pyengine import startup\n"
        "from pyengine.errors import StartupError\n"
        "try:\n    startup.check()\n"
        "except StartupError as refused:\n    print(refused)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "libllama.so is gone" in result.stdout
    assert startup.rebuild_command() in result.stdout


@on_x86_64
@pytest.mark.parametrize(
    ("script", "trouble"),
    [
        ("kill -ILL $$", "they trap"),
        ("exec sleep 60", "they hang"),
        ("exit 3", "wrong results"),
        ("exit 4", "far too slow"),
    ],
)
def test_amx_that_does_not_work_is_refused(
    with_amx: None, probe: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, script: str, trouble: str
) -> None:
    monkeypatch.setattr(startup, "_PROBE_TIME_LIMIT", 0.5)
    probe(script)
    with pytest.raises(StartupError, match=trouble) as refused:
        startup.check()
    assert "AMX" in str(refused.value)
    assert startup.rebuild_command() in str(refused.value)


@on_x86_64
@pytest.mark.parametrize("status", [0, 2])
def test_amx_that_works_or_is_not_used_passes(with_amx: None, probe: Callable[[str], None], status: int) -> None:
    probe(f"exit {status}")
    startup._check_amx()


@on_x86_64
def test_no_probe_without_amx_in_llama_cpp(probe: Callable[[str], None]) -> None:
    probe("kill -ILL $$")
    startup._check_amx()


@on_x86_64
def test_probe_answers_quickly_on_this_machine(native_folder: Path) -> None:
    """Whatever the machine is like, the program ends in one of the ways that startup knows."""
    status = subprocess.run([native_folder / "amx_probe"], timeout=startup._PROBE_TIME_LIMIT, check=False).returncode
    assert status in (0, 2, 3, 4) or status < 0
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    if "amx_int8" not in flags:
        assert status == 2


def test_rebuild_command_is_what_make_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell must hand pip the same CMAKE_ARGS, word by word, that `make` builds the cached wheel with."""
    stand_in = tmp_path / "a python"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$CMAKE_ARGS" "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    environment = {"PATH": os.environ["PATH"]}
    command = ["sh", "-c", startup.rebuild_command()]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    assert shlex.split(printed[0]) == llama_wheel.cmake_args()
    assert printed[1:4] == ["-m", "pip", "install"]
    assert printed[-1] == f"llama-cpp-python=={pinned.VERSION}"


def test_versions_agree_everywhere(root: Path) -> None:
    assert startup.LLAMA_CPP_PYTHON == pinned.VERSION
    required = re.search(r'^    "llama-cpp-python==(.*)",$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert required is not None and required[1] == pinned.VERSION
