"""LoRA adapters for generated models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from .container import EncodedTensor, PartWriter, write_tensors
from .facts import ModelFacts
from .weights import ByteArray, tensor_rng

Target = Literal["attention", "experts", "both"]

_STRENGTH = 2.0  # large enough that a missing adapter changes the likeliest token


def write_adapter(
    path: Path, model: ModelFacts, target: Target = "attention", *, rank: int = 4, seed: int = 0
) -> list[str]:
    """Write a random LoRA adapter and return the names of the tensors it changes.

    attention: the output projection of every block's attention, the one matrix that all architectures share and all
    graphs of llama.cpp adapt. experts: every projection of every computed block's experts. alpha equals the rank: the
    adapter has its full strength at scale 1.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if target in ("attention", "both"):
        readers = [gguf.GGUFReader(part) for part in model.files]
        tensors = (t for reader in readers for t in reader.tensors)
        outputs = {f"blk.{i}.attn_output.weight" for i in range(model.n_layer)}
        shapes |= {t.name: tuple(int(n) for n in t.shape) for t in tensors if t.name in outputs}
    if target in ("experts", "both"):
        shapes |= {t.name: t.shape for t in model.expert_tensors if t.computed}
    writer = PartWriter(path, model.arch, gguf.GGUF_DEFAULT_ALIGNMENT)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    pairs = [t for name in sorted(shapes) for t in _pair(name, shapes[name], rank)]

    def data(t: EncodedTensor) -> ByteArray:
        values = tensor_rng(seed, t.name).standard_normal(t.shape, dtype=np.float32)
        values *= _STRENGTH / np.sqrt(t.shape[-1])
        return values.view(np.uint8)

    write_tensors(writer, pairs, data)
    return sorted(shapes)


def _pair(name: str, shape: Sequence[int], rank: int) -> list[EncodedTensor]:
    """Both factors of the change to a tensor of that shape (`ne[0]` first); each expert has its own."""
    n_in, n_out, *n_expert = shape
    out = []
    for suffix, factor in (("lora_a", (*n_expert, rank, n_in)), ("lora_b", (*n_expert, n_out, rank))):
        out.append(EncodedTensor(f"{name}.{suffix}", factor, gguf.GGMLQuantizationType.F32, 4 * int(np.prod(factor))))
    return out
