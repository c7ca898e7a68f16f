"""pytest fixtures: models of the grid, each written once in a session. Import them in a conftest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .facts import ModelFacts
from .generator import write_model
from .grid import FULL

ModelFactory = Callable[[str], ModelFacts]


@pytest.fixture(scope="session")
def generated_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Give the facts of the grid's model of that id, written at its first use. Tests must not change its files."""
    folder = tmp_path_factory.mktemp("models")
    written: dict[str, ModelFacts] = {}

    def get(model_id: str) -> ModelFacts:
        if model_id not in written:
            written[model_id] = write_model(folder / f"{model_id}.gguf", **FULL[model_id])
        return written[model_id]

    return get


@pytest.fixture(scope="session")
def model_path(generated_model: ModelFactory) -> Callable[[str], Path]:
    """Give the path to load for the grid's model of that id."""
    return lambda model_id: generated_model(model_id).path
