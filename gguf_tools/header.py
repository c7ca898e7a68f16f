"""The header of one GGUF file, distrusted: where its metadata keys and tensors lie.

gguf.GGUFReader believes every length it reads (a damaged one keeps it busy until memory is full) and makes Python
objects of every token of the vocabulary. Here every length is checked against the size of the file before it is used,
and values stay in the file until they are asked for.

Layout of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys

from gguf_tools.errors import ModelFileError, one_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# More than any model has; a header that says more is damaged. The last one is ggml's own GGML_MAX_DIMS.
_MOST_KEYS, _MOST_TENSORS, _MOST_ITEMS, _MOST_NAME, _MOST_DIMS = 1 << 16, 1 << 17, 1 << 24, 1 << 16, 4
_MOST_BYTES = 256 << 20

NUMBER_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

Number = bool | int | float


@dataclass(frozen=True)
class KeyEntry:
    """A metadata key. `start` to `end` are its bytes in the file, name and all; its value begins at `value`.

    item_type: the type of the items of an array, None otherwise. count: how many there are, 1 otherwise.
    """

    name: str
    type: GGUFValueType
    item_type: GGUFValueType | None
    count: int
    start: int
    value: int
    end: int

    @property
    def items(self) -> GGUFValueType:
        """The type of the value, or of the items of an array."""
        return self.type if self.item_type is None else self.item_type  # UINT8 is 0 and counts as false


@dataclass(frozen=True)
class TensorEntry:
    """A tensor. shape: `ne[0]` first. offset: of its first byte from the start of the file at `path`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    path: Path
    offset: int
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of `ne[0]` values."""
        return tensor_bytes(self.shape[:1], self.type)


@dataclass(frozen=True)
class Header:
    """What a file says about itself; keys and tensors by name, in their order in the file. Sizes in bytes."""

    path: Path
    version: int
    alignment: int
    keys: dict[str, KeyEntry]
    tensors: dict[str, TensorEntry]
    file_bytes: int


def tensor_bytes(shape: tuple[int, ...], type_: GGMLQuantizationType) -> int:
    """Bytes of a tensor (`ne[0]` first). Raises ValueError when a row is no whole number of the type's blocks."""
    block, size = GGML_QUANT_SIZES[type_]
    if shape[0] % block:
        raise ValueError(f"rows of {type_.name} come in multiples of {block} values, not {shape[0]}")
    return math.prod(shape) // block * size


def read_header(path: Path) -> Header:
    """Read the header of one GGUF file.

    Raises:
        ModelFileError: not GGUF, truncated, contradicting itself, or of a version or tensor type we do not know.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ModelFileError(f"{path} is not a regular file" if path.exists() else f"{path}: no such file")
    with path.open("rb") as file:
        return _HeaderReader(file, path).read()


class _HeaderReader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = path.stat().st_size
        self._end = min(self._size, _MOST_BYTES)
        self._at = 0

    def read(self) -> Header:
        if self._size == 0:
            raise ModelFileError(f"{self._path} is empty")
        if self._file.read(len(MAGIC)) != MAGIC:
            raise ModelFileError(f"{self._path} is not a GGUF file")
        self._at = len(MAGIC)
        (version,) = self._unpack("<I")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            raise self._bad(f"GGUF version {version} is not known" if not big else "big-endian files are not supported")
        n_tensors, n_keys = self._unpack("<QQ")
        if n_keys > _MOST_KEYS or n_tensors > _MOST_TENSORS:
            raise self._bad(f"it claims {n_keys} keys and {n_tensors} tensors")
        keys: dict[str, KeyEntry] = {}
        for _ in range(n_keys):
            key = self._key()
            if key.name in keys:
                raise self._bad(f"GGUF key {one_line(key.name)} appears twice")
            keys[key.name] = key
        infos = [self._tensor() for _ in range(n_tensors)]
        alignment = self._alignment(keys)
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, type_, offset in infos:
            if name in tensors:
                raise self._bad(f"tensor {name} appears twice")
            tensors[name] = self._placed(name, shape, type_, data + offset)
        return Header(self._path, version, alignment, keys, tensors, self._size)

    def _bad(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: the GGUF metadata is damaged or truncated: {what}")

    def _take(self, n: int) -> bytes:
        self._check_left(n)
        raw = self._file.read(n)
        if len(raw) != n:
            raise self._bad("the file ends early")
        self._at += n
        return raw

    def _skip(self, n: int) -> None:
        self._check_left(n)
        self._at += n
        self._file.seek(self._at)

    def _check_left(self, n: int) -> None:
        if n > self._end - self._at:
            raise self._bad(f"{n} bytes are wanted at {self._at}, and there are {self._end}")

    def _unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _name(self) -> str:
        (n,) = self._unpack("<Q")
        if n > _MOST_NAME:
            raise self._bad(f"a name of {n} bytes")
        try:
            return self._take(n).decode()
        except UnicodeDecodeError:
            raise self._bad("a name is not UTF-8") from None

    def _value_type(self) -> GGUFValueType:
        (number,) = self._unpack("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._bad(f"no value type has the number {number}") from None

    def _key(self) -> KeyEntry:
        start = self._at
        name = self._name()
        type_ = self._value_type()
        value, item_type, count = self._at, None, 1
        if type_ == GGUFValueType.ARRAY:
            item_type = self._value_type()
            (count,) = self._unpack("<Q")
            if item_type == GGUFValueType.ARRAY or count > _MOST_ITEMS:
                raise self._bad(f"GGUF key {one_line(name)} is an array of {count} items of type {item_type.name}")
        items = type_ if item_type is None else item_type
        if items == GGUFValueType.STRING:
            for _ in range(count):
                self._skip(*self._unpack("<Q"))
        else:
            self._skip(count * struct.calcsize(NUMBER_FORMATS[items]))
        return KeyEntry(name, type_, item_type, count, start, value, self._at)

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._name()
        if name != one_line(name):  # no converter writes such names, and no message need then fear them
            raise self._bad(f"a tensor is called {one_line(name)}")
        (n_dims,) = self._unpack("<I")
        if not 1 <= n_dims <= _MOST_DIMS:
            raise self._bad(f"tensor {name} has {n_dims} dimensions")
        shape = self._unpack(f"<{n_dims}Q")
        number, offset = self._unpack("<IQ")
        try:
            type_ = GGMLQuantizationType(number)
        except ValueError:
            raise ModelFileError(
                f"{self._path}: tensor {name} has type {number}, which the installed gguf package does not know"
            ) from None
        return name, shape, type_, offset

    def _alignment(self, keys: dict[str, KeyEntry]) -> int:
        key = keys.get(Keys.General.ALIGNMENT)
        if key is None:
            return GGUF_DEFAULT_ALIGNMENT
        value = read_numbers(self._file, key)[0] if key.type == GGUFValueType.UINT32 else 0
        if value <= 0 or int(value) & (int(value) - 1):
            raise self._bad(f"{key.name} is no power of two")
        return int(value)

    def _placed(self, name: str, shape: tuple[int, ...], type_: GGMLQuantizationType, offset: int) -> TensorEntry:
        try:
            n_bytes = tensor_bytes(shape, type_)
        except ValueError as error:
            raise self._bad(f"tensor {name}: {error}") from None
        if offset + n_bytes > self._size:
            raise ModelFileError(
                f"{self._path}: tensor {name} lies past the end of the file ({self._size} bytes; truncated?)"
            )
        return TensorEntry(name, shape, type_, self._path, offset, n_bytes)


def read_numbers(file: BinaryIO, key: KeyEntry) -> tuple[Number, ...]:
    """The value of a key that holds a number or an array of them; a string has none, so the answer is empty."""
    if key.items not in NUMBER_FORMATS:
        return ()
    form = f"<{key.count}{NUMBER_FORMATS[key.items]}"
    file.seek(key.end - struct.calcsize(form))
    return struct.unpack(form, file.read(struct.calcsize(form)))


def read_text(file: BinaryIO, key: KeyEntry) -> str:
    """The value of a key that holds a string; "" for any other."""
    if key.type != GGUFValueType.STRING:
        return ""
    file.seek(key.value + 8)
    return file.read(key.end - key.value - 8).decode(errors="replace")
