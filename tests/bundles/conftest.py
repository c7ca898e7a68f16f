"""Small models, their bundles, and stock llama.cpp to compare with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from engine.conftest import stock
from models.fixtures import ModelFactory, generated_model

from .making import make

__all__ = ["generated_model", "stock"]


class Pair(NamedTuple):
    """A model and its bundle, beside it."""

    model: Path
    bundle: Path


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, for child processes too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def sound(generated_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Tests must not change them."""
    folder = tmp_path_factory.mktemp("sound")
    model = Path(shutil.copy2(generated_model("llama-q4_0").path, folder))
    bundle = folder / f"{model.stem}.bundle"
    make(model, bundle)
    return Pair(model, bundle)


@pytest.fixture
def pair(sound: Pair, tmp_path: Path) -> Pair:
    """A copy to change: the model keeps its date, so that the bundle fits."""
    return Pair(Path(shutil.copy2(sound.model, tmp_path)), Path(shutil.copy2(sound.bundle, tmp_path)))
