from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The set-up scripts import each other as scripts do: from their own folder.
sys.path.append(str(ROOT / "scripts" / "setup"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def native_folder() -> Path:
    """Where libpyengine.so and its binding are installed."""
    found = importlib.util.find_spec("pyengine._native")
    assert found is not None and found.origin is not None, "the native part is not built"
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def native_build(root: Path) -> ModuleType:
    """pyengine/_native_build.py, which runs at build time and imports nothing of pyengine."""
    spec = importlib.util.spec_from_file_location("_native_build", root / "pyengine" / "_native_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
