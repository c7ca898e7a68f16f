"""A tiny model with several sequences, loaded once, and schedulers over it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from models.fixtures import ModelFactory, generated_model

from pyengine import Llama
from pyengine.sessions import Scheduler

__all__ = ["generated_model"]

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "n_threads": 2, "n_threads_batch": 2}


@pytest.fixture(scope="package")
def tiny(generated_model: ModelFactory) -> Iterator[Llama]:
    """512 KV cells for eight sequences, batches of 64 tokens."""
    path = generated_model("qwen2moe").path
    llama = Llama(path, ram_budget="60%", policy="lru", look_ahead="off", n_sequences=8, **SETTINGS)
    with contextlib.closing(llama):
        yield llama


@pytest.fixture
def scheduler(tiny: Llama) -> Iterator[Callable[..., Scheduler]]:
    """scheduler(**options): one over the tiny model, closed with the test."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Scheduler:
            return stack.enter_context(Scheduler(tiny, **options))

        yield make
