"""Models of the grid, and a cache folder of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from models.fixtures import generated_model

__all__ = ["generated_model"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pyengine's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyengine"
