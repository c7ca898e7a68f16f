"""Refuses to start beside a llama.cpp that would compute garbage or crash, and says how to repair it.

Our native part uses ggml's back-end interface, which changes between versions without notice, so it runs beside exactly
one version of llama-cpp-python. And that one must not use AMX where its AMX kernels do not really work, or the process
dies at the first long prompt: some virtual machines advertise AMX but trap on its instructions or emulate them slowly,
and some compilers (GCC 12 was seen to) get the set-up of the tiles in ggml wrong.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from pyengine import amx_trial
from pyengine.errors import StartupError

#: What the native part is built for. scripts/setup/llama-cpp-python.txt pins the same.
LLAMA_CPP_PYTHON = "0.3.36"
GGML = "0.25.3"

#: ggml's library names carry the major version of its interface. The native part finds them by these names.
GGML_LIBRARY = f"libggml-base.so.{GGML.partition('.')[0]}"

_CMAKE_OPTIONS = ("-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_TOOLS=OFF")
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"

_AMX_TRIAL = Path(amx_trial.__file__)
#: Seconds. It takes a tenth of one where AMX works.
_AMX_TIME_LIMIT = 20.0


@functools.cache
def check() -> None:
    """Check the installed llama.cpp before anything native is used. Repeated calls cost nothing once one has passed.

    Raises:
        StartupError: llama-cpp-python is missing, of another version, or not safe on this machine, or our native part
            is missing or built for another version. The message ends with the line to type.
    """
    _check_version()
    _check_amx()
    _check_native()


def rebuild_command() -> str:
    """The shell command that compiles and installs the right llama-cpp-python for this machine and interpreter."""
    options = list(_CMAKE_OPTIONS)
    if platform.machine() in ("x86_64", "AMD64"):
        options += [f"-DCMAKE_C_FLAGS='{_NO_AMX}'", f"-DCMAKE_CXX_FLAGS='{_NO_AMX}'"]
    # Without the cache and binaries, because those may have been built with other options.
    pip = "-m pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python"
    return f'CMAKE_ARGS="{" ".join(options)}" {shlex.quote(sys.executable)} {pip} llama-cpp-python=={LLAMA_CPP_PYTHON}'


def _refuse(reason: str) -> StartupError:
    return StartupError(
        f"{reason}\nThis line builds and installs the right one (it takes some minutes):\n    {rebuild_command()}"
    )


def _check_version() -> None:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # it raises RuntimeError if its libraries do not load
        raise _refuse(
            f"pyengine runs inside llama-cpp-python {LLAMA_CPP_PYTHON}, which cannot be imported: {error}"
        ) from error
    if llama_cpp.__version__ != LLAMA_CPP_PYTHON:
        raise _refuse(
            f"pyengine is built for llama-cpp-python {LLAMA_CPP_PYTHON}, but {llama_cpp.__version__} is installed in "
            f"{Path(llama_cpp.__file__).parent}."
        )
    found = _ggml_version()
    if found != GGML:
        raise _refuse(
            f"pyengine is built for ggml {GGML}, but llama-cpp-python {LLAMA_CPP_PYTHON} in "
            f"{Path(llama_cpp.__file__).parent} has loaded {f'ggml {found}' if found else f'no {GGML_LIBRARY}'}."
        )


def _ggml_version() -> str | None:
    """The version of the ggml that llama_cpp has loaded and our native part will find; None if it will find none."""
    try:
        # Not by path: llama-cpp-python installs each library under several names as separate files, and a second copy
        # of ggml would have its own registry of back-ends.
        library = ctypes.CDLL(GGML_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        version = library.ggml_version
    except (OSError, AttributeError):
        return None
    version.restype = ctypes.c_char_p
    return str(version().decode())


def _check_amx() -> None:
    if not _built_with_amx():
        return
    trouble = _amx_trouble()
    if trouble:
        raise _refuse(
            f"The installed llama-cpp-python was compiled to use AMX instructions, but on this machine its AMX kernels "
            f"{trouble}."
        )


def _built_with_amx() -> bool:
    """Whether llama.cpp's CPU kernels use AMX: they do wherever the processor says it has it."""
    import llama_cpp

    return re.search(r"\bAMX_INT8 = 1\b", llama_cpp.llama_print_system_info().decode()) is not None


def _amx_trouble() -> str | None:
    """What goes wrong when llama.cpp's AMX kernels run on this machine; None if nothing does.

    They run in another process, because they may kill or stall the one that tries.
    """
    import llama_cpp

    command = [sys.executable, "-I", "-S", str(_AMX_TRIAL), str(Path(llama_cpp.__file__).parent / "lib")]
    try:
        trial = subprocess.run(command, timeout=_AMX_TIME_LIMIT, check=False, capture_output=True)
    except subprocess.TimeoutExpired:
        return "hang"
    if trial.returncode < 0:
        return f"crash ({signal.strsignal(-trial.returncode)})"
    known = {
        amx_trial.WORKS: None,
        amx_trial.WRONG_RESULT: "compute wrong results",
        amx_trial.TOO_SLOW: "are far too slow",
    }
    if trial.returncode not in known:
        raise RuntimeError(f"{_AMX_TRIAL.name} failed: {trial.stderr.decode(errors='replace')}")
    return known[trial.returncode]


def _native_folder() -> Path:
    """Where the native part is installed; for an editable install that is not where this file lies."""
    found = importlib.util.find_spec("pyengine._native")
    if found is None or found.origin is None:
        raise StartupError("The native part of pyengine is not built. In a clone type:\n    make build")
    return Path(found.origin).parent


def _check_native() -> None:
    _native_folder()
    from pyengine._native import ffi, lib

    built_for = ffi.string(lib.pye_built_for()).decode()
    expected = f"{LLAMA_CPP_PYTHON} ggml {GGML}"
    if built_for != expected:
        raise StartupError(
            f"The native part of pyengine was built for llama-cpp-python {built_for}, its Python part for {expected}: "
            "they are from different versions of pyengine. Install pyengine again (in a clone: make clean build)."
        )
