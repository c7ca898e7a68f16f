"""Print the folder of the installed llama_cpp package to link with, or an empty line if there is none.

    python find_llama_cpp.py VERSION [FOLDER]

FOLDER, if given and not empty, must be such a package of that version; OFF means none. Otherwise the Python environment
is searched, and under pip's build isolation also the environment that pip installs into: the interpreter is the same.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path


def has_libraries(package: Path) -> bool:
    """Whether the folder is a llama_cpp package with ggml's shared libraries."""
    return all((package / "lib" / f"lib{name}.so").is_file() for name in ("ggml", "ggml-base", "ggml-cpu"))


def installed_version(site: Path) -> str | None:
    """The version of llama-cpp-python installed in the folder, None if it is not there."""
    for found in distributions(name="llama-cpp-python", path=[str(site)]):
        return found.version
    return None


def main() -> None:
    version, given = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    if given == "OFF":
        print()
        return
    if given:
        package = Path(given)
        found = installed_version(package.parent)
        if found != version or not has_libraries(package):
            raise SystemExit(f"{package} is not the llama_cpp package of llama-cpp-python {version} (found: {found})")
        print(package)
        return
    for site in [*map(Path, sys.path), Path(sysconfig.get_path("platlib"))]:
        if installed_version(site) == version and has_libraries(site / "llama_cpp"):
            print(site / "llama_cpp")
            return
    print()


if __name__ == "__main__":
    main()
