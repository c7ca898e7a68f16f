"""The model a bundle belongs to, through the engine that will read it: its layout decisions are the bundle's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gguf_tools.bundles.format import Tables
from gguf_tools.errors import ModelFileError, RequestError
from pyengine import startup
from pyengine.architectures import MANAGED
from pyengine.errors import ModelFileError as EngineFileError
from pyengine.errors import PyengineError, StaleBundleError
from pyengine.native import NativeEngine


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Turn the engine's errors into this package's."""
    try:
        yield
    except EngineFileError as error:
        raise ModelFileError(str(error)) from error
    except PyengineError as error:
        raise RequestError(str(error)) from error


def prepare() -> None:
    """Once, before the first engine: see that the installed llama.cpp fits, and quiet its log. Raises RequestError."""
    with engine_errors():
        startup.check()
    from llama_cpp import _logger

    _logger.set_verbose(False)


@contextlib.contextmanager
def opened_model(path: Path) -> Iterator[NativeEngine]:
    """An engine that is never started, closed when the block ends.

    Raises:
        ModelFileError: the file is missing, damaged, or no GGUF file.
        RequestError: it has no experts, or pyengine does not manage them: a bundle would be of no use.
    """
    with engine_errors():
        engine = NativeEngine(path)
    try:
        architecture = engine.info.architecture
        if architecture not in MANAGED:
            raise RequestError(
                f"{path}: pyengine does not manage architecture {architecture!r}; no bundle would be used"
            )
        yield engine
    finally:
        engine.close()


def tables_of(engine: NativeEngine, raw: bool) -> Tables:
    """What a bundle of this model must say on this machine, nothing done yet. Raises ModelFileError."""
    with engine_errors():
        return Tables(engine.bundle_tables(raw))


def why_unfit(model: Path, bundle: Path) -> str | None:
    """None if the engine would read this model's experts from this bundle, else the reason why not.

    Raises ModelFileError, RequestError: it is the model that is unfit."""
    with opened_model(model) as engine:
        try:
            engine.use_bundle(bundle)
        except (StaleBundleError, EngineFileError) as reason:
            return str(reason)
    return None
