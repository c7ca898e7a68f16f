"""Takes GGUF files apart and puts them together again without asking whether the result makes sense.

The gguf package refuses to write what these tests need: contradictions, duplicates, wrong types.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

MAGIC = b"GGUF"
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_FORMATS = {
    UINT8: "<B",
    INT8: "<b",
    UINT16: "<H",
    INT16: "<h",
    UINT32: "<I",
    INT32: "<i",
    FLOAT32: "<f",
    BOOL: "<?",
    UINT64: "<Q",
    INT64: "<q",
    FLOAT64: "<d",
}


def text(value: str) -> bytes:
    """A string as GGUF stores it: length, bytes."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: float) -> bytes:
    """A number as GGUF stores it; `kind` is UINT8 ... FLOAT64."""
    return struct.pack(_FORMATS[kind], value)


def array(kind: int, values: Iterable[float]) -> bytes:
    """An array of numbers as GGUF stores it."""
    items = [scalar(kind, value) for value in values]
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


@dataclass(frozen=True)
class Key:
    """A metadata key: its GGUF type and the value's bytes."""

    name: str
    kind: int
    raw: bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry. shape: `ne[0]` first. offset: bytes from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass
class Gguf:
    """A file in parts. `data` is everything from the first tensor's first byte on."""

    keys: list[Key]
    tensors: list[Tensor]
    data: bytes
    version: int = 3
    alignment: int = field(default=32)

    @classmethod
    def read(cls, path: Path) -> Gguf:
        """Take a sound file apart."""
        reader = _Reader(path.read_bytes())
        assert reader.take(4) == MAGIC
        version, n_tensors, n_keys = reader.unpack("<IQQ")
        keys = [Key(reader.text(), *reader.value()) for _ in range(n_keys)]
        tensors = []
        for _ in range(n_tensors):
            name = reader.text()
            (n_dims,) = reader.unpack("<I")
            shape = reader.unpack(f"<{n_dims}Q")
            tensors.append(Tensor(name, shape, *reader.unpack("<IQ")))
        found = [key for key in keys if key.name == "general.alignment"]
        alignment = struct.unpack("<I", found[0].raw)[0] if found else 32
        start = -(-reader.at // alignment) * alignment
        return cls(keys, tensors, reader.raw[start:], version, alignment)

    def header(self) -> bytes:
        """Everything before the tensor data, padded."""
        out = [MAGIC, struct.pack("<IQQ", self.version, len(self.tensors), len(self.keys))]
        out += [text(key.name) + struct.pack("<I", key.kind) + key.raw for key in self.keys]
        for t in self.tensors:
            dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape)
            out.append(text(t.name) + dims + struct.pack("<IQ", t.type, t.offset))
        header = b"".join(out)
        return header + b"\0" * (-len(header) % self.alignment)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.header() + self.data)
        return path

    def with_key(self, name: str, kind: int, raw: bytes) -> Gguf:
        """A copy with a key set, added at the end if there is none of that name."""
        changed = [Key(name, kind, raw) if key.name == name else key for key in self.keys]
        if name not in [key.name for key in self.keys]:
            changed.append(Key(name, kind, raw))
        return replace(self, keys=changed)

    def without_key(self, name: str) -> Gguf:
        """A copy without a key. Raises KeyError when there is none of that name."""
        kept = [key for key in self.keys if key.name != name]
        if len(kept) == len(self.keys):
            raise KeyError(name)
        return replace(self, keys=kept)

    def with_tensor(self, tensor: str, /, **changes: object) -> Gguf:
        """A copy with fields of one tensor's entry changed, the data as it was. Raises KeyError."""
        if tensor not in [t.name for t in self.tensors]:
            raise KeyError(tensor)
        changed = [replace(t, **changes) if t.name == tensor else t for t in self.tensors]  # type: ignore[arg-type]
        return replace(self, tensors=changed)

    def with_data_for(self, tensors: list[Tensor], n_bytes: dict[str, int]) -> Gguf:
        """A copy with these tensors, laid out one after another over fresh data; sizes in bytes by name."""
        laid_out, at = [], 0
        for t in tensors:
            laid_out.append(replace(t, offset=at))
            at += -(-n_bytes[t.name] // self.alignment) * self.alignment
        return replace(self, tensors=laid_out, data=b"\0" * at)


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0

    def take(self, n: int) -> bytes:
        self.at += n
        return self.raw[self.at - n : self.at]

    def unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        return self.take(self.unpack("<Q")[0]).decode()

    def value(self) -> tuple[int, bytes]:
        """A value's type and bytes."""
        (kind,) = self.unpack("<I")
        start = self.at
        self._skip(kind)
        return kind, self.raw[start : self.at]

    def _skip(self, kind: int) -> None:
        if kind == STRING:
            self.take(self.unpack("<Q")[0])
        elif kind == ARRAY:
            of, n = self.unpack("<IQ")
            for _ in range(n):
                self._skip(of)
        else:
            self.take(struct.calcsize(_FORMATS[kind]))
