"""The toy model and its samples as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from toy_results import FACTS, make_sample

from pyengine.bench.rows import ModelFacts
from pyengine.bench.samples import Sample


@pytest.fixture
def facts() -> ModelFacts:
    return FACTS


@pytest.fixture
def sample() -> Callable[..., Sample]:
    return make_sample
