"""Routing traces as files.

A NumPy .npz archive. `meta` is UTF-8 JSON as bytes: format, version, and the model's identity; the other members are
the arrays of Trace under their names, those of its prompts as `prompt_at`, `prompt_tokens` and so on. A trace of
another origin with only `ids` [n_token, n_layer, n_used] and `starts`, perhaps `probs` of the shape of `ids`, is read
too; its model is then known by its shape alone.
"""

from __future__ import annotations

import io
import json
import tokenize
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import one_line
from pyengine.traces.trace import Prompts, Trace, TracedModel, TraceError
from pyengine.whole_file import written_whole

FORMAT, VERSION = "pyengine routing trace", 2

#: Bounds on what a file may claim, so that a hostile one cannot take the memory.
_MOST_BYTES = 4 << 30
_MOST_META = 1 << 16
_MOST_EXPERTS = 1 << 16
_FOREIGN_IDS = ("ids", "starts")
#: Name -> (kinds of dtype, dimensions, dtype in memory).
_ARRAYS = {
    "ids": ("u", 3, "<u2"),
    "starts": ("iu", 1, "<i8"),
    "tokens": ("i", 1, "<i4"),
    "weights": ("f", 3, "<f2"),
    "inputs": ("f", 3, "<f2"),
    "seconds": ("f", 1, "<f4"),
}
_PROMPT_ARRAYS = {
    "at": ("iu", 1, "<i8"),
    "tokens": ("iu", 1, "<i8"),
    "offsets": ("iu", 1, "<i8"),
    "experts": ("u", 1, "<u2"),
    "pairs": ("u", 1, "<u2"),
}

#: What reading a damaged archive may raise besides our own.
_DAMAGE = (
    *(ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, OSError),
)


def save_trace(path: Path, trace: Trace) -> None:
    """Write the trace; a file of that name is replaced at once or not at all. Raises OSError."""
    meta = {"format": FORMAT, "version": VERSION, "model": asdict(trace.model)}
    arrays = {name: getattr(trace, name) for name in _ARRAYS}
    arrays |= {f"prompt_{name}": getattr(trace.prompts, name) for name in _PROMPT_ARRAYS}
    with written_whole(path) as file:
        np.savez_compressed(file, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)


def load_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        OSError: the file cannot be read.
        TraceError: it is no trace, damaged, or its numbers contradict each other.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if "meta.npy" in archive.namelist():
                return _own(archive)
            return _foreign(archive)
    except TraceError as error:
        raise TraceError(f"{path} is not a usable routing trace: {error}") from error
    except _DAMAGE as error:
        raise TraceError(f"{path} is not a usable routing trace: {one_line(str(error)) or 'damaged'}") from error
    except (MemoryError, RecursionError) as error:
        raise TraceError(f"{path} is not a usable routing trace: absurd") from error


def _own(archive: zipfile.ZipFile) -> Trace:
    meta = json.loads(bytes(_member(archive, "meta", "u", 1, most=_MOST_META)).decode("utf-8"))
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise TraceError("it has another format")
    if meta.get("version") != VERSION:
        raise TraceError(f"it has format version {meta.get('version')!r:.20}; this pyengine reads {VERSION}")
    model = _model(meta.get("model"))
    arrays = {name: _member(archive, name, *how[:2]).astype(how[2]) for name, how in _ARRAYS.items()}
    prompts = {
        name: _member(archive, f"prompt_{name}", *how[:2]).astype(how[2]) for name, how in _PROMPT_ARRAYS.items()
    }
    return Trace(model, prompts=Prompts(**prompts), **arrays)


def _model(values: Any) -> TracedModel:
    names = TracedModel.__dataclass_fields__
    if not isinstance(values, dict) or values.keys() != names.keys():
        raise TraceError("it does not say which model it belongs to")
    for name, value in values.items():
        kind = int if name.startswith("n_") else str
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TraceError(f"its model's {name} is not understood")
    return TracedModel(**values)


def _foreign(archive: zipfile.ZipFile) -> Trace:
    names = set(archive.namelist())
    if not {f"{name}.npy" for name in _FOREIGN_IDS} <= names:
        raise TraceError("it has neither meta nor ids and starts")
    ids = _member(archive, "ids", "iu", 3)
    if not ids.size or int(ids.min()) < 0 or int(ids.max()) >= _MOST_EXPERTS:
        raise TraceError("its ids are not expert ids")
    model = TracedModel("", "", ids.shape[1], int(ids.max()) + 1, ids.shape[2])
    starts = _member(archive, "starts", "iu", 1).astype("<i8")
    weights = _member(archive, "probs", "f", 3).astype("<f2") if "probs.npy" in names else np.zeros((0, 0, 0), "<f2")
    prompts = Prompts()
    return Trace(model, ids=ids.astype("<u2"), starts=starts, prompts=prompts, weights=weights)


def _member(archive: zipfile.ZipFile, name: str, kinds: str, n_dim: int, most: int = _MOST_BYTES) -> npt.NDArray[Any]:
    """An array of the archive; its header is looked at before memory is spent on it."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > most:
        raise TraceError(f"its {name} are absurdly large")
    with archive.open(entry) as file:
        data = file.read(most + 1)
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise TraceError(f"its {name} have an unknown layout")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    count = 1
    for n in shape:
        count *= n
    if dtype.kind not in kinds or len(shape) != n_dim or min(shape, default=0) < 0:
        raise TraceError(f"its {name} are not as they should be: {dtype} {shape}")
    if count * dtype.itemsize != len(data) - stream.tell():
        raise TraceError(f"its {name} are truncated")
    stream.seek(0)
    array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array
