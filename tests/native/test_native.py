"""Builds the C++ unit tests and runs them plain and under the sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Kept, so that only what has changed is compiled again.
BUILD = ROOT / "build" / "native-test"
PROGRAMS = sorted(path.stem for path in HERE.glob("*.cpp"))


def tool(name: str) -> str:
    """A build tool of the Python environment, else of the system."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=search)
    if found is None:
        pytest.fail(f"no {name} here, which building the native tests needs")
    return found


def run(command: list[str]) -> None:
    """Run a command; its output is in the failure if it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        pytest.fail(f"{' '.join(command)}: exit status {result.returncode}\n{result.stdout}", pytrace=False)


def fixed_addresses() -> list[str]:
    """ThreadSanitizer cannot start where the kernel spreads addresses more widely than it knows of."""
    command = ["setarch", platform.machine(), "--addr-no-randomize"]
    allowed = (
        shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    )
    return command if allowed else []


def compiler_has(sanitizers: str, folder: Path) -> bool:
    """Whether a program that is compiled with these sanitizers also runs."""
    program = folder / "program"
    source = folder / "program.cpp"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    compiled = subprocess.run(
        [os.environ.get("CXX", "c++"), f"-fsanitize={sanitizers}", str(source), "-o", str(program)],
        capture_output=True,
        check=False,
    )
    return (
        compiled.returncode == 0
        and subprocess.run([*fixed_addresses(), str(program)], capture_output=True, check=False).returncode == 0
    )


@pytest.fixture(
    scope="module", params=["", "address,undefined", "thread"], ids=["plain", "address+undefined", "thread"]
)
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built programs. Skips a sanitizer that the compiler lacks."""
    watched: str = request.param
    if watched and not compiler_has(watched, tmp_path_factory.mktemp("sanitizer")):
        pytest.skip(f"the compiler cannot build programs with -fsanitize={watched} that run here")
    folder = BUILD / (watched or "plain")
    if not (folder / "build.ninja").exists():
        run(
            [
                tool("cmake"),
                "-G",
                "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                f"-DPYENGINE_SANITIZE={watched}",
                f"-DPython_EXECUTABLE={sys.executable}",
                "-S",
                str(HERE),
                "-B",
                str(folder),
            ]
        )
    run([tool("cmake"), "--build", str(folder)])
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_native(programs: Path, program: str) -> None:
    exactly = f"^{program}$"
    run(
        [
            *fixed_addresses(),
            tool("ctest"),
            "--test-dir",
            str(programs),
            "--output-on-failure",
            "--no-tests=error",
            "-R",
            exactly,
        ]
    )
