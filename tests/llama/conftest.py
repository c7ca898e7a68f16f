"""The bundled model under pyengine.Llama and, in another process, under stock llama.cpp."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models.fixtures import generated_model

from pyengine import Llama, bundled_model

from .dense import write_dense_model
from .probes import PROBES, Answer, as_json, options_for
from .stock_process import StockProcess

__all__ = ["generated_model"]

Ask = Callable[..., Answer]


@pytest.fixture(scope="session")
def stock() -> Iterator[Ask]:
    """stock(probe, options, model, **arguments): what the probe gives in stock llama.cpp."""
    with StockProcess() as process:

        def ask(
            probe: str, options: dict[str, Any] | None = None, model: Path | None = None, **arguments: Any
        ) -> Answer:
            return process.ask(model or bundled_model(), options or {}, probe, **arguments)

        yield ask


@pytest.fixture(scope="package")
def _opened() -> Iterator[dict[str, Any]]:
    opened: dict[str, Any] = {}
    yield opened
    for llm in opened.values():
        llm.close()


@pytest.fixture
def ours(_opened: dict[str, Any]) -> Ask:
    """ours(probe, options, model, **arguments): the same with pyengine.Llama; options have the ram_budget, too.

    The last model stays loaded for the next question.
    """

    def ask(probe: str, options: dict[str, Any] | None = None, model: Path | None = None, **arguments: Any) -> Answer:
        wanted = repr((model, options))
        if wanted not in _opened:
            for llm in _opened.values():
                llm.close()
            _opened.clear()
            _opened[wanted] = Llama(model, **options_for({"ram_budget": "25%"} | (options or {})))
        # Through JSON, as the other process's answers come.
        return json.loads(as_json(PROBES[probe](_opened[wanted], **arguments)))

    return ask


@pytest.fixture
def opened() -> Iterator[Callable[..., Llama]]:
    """opened(model, **options): a pyengine.Llama that is closed with the test."""
    with contextlib.ExitStack() as stack:

        def open_one(model: Path | None = None, **options: Any) -> Llama:
            return stack.enter_context(contextlib.closing(Llama(model, **options_for(options))))

        yield open_one


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without experts."""
    return write_dense_model(tmp_path_factory.mktemp("dense") / "dense.gguf")
