"""What widening rests on: bytes of zero decode to zeros in every type that experts can have."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from models.ggml import ggml_base
from models.grid import MORE_TYPES, TYPES

_NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}  # numbers of other kinds, and types of activations
WEIGHTS = [t for t in GGMLQuantizationType if t.name not in _NO_WEIGHTS]


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


def ggml_decode(raw: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    """Values of encoded bytes, by the function that ggml's own reference kernels decode with."""
    if type_ == GGMLQuantizationType.F32:
        return raw.view(np.float32)
    find = ggml_base().ggml_get_type_traits
    find.restype, find.argtypes = ctypes.POINTER(_TypeTraits), [ctypes.c_int]
    traits = find(int(type_)).contents
    block, size = GGML_QUANT_SIZES[type_]
    assert (traits.blck_size, traits.type_size) == (block, size), "gguf and ggml mean the same type"
    out = np.full(raw.nbytes // size * block, np.nan, dtype=np.float32)
    traits.to_float(raw.ctypes.data, out.ctypes.data, out.size)
    return out


def test_all_types_of_the_generator_are_among_these() -> None:
    assert {*TYPES, *MORE_TYPES} <= {t.name for t in WEIGHTS}


@pytest.mark.parametrize("type_", WEIGHTS, ids=lambda t: t.name)
def test_zero_bytes_are_zeros(type_: GGMLQuantizationType) -> None:
    zeros = ggml_decode(np.zeros(4 * GGML_QUANT_SIZES[type_][1], dtype=np.uint8), type_)
    assert zeros.size == 4 * GGML_QUANT_SIZES[type_][0]
    assert not zeros.any()  # NaN would count as true
    other = ggml_decode(np.full(4 * GGML_QUANT_SIZES[type_][1], 0x3A, dtype=np.uint8), type_)
    assert other.any(), "the check can fail"


@pytest.mark.parametrize("type_", [t for t in WEIGHTS if t.name != "Q1_0"], ids=lambda t: t.name)
def test_the_gguf_package_agrees(type_: GGMLQuantizationType) -> None:
    zeros = np.zeros((2, 4 * GGML_QUANT_SIZES[type_][1]), dtype=np.uint8)
    if type_ in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
        zeros = zeros.view(np.float16 if type_ == GGMLQuantizationType.F16 else np.float32)
    assert not gguf.quants.dequantize(zeros, type_).any()
