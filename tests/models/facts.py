"""What a test may want to know about a generated model, read back from its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

_EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight")


@dataclass(frozen=True)
class ExpertTensor:
    """Where the experts of one projection of one block lie.

    shape: `ne[0]` first, the last is the number of experts. offset: bytes from the start of the file. stride: bytes
    from one expert to the next. computed: False for blocks that llama.cpp skips (multi-token prediction).
    """

    name: str
    block: int
    projection: str  # gate | up | down | gate_up
    type: str
    shape: tuple[int, int, int]
    path: Path
    offset: int
    stride: int
    computed: bool

    @property
    def n_bytes(self) -> int:
        return self.stride * self.shape[2]


@dataclass(frozen=True)
class ModelFacts:
    """A generated model. path is the file to load (the first part of a split model); sizes in bytes.

    expert_blocks: blocks whose experts are computed. other_bytes: tensors that are no experts, as far as llama.cpp
    loads them by default.
    """

    path: Path
    files: tuple[Path, ...]
    arch: str  # GGUF key general.architecture
    n_layer: int  # blocks that llama.cpp computes
    n_expert: int
    n_expert_used: int  # the most of any block
    n_vocab: int
    expert_tensors: tuple[ExpertTensor, ...]
    other_bytes: int

    @property
    def expert_blocks(self) -> tuple[int, ...]:
        return tuple(sorted({t.block for t in self.expert_tensors if t.computed}))

    @property
    def expert_bytes(self) -> int:
        """Of computed blocks."""
        return sum(t.n_bytes for t in self.expert_tensors if t.computed)

    @property
    def shape_classes(self) -> frozenset[tuple[tuple[str, str, tuple[int, int]], ...]]:
        """The different kinds of expert among the computed blocks: (projection, type, shape) of their tensors."""
        kinds = (
            tuple(sorted((t.projection, t.type, t.shape[:2]) for t in self.expert_tensors if t.block == block))
            for block in self.expert_blocks
        )
        return frozenset(kinds)

    def expert_tensor(self, block: int, projection: str) -> ExpertTensor:
        """Raises KeyError when the block has no such tensor."""
        for t in self.expert_tensors:
            if (t.block, t.projection) == (block, projection):
                return t
        raise KeyError(f"block {block} has no {projection} experts")


def read_facts(files: Sequence[Path]) -> ModelFacts:
    """Read a model's facts from its file, or from all parts of a split model in order."""
    readers = [gguf.GGUFReader(path) for path in files]
    fields = readers[0].fields
    arch = str(fields["general.architecture"].contents())

    def count(key: str) -> int:
        value = fields[f"{arch}.{key}"].contents() if f"{arch}.{key}" in fields else 0
        return max(value) if isinstance(value, list) else int(value)  # a list: one for each block

    n_layer = count("block_count") - count("nextn_predict_layers")
    expert_tensors, other_bytes = [], 0
    for path, reader in zip(files, readers, strict=True):
        for t in reader.tensors:
            match = _EXPERT_TENSOR.fullmatch(t.name)
            shape = tuple(int(n) for n in t.shape)
            block = re.match(r"blk\.(\d+)\.", t.name)
            computed = block is None or int(block[1]) < n_layer
            if match:
                expert_tensors.append(
                    ExpertTensor(
                        name=t.name,
                        block=int(match[1]),
                        projection=match[2],
                        type=t.tensor_type.name,
                        shape=(shape[0], shape[1], shape[2]),
                        path=path,
                        offset=int(t.data_offset),
                        stride=int(t.n_bytes) // shape[2],
                        computed=computed,
                    )
                )
            elif computed:
                other_bytes += int(t.n_bytes)
    return ModelFacts(
        path=files[0],
        files=tuple(files),
        arch=arch,
        n_layer=n_layer,
        n_expert=count("expert_count"),
        n_expert_used=count("expert_used_count"),
        n_vocab=len(fields["tokenizer.ggml.tokens"].data),
        expert_tensors=tuple(sorted(expert_tensors, key=lambda t: (t.block, t.projection))),
        other_bytes=other_bytes,
    )
