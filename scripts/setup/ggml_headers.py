"""Put the llama.cpp, ggml and xxHash headers of the pinned llama-cpp-python into one folder.

    python ggml_headers.py OUT

An installed llama-cpp-python has the public headers but not ggml-backend-impl.h, which every out-of-tree ggml back-end
needs, ggml-impl.h (what a graph is made of), nor xxhash.h, which llama.cpp carries along. So all headers come from the
source package of the pinned version: pip fetches it (whatever index, proxy or certificate pip is set up for) and checks
its hash. The headers are kept in the user's cache, so later builds need no network. The folder also gets
ggml-version.txt, ggml's own version number.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pinned

# Digest over names and contents of the extracted files, so that a cached copy is checked as the package was.
# To change the pin: run this script, and take the new digest from its message.
HEADERS_SHA256 = "9a4af5717b051f833647d1f3d9988fcf9ae52d82c395acecf1477ff5ef53458a"

_SOURCE = r"[^/]+/vendor/llama\.cpp/"
_HEADER = re.compile(
    _SOURCE + r"(?:include|ggml/include|ggml/src(?=/ggml-(?:backend-)?impl\.h$)|vendor/hash/xxhash)/([\w.-]+\.h)"
)
_GGML_CMAKE = re.compile(_SOURCE + r"ggml/CMakeLists\.txt")


def digest(folder: Path) -> str:
    """SHA-256 over the sorted (name, content) pairs of the folder's files; of nothing if there is no such folder."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        content = path.read_bytes()
        total.update(f"{path.name} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()


def fetch_sdist(folder: Path) -> Path:
    """Download the pinned source package with pip, which refuses another hash. Raises SystemExit if that fails."""
    if subprocess.run([*pinned.download_command(folder), "--quiet"], check=False).returncode != 0:
        raise SystemExit(
            f"cannot fetch the source package of llama-cpp-python {pinned.VERSION} with pip (see above); "
            "to build without it, point the CMake variable PYENGINE_GGML_HEADERS at a folder with its headers"
        )
    return pinned.downloaded(folder)


def extract(sdist: Path, folder: Path) -> None:
    """Write the headers and ggml-version.txt from the source package into the folder."""
    with tarfile.open(sdist) as package:
        for member in package:
            header = _HEADER.fullmatch(member.name)
            if not (header or _GGML_CMAKE.fullmatch(member.name)):
                continue
            source = package.extractfile(member)
            if source is None:
                continue
            content = source.read()
            if header:
                (folder / header[1]).write_bytes(content)
            else:
                parts = re.findall(rb"set\(GGML_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)\)", content)
                (folder / "ggml-version.txt").write_bytes(b".".join(parts) + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out

    cached = pinned.cache_dir() / "headers" / f"llama-cpp-python-{pinned.VERSION}"
    if digest(out) == HEADERS_SHA256:
        return
    if digest(cached) == HEADERS_SHA256:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(cached, out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "headers")
        fresh.mkdir()
        extract(fetch_sdist(Path(scratch)), fresh)
        found = digest(fresh)
        if found != HEADERS_SHA256:
            raise SystemExit(
                f"llama-cpp-python {pinned.VERSION}: its headers have digest {found}, not {HEADERS_SHA256}"
            )
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(fresh, out)
        keep(fresh, cached)


def keep(fresh: Path, cached: Path) -> None:
    """Copy the headers into the cache in one step, so that a build running beside this one never sees half of them."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=cached.parent))
        shutil.copytree(fresh, staged, dirs_exist_ok=True)
        shutil.rmtree(cached, ignore_errors=True)
        staged.replace(cached)
    except OSError as error:
        print(f"note: cannot keep the headers in {cached}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
