"""Print the path of a wheel of the pinned llama-cpp-python, built on this machine with flags that are safe on it.

    python llama_wheel.py [--key]

llama.cpp is compiled for the processor it is built on, so a wheel fits one kind of machine only. It takes minutes, so
wheels are kept in the user's cache, one folder for each combination of version, flags, processor, compiler and C
library. pip's own wheel cache is not used: a wheel from there may have been built with other flags, for instance with
AMX. Progress goes to stderr. --key prints what identifies the wheel and builds nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pinned
import quietly

# Parts of llama.cpp that nothing here uses.
OPTIONS = ["-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_TOOLS=OFF"]

# AMX kernels crash on some machines and with some compilers (see pyengine/startup.py).
NO_AMX = ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]

# What else the build takes from the environment. CMAKE_ARGS is ours.
FLAG_VARIABLES = ("CFLAGS", "CXXFLAGS", "LDFLAGS", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE")


def compiler(variable: str, default: str) -> list[str]:
    """The compiler command that CMake will use: the environment variable CC or CXX, or the system's default."""
    return shlex.split(os.environ.get(variable, "")) or [default]


def compiler_version(variable: str, default: str) -> str:
    command = [*compiler(variable, default), "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def safe_flags() -> list[str]:
    """Compiler flags that keep instructions out which this kind of machine may not run; empty except on x86-64."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    # A compiler too old to know AMX refuses the flags, and needs none.
    command = [*compiler("CC", "cc"), *NO_AMX, "-x", "c", "-E", "-", "-o", os.devnull]
    known = subprocess.run(command, input=b"", check=False, capture_output=True).returncode == 0
    return NO_AMX if known else []


def cmake_args() -> list[str]:
    """What the environment variable CMAKE_ARGS must hold (see shlex.join) for a build of llama-cpp-python."""
    flags = " ".join(safe_flags())
    return OPTIONS + ([f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"] if flags else [])


def processor() -> list[str]:
    """What the compiler looks at for -march=native: model and features of the first processor."""
    wanted = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return [platform.processor()]
    fields = (line.partition(":") for line in first.splitlines())
    return [f"{name.strip()}: {' '.join(sorted(value.split()))}" for name, _, value in fields if name.strip() in wanted]


def key() -> dict[str, object]:
    """Everything that decides what the compiled libraries hold."""
    return {
        "version": pinned.VERSION,
        "sdist_sha256": pinned.SDIST_SHA256,
        "cmake_args": cmake_args(),
        "machine": platform.machine(),
        "processor": processor(),
        "cc": compiler_version("CC", "cc"),
        "cxx": compiler_version("CXX", "c++"),
        "environment": {name: os.environ[name] for name in FLAG_VARIABLES if os.environ.get(name)},
        "libc": " ".join(platform.libc_ver()),
    }


def parallel_jobs() -> int:
    """Compiler processes to run at once: one a core, but with a GiB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**30))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cached_wheel(folder: Path) -> Path | None:
    """The wheel in the folder, if it is whole."""
    for path in folder.glob("*.whl"):
        note = path.with_name(path.name + ".sha256")
        if note.is_file() and note.read_text().split()[:1] == [sha256(path)]:
            return path
    return None


def run(command: list[str], label: str, log: Path) -> None:
    status = quietly.run(command, label, log, sys.stderr)
    if status != 0:
        raise SystemExit(status)


def build(folder: Path, described: dict[str, object]) -> Path:
    """Compile the wheel into the folder and return its path. Raises SystemExit if that fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"cannot keep what is built: {error}. Set XDG_CACHE_HOME to a folder of yours.") from error
    for left_behind in folder.parent.glob("building-*"):  # by a build that was killed
        if time.time() - left_behind.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as scratch:
        run(pinned.download_command(Path(scratch)), "Fetching the source of llama.cpp", folder.parent / "download.log")
        # Verbose, because the progress of the compiler is read from the output.
        options = ["--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        command = [*pinned.PIP, "wheel", *options, "-w", scratch, str(pinned.downloaded(Path(scratch)))]
        os.environ["CMAKE_ARGS"] = shlex.join(cmake_args())
        os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(parallel_jobs()))
        label = f"Compiling llama.cpp (llama-cpp-python {pinned.VERSION}), some minutes, once"
        run(command, label, folder.parent / "build.log")
        built = next(Path(scratch).glob("*.whl"))
        folder.mkdir(exist_ok=True)
        (folder / "built-from.json").write_text(json.dumps(described, indent=2) + "\n")
        (folder / (built.name + ".sha256")).write_text(f"{sha256(built)}  {built.name}\n")
        return Path(shutil.move(built, folder / built.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key", action="store_true", help="print what identifies the wheel, and its folder")
    only_key: bool = parser.parse_args().key

    described = key()
    text = json.dumps(described, indent=2, sort_keys=True)
    folder = pinned.cache_dir() / "wheels" / f"{pinned.VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if only_key:
        print(text)
        print(folder)
        return
    print(cached_wheel(folder) or build(folder, described))


if __name__ == "__main__":
    main()
