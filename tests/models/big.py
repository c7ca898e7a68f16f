"""Writes models with gigabytes of experts quickly: their rows are drawn from a small pool of encoded random rows."""

from __future__ import annotations

import functools
from pathlib import Path

import gguf
import numpy as np

from .container import EncodedTensor, write_tensors
from .facts import ModelFacts, read_facts
from .generator import open_writer, plan_model
from .weights import ByteArray, encode, ggml_type, random_values, tensor_rng

_GIB = 1 << 30
_POOL_ROWS = 4096


def write_big_model(
    path: Path,
    gib: float = 1.0,
    *,
    arch: str = "qwen3moe",
    expert_type: str = "Q4_0",
    n_expert: int = 64,
    n_expert_used: int = 4,
    n_embd: int = 1024,
    n_ff: int = 512,
    split: int | None = None,
    seed: int = 0,
) -> ModelFacts:
    """Write a model with at least `gib` GiB of experts; the number of blocks follows from it.

    Only the rows repeat, in random order: no two experts are alike. Takes about as long as writing the file does; holds
    one tensor in memory. Other parameters as in write_model(). Raises ValueError for sizes that do not fit the type.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type(expert_type)]
    layer_bytes = 3 * n_embd * n_ff * n_expert // block * block_bytes
    lead = plan_model(arch).dims.n_dense_lead
    n_layer = lead + int(np.ceil(gib * _GIB / layer_bytes))
    plan = plan_model(
        arch,
        expert_types=expert_type,
        n_layer=n_layer,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_embd=n_embd,
        n_ff=n_ff,
    )
    specs = {spec.name: spec for spec in plan.tensors}

    @functools.cache
    def pool(n_in: int) -> ByteArray:
        rows = tensor_rng(seed, f"pool {n_in}").standard_normal((_POOL_ROWS, n_in), dtype=np.float32)
        return encode(rows / np.float32(np.sqrt(n_in)), expert_type)

    def data(t: EncodedTensor) -> ByteArray:
        spec = specs[t.name]
        if spec.role != "expert":
            return encode(random_values(spec, seed), plan.types[t.name])
        rows = pool(spec.shape[0])
        n_rows = int(np.prod(spec.shape[1:]))
        return rows[tensor_rng(seed, t.name).integers(0, len(rows), n_rows, dtype=np.intp)]

    return read_facts(write_tensors(open_writer(path, plan), plan.encoded(), data, split or 1))
