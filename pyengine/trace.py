"""Routing traces: which experts each step used, recorded from a running engine and kept in a file.

A trace knows nothing of budgets or time; pyengine.planning replays it to say what a budget would have hit.

The file is a NumPy .npz archive. `meta` is UTF-8 JSON as bytes: format, version, and the model's identity; the other
members are the arrays of Trace under their names. A trace of another origin with only `ids` [n_token, n_layer, n_used]
and `starts` is read too; its model is then known by its shape alone.
"""

from __future__ import annotations

import io
import json
import os
import tokenize
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import PyengineError, one_line

FORMAT, VERSION = "pyengine routing trace", 1

#: Bounds on what a file may claim, so that a hostile one cannot take the memory.
_MOST_BYTES = 1 << 30
_MOST_META = 1 << 16
_MOST_EXPERTS = 1 << 16
_FOREIGN_IDS = ("ids", "starts")
_ARRAYS = ("ids", "starts", "prompt_tokens", "prompt_experts")

#: What reading a damaged archive may raise besides our own.
_DAMAGE = (
    *(ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, OSError),
)


class TraceError(PyengineError, ValueError):
    """A routing trace that is damaged, of another model, or empty."""


@dataclass(frozen=True)
class TracedModel:
    """The model a trace belongs to. `name` is the file's name, empty if unknown, as is `architecture`."""

    name: str
    architecture: str
    n_layer: int
    n_expert: int
    n_expert_used: int


@dataclass(frozen=True)
class Trace:
    """Expert ids of decoded tokens, and how many experts prompts touched.

    Layers are counted among those that have experts; ids are within their layer.
    """

    model: TracedModel
    ids: npt.NDArray[np.uint16]
    """uint16 [n_token, n_layer, n_expert_used]: tokens computed one at a time, in order; a token's set in no order"""
    starts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, "<i8"))
    """int64 [n]: the tokens of `ids` that a prompt came right before; ascending"""
    prompt_tokens: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, "<i8"))
    """int64 [n_prompt]: tokens of each micro-batch of several tokens"""
    prompt_experts: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros((0, 0), "<u2"))
    """uint16 [n_prompt, n_layer]: distinct experts it used in each layer"""

    def __post_init__(self) -> None:
        _check(self)


def _check(trace: Trace) -> None:
    """Raise TraceError unless shapes and ranges agree."""
    model, ids = trace.model, trace.ids
    if not (0 < model.n_expert_used <= model.n_expert <= _MOST_EXPERTS and model.n_layer > 0):
        raise TraceError("its model's numbers of layers and experts are impossible")
    if ids.ndim != 3 or ids.shape[1:] != (model.n_layer, model.n_expert_used):
        raise TraceError(f"its ids have the shape {ids.shape}, which does not fit its model")
    if ids.size and int(ids.max()) >= model.n_expert:
        raise TraceError(f"it names expert {int(ids.max())} of {model.n_expert}")
    starts, tokens, experts = trace.starts, trace.prompt_tokens, trace.prompt_experts
    if starts.ndim != 1 or (starts.size and (starts[0] < 0 or starts[-1] > len(ids) or np.any(np.diff(starts) < 0))):
        raise TraceError("its starts are not ascending positions in the trace")
    if tokens.ndim != 1 or (tokens.size and int(tokens.min()) < 1) or len(experts) != len(tokens):
        raise TraceError("its prompts have impossible lengths")
    if len(tokens) and (experts.shape != (len(tokens), model.n_layer) or int(experts.max()) > model.n_expert):
        raise TraceError("its prompts use impossible numbers of experts")


def save_trace(path: Path, trace: Trace) -> None:
    """Write the trace; a file of that name is replaced at once or not at all. Raises OSError."""
    meta = {"format": FORMAT, "version": VERSION, "model": asdict(trace.model)}
    arrays = {name: getattr(trace, name) for name in _ARRAYS}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
    return Trace(
        model,
        ids=_member(archive, "ids", "u", 3).astype("<u2"),
        starts=_member(archive, "starts", "iu", 1).astype("<i8"),
        prompt_tokens=_member(archive, "prompt_tokens", "iu", 1).astype("<i8"),
        prompt_experts=_member(archive, "prompt_experts", "u", 2).astype("<u2"),
    )


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
    if not {f"{name}.npy" for name in _FOREIGN_IDS} <= set(archive.namelist()):
        raise TraceError("it has neither meta nor ids and starts")
    ids = _member(archive, "ids", "iu", 3)
    if not ids.size or int(ids.min()) < 0 or int(ids.max()) >= _MOST_EXPERTS:
        raise TraceError("its ids are not expert ids")
    model = TracedModel("", "", ids.shape[1], int(ids.max()) + 1, ids.shape[2])
    starts = _member(archive, "starts", "iu", 1).astype("<i8")
    return Trace(model, ids=ids.astype("<u2"), starts=starts, prompt_experts=np.zeros((0, ids.shape[1]), "<u2"))


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
