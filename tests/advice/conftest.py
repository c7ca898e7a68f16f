"""A cache folder of each test's own, in which profiles can be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyengine import bundled_model
from pyengine.native import ModelInfo, NativeEngine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyengine"


@pytest.fixture(scope="session")
def info() -> ModelInfo:
    """Of the bundled model."""
    engine = NativeEngine(bundled_model())
    try:
        return engine.info
    finally:
        engine.close()
