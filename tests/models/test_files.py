"""What the generator says about a file is what lies in the file; mutations and adapters do what they claim."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from .adapters import Target, write_adapter
from .facts import ExpertTensor, ModelFacts
from .fixtures import ModelFactory
from .generator import plan_model, write_model
from .grid import FULL, MORE_TYPES, TYPES
from .mutation import mutate
from .stock import StockModel
from .test_models import PROMPT, answer
from .weights import ggml_type, random_values


def _read_expert(tensor: ExpertTensor, expert: int) -> np.ndarray[Any, Any]:
    """Weights [n_out, n_in] of one expert, found with nothing but the facts."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset + expert * tensor.stride)
        raw = np.frombuffer(file.read(tensor.stride), dtype=np.uint8)
    n_in, n_out, _ = tensor.shape
    return gguf.quants.dequantize(raw.reshape(n_out, -1), ggml_type(tensor.type)).reshape(n_out, n_in)


@pytest.mark.parametrize("model_id", ["split-align64", "gaps", "odd-f16", "merged-gemma4-scales", "unlike-projections"])
def test_facts_locate_every_expert(model_id: str, generated_model: ModelFactory) -> None:
    facts = generated_model(model_id)
    arguments = {k: v for k, v in FULL[model_id].items() if k not in ("seed", "split", "alignment", "shuffle")}
    specs = {s.name: s for s in plan_model(**arguments).tensors}
    for tensor in facts.expert_tensors:
        wanted = random_values(specs[tensor.name], FULL[model_id].get("seed", 0))
        for expert in range(tensor.shape[2]):
            error = _read_expert(tensor, expert) - wanted[expert]
            assert np.square(error).mean() < 0.02 * np.square(wanted[expert]).mean()


def _tensors_by_offset(facts: ModelFacts) -> list[gguf.ReaderTensor]:
    return sorted(gguf.GGUFReader(facts.path).tensors, key=lambda t: int(t.data_offset))


def test_gaps_hold_noise(generated_model: ModelFactory) -> None:
    facts = generated_model("gaps")
    raw = facts.path.read_bytes()
    tensors = _tensors_by_offset(facts)
    gaps = [raw[int(a.data_offset) + int(a.n_bytes) : int(b.data_offset)] for a, b in itertools.pairwise(tensors)]
    assert sum(len(g) > 1000 for g in gaps) > len(gaps) // 2
    assert all(any(g) for g in gaps if len(g) > 16)
    assert all(int(t.data_offset) % 4096 == 0 for t in tensors)


def test_tensors_are_shuffled_unless_asked_otherwise(generated_model: ModelFactory) -> None:
    def blocks(model_id: str) -> list[int]:
        names = [t.name for t in _tensors_by_offset(generated_model(model_id))]
        return [int(n.split(".")[1]) for n in names if n.startswith("blk.")]

    assert blocks("model-order") == sorted(blocks("model-order"))
    assert blocks("llama") != sorted(blocks("llama"))


def test_experts_of_one_block_lie_in_different_parts(generated_model: ModelFactory) -> None:
    facts = generated_model("split-align64")
    assert len(facts.files) == 5
    parts = {block: {t.path for t in facts.expert_tensors if t.block == block} for block in facts.expert_blocks}
    assert any(len(paths) > 1 for paths in parts.values())


@pytest.mark.parametrize(
    ("model_id", "n"), [("q4_k_m", 2), ("q4_k_m-narrow", 2), ("unlike-projections", 3), ("llama", 1)]
)
def test_shape_classes(model_id: str, n: int, generated_model: ModelFactory) -> None:
    assert len(generated_model(model_id).shape_classes) == n


@pytest.mark.parametrize("expert_type", [*TYPES, *MORE_TYPES])
def test_a_mutation_changes_one_weight(expert_type: str, generated_model: ModelFactory, tmp_path: Path) -> None:
    facts = generated_model(f"llama-{expert_type.lower()}")
    tensor = facts.expert_tensor(1, "up")
    mutation = mutate(facts, tmp_path / "mutated.gguf", tensor, expert=3, row=2)
    copy = mutation.facts.expert_tensor(1, "up")
    changed = _read_expert(copy, 3) != _read_expert(tensor, 3)
    assert np.argwhere(changed).tolist() == [[2, mutation.column]]
    assert _read_expert(copy, 3)[2, mutation.column] == np.float32(mutation.after) != np.float32(mutation.before)
    before, after = (np.frombuffer(p.read_bytes(), dtype=np.uint8) for p in (facts.path, mutation.facts.path))
    assert (before != after).sum() == 1


@pytest.mark.parametrize("model_id", ["llama-q4_0", "odd-f16", "split-align64", "merged-gemma4-scales", "gpt-oss"])
@pytest.mark.parametrize("projection", ["inward", "down"])
def test_stock_notices_a_mutated_weight(
    model_id: str, projection: str, generated_model: ModelFactory, tmp_path: Path
) -> None:
    facts = generated_model(model_id)
    with StockModel(facts.path, n_threads=1, watch_routing=True) as model:
        model.decode(model.tokenize(PROMPT))
    block = facts.expert_blocks[0]
    expert = model.routing[block][-1][0]
    merged = any(t.projection == "gate_up" for t in facts.expert_tensors)
    name = "down" if projection == "down" else "gate_up" if merged else "up"
    mutation = mutate(facts, tmp_path / "mutated.gguf", facts.expert_tensor(block, name), expert=expert)
    assert not np.array_equal(answer(mutation.facts.path)[1], answer(facts.path)[1])


@pytest.mark.parametrize("model_id", ["q4_k_m", "odd-f16", "split-align64", "merged-gemma4-scales", "many-experts"])
def test_stock_notices_experts_in_the_wrong_place(model_id: str, generated_model: ModelFactory, tmp_path: Path) -> None:
    facts = generated_model(model_id)
    copies = {part: tmp_path / part.name for part in facts.files}
    for part, copy in copies.items():
        copy.write_bytes(part.read_bytes())
    down = facts.expert_tensor(facts.expert_blocks[-1], "down")
    with copies[down.path].open("r+b") as file:
        file.seek(down.offset)
        experts = file.read(down.n_bytes)
        file.seek(down.offset)
        file.write(experts[down.stride :] + experts[: down.stride])
    assert np.abs(answer(copies[facts.path])[1] - answer(facts.path)[1]).max() > 0.05


def test_a_mutated_weight_of_a_block_that_is_skipped_changes_nothing(
    generated_model: ModelFactory, tmp_path: Path
) -> None:
    facts = generated_model("mtp")
    skipped = next(t for t in facts.expert_tensors if not t.computed)
    mutation = mutate(facts, tmp_path / "mutated.gguf", skipped, expert=0)
    np.testing.assert_array_equal(answer(mutation.facts.path)[1], answer(facts.path)[1])


def test_a_mutation_outside_the_tensor_is_refused(generated_model: ModelFactory, tmp_path: Path) -> None:
    facts = generated_model("llama")
    with pytest.raises(IndexError, match="expert 99"):
        mutate(facts, tmp_path / "mutated.gguf", facts.expert_tensors[0], expert=99)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["attention", "experts", "both"])
@pytest.mark.parametrize("model_id", ["llama", "split-align64", "merged-granite_swa-odd", "gpt-oss"])
def test_adapters_change_what_stock_computes(
    model_id: str, target: Target, generated_model: ModelFactory, tmp_path: Path
) -> None:
    facts = generated_model(model_id)
    names = write_adapter(tmp_path / "adapter.gguf", facts, target)
    assert any("attn" in n for n in names) == (target != "experts")
    assert any("_exps" in n for n in names) == (target != "attention")
    plain = answer(facts.path, 1)[1]
    with StockModel(facts.path, n_threads=1) as model, model.adapter(tmp_path / "adapter.gguf"):
        adapted = model.decode(model.tokenize(PROMPT))[-1:]
    assert np.isfinite(adapted).all()
    assert np.abs(adapted - plain).max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "gpt-2"}, "unknown architecture"),
        ({"arch": "llama", "expert_types": "Q4_0X"}, "no ggml type"),
        ({"arch": "llama", "expert_types": "Q4_K"}, "multiple of 256"),
        ({"arch": "llama", "merged_gate_up": True}, "no merged gate and up"),
        ({"arch": "qwen3moe", "gate": False}, "without a gate"),
        ({"arch": "dbrx", "expert_scales": True}, "no scales"),
        ({"arch": "llama", "alignment": 8}, "alignment 8"),
        ({"arch": "llama", "split": 1000}, "1000 parts"),
        ({"arch": "llama", "n_embd": 33}, "must be even"),
    ],
    ids=lambda v: str(v),
)
def test_impossible_models_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "model.gguf", **arguments)
    assert not any(tmp_path.iterdir())
