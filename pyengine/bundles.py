"""Where the bundle of a model lies, and which one an engine uses. Making bundles is gguf_tools' work."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from pyengine.cache import cache_dir
from pyengine.errors import ModelFileError, StaleBundleError, UsageError
from pyengine.native import NativeEngine
from pyengine.whole_file import behind_links

_log = logging.getLogger("pyengine")

#: What a bundle's name ends with.
SUFFIX = ".bundle"

#: What follows that while a bundle is unfinished.
PARTIAL_SUFFIX = ".partial"


def beside(model: Path) -> Path:
    """The bundle's place beside the model (for a split model: beside its first file)."""
    return model.with_name(model.stem + SUFFIX)


def in_cache(model: Path) -> Path:
    """Its place in the user's cache folder, for models in folders that one may not write to. Models of one name and
    different sizes do not meet."""
    size = model.stat().st_size if model.exists() else 0
    return cache_folder() / f"{model.stem}-{size:x}{SUFFIX}"


def cache_folder() -> Path:
    """Where bundles lie that are not beside their models. It may not exist."""
    return cache_dir() / "bundles"


def partial_of(bundle: Path) -> Path:
    """The name a bundle has until it is whole; where the bundle is a link, beside the file that it leads to. Raises
    OSError."""
    bundle = behind_links(bundle)
    return bundle.with_name(bundle.name + PARTIAL_SUFFIX)


def candidates(model: Path) -> list[Path]:
    """Where to look for a model's bundle, the best place first."""
    return [beside(model), in_cache(model)]


def place_for(model: Path) -> Path:
    """Where a new bundle goes: beside the model, or into the cache folder, which is then made, where one may not write
    or the package keeps its own files. Raises OSError."""
    path = beside(model)
    ours = path.parent.resolve() == Path(__file__).resolve().parent / "data"
    if os.access(behind_links(path).parent, os.W_OK) and not ours:
        return path
    path = in_cache(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def use_bundle(engine: NativeEngine, model: Path, bundle: str | Path) -> Path | None:
    """Let an engine that has not been started read from a bundle.

    Args:
        bundle: "use" takes the first that fits, and says one line about each that does not; "off" takes none; else the
            file to use.

    Returns:
        The bundle in use, or None.

    Raises:
        StaleBundleError, ModelFileError: the file that was named does not fit, or is damaged.
    """
    if bundle == "off":
        return None
    if bundle != "use":
        engine.use_bundle(bundle)
        return Path(bundle)
    return _first_fitting(engine, (path for path in candidates(model) if path.is_file()))


def _first_fitting(engine: NativeEngine, paths: Iterable[Path]) -> Path | None:
    for path in paths:
        try:
            engine.use_bundle(path)
        except (StaleBundleError, ModelFileError) as reason:
            _log.warning("bundle not used: %s; `gguf_tools bundle` makes it anew", reason)
        else:
            return path
    return None


def check_wording(bundle: str | Path) -> None:
    """Raise UsageError for a word that is neither a way to choose nor a file."""
    if bundle not in ("use", "off") and not Path(bundle).is_file():
        raise UsageError(f"bundle must be use, off or a file; there is no file {str(bundle)!r}")
