"""What is in a model: sizes by class of tensor, its experts and the shapes they have.

Sizes of slots are those that pyengine gives its slots: the matrices of an expert one after another, each at a multiple
of 64 bytes, in slots of whole pages of 4096 bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import Keys

from gguf_tools.errors import ModelFileError, one_line
from gguf_tools.experts import PROJECTIONS, ExpertTensor, find_experts
from gguf_tools.model import Model, open_model
from gguf_tools.tensor_classes import CLASSES, EXPERT_CLASSES, tensor_class

_MATRIX_ALIGNMENT, _PAGE = 64, 4096

_EXPERT_WEIGHTS = frozenset(EXPERT_CLASSES.values())


@dataclass(frozen=True)
class ClassSize:
    """All tensors of one class. types: bytes by ggml type."""

    name: str
    tensors: int
    bytes: int
    types: dict[str, int]


@dataclass(frozen=True)
class Matrix:
    """One projection of one expert: values in, values out."""

    projection: str
    type: str
    n_in: int
    n_out: int
    bytes: int


@dataclass(frozen=True)
class ShapeClass:
    """Blocks whose experts have the same matrices. bytes: of one expert; slot_bytes: of the slot that holds it."""

    blocks: tuple[int, ...]
    experts: int
    matrices: tuple[Matrix, ...]
    bytes: int
    slot_bytes: int


@dataclass(frozen=True)
class Experts:
    """per_block: most experts in one block. used: by one token in one block, 0 if the metadata does not say.

    bytes_per_token: expert weights that one token needs, all blocks together. slot_bytes: for every expert a slot.
    """

    per_block: int
    used: int
    blocks: tuple[int, ...]
    total: int
    n_ff: tuple[int, ...]
    bytes: int
    bytes_per_expert: tuple[int, ...]
    bytes_per_token: int
    slot_bytes: int
    shape_classes: tuple[ShapeClass, ...]


@dataclass(frozen=True)
class Summary:
    """What inspect says. Sizes in bytes; tensor_bytes leaves out metadata and padding. experts: None in a dense model.

    other_bytes_per_token: weights besides experts that one token needs; of an embedding one row, unless it is the
    output matrix as well.
    """

    path: str
    files: int
    architecture: str
    name: str
    file_bytes: int
    tensor_bytes: int
    tensors: int
    classes: tuple[ClassSize, ...]
    other_bytes_per_token: int
    experts: Experts | None

    def as_json(self) -> dict[str, Any]:
        """Plain data: numbers, texts, lists and dictionaries."""
        return asdict(self)


def inspect_model(path: Path) -> Summary:
    """Look into a model; of a split one give the first part. Reads no tensor data.

    Raises:
        ModelFileError: a file is missing or damaged, or its numbers contradict each other.
        OSError: a file cannot be read.
    """
    model = open_model(path)
    return Summary(
        path=str(path),
        files=len(model.headers),
        architecture=model.architecture,
        name=one_line(model.text(Keys.General.NAME)),
        file_bytes=model.file_bytes,
        tensor_bytes=sum(t.n_bytes for t in model.tensors.values()),
        tensors=len(model.tensors),
        classes=_class_sizes(model),
        other_bytes_per_token=_other_bytes_per_token(model),
        experts=_experts(model),
    )


def _class_sizes(model: Model) -> tuple[ClassSize, ...]:
    count: Counter[str] = Counter()
    types: dict[str, Counter[str]] = {}
    for tensor in model.tensors.values():
        class_ = tensor_class(tensor.name)
        count[class_] += 1
        types.setdefault(class_, Counter())[tensor.type.name] += tensor.n_bytes
    return tuple(
        ClassSize(name, count[name], types[name].total(), dict(types[name].most_common()))
        for name in CLASSES
        if name in count
    )


def _other_bytes_per_token(model: Model) -> int:
    n = 0
    for tensor in model.tensors.values():
        if tensor.name.endswith("token_embd.weight") and (
            "output.weight" in model.tensors or tensor.name != "token_embd.weight"
        ):
            n += tensor.row_bytes
        elif tensor_class(tensor.name) not in _EXPERT_WEIGHTS:
            n += tensor.n_bytes
    return n


def _experts(model: Model) -> Experts | None:
    blocks: dict[int, list[ExpertTensor]] = {}
    for e in find_experts(model.tensors.values()).values():
        if not e.bias:
            blocks.setdefault(e.block, []).append(e)
    if not blocks:
        return None
    blocks = {block: sorted(blocks[block], key=lambda e: PROJECTIONS.index(e.projection)) for block in sorted(blocks)}
    for tensors in blocks.values():
        for e in tensors:
            if e.n_expert != tensors[0].n_expert or e.n_ff != tensors[0].n_ff:
                raise ModelFileError(f"{model.path}: tensor {e.tensor.name} does not fit {tensors[0].tensor.name}")
    used = model.count("expert_used_count")
    per_block = max(tensors[0].n_expert for tensors in blocks.values())
    if used > per_block:
        raise ModelFileError(f"{model.path}: {used} experts for a token do not fit the {per_block} there are")
    sizes = {block: sum(e.expert_bytes for e in tensors) for block, tensors in blocks.items()}
    classes = _shape_classes(blocks)
    return Experts(
        per_block=per_block,
        used=used,
        blocks=tuple(blocks),
        total=sum(tensors[0].n_expert for tensors in blocks.values()),
        n_ff=tuple(sorted({tensors[0].n_ff for tensors in blocks.values()})),
        bytes=sum(e.tensor.n_bytes for tensors in blocks.values() for e in tensors),
        bytes_per_expert=tuple(sorted(set(sizes.values()))),
        bytes_per_token=used * sum(sizes.values()),
        slot_bytes=sum(c.experts * c.slot_bytes for c in classes),
        shape_classes=classes,
    )


def _shape_classes(blocks: Mapping[int, list[ExpertTensor]]) -> tuple[ShapeClass, ...]:
    members: dict[tuple[Matrix, ...], list[int]] = {}
    for block, tensors in blocks.items():
        matrices = tuple(
            Matrix(e.projection, e.tensor.type.name, e.tensor.shape[0], e.tensor.shape[1], e.expert_bytes)
            for e in tensors
        )
        members.setdefault(matrices, []).append(block)
    return tuple(
        ShapeClass(
            blocks=tuple(of),
            experts=sum(blocks[block][0].n_expert for block in of),
            matrices=matrices,
            bytes=sum(m.bytes for m in matrices),
            slot_bytes=_rounded(sum(_rounded(m.bytes, _MATRIX_ALIGNMENT) for m in matrices), _PAGE),
        )
        for matrices, of in members.items()
    )


def _rounded(n: int, to: int) -> int:
    return -(-n // to) * to
