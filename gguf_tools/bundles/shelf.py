"""The bundles that are there: of a model, or in the cache folder; what state they are in; taking them away."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.bundles.file import opened
from gguf_tools.bundles.format import MAGIC, BundleError, read_tables
from gguf_tools.bundles.model import why_unfit
from gguf_tools.errors import GgufToolsError, RequestError
from pyengine import bundles


@dataclass(frozen=True)
class Shelved:
    """A bundle file.

    file_bytes: on disk now. layout: "repacked" or "raw". order: what its records' order follows. model: the one it was
    looked at for. state: one or two words, then perhaps a reason.
    """

    path: Path
    file_bytes: int
    layout: str
    order: str
    model: Path | None
    state: str


def is_model(path: Path) -> bool:
    """Whether the file is a GGUF file. Raises OSError."""
    return _begins_with(path, b"GGUF")


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def bundle_of(model: Path) -> Path:
    """The first bundle of a model. Raises RequestError if there is none."""
    for path in bundles.candidates(model):
        if path.is_file():
            return path
    raise RequestError(f"{model} has no bundle; `gguf_tools bundle` makes one")


def fitting_bundle(model: Path, places: Iterable[Path], say: Callable[[str], None]) -> Path | None:
    """The first of the places with a bundle that fits the model, or None; says of each other one why it does not.

    Raises ModelFileError, RequestError."""
    for path in places:
        if path.is_file():
            reason = why_unfit(model, path)
            if reason is None:
                return path
            say(reason)
    return None


def files_of(model: Path) -> list[Path]:
    """Bundles of a model that exist, unfinished ones too."""
    names = (name for path in bundles.candidates(model) for name in (path, bundles.partial_of(path)))
    return [path for path in names if path.is_file()]


def files_in_cache() -> list[Path]:
    """Bundles in the cache folder, unfinished ones too."""
    folder = bundles.cache_folder()
    if not folder.is_dir():
        return []
    endings = (bundles.SUFFIX, bundles.SUFFIX + bundles.PARTIAL_SUFFIX)
    return sorted(path for path in folder.iterdir() if path.name.endswith(endings) and path.is_file())


def shelved(models: Iterable[Path]) -> list[Shelved]:
    """Bundles of these models and all others in the cache folder. Raises OSError."""
    found: dict[Path, Path | None] = {path: model for model in models for path in files_of(model)}
    for path in files_in_cache():
        found.setdefault(path, None)
    return [_look(path, model) for path, model in found.items()]


def _look(path: Path, model: Path | None) -> Shelved:
    size = path.stat().st_blocks * 512
    layout = order = ""
    try:
        with opened(path, os.O_RDONLY, direct=False) as descriptor:
            tables = read_tables(descriptor)
        layout, order = "raw" if tables.raw else "repacked", tables.text("order")
        if path.name.endswith(bundles.PARTIAL_SUFFIX):
            doing = "being made" if _is_locked(path) else "unfinished"
            state = f"{doing}, {100 * tables.n_done // tables.n_total} %"
        elif model is None:
            state = f"whole, for ggml {tables.text('ggml_version')}"
        else:
            reason = why_unfit(model, path)
            state = "fits" if reason is None else reason.removeprefix(f"{path} is ")
    except BundleError as reason:
        state = "unfinished, 0 %" if path.name.endswith(bundles.PARTIAL_SUFFIX) else f"damaged: {reason}"
    except GgufToolsError as reason:  # about the model
        state = str(reason)
    return Shelved(path, size, layout, order, model, state)


def _is_locked(path: Path) -> bool:
    with opened(path, os.O_RDONLY, direct=False) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def chosen(names: Iterable[Path]) -> list[Path]:
    """The bundle files that names stand for: a bundle for itself, a model for all of its bundles.

    Raises:
        RequestError: a name that is neither, or a model without one.
        OSError: a file cannot be read.
    """
    files: dict[Path, None] = {}
    for name in names:
        if is_model(name):
            if not (own := files_of(name)):
                raise RequestError(f"{name} has no bundle")
            files.update(dict.fromkeys(own))
        elif _begins_with(name, MAGIC + b"\0") or name.name.endswith(bundles.SUFFIX + bundles.PARTIAL_SUFFIX):
            files[name] = None
        else:
            raise RequestError(f"{name} is neither a bundle nor a model; nothing was removed")
    return list(files)


def remove(path: Path) -> int:
    """Remove a bundle file; the bytes it had on disk. A running engine keeps what it has open.

    Raises:
        RequestError: another process is making it.
        OSError: it cannot be removed.
    """
    if path.name.endswith(bundles.PARTIAL_SUFFIX) and _is_locked(path):
        raise RequestError(f"another process is making {path}; it was not removed")
    size = path.stat().st_blocks * 512
    path.unlink()
    return size
