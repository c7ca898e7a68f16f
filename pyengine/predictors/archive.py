"""Learned predictors as files, beside what else is kept about a model.

A NumPy .npz archive. `meta` is UTF-8 JSON as bytes: format, version, the model they belong to, and for each predictor
its form, target, distance, calibration and figures. Predictor i has the float32 arrays `w2_i` and `b2_i` and perhaps
`w1_i` and `b1_i`, as in Predictor, and `by_rank_i` and `by_rank_absent_i` if it is calibrated.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.cache import cache_dir
from pyengine.errors import one_line
from pyengine.predictors.predictor import Calibration, Predictor, PredictorError
from pyengine.traces import TracedModel
from pyengine.whole_file import written_whole

FORMAT, VERSION = "pyengine predictors", 1

#: Bounds on what a file may claim, so that a hostile one cannot take the memory.
_MOST_BYTES = 4 << 30
_MOST_META = 1 << 24
_NUMBERS = ("slope", "intercept", "threshold")
_DAMAGE = (
    *(ValueError, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError, SyntaxError, RecursionError),
    *(zipfile.BadZipFile, zlib.error, MemoryError, OSError),
)


@dataclass(frozen=True, eq=False)
class PredictorSet:
    """What was learned about one model: at most one predictor for each target and distance."""

    model: TracedModel
    predictors: tuple[Predictor, ...]

    def __post_init__(self) -> None:
        model = self.model
        seen = {(p.target, p.distance) for p in self.predictors}
        if len(seen) != len(self.predictors):
            raise PredictorError("two predictors have the same target and distance")
        if any(p.target >= model.n_layer or p.n_expert > model.n_expert for p in self.predictors):
            raise PredictorError("a predictor does not fit the model it is said to belong to")
        if len({p.n_embd for p in self.predictors}) > 1:
            raise PredictorError("its predictors read gate inputs of different widths")

    def at(self, distance: int) -> list[Predictor]:
        """The predictors of one distance, by target."""
        return sorted((p for p in self.predictors if p.distance == distance), key=lambda p: p.target)


def predictors_file(model: Path) -> Path:
    """Where the predictors of this model file are kept. Raises OSError: no such file."""
    return cache_dir() / "predictors" / f"{model.stem}-{model.stat().st_size:x}.npz"


def save_predictors(path: Path, learned: PredictorSet) -> None:
    """Write them; a file of that name is replaced at once or not at all. Raises OSError."""
    arrays: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for i, p in enumerate(learned.predictors):
        entry: dict[str, Any] = {"form": p.form, "target": p.target, "distance": p.distance, "figures": dict(p.figures)}
        arrays |= {f"w2_{i}": p.w2, f"b2_{i}": p.b2}
        if p.w1 is not None and p.b1 is not None:
            arrays |= {f"w1_{i}": p.w1, f"b1_{i}": p.b1}
        if p.calibration is not None:
            entry["calibration"] = {name: getattr(p.calibration, name) for name in _NUMBERS}
            arrays[f"by_rank_{i}"] = p.calibration.by_rank
            arrays[f"by_rank_absent_{i}"] = p.calibration.by_rank_absent
        entries.append(entry)
    meta = {"format": FORMAT, "version": VERSION, "model": asdict(learned.model), "predictors": entries}
    with written_whole(path) as file:
        np.savez(file, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)


def load_predictors(path: Path) -> PredictorSet:
    """Read predictors.

    Raises:
        OSError: the file cannot be read.
        PredictorError: it holds no predictors, is damaged, or its numbers contradict each other.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    try:
        if len(content) > _MOST_BYTES:
            raise PredictorError("it is absurdly large")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _set(archive)
    except PredictorError as error:
        raise PredictorError(f"{path} holds no usable predictors: {error}") from error
    except _DAMAGE as error:
        raise PredictorError(f"{path} holds no usable predictors: {one_line(str(error)) or 'damaged'}") from error


def _set(archive: zipfile.ZipFile) -> PredictorSet:
    if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
        raise PredictorError("it is absurdly large")
    if "meta.npy" not in archive.namelist():
        raise PredictorError("it does not say what it is")
    meta = json.loads(bytes(_member(archive, "meta", "u1", 1, _MOST_META)).decode("utf-8"))
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise PredictorError("it has another format")
    if meta.get("version") != VERSION:
        raise PredictorError(f"it has format version {meta.get('version')!r:.20}; this pyengine reads {VERSION}")
    entries = meta.get("predictors")
    if not isinstance(entries, list):
        raise PredictorError("it does not list its predictors")
    return PredictorSet(_model(meta.get("model")), tuple(_predictor(archive, i, e) for i, e in enumerate(entries)))


def _model(values: Any) -> TracedModel:
    names = TracedModel.__dataclass_fields__
    if not isinstance(values, dict) or values.keys() != names.keys():
        raise PredictorError("it does not say which model it belongs to")
    for name, value in values.items():
        if type(value) is not (int if name.startswith("n_") else str):
            raise PredictorError(f"its model's {name} is not understood")
    return TracedModel(**values)


def _predictor(archive: zipfile.ZipFile, i: int, entry: Any) -> Predictor:
    whole = isinstance(entry, dict) and type(entry.get("target")) is int and type(entry.get("distance")) is int
    if not whole or not isinstance(entry.get("form"), str) or not isinstance(entry.get("figures"), dict):
        raise PredictorError(f"its predictor {i} is not understood")
    names = archive.namelist()
    hidden = f"w1_{i}.npy" in names or f"b1_{i}.npy" in names
    calibration = None
    if entry.get("calibration") is not None:
        calibration = Calibration(
            _member(archive, f"by_rank_{i}", "f4", 1),
            _member(archive, f"by_rank_absent_{i}", "f4", 1),
            **{name: _finite(entry["calibration"][name]) for name in _NUMBERS},
        )
    return Predictor(
        entry["form"],
        entry["target"],
        entry["distance"],
        _member(archive, f"w2_{i}", "f4", 2),
        _member(archive, f"b2_{i}", "f4", 1),
        _member(archive, f"w1_{i}", "f4", 2) if hidden else None,
        _member(archive, f"b1_{i}", "f4", 1) if hidden else None,
        calibration,
        {str(name): _finite(value) for name, value in entry["figures"].items()},
    )


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise PredictorError("one of its figures is no number")
    return float(value)


def _member(archive: zipfile.ZipFile, name: str, dtype: str, n_dim: int, most: int = _MOST_BYTES) -> npt.NDArray[Any]:
    """An array of the archive; its header is looked at before memory is spent on it."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > most:
        raise PredictorError(f"its {name} is absurdly large")
    with archive.open(entry) as file:
        data = file.read(most + 1)
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise PredictorError(f"its {name} has an unknown layout")
    shape, _, found = np.lib.format.read_array_header_1_0(stream)
    if found != np.dtype(f"<{dtype}") or len(shape) != n_dim or min(shape, default=0) < 0:
        raise PredictorError(f"its {name} is not as it should be: {found} {shape}")
    if math.prod(shape) * found.itemsize != len(data) - stream.tell():
        raise PredictorError(f"its {name} is truncated")
    stream.seek(0)
    array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array
