"""Writes tiny random mixture-of-experts models that llama.cpp loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .architecture import Architecture, model_keys, model_tensors
from .architectures import ARCHITECTURES
from .container import EncodedTensor, PartWriter, add_metadata, write_tensors
from .facts import ModelFacts, read_facts
from .layout import Dims, TensorSpec
from .vocabulary import N_TOKEN_TYPES, N_VOCAB, add_vocabulary
from .weights import ByteArray, encode, ggml_type, random_values, row_bytes, tensor_rng

# One type for all, or one for each projection, or a list of these that the blocks take in turn.
LayerTypes = str | Mapping[str, str]
ExpertTypes = LayerTypes | Sequence[LayerTypes]

LEAST_ALIGNMENT = 32
_MATRIX_ROLES = ("matrix", "embedding", "output")


@dataclass(frozen=True)
class Plan:
    """A model about to be written."""

    arch: Architecture
    dims: Dims
    tensors: tuple[TensorSpec, ...]
    types: Mapping[str, str]  # tensor name -> ggml type

    def encoded(self) -> list[EncodedTensor]:
        """What will be written, without the bytes. Raises ValueError when a type does not fit a tensor's rows."""
        out = []
        for spec in self.tensors:
            name = self.types[spec.name]
            n_rows = int(np.prod(spec.shape[1:]))
            out.append(
                EncodedTensor(spec.name, spec.shape[::-1], ggml_type(name), n_rows * row_bytes(name, spec.shape[0]))
            )
        return out


def plan_model(
    arch: str,
    *,
    expert_types: ExpertTypes = "Q4_0",
    dense_type: str = "F16",
    n_layer: int | None = None,
    n_expert: int = 8,
    n_expert_used: int | None = None,
    n_embd: int = 96,
    n_ff: int = 64,
    n_head: int | None = None,
    n_mtp: int = 0,
    merged_gate_up: bool = False,
    gate: bool = True,
    expert_scales: bool = False,
) -> Plan:
    """Decide on tensors, shapes and types; parameters as in write_model()."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    a = ARCHITECTURES[arch]
    for wanted, possible, what in (
        (merged_gate_up, a.can_merge, "merged gate and up experts"),
        (not gate, a.can_drop_gate, "experts without a gate"),
        (expert_scales, a.can_scale, "scales of experts"),
    ):
        if wanted and not possible:
            raise ValueError(f"llama.cpp knows no {what} for {arch}")
    if n_head is None:
        n_head = n_embd // _head_dim(n_embd)
    n_layer = a.n_layer if n_layer is None else n_layer
    dims = Dims(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv={"all": n_head, "one": 1, "fewer": n_head // 2 if n_head % 2 == 0 else 1}[a.kv_heads],
        head_dim=n_embd // n_head,
        n_ff=n_ff + 32,
        n_ff_exp=n_ff,
        n_ff_shexp={"none": 0}.get(a.shared, a.shared_count * n_ff if a.shared_count else n_ff + 32),
        n_expert=n_expert,
        n_expert_used=min(a.n_expert_used, n_expert) if n_expert_used is None else n_expert_used,
        n_dense_lead=min(a.dense_lead, n_layer - 1),
        moe_step=a.moe_step,
        n_mtp=n_mtp,
        n_vocab=N_VOCAB,
    )
    layout = replace(a.layout, merged_gate_up=merged_gate_up, gate=gate and a.layout.gate, scales=expert_scales)
    tensors = tuple(model_tensors(a, dims, layout))
    return Plan(a, dims, tensors, _types(tensors, dims, expert_types, dense_type))


def write_model(
    path: Path,
    arch: str,
    *,
    seed: int = 0,
    split: int | None = None,
    alignment: int = 32,
    shuffle: bool = True,
    **sizes: Any,
) -> ModelFacts:
    """Write a random model that llama.cpp loads, and say what is in it.

    path: the file; of a split model the stem, its parts are called `<stem>-00001-of-0000N.gguf`.
    arch: an id of ARCHITECTURES.
    seed: decides the weights and the order of tensors in the file.
    split: number of parts, None for one plain file.
    alignment: general.alignment in bytes, a power of two from 32 (stock llama.cpp aborts below); a large one makes wide
        gaps between tensors.
    shuffle: write tensors in random order, so that nothing can lean on their order.
    sizes: expert_types: a ggml type name, or a mapping from projection (gate, up, down, gate_up) to one, or a list of
        either that the blocks with experts take in turn. dense_type: type of the other matrices. n_layer: blocks.
        n_expert, n_expert_used: experts in a block, and for one token. n_embd, n_ff: values of the residual and of one
        expert's hidden layer. n_head: query heads. n_mtp: more blocks, for multi-token prediction. merged_gate_up: one
        tensor for gate and up. gate: False for experts of up and down only. expert_scales: a factor for each expert.

    Raises ValueError for sizes that do not fit the types, or a layout that llama.cpp does not know for the
    architecture; nothing is written then.
    """
    if alignment < LEAST_ALIGNMENT:
        raise ValueError(f"stock llama.cpp cannot map a file of alignment {alignment}")
    plan = plan_model(arch, **sizes)
    specs = {spec.name: spec for spec in plan.tensors}

    def data(t: EncodedTensor) -> ByteArray:
        return encode(random_values(specs[t.name], seed), plan.types[t.name])

    tensors = plan.encoded()
    if shuffle:
        order = tensor_rng(seed, "order").permutation(len(tensors))
        tensors = [tensors[i] for i in order]
    writer = open_writer(path, plan, alignment)
    return read_facts(write_tensors(writer, tensors, data, split or 1))


def open_writer(path: Path, plan: Plan, alignment: int = 32) -> PartWriter:
    """A writer with all metadata of the model."""
    writer = PartWriter(path, plan.arch.name, alignment)
    writer.add_name(f"random {plan.arch.name}")
    writer.add_quantization_version(2)
    add_metadata(writer, {f"{plan.arch.name}.{key}": v for key, v in model_keys(plan.arch, plan.dims).items()})
    add_vocabulary(writer)
    if plan.arch.embeds:
        writer.add_token_type_count(N_TOKEN_TYPES)
    return writer


def _head_dim(n_embd: int) -> int:
    """The largest even divisor up to 32: rotary embedding turns pairs."""
    sizes = [n for n in range(32, 0, -2) if n_embd % n == 0]
    if not sizes:
        raise ValueError(f"n_embd must be even, not {n_embd}")
    return sizes[0]


def _types(tensors: Sequence[TensorSpec], dims: Dims, expert_types: ExpertTypes, dense_type: str) -> dict[str, str]:
    in_turn = [expert_types] if isinstance(expert_types, str | Mapping) else list(expert_types)
    blocks = [i for i in range(dims.n_layer + dims.n_mtp) if dims.has_experts(i)]
    types = {}
    for spec in tensors:
        if spec.role == "expert":
            block, projection = int(spec.name.split(".")[1]), spec.name.split(".")[2][4:-5]
            chosen = in_turn[blocks.index(block) % len(in_turn)]
            types[spec.name] = chosen if isinstance(chosen, str) else chosen[projection]
        else:
            types[spec.name] = (
                "I32" if spec.role == "expert_ids" else dense_type if spec.role in _MATRIX_ROLES else "F32"
            )
    return types
