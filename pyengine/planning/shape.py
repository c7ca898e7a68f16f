"""What a model needs, from its metadata alone: experts, slots, other weights, memory per token of context."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pyengine.native import ModelInfo, NativeEngine
from pyengine.planning.gguf_header import GgufHeader, Tensor, read_header, split_files

_EXPERT_WEIGHT = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight")

#: ggml's number of f16, of which llama_cpp makes the KV cache unless told otherwise.
F16 = 1

#: Bytes of an element of the types that it can be made of, by ggml's number: f32, f16, bf16, q4_0, q4_1, q5_0, q5_1,
#: q8_0, iq4_nl.
_KV_ELEMENT = {0: 4, F16: 2, 30: 2, 2: 18 / 32, 3: 20 / 32, 6: 22 / 32, 7: 24 / 32, 8: 34 / 32, 20: 18 / 32}

#: Keep no cache, for they compute the whole text at once; or another than this arithmetic knows.
_NO_CACHE = frozenset({"llada-moe", "nomic-bert-moe", "rnd1"})
_OTHER_CACHE = frozenset({"deepseek4"})


@dataclass(frozen=True)
class ShapeClass:
    """Layers whose experts are alike; they share slots."""

    layers: tuple[int, ...]
    """indices among the layers that have experts"""
    n_expert: int
    """in each layer"""
    expert_bytes: int
    """of one expert in the file"""
    n_matrix: int
    """matrices of one expert"""


@dataclass(frozen=True)
class ModelShape:
    path: Path
    info: ModelInfo
    classes: tuple[ShapeClass, ...]
    kv_bytes_per_token: int
    """of context, all layers"""
    n_ctx_train: int
    """GGUF key <arch>.context_length"""

    @property
    def other_bytes(self) -> int:
        """Weights that are no experts, with the file's metadata."""
        return self.info.file_bytes - self.info.expert_bytes

    @property
    def expert_bytes(self) -> float:
        """Mean bytes of one expert in the file."""
        return self.info.expert_bytes / self.info.n_experts_total

    @property
    def slot_bytes(self) -> float:
        """Mean bytes of one slot."""
        return self.info.slot_bytes / self.info.n_experts_total

    def slots(self, budget: int) -> list[int]:
        """Slots that a budget gives to each class, as the native engine divides it: the least that it can work with
        each, then by size."""
        share = (min(budget, self.info.slot_bytes) - self.info.least_budget) / max(
            1, self.info.slot_bytes - self.info.least_budget
        )
        one_each = sum(c.expert_bytes for c in self.classes) / self.expert_bytes * self.slot_bytes
        least = max(1, round(self.info.least_budget / one_each))  # more than one on a GPU
        slots = []
        for c in self.classes:
            n = c.n_expert * len(c.layers)
            # The engine gives what rounding leaves to whoever fits; half an expert is nearer than rounding down.
            slots.append(least + min(n - least, int(max(0.0, share) * (n - least) + 1e-6)))
        return slots


def is_expert_weight(name: str) -> bool:
    """Whether a tensor of this name holds the weights of experts."""
    return _EXPERT_WEIGHT.fullmatch(name) is not None


def read_shape(path: Path) -> ModelShape:
    """Read the metadata of a managed model (of a split one: its first file).

    Raises:
        ModelFileError: the file is missing or damaged.
        UnmanagedModelError: it has no experts, or experts that this engine does not know how to manage.
    """
    engine = NativeEngine(path)
    try:
        info = engine.info
    finally:
        engine.close()
    header = read_header(path)
    tensors = header.tensors + [t for file in split_files(path, header)[1:] for t in read_header(file).tensors]
    arch = info.architecture
    return ModelShape(
        path=path,
        info=info,
        classes=_classes(tensors),
        kv_bytes_per_token=kv_bytes_per_token(header, arch, tensors),
        n_ctx_train=header.number(f"{arch}.context_length", 0),
    )


def _classes(tensors: list[Tensor]) -> tuple[ShapeClass, ...]:
    """Layers with the same matrices (role, type, size) share a class, as in the native engine."""
    layers: dict[int, list[tuple[str, Tensor]]] = {}
    for tensor in tensors:
        found = _EXPERT_WEIGHT.fullmatch(tensor.name)
        if found:
            layers.setdefault(int(found[1]), []).append((found[2], tensor))
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, block in enumerate(sorted(layers)):
        matrices = sorted(layers[block], key=lambda m: m[0])
        alike.setdefault(tuple((role, t.ggml_type, t.shape, t.n_bytes) for role, t in matrices), []).append(index)
    classes = []
    for matrices_, members in alike.items():
        n_expert = matrices_[0][2][2]  # type: ignore[index]
        total = sum(m[3] for m in matrices_)  # type: ignore[index]
        classes.append(ShapeClass(tuple(members), n_expert, total // n_expert, len(matrices_)))
    return tuple(classes)


def looks_back(header: GgufHeader, arch: str) -> bool:
    """Whether its attention sees the tokens before, and none after (<arch>.attention.causal)."""
    return arch not in _NO_CACHE and bool(header.number(f"{arch}.attention.causal", 1))


def kv_bytes_per_token(
    header: GgufHeader, arch: str, tensors: Iterable[Tensor] = (), type_k: int = F16, type_v: int = F16
) -> int:
    """Bytes of KV cache per token of context, from <arch>.block_count, attention.head_count(_kv), key_length and
    value_length. With multi-head latent attention (attention.key_length_mla) the compressed keys are all there is;
    layers of linear attention, which `tensors` show, keep none. 0 where it is not known."""
    if arch in _NO_CACHE | _OTHER_CACHE:
        return 0
    n_layer = header.number(f"{arch}.block_count", 0) - header.number(f"{arch}.nextn_predict_layers", 0)
    heads = header.per_layer(f"{arch}.attention.head_count", n_layer, 0)
    names = {tensor.name for tensor in tensors}
    kv_heads = [
        0
        if {f"blk.{i}.attn_gate.weight", f"blk.{i}.attn_qkv.weight"} <= names
        else header.per_layer(f"{arch}.attention.head_count_kv", n_layer, own)[i]
        for i, own in enumerate(heads)
    ]
    width = header.number(f"{arch}.embedding_length", 0)
    plain = width // max(1, *heads, 1)
    key = header.number(f"{arch}.attention.key_length", plain)
    value = header.number(f"{arch}.attention.value_length", plain)
    if header.number(f"{arch}.attention.key_length_mla", 0):
        value = 0  # a view of the keys
    return int(sum(kv_heads) * (key * _KV_ELEMENT.get(type_k, 0) + value * _KV_ELEMENT.get(type_v, 0)))
