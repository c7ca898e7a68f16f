"""The few functions of the installed libggml-base that tests call directly."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any


@functools.cache
def ggml_base() -> Any:
    """The library that llama-cpp-python ships, with the prototypes of what is used. Raises ImportError without it."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise ImportError("llama-cpp-python is not installed")
    folder = Path(package.origin).parent / "lib"
    library = next(p for p in sorted(folder.iterdir()) if p.stem.split(".")[0].endswith("ggml-base"))
    ggml = ctypes.CDLL(str(library))
    tensor = ctypes.c_void_p
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [tensor]
    ggml.ggml_nbytes.restype, ggml.ggml_nbytes.argtypes = ctypes.c_size_t, [tensor]
    ggml.ggml_nrows.restype, ggml.ggml_nrows.argtypes = ctypes.c_int64, [tensor]
    ggml.ggml_backend_tensor_get.restype = None
    ggml.ggml_backend_tensor_get.argtypes = [tensor, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return ggml
