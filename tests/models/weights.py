"""Values of generated tensors: random, sane in size, and encoded in a ggml type by ggml's own quantizer."""

from __future__ import annotations

import zlib

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from .ggml import ggml_base
from .layout import TensorSpec
from .vocabulary import WRITABLE_TOKENS

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

# Gains that keep every block's contribution to the residual near the size of the embedding, so that no layer drowns
# another and routing varies from token to token. Stronger attention was tried: it averages over the text, the residual
# stops changing, and greedy answers fall into one token.
_EXPERT_DOWN_GAIN = 3.0
_ROUTER_GAIN = 2.0
_OUTPUT_GAIN = 3.0
_VECTOR_SPREAD = 0.2
_EXPERT_SIZE_SPREAD = 0.7  # in powers of two


def ggml_type(name: str) -> GGMLQuantizationType:
    """The ggml type of that name, e.g. "Q4_K". Raises ValueError for an unknown one."""
    try:
        return GGMLQuantizationType[name]
    except KeyError:
        raise ValueError(f"no ggml type is called {name!r}") from None


def row_bytes(name: str, n_in: int) -> int:
    """Bytes of one row of n_in values. Raises ValueError when n_in is no multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[ggml_type(name)]
    if n_in % block:
        raise ValueError(f"{name} needs rows of a multiple of {block} values, not {n_in}")
    return n_in // block * size


def encode(values: FloatArray, name: str) -> ByteArray:
    """Encode values [..., n_in] in a ggml type; returns bytes [..., bytes of a row]."""
    n_in = values.shape[-1]
    shape = (*values.shape[:-1], row_bytes(name, n_in))
    values = np.ascontiguousarray(values, dtype=np.float32)
    if name == "F32":
        return values.view(np.uint8).reshape(shape)
    if name == "I32":
        return values.astype(np.int32).view(np.uint8).reshape(shape)
    if name == "F16":
        return values.astype(np.float16).view(np.uint8).reshape(shape)
    out = np.empty(shape, dtype=np.uint8)
    n_rows = values.size // n_in
    quantize = ggml_base().ggml_quantize_chunk
    written = quantize(int(ggml_type(name)), values.ctypes.data, out.ctypes.data, 0, n_rows, n_in, None)
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {name}, expected {out.nbytes}")
    return out


def tensor_rng(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each tensor: the values do not depend on the order of writing."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def random_values(spec: TensorSpec, seed: int) -> FloatArray:
    """Random values of a tensor, shape as in numpy (`ne[0]` last)."""
    rng = tensor_rng(seed, spec.name)
    shape = spec.shape[::-1]
    if spec.role == "expert_ids":  # spec.gain is the number of experts
        return np.argsort(rng.random((shape[0], int(spec.gain))), axis=1)[:, : shape[1]].astype(np.float32)
    values = rng.standard_normal(shape, dtype=np.float32)
    unit = np.float32(1 / np.sqrt(spec.shape[0]))  # keeps the size of activations through a matrix
    if spec.role == "norm":
        values = 1 + _VECTOR_SPREAD * values
    elif spec.role in ("bias", "output_bias"):
        values *= _VECTOR_SPREAD
    elif spec.role == "scale":
        values = np.exp2(_VECTOR_SPREAD * values)
    elif spec.role == "decay":
        values = -np.exp2(values)
    elif spec.role in ("matrix", "kernel"):
        values *= unit
    elif spec.role == "output":
        values *= _OUTPUT_GAIN * unit
    elif spec.role == "router":
        values *= _ROUTER_GAIN * unit
    elif spec.role == "expert":
        # Experts differ in size as well as in direction: mistaking one for another cannot go unnoticed.
        sizes = np.exp2(rng.uniform(-_EXPERT_SIZE_SPREAD, _EXPERT_SIZE_SPREAD, (shape[0], 1, 1))).astype(np.float32)
        values *= sizes * unit * (_EXPERT_DOWN_GAIN if ".ffn_down_" in spec.name else 1.0)
    if spec.role in ("output", "output_bias"):
        values[~WRITABLE_TOKENS] = 0  # greedy text stays readable and never ends by itself
    return (values * spec.gain).astype(np.float32)
