"""Makes records and writes them: a few threads that each read, repack, sum and write batches of their own, so that the
disk and the cores work at the same time."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gguf_tools.bundles.file import aligned_buffer, write_all
from gguf_tools.bundles.model import engine_errors, opened_model
from pyengine.native import NativeEngine, checksum

#: Bytes of records a thread writes at a time; at least one record.
BATCH_BYTES = 8 << 20

#: The first record of a batch in the order of the file, and the checksums of its records.
Batch = tuple[int, list[int]]


def batches_of(records: npt.NDArray[Any], first: int, n_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut records `first` and following into runs that lie together; (first, last), the last exclusive."""
    begin, end = first, first
    while begin < len(records):
        size = 0
        while end < len(records) and (end == begin or size + int(records["bytes"][end]) <= n_bytes):
            if end > begin and records["offset"][end] != records["offset"][end - 1] + records["bytes"][end - 1]:
                break
            size += int(records["bytes"][end])
            end += 1
        yield begin, end
        begin = end


@contextlib.contextmanager
def record_batches(
    model: Path, raw: bool, descriptor: int, records: npt.NDArray[Any], first: int, threads: int
) -> Iterator[Iterator[Batch]]:
    """Make and write records from number `first` on; iterate over the batches as they are written, in any order.

    Args:
        model: the GGUF file.
        raw: as Tables.raw.
        descriptor: for aligned writes.
        records: RECORD, in the order of the file.
        threads: how many work at it.

    Raises:
        ModelFileError, OSError: the first failure of a thread. When the block is left, no thread works any more.
    """
    work = iter(list(batches_of(records, first, BATCH_BYTES)))
    lock = threading.Lock()
    stop = threading.Event()
    results: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            with opened_model(model) as engine:
                while not stop.is_set():
                    with lock:
                        batch = next(work, None)
                    if batch is None:
                        break
                    results.put((batch[0], _write(engine, raw, descriptor, records[batch[0] : batch[1]])))
        except BaseException as error:
            results.put(error)
        finally:
            results.put(None)

    def finished() -> Iterator[Batch]:
        running = len(workers)
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result

    workers = [threading.Thread(target=run, name=f"records-{i}", daemon=True) for i in range(threads)]
    try:
        for worker in workers:
            worker.start()
        yield finished()
    finally:
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()


_own = threading.local()


def _write(engine: NativeEngine, raw: bool, descriptor: int, records: npt.NDArray[Any]) -> list[int]:
    """Write records that lie together; their checksums."""
    n_bytes = int(records["bytes"].sum())
    buffer: memoryview | None = getattr(_own, "buffer", None)
    if buffer is None or len(buffer) < n_bytes:
        buffer = _own.buffer = aligned_buffer(max(n_bytes, BATCH_BYTES))
    sums, at = [], 0
    for record in records:
        out = buffer[at : at + int(record["bytes"])]
        with engine_errors():
            engine.bundle_record(raw, int(record["layer"]), int(record["expert"]), out)
        sums.append(checksum(out))
        at += len(out)
    write_all(descriptor, buffer[:at], int(records["offset"][0]))
    return sums
