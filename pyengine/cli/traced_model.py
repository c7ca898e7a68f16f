"""What the learning commands share: a trace, and the model it was recorded with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pyengine.cli.options import Option


def traced_model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command TRACE and -m; it receives them as `trace` and `model`."""
    option = click.option(
        "-m",
        "--model",
        cls=Option,
        type=click.Path(path_type=Path),
        env=True,
        metavar="FILE",
        help="GGUF model the trace was recorded with (the first file of a split one).  [default: the bundled model]",
    )
    return click.argument("trace", type=click.Path(path_type=Path))(option(command))


def traced_model(given: Path | None) -> Path:
    """The model file; from now on ggml keeps quiet about a damaged one, which our own error names. Raises
    StartupError."""
    from pyengine import bundled_model, startup

    startup.check()
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    return Path(bundled_model()) if given is None else given
