"""Writes a GGUF file from a model's: its metadata and tensors as bytes, except for what is said to change."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf import GGUFValueType

from gguf_tools.edits import Advance, Copy, Edit, read_all
from gguf_tools.header import MAGIC, NUMBER_FORMATS, KeyEntry, Number, TensorEntry
from gguf_tools.model import Model
from gguf_tools.new_file import new_file

_SPLIT_KEYS = "split."
_COPY = 1 << 20
AS_IT_IS = Copy()


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: one of the model's, and what becomes of it. shape: `ne[0]` first."""

    source: TensorEntry
    shape: tuple[int, ...]
    edit: Edit = AS_IT_IS

    @property
    def n_bytes(self) -> int:
        return self.edit.n_bytes(self.source)


class Rewrite:
    """A file about to be written from the model's, of however many parts, as one.

    tensors: all there will be, in order. keys: new values, as bytes of the whole entry (see encoded_numbers), for keys
    that the model has; keys that say how it was split are left out.
    """

    def __init__(self, model: Model, tensors: Sequence[NewTensor], keys: Mapping[str, bytes]) -> None:
        self._model, self._tensors, self._changed = model, tensors, keys
        first = model.headers[0]
        self._alignment = first.alignment
        joined = len(model.headers) > 1
        self._kept = [key for name, key in first.keys.items() if not (joined and name.startswith(_SPLIT_KEYS))]
        self._infos = self._encode_infos()
        n_keys = sum(len(keys.get(key.name, b"")) or key.end - key.start for key in self._kept)
        self._header_bytes = len(MAGIC) + struct.calcsize("<IQQ") + n_keys + len(self._infos)

    @property
    def file_bytes(self) -> int:
        return self._padded(self._header_bytes) + sum(self._padded(t.n_bytes) for t in self._tensors)

    def write(self, path: Path, advance: Advance, *, force: bool = False) -> None:
        """Write it; see new_file for the errors. `advance` hears of every byte of tensor data."""
        with contextlib.ExitStack() as stack:
            files = {h.path: stack.enter_context(h.path.open("rb")) for h in self._model.headers}
            out = stack.enter_context(new_file(path, self.file_bytes, force=force))
            self._write_header(files[self._model.path], out)
            for tensor in self._tensors:
                tensor.edit.write(tensor.source, files[tensor.source.path], out, advance)
                _pad(out, tensor.n_bytes, self._alignment)

    def _padded(self, n: int) -> int:
        return -(-n // self._alignment) * self._alignment

    def _encode_infos(self) -> bytes:
        encoded, offset = [], 0
        for t in self._tensors:
            name = t.source.name.encode()
            dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape)
            encoded.append(struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", t.source.type, offset))
            offset += self._padded(t.n_bytes)
        return b"".join(encoded)

    def _write_header(self, source: BinaryIO, out: BinaryIO) -> None:
        out.write(MAGIC)
        out.write(struct.pack("<IQQ", self._model.headers[0].version, len(self._tensors), len(self._kept)))
        for key in self._kept:
            if key.name in self._changed:
                out.write(self._changed[key.name])
                continue
            source.seek(key.start)
            for at in range(key.start, key.end, _COPY):
                out.write(read_all(source, min(_COPY, key.end - at)))
        out.write(self._infos)
        _pad(out, self._header_bytes, self._alignment)


def _pad(out: BinaryIO, written: int, alignment: int) -> None:
    out.write(bytes(-written % alignment))


def encoded_numbers(file: BinaryIO, key: KeyEntry, values: Sequence[Number]) -> bytes:
    """The entry of a key that holds numbers, with other values, as many and of the same type.

    Raises ValueError when a value does not fit the type.
    """
    form = f"<{key.count}{NUMBER_FORMATS[key.items]}"
    try:
        packed = struct.pack(form, *values)
    except struct.error as error:
        raise ValueError(f"GGUF key {key.name} cannot hold {values}: {error}") from None
    file.seek(key.start)
    return read_all(file, key.end - key.start - len(packed)) + packed


INTEGERS = frozenset(NUMBER_FORMATS) - {GGUFValueType.FLOAT32, GGUFValueType.FLOAT64, GGUFValueType.BOOL}
