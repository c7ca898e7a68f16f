"""Reads records of a bundle back and compares them with their checksums, and with what the model gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_tools.bundles.file import aligned_buffer, drop_cached, opened, read_into, write_all
from gguf_tools.bundles.format import Tables, read_tables
from gguf_tools.bundles.model import engine_errors, opened_model, tables_of
from gguf_tools.bundles.progress import Progress
from gguf_tools.errors import RequestError
from pyengine.native import NativeEngine, checksum


@dataclass
class Verdict:
    """What verify_bundle() found.

    damaged: (block, expert) of records that are not as their checksums say, or lie past the end of the file.
    differing: (block, expert) of records that are sound, and not what the model gives.
    missing: records that were never written: the making was interrupted.
    unlike: why it does not fit the model, one reason each; empty if it fits or no model was given.
    compared: whether every record was compared with the model.
    """

    records: int
    damaged: list[tuple[int, int]] = field(default_factory=list)
    differing: list[tuple[int, int]] = field(default_factory=list)
    missing: int = 0
    unlike: list[str] = field(default_factory=list)
    compared: bool = False

    @property
    def whole(self) -> bool:
        """Every record is there and sound."""
        return not (self.damaged or self.missing)


def each_record(descriptor: int, records: npt.NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of one record after the other, in the same memory; shorter than the record where the file ends.

    Args:
        descriptor: for aligned reads.
        records: RECORD, in the order of the file.

    Raises OSError.
    """
    if not records.size:
        return
    buffer = aligned_buffer(int(records["bytes"].max()))
    for record in records:
        out = buffer[: int(record["bytes"])]
        yield out[: read_into(descriptor, out, int(record["offset"]))]
    drop_cached(descriptor)


def first_damaged(
    descriptor: int, records: npt.NDArray[Any], checksums: npt.NDArray[np.uint64], progress: Progress
) -> int | None:
    """The place in `records` of the first one that is not as its checksum says, or None. Raises OSError."""
    with progress("Checking what is there", int(records["bytes"].sum())) as advance:
        for i, content in enumerate(each_record(descriptor, records)):
            if len(content) != records["bytes"][i] or checksum(content) != checksums[i]:
                return i
            advance(len(content))
    return None


def verify_bundle(path: Path, model: Path | None, progress: Progress) -> Verdict:
    """Read every record of a bundle, complete or not; with a model also compare everything with it.

    Raises:
        BundleError: it is none, or its head is damaged.
        ModelFileError, RequestError: it is the model that is unfit.
        OSError: a file cannot be read.
    """
    with opened(path, os.O_RDONLY, direct=False) as descriptor:
        tables = read_tables(descriptor)
    if model is None:
        return _verify(path, tables, None, progress)
    with opened_model(model) as engine:
        wanted = tables_of(engine, tables.raw)
        same_layout = tables.layers[:1].tobytes() == wanted.layers.tobytes()
        verdict = _verify(path, tables, engine if same_layout else None, progress)
        verdict.unlike = differences(tables, wanted)
        return verdict


def _verify(path: Path, tables: Tables, engine: NativeEngine | None, progress: Progress) -> Verdict:
    records = tables.records()
    checksums = tables.places["checksum"].ravel()
    done = records[: tables.n_done]
    verdict = Verdict(len(records), missing=len(records) - len(done), compared=engine is not None)
    own = np.zeros(int(records["bytes"].max()), np.uint8)
    with progress(f"Reading {path.name}", int(done["bytes"].sum())) as advance, opened(path, os.O_RDONLY) as descriptor:
        for record, content in zip(done, each_record(descriptor, done), strict=True):
            layer, expert = int(record["layer"]), int(record["expert"])
            where = (int(tables.layers[record["variant"], layer]["block"]), expert)
            if len(content) != record["bytes"] or checksum(content) != checksums[record["number"]]:
                verdict.damaged.append(where)
            elif engine is not None and record["variant"] == 0:
                wanted = own[: len(content)]
                with engine_errors():
                    engine.bundle_record(tables.raw, layer, expert, wanted)
                if not np.array_equal(wanted, np.frombuffer(content, np.uint8)):
                    verdict.differing.append(where)
            advance(int(record["bytes"]))
    return verdict


def differences(tables: Tables, wanted: Tables) -> list[str]:
    """Why a bundle does not fit what the model's bundle must say here, one reason each."""
    reasons = []
    made_for, here = tables.text("ggml_version"), wanted.text("ggml_version")
    if made_for != here:
        reasons.append(f"it was made for ggml {made_for}, this is ggml {here}")
    if tables.text("architecture") != wanted.text("architecture") or len(tables.sources) != len(wanted.sources):
        reasons.append("it is of another model")
    elif any((tables.sources[name] != wanted.sources[name]).any() for name in ("bytes", "digest")):
        reasons.append("the model's metadata or size is not what it was")
    elif (tables.sources["mtime_ns"] != wanted.sources["mtime_ns"]).any():
        reasons.append("the model was written after it was made, or copied")
    if tables.layers[:1].tobytes() != wanted.layers.tobytes():
        reasons.append("its experts are in the layout of another CPU, or of another model")
    return reasons


def refresh(path: Path, model: Path) -> None:
    """Write today's identity of the model into a bundle whose records were found to be the model's.

    Raises:
        RequestError: the model is now in another number of files.
        BundleError, ModelFileError, OSError.
    """
    with opened(path, os.O_RDWR, direct=False) as descriptor, opened_model(model) as engine:
        tables = read_tables(descriptor)
        wanted = tables_of(engine, tables.raw)
        if len(tables.sources) != len(wanted.sources):
            raise RequestError(f"{model} is in another number of files than {path} was made of; make it anew")
        tables.sources[:] = wanted.sources
        for name in ("ggml_version", "architecture"):
            tables.header[name] = wanted.header[name]
        tables.seal()
        write_all(descriptor, tables.content, 0)
        os.fsync(descriptor)
