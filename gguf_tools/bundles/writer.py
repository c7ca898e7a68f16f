"""Makes a bundle: records from the model, through the engine, to the disk, and going on where an earlier run stopped.

Keeps the books: which records are there without a gap, and when the file may say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gguf_tools.bundles.check import first_damaged
from gguf_tools.bundles.format import Tables
from gguf_tools.bundles.partial import PartialBundle, check_replaceable, opened
from gguf_tools.bundles.progress import Progress
from gguf_tools.bundles.records import record_batches
from gguf_tools.errors import RequestError

#: Bytes of records between two checkpoints.
CHECKPOINT_BYTES = 256 << 20


@dataclass(frozen=True)
class Made:
    """What make_bundle() did: bytes of the bundle, and of the records that an earlier run had left."""

    file_bytes: int
    bytes_kept: int


def make_bundle(
    model: Path,
    target: Path,
    tables: Tables,
    *,
    threads: int,
    progress: Progress,
    say: Callable[[str], None],
) -> Made:
    """Write the bundle of a model, or its rest. An interruption keeps what is done in a file beside it, for the next
    time.

    Args:
        model: its GGUF file, the first one of a split model.
        target: the bundle; replaced in the end if it exists.
        tables: what it must say, with nothing done.
        threads: how many make records.

    Raises:
        BusyError: another process is making it.
        RequestError: the disk has too little space, or writing failed; or a file of that name is no bundle.
        ModelFileError: the model cannot be read, or was changed meanwhile.
        OSError: the file cannot be made.
    """
    check_replaceable(target)
    with opened(target, tables) as partial:
        try:
            records = tables.records()
            kept = _take_over(partial, records, progress, say)
            partial.allocate()
            _write_rest(model, partial, records, threads, progress)
            partial.finish()
        except OSError as error:
            kept_for_later = "; what is done is kept for the next time" if tables.n_done else ""
            raise RequestError(f"{partial.path}: {error.strerror or error}{kept_for_later}") from error
        finally:
            partial.discard_if_empty()
    return Made(tables.file_bytes, kept)


def _take_over(
    partial: PartialBundle, records: npt.NDArray[Any], progress: Progress, say: Callable[[str], None]
) -> int:
    """Keep what an earlier run left as far as it is sound; the bytes of it."""
    tables = partial.tables
    anew = partial.take_over()
    if anew is not None:
        say(f"{partial.path} cannot be continued ({anew}): begun anew")
    done = records[: tables.n_done]
    if done.size:
        checksums = tables.places["checksum"].ravel()[done["number"]]
        damaged = first_damaged(partial.descriptor, done, checksums, progress)
        if damaged is not None:
            say(f"{partial.path} is damaged from record {damaged} of {len(done)} on: written again")
            done = done[:damaged]
    tables.n_done = len(done)
    tables.places["checksum"].ravel()[records[len(done) :]["number"]] = 0
    kept = int(done["bytes"].sum())
    if kept:
        say(f"going on after {kept / 1e9:.2f} of {tables.file_bytes / 1e9:.2f} GB")
    return kept


def _write_rest(
    model: Path, partial: PartialBundle, records: npt.NDArray[Any], threads: int, progress: Progress
) -> None:
    tables = partial.tables
    checksums = tables.places["checksum"].reshape(-1)
    n_done = tables.n_done
    finished: dict[int, list[int]] = {}  # checksums of a batch by its first record, until all before it are there
    since = 0
    try:
        with (
            progress(f"Making {partial.target.name}", int(records[n_done:]["bytes"].sum())) as advance,
            record_batches(model, tables.raw, partial.descriptor, records, n_done, threads) as batches,
        ):
            for first, batch in batches:
                finished[first] = batch
                while n_done in finished:
                    sums = finished.pop(n_done)
                    checksums[records[n_done : n_done + len(sums)]["number"]] = sums
                    n_done += len(sums)
                n_bytes = int(records[first : first + len(batch)]["bytes"].sum())
                since += n_bytes
                if since >= CHECKPOINT_BYTES:
                    partial.checkpoint(n_done)
                    since = 0
                advance(n_bytes)
    except BaseException:
        with contextlib.suppress(OSError):  # what brought us here is the better reason
            partial.checkpoint(n_done)
        raise
