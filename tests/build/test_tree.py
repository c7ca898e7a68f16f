"""What may not be in the repository: code of others, and names of places on somebody's machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pinned
import pytest

SOURCES = {".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".py", ".sh"}


@pytest.fixture(scope="module")
def tracked(root: Path) -> list[Path]:
    """Every file that git keeps or would add."""
    if not (root / ".git").exists():
        pytest.skip("not a git clone")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.split(b"\0")
    files = [path for path in (root / name.decode() for name in names if name) if path.is_file()]
    assert files
    return files


def texts(files: list[Path]) -> dict[Path, str]:
    """Content of the files that are text."""
    found = {}
    for path in files:
        with path.open("rb") as stream:
            if b"\0" not in stream.read(8192):
                found[path] = path.read_text(encoding="utf-8")
    return found


def test_no_source_of_others(tracked: list[Path]) -> None:
    headers = {p.name for p in (pinned.cache_dir() / "headers" / f"llama-cpp-python-{pinned.VERSION}").glob("*.h")}
    headers |= {"ggml.h", "ggml-impl.h", "ggml-backend-impl.h", "ggml-quants.h", "llama.h", "gguf.h"}
    sources = texts([path for path in tracked if path.suffix in SOURCES])
    assert sources
    for path, text in sources.items():
        assert path.name not in headers
        assert not {"vendor", "third_party", "extern"} & set(path.parts), path
        claim = re.search(r"^\W*copyright\b.*\d{4}.*$", text, re.IGNORECASE | re.MULTILINE)
        assert claim is None or "pyengine" in claim[0], f"{path}: {claim and claim[0]}"


def test_no_path_of_this_machine(tracked: list[Path], root: Path) -> None:
    places = {root, root.parent, Path.home(), Path(sys.base_prefix)}
    common = {Path("/"), Path("/usr"), Path("/usr/local"), Path("/home"), Path(tempfile.gettempdir())}
    named = [re.escape(str(place)) for place in places - common]
    # Not the end of another path: /src is no part of native/src.
    here = re.compile(rf"(?<![\w./$}}])(?:{'|'.join(named)})(?=/)")
    for path, text in texts(tracked).items():
        found = here.search(text)
        assert found is None, f"{path.relative_to(root)} names {found and found[0]}"
