"""Copies of a model with a single weight of a single expert changed: proof that a test of exactness can fail."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from .facts import ExpertTensor, ModelFacts, read_facts
from .weights import ggml_type

_PART = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Mutation:
    """A copy of a model and what differs in it: the weight at [expert, row, column] of a tensor."""

    facts: ModelFacts
    tensor: str
    expert: int
    row: int
    column: int
    before: float
    after: float


def mutate(
    source: ModelFacts, path: Path, tensor: ExpertTensor, *, expert: int, row: int = 0, block: int = 0
) -> Mutation:
    """Copy a model and change one weight in one quantisation block, as much as flipping one bit can.

    path: the file to write; of a split model the stem of its parts. row, block: which output row of the expert, and
    which block of the type's block size in it. Raises IndexError outside the tensor, and ValueError when no flipped bit
    changes exactly one weight.
    """
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type(tensor.type)]
    n_in, n_rows, n_expert = tensor.shape
    n_blocks = n_in // block_size
    if not (0 <= expert < n_expert and 0 <= row < n_rows and 0 <= block < n_blocks):
        raise IndexError(f"{tensor.name} has no block {block} in row {row} of expert {expert}")
    copies = {part: _copy_name(part, path) for part in source.files}
    for part, copy in copies.items():
        shutil.copyfile(part, copy)
    offset = tensor.offset + expert * tensor.stride + (row * n_blocks + block) * block_bytes
    with copies[tensor.path].open("r+b") as file:
        file.seek(offset)
        original = np.frombuffer(file.read(block_bytes), dtype=np.uint8)
        changed, index, before, after = _change_one_weight(original, tensor.type)
        file.seek(offset)
        file.write(changed.tobytes())
    return Mutation(
        read_facts(list(copies.values())), tensor.name, expert, row, block * block_size + index, before, after
    )


def mutate_first_layer(source: ModelFacts, path: Path, *, expert: int, direction: str) -> ModelFacts:
    """The same for an expert of the first layer that has some. direction: "inward" or "down"."""
    projections = {t.projection for t in source.expert_tensors}
    projection = "down" if direction == "down" else "gate_up" if "gate_up" in projections else "up"
    return mutate(source, path, source.expert_tensor(source.expert_blocks[0], projection), expert=expert).facts


def _copy_name(part: Path, path: Path) -> Path:
    suffix = _PART.search(part.stem)
    return path.with_name(path.stem + suffix[0] + path.suffix) if suffix else path


def _change_one_weight(block: NDArray[np.uint8], type_name: str) -> tuple[NDArray[np.uint8], int, float, float]:
    """The block with one weight changed, that weight's index, and its value before and after."""
    masks = np.array([1 << bit for bit in range(8)], dtype=np.uint8)
    n = block.size
    candidates = np.repeat(block[None], n * masks.size, axis=0)
    rows = np.arange(len(candidates))
    candidates[rows, rows // masks.size] ^= masks[rows % masks.size]
    kind = ggml_type(type_name)
    before = _decode(block[None], kind)[0]
    with np.errstate(all="ignore"):  # a flipped bit may make a scale infinite; such candidates are dropped
        after = _decode(candidates, kind)
        change = np.abs(after - before)
    differs = (after != before).sum(axis=1) == 1
    # Within twice the block's largest weight the copy stays a plausible model: no overflow hides behind the difference.
    plausible = np.isfinite(after).all(axis=1) & (change.max(axis=1) <= 2.001 * np.abs(before).max())
    usable = differs & plausible
    if not usable.any():
        raise ValueError(f"no flipped bit changes exactly one weight of this {type_name} block")
    best = int(np.where(usable, change.max(axis=1, initial=0), -1).argmax())
    index = int(change[best].argmax())
    return candidates[best], index, float(before[index]), float(after[best, index])


def _decode(blocks: NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    return np.asarray(gguf.quants.dequantize(blocks, kind), dtype=np.float32)
