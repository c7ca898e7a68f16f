"""Tensor tables that lie: offsets, shapes, types, names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import pytest

from .conftest import Refused, Write
from .gguf_bytes import Gguf, Tensor

EXPERTS = "blk.0.ffn_up_exps.weight"  # [64, 32, 4], Q4_0
F32, F16, Q4_0, Q8_0, Q8_K, I8, I32, I64, F64 = 0, 1, 2, 8, 15, 24, 26, 27, 28


@pytest.mark.parametrize("offset", [10**9, 2**63, 2**64 - 32, 0, 1, "+1", "+32"], ids=str)
@pytest.mark.parametrize("name", [EXPERTS, "output.weight"])
def test_offsets_that_point_elsewhere(
    refused: Refused, write: Write, sound: Gguf, name: str, offset: int | str
) -> None:
    (tensor,) = [t for t in sound.tensors if t.name == name]
    moved = tensor.offset + int(offset) if isinstance(offset, str) else offset
    refused(write(sound.with_tensor(name, offset=moved)), "damaged or truncated")


@pytest.mark.parametrize(
    "shape",
    [
        (64, 128),
        (64, 32, 2, 2),
        (64, 32, 1, 4),
        (64, 32, 0),
        (64, 32, 3),
        (64, 32, 5),
        (64, 16, 4),
        (32, 64, 4),
        (64, 4, 32),
        (64, 2**40, 4),
        (2**62, 4, 4),
        (2**63, 1, 1),
        (64, 32, 2**32 + 4),
        (64, 32, 4, 1, 1),
        (8192,),
        (),
    ],
    ids=str,
)
def test_experts_of_the_wrong_shape(refused: Refused, write: Write, sound: Gguf, shape: tuple[int, ...]) -> None:
    refused(write(sound.with_tensor(EXPERTS, shape=shape)))


@pytest.mark.parametrize("kind", [F32, F16, Q8_0, Q8_K, I8, I32, F64, 4, 5, 43, 99, 2**31, 2**32 - 1])
def test_experts_of_a_type_that_does_not_fit_their_bytes(
    refused: Refused, write: Write, sound: Gguf, kind: int
) -> None:
    refused(write(sound.with_tensor(EXPERTS, type=kind)))


@pytest.mark.parametrize("kind", [I8, I32, I64, F64, Q8_K])
@pytest.mark.parametrize("name", [EXPERTS, "blk.1.ffn_gate_inp.weight", "blk.1.ffn_norm.weight", "output_norm.weight"])
def test_types_that_no_kernel_computes_with(refused: Refused, write: Write, sound: Gguf, name: str, kind: int) -> None:
    shape = (256, *next(t.shape for t in sound.tensors if t.name == name)[1:])  # whole blocks of any type
    retyped = [replace(t, type=kind, shape=shape) if t.name == name else t for t in sound.tensors]
    refused(write(sound.with_data_for(retyped, {t.name: n_bytes(t) for t in retyped})), f"{name} cannot be of type")


def n_bytes(tensor: Tensor) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
    elements = 1
    for n in tensor.shape:
        elements *= n
    return elements // block * size


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blk.0.ffn_gate_exps.weight", "duplicate tensor name"),
        ("blk.9.ffn_up_exps.weight", "not found"),
        ("blk.99999.ffn_up_exps.weight", "not found"),
        ("blk.99999999999.ffn_up_exps.weight", "not found"),
        ("blk.-1.ffn_up_exps.weight", "not found"),
        ("blk.0.ffn_gate_up_exps.weight", "not found"),
        ("blk.00.ffn_up_exps.weight", "not found"),
        ("blk.0.ffn_up_exps", "not found"),
        ("something_else", "not found"),
        ("", "not found"),
        ("x" * 63, "not found"),
        ("x" * 64, "damaged or truncated"),
        ("a\nb\x1b[2J", "not found"),
    ],
)
def test_one_layers_experts_under_another_name(
    refused: Refused, write: Write, sound: Gguf, name: str, part: str
) -> None:
    refused(write(sound.with_tensor(EXPERTS, name=name)), part)


@pytest.mark.parametrize("projection", ["up", "down"])  # a gate is optional for llama
def test_a_layer_without_one_of_its_expert_tensors(
    refused: Refused, write: Write, sound: Gguf, projection: str
) -> None:
    missing = f"blk.1.ffn_{projection}_exps.weight"
    kept = [t for t in sound.tensors if t.name != missing]
    less = sound.with_data_for(kept, {t.name: n_bytes(t) for t in kept})
    refused(write(less), f"{missing}' not found")


def test_no_tensors_at_all(refused: Refused, write: Write, sound: Gguf) -> None:
    refused(write(Gguf(sound.keys, [], b"")), "not found")


@pytest.mark.parametrize("changes", [{"shape": (64,)}, {"shape": (4, 64)}, {"name": "blk.0.router"}], ids=str)
def test_a_router_that_does_not_fit(refused: Refused, write: Write, sound: Gguf, changes: dict[str, Any]) -> None:
    refused(write(sound.with_tensor("blk.0.ffn_gate_inp.weight", **changes)))
