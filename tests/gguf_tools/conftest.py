"""The command line of gguf_tools in this process, and the models that the generator writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from models.fixtures import generated_model

from gguf_tools.cli import main

__all__ = ["generated_model"]


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """invoke(*arguments): what the command line answers."""
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments], prog_name="gguf_tools")
