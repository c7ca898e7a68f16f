"""What scripts/setup/llama-cpp-python.txt pins, and where fetched and built things are kept between clones."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

REQUIREMENT_FILE = Path(__file__).with_name("llama-cpp-python.txt")

_pin = re.search(r"^llama-cpp-python==(\S+) --hash=sha256:([0-9a-f]{64})$", REQUIREMENT_FILE.read_text(), re.MULTILINE)
if _pin is None:
    raise SystemExit(f"{REQUIREMENT_FILE}: no line 'llama-cpp-python==VERSION --hash=sha256:HASH'")

VERSION: str = _pin[1]
SDIST_SHA256: str = _pin[2]

# Used without build isolation: the interpreter's environment has the package's build back-end (build-tools.txt).
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def download_command(folder: Path) -> list[str]:
    """The command that puts the source package into the folder, if it has the pinned hash, and nothing else."""
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python", "--require-hashes"]
    return [*PIP, "download", *options, "-r", str(REQUIREMENT_FILE), "-d", str(folder)]


def downloaded(folder: Path) -> Path:
    """The source package in the folder."""
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def cache_dir() -> Path:
    """The user's cache folder for pyengine, after the XDG base directory specification. It may not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "pyengine"
