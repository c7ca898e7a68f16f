"""pyengine.startup refuses a llama.cpp that does not fit, and names the line that repairs it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import llama_wheel
import numpy as np
import pinned
import pytest

from pyengine import amx_trial, startup
from pyengine.errors import StartupError

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"


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
def trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts other Python code in the place of amx_trial.py."""

    def put(code: str) -> None:
        path = tmp_path / "amx_trial.py"
        path.write_text(code)
        monkeypatch.setattr(startup, "_AMX_TRIAL", path)

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


@pytest.mark.parametrize(
    ("code", "trouble"),
    [
        ("import os; os.kill(os.getpid(), 4)", "Illegal instruction"),
        ("import os; os.kill(os.getpid(), 11)", "Segmentation fault"),
        ("import time; time.sleep(60)", "hang"),
        (f"raise SystemExit({amx_trial.WRONG_RESULT})", "compute wrong results"),
        (f"raise SystemExit({amx_trial.TOO_SLOW})", "far too slow"),
    ],
)
def test_amx_that_does_not_work_is_refused(
    with_amx: None, trial: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, code: str, trouble: str
) -> None:
    monkeypatch.setattr(startup, "_AMX_TIME_LIMIT", 2.0)
    trial(code)
    with pytest.raises(StartupError, match=trouble) as refused:
        startup.check()
    assert "AMX" in str(refused.value)
    assert startup.rebuild_command() in str(refused.value)


def test_amx_that_works_passes(with_amx: None, trial: Callable[[str], None]) -> None:
    trial("pass")
    startup.check()


def test_no_trial_without_amx_in_llama_cpp(trial: Callable[[str], None]) -> None:
    trial("raise SystemExit(1)")
    startup.check()


def test_trial_passes_where_ggml_offers_no_amx(with_amx: None) -> None:
    """The real trial with the real libraries, which the tests need to be without AMX."""
    startup.check()


@pytest.mark.parametrize(
    ("factor", "seconds", "status"),
    [
        (1.0, 1.0, amx_trial.WORKS),
        (1.001, 1.0, amx_trial.WORKS),
        (1.1, 1.0, amx_trial.WRONG_RESULT),
        (float("nan"), 1.0, amx_trial.WRONG_RESULT),
        (1.0, 1000.0, amx_trial.TOO_SLOW),
    ],
)
def test_trial_compares_with_the_plain_kernels(
    monkeypatch: pytest.MonkeyPatch, factor: float, seconds: float, status: int
) -> None:
    """With the plain kernels in the place of AMX ones, their result and time made better or worse."""
    plain = amx_trial.Ggml(LIBRARIES).ggml_backend_cpu_buffer_type()
    multiply = amx_trial.Ggml.multiply
    runs: list[int] = []

    def altered(ggml: amx_trial.Ggml, buffer_type: int) -> tuple[list[float], float]:
        runs.append(buffer_type)
        result, _ = multiply(ggml, buffer_type)
        return (result, 1.0) if len(runs) == 1 else ([factor * value for value in result], seconds)

    monkeypatch.setattr(amx_trial.Ggml, "amx_buffer_type", lambda ggml: plain)
    monkeypatch.setattr(amx_trial.Ggml, "multiply", altered)
    assert amx_trial.trial(LIBRARIES) == status
    assert runs == [plain, plain]


def test_trial_multiplies_correctly() -> None:
    """The product of the plain kernels is that of the two matrices."""
    ggml = amx_trial.Ggml(LIBRARIES)
    found, seconds = ggml.multiply(ggml.ggml_backend_cpu_buffer_type())
    weights = np.array(amx_trial.wave(amx_trial.INPUTS * amx_trial.OUTPUTS, 0.7)).reshape(amx_trial.OUTPUTS, -1)
    activations = np.array(amx_trial.wave(amx_trial.INPUTS * amx_trial.TOKENS, 1.3)).reshape(amx_trial.TOKENS, -1)
    expected = (activations @ weights.T).ravel()
    assert np.square(np.array(found) - expected).mean() < 1e-3 * np.square(expected).mean()
    assert seconds > 0


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
