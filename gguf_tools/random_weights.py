"""Random weights of sane size, as fast as a disk takes them.

Values are normal with the variance that keeps the size of activations through a matrix (1 / n_in). Encoded blocks are
drawn once into a pool for each type and size; a matrix is the pool, round and round, from a place of its own. So any
two matrices of a kind differ everywhere, though their blocks repeat.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from gguf_tools.layouts import TensorSpec

ByteArray = NDArray[np.uint8]

# A prime: then steps of any length visit every block before they return to the first. More than any model has matrices.
_POOL_BLOCKS = 65_521
_STEP = round(_POOL_BLOCKS * (math.sqrt(5) - 1) / 2)

# Strong enough that the experts of a token stand out from the others, weak enough that all are used.
_ROUTER_GAIN = 2.0
_BIAS_SPREAD, _NORM_SPREAD = 0.02, 0.05


class RandomWeights:
    """Bytes for the tensors of one model; the seed and the order of the calls decide them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._matrices = 0
        self._pool = functools.cache(self._make_pool)

    def quantised(self, spec: TensorSpec, type_: GGMLQuantizationType, zero_rows: int = 0) -> Iterator[ByteArray]:
        """The tensor's bytes in pieces; each expert is a matrix of its own. Of a single matrix the first `zero_rows`
        are zeros."""
        block, block_bytes = GGML_QUANT_SIZES[type_]
        pool = self._pool(type_, spec.shape[0])
        n_matrices = spec.shape[2] if len(spec.shape) == 3 else 1
        n_zero = spec.shape[0] // block * zero_rows
        n_blocks = spec.shape[0] // block * spec.shape[1] - n_zero
        yield np.zeros(n_zero * block_bytes, dtype=np.uint8)
        for _ in range(n_matrices):
            at = self._matrices * _STEP % _POOL_BLOCKS
            self._matrices += 1
            left = n_blocks
            while left:
                n = min(left, _POOL_BLOCKS - at)
                yield pool[at : at + n].reshape(-1)
                left, at = left - n, 0

    def floats(self, spec: TensorSpec) -> ByteArray:
        """The bytes of a small tensor of F32."""
        values = self._rng(spec.name).standard_normal(spec.shape[::-1], dtype=np.float32)
        if spec.role == "router":
            values *= np.float32(_ROUTER_GAIN / math.sqrt(spec.shape[0]))
        elif spec.role == "norm":
            values = 1 + np.float32(_NORM_SPREAD) * values
        else:
            values *= np.float32(_BIAS_SPREAD)
        return np.ascontiguousarray(values).view(np.uint8).reshape(-1)

    def _make_pool(self, type_: GGMLQuantizationType, n_in: int) -> ByteArray:
        rng = self._rng(f"{type_.name} {n_in}")
        values = rng.standard_normal((_POOL_BLOCKS, GGML_QUANT_SIZES[type_][0]), dtype=np.float32)
        pool: ByteArray = gguf.quants.quantize(values / np.float32(math.sqrt(n_in)), type_)
        return pool

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(name.encode())])
