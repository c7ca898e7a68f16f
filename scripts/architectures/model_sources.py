"""The model sources of the pinned llama.cpp: where they are kept, and how to get them.

They come from the source package of llama-cpp-python that the build takes its headers from, and stay in the user's
cache like those.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "setup"))

import ggml_headers
import pinned

VERSION = pinned.VERSION

# What is kept of the package: llama.cpp's model graphs, and the tables that give them their names.
_KEPT = re.compile(r"[^/]+/vendor/llama\.cpp/src/(models/[\w.-]+\.(?:cpp|h)|llama-(?:arch|model)\.cpp)")
# Extracted first when a package is read, last written here: its presence says that the folder is whole.
_MARK = "llama-arch.cpp"


def cached() -> Path:
    """The folder that stands for llama.cpp's src/. It may not exist yet."""
    return pinned.cache_dir() / "model-sources" / f"llama-cpp-python-{VERSION}"


def extract(sdist: Path, folder: Path) -> None:
    """Write the model sources of the package into the folder. Raises SystemExit if it has none."""
    with tarfile.open(sdist) as package:
        for member in package:
            kept = _KEPT.fullmatch(member.name)
            source = package.extractfile(member) if kept else None
            if kept and source is not None:
                path = folder / kept[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(source.read())
    if not (folder / _MARK).is_file():
        raise SystemExit(f"{sdist.name} has no sources of llama.cpp's models")


def find(given: Path | None = None) -> Path:
    """A folder with models/*.cpp, models/models.h, llama-arch.cpp and llama-model.cpp of the pinned version.

    given: another copy of llama.cpp's src/ to read instead. Without it the package is fetched once, with pip, which
    checks its hash. Raises SystemExit if that fails or the folder is none.
    """
    folder = cached() if given is None else given
    if (folder / _MARK).is_file():
        return folder
    if given is not None:
        raise SystemExit(f"{given} is no src/ folder of llama.cpp: it has no {_MARK}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        extract(ggml_headers.fetch_sdist(Path(scratch)), Path(scratch, "src"))
        shutil.rmtree(folder, ignore_errors=True)
        Path(scratch, "src").replace(folder)
    return folder
