"""The recipe of the bundled model is no installed package: its tests import it from the source tree."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest

RECIPE = Path(__file__).parents[2] / "scripts" / "recipe"
sys.path.insert(0, str(RECIPE))


@pytest.fixture(scope="session")
def recipe_folder() -> Path:
    """The recipe's folder."""
    return RECIPE


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The bundled model's path."""
    import pyengine

    return pyengine.bundled_model()


@pytest.fixture(scope="session")
def bundled_reader(bundled: Path) -> gguf.GGUFReader:
    """The bundled model's metadata and tensors; reading a vocabulary of this size takes seconds."""
    return gguf.GGUFReader(bundled)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGUF of a random dense model of two layers in the base model's architecture and vocabulary format."""
    from tiny_base import write_tiny_base

    path = tmp_path_factory.mktemp("base") / "tiny.gguf"
    write_tiny_base(path)
    return path
