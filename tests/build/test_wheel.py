"""The wheel: built as `pip install` does where llama-cpp-python is not installed yet, for all supported Pythons."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import llama_cpp
import pytest


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    # OFF: without the installed libraries, as under build isolation on a machine that has none.
    options = [
        "--config-settings=cmake.define.PYENGINE_LLAMA_CPP_DIR=OFF",
        f"--config-settings=build-dir={root}/build/wheel-test",
    ]
    subprocess.run([*command, *options, str(root)], check=True)
    return next(folder.glob("*.whl"))


def test_one_wheel_for_all_pythons(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("pyengine", "0.1.0", "cp310", "abi3")
    assert platform.startswith("linux_")


def test_wheel_holds_what_it_should(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {f"pyengine/data/{path.name}" for path in (root / "pyengine" / "data").iterdir()}
    packages = ("gguf_tools", "pyengine")
    sources = {str(path.relative_to(root)) for package in packages for path in (root / package).rglob("*.py")}
    native = {"pyengine/libpyengine.so", "pyengine/_native.abi3.so"}
    assert names >= data | sources | native
    assert all(name.startswith(("gguf_tools/", "pyengine/", "pyengine-0.1.0.dist-info/")) for name in names)
    assert not any("__pycache__" in name or name.endswith((".h", ".cpp", ".c")) for name in names)
    licences = {Path(name).name for name in names if "/licenses/" in name}
    assert licences >= {"LICENSE", "THIRD_PARTY_NOTICES.md"}


def test_wheel_has_both_commands(wheel: Path, tmp_path: Path) -> None:
    """As console scripts and as modules, unpacked nowhere near the source tree."""
    archive = zipfile.ZipFile(wheel)
    scripts = archive.read("pyengine-0.1.0.dist-info/entry_points.txt").decode()
    archive.extractall(tmp_path)
    paths = [str(tmp_path), sysconfig.get_path("platlib")]
    for package in ("gguf_tools", "pyengine"):
        assert f"{package}={package}.__main__:entry" in scripts.replace(" ", "").splitlines()
        script = f"import runpy, sys; sys.path[:0] = {paths!r}; sys.argv[1:] = ['--help']; "
        command = [sys.executable, "-S", "-c", script + f"runpy.run_module({package!r}, run_name='__main__')"]
        result = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"Usage: {package} ")


def test_installed_wheel_finds_llama_cpp_beside_it(wheel: Path, tmp_path: Path) -> None:
    """Unpacked beside llama_cpp and nowhere near the source tree, it passes its own start-up check."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "llama_cpp").symlink_to(Path(llama_cpp.__file__).parent)
    # Without `site`, the editable install of the source tree is not in the way.
    paths = [str(tmp_path), sysconfig.get_path("platlib")]
    script = "from pyengine import _native, startup; startup.check(); print(_native.__file__)"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths!r}; {script}"]
    result = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "pyengine" / "_native.abi3.so")
