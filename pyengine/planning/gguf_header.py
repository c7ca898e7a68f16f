"""A GGUF file's keys and tensors, read by ggml itself: fast with any vocabulary, and it has met damaged files before.

Only for files that NativeEngine has accepted: what ggml would meet with an assertion has been refused there.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from os import fsencode
from pathlib import Path
from typing import Any

from pyengine.errors import ModelFileError
from pyengine.startup import GGML_LIBRARY

# enum gguf_type of gguf.h
_STRING, _ARRAY = 8, 9
_NUMBERS: dict[int, Any] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    6: ctypes.c_float,
    7: ctypes.c_bool,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
    12: ctypes.c_double,
}

Value = str | float | int | list[float | int]


class _InitParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = (("no_alloc", c_bool), ("ctx", c_void_p))


#: Result type and argument types of what is used of gguf.h.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "gguf_init_from_file": (c_void_p, [c_char_p, _InitParams]),
    "gguf_free": (None, [c_void_p]),
    "gguf_get_n_kv": (c_int64, [c_void_p]),
    "gguf_get_key": (c_char_p, [c_void_p, c_int64]),
    "gguf_get_kv_type": (c_int, [c_void_p, c_int64]),
    "gguf_get_arr_type": (c_int, [c_void_p, c_int64]),
    "gguf_get_arr_n": (c_size_t, [c_void_p, c_int64]),
    "gguf_get_arr_data": (c_void_p, [c_void_p, c_int64]),
    "gguf_get_val_data": (c_void_p, [c_void_p, c_int64]),
    "gguf_get_val_str": (c_char_p, [c_void_p, c_int64]),
    "gguf_get_data_offset": (c_size_t, [c_void_p]),
    "gguf_get_n_tensors": (c_int64, [c_void_p]),
    "gguf_get_tensor_name": (c_char_p, [c_void_p, c_int64]),
    "gguf_get_tensor_ne": (POINTER(c_int64), [c_void_p, c_int64]),
    "gguf_get_tensor_type": (c_int, [c_void_p, c_int64]),
    "gguf_get_tensor_size": (c_size_t, [c_void_p, c_int64]),
    "gguf_get_tensor_offset": (c_size_t, [c_void_p, c_int64]),
}


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, int, int, int]
    """elements, the contiguous dimension first, as ggml's ne"""
    ggml_type: int
    n_bytes: int
    offset: int
    """of its first byte in the file"""


@dataclass(frozen=True)
class GgufHeader:
    keys: dict[str, Value]
    """all but arrays of texts, which are vocabularies"""
    tensors: list[Tensor]

    def number(self, key: str, otherwise: int) -> int:
        """The key's value; `otherwise` if it is absent or no number."""
        value = self.keys.get(key, otherwise)
        return int(value) if isinstance(value, (int, float)) else otherwise

    def per_layer(self, key: str, n_layer: int, otherwise: int) -> list[int]:
        """One number per layer, which the file gives as an array or as one number for all."""
        value = self.keys.get(key, otherwise)
        if isinstance(value, list):
            return [int(v) for v in value[:n_layer]] + [otherwise] * (n_layer - len(value))
        return [int(value) if isinstance(value, (int, float)) else otherwise] * n_layer


def read_header(path: Path) -> GgufHeader:
    """Keys and tensors of one file. Raises ModelFileError."""
    gguf = _library()
    context = gguf.gguf_init_from_file(fsencode(path), _InitParams(True, None))
    if not context:
        raise ModelFileError(f"{path}: the GGUF metadata cannot be read")
    try:
        keys = {}
        for i in range(gguf.gguf_get_n_kv(context)):
            value = _value(gguf, context, i)
            if value is not None:
                keys[gguf.gguf_get_key(context, i).decode("utf-8", "replace")] = value
        start = gguf.gguf_get_data_offset(context)
        tensors = [
            Tensor(
                gguf.gguf_get_tensor_name(context, i).decode("utf-8", "replace"),
                tuple(gguf.gguf_get_tensor_ne(context, i)[:4]),
                gguf.gguf_get_tensor_type(context, i),
                gguf.gguf_get_tensor_size(context, i),
                start + gguf.gguf_get_tensor_offset(context, i),
            )
            for i in range(gguf.gguf_get_n_tensors(context))
        ]
        return GgufHeader(keys, tensors)
    finally:
        gguf.gguf_free(context)


def _value(gguf: Any, context: int, i: int) -> Value | None:
    kind = gguf.gguf_get_kv_type(context, i)
    if kind == _STRING:
        text: str = gguf.gguf_get_val_str(context, i).decode("utf-8", "replace")
        return text
    if kind == _ARRAY:
        number = _NUMBERS.get(gguf.gguf_get_arr_type(context, i))
        if number is None:
            return None
        n = gguf.gguf_get_arr_n(context, i)
        return list((number * n).from_address(gguf.gguf_get_arr_data(context, i))) if n else []
    number = _NUMBERS.get(kind)
    if number is None:
        return None
    value: int | float = number.from_address(gguf.gguf_get_val_data(context, i)).value
    return value


@cache
def _library() -> Any:
    import llama_cpp  # noqa: F401  (loads the library that is named here)

    library = ctypes.CDLL(GGML_LIBRARY)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def split_files(path: Path, header: GgufHeader) -> list[Path]:
    """All files of a model, of which `path` is the first (GGUF key split.count)."""
    n_file = header.number("split.count", 1)
    tail = f"-{1:05d}-of-{n_file:05d}.gguf"
    if n_file <= 1 or not path.name.endswith(tail):
        return [path]
    stem = path.name.removesuffix(tail)
    return [path.with_name(f"{stem}-{i:05d}-of-{n_file:05d}.gguf") for i in range(1, n_file + 1)]
