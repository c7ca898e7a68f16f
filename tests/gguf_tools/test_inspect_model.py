"""What inspect says agrees with the generator, with the engine that will run the model, and with people's eyes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from bad_input.gguf_bytes import ARRAY, STRING, UINT32, Gguf, array, scalar, text
from click.testing import Result
from llama.dense import write_dense_model
from models.fixtures import ModelFactory

from gguf_tools.cli.output import format_bytes, format_ranges
from gguf_tools.errors import ModelFileError
from gguf_tools.inspect_model import Summary, inspect_model
from gguf_tools.tensor_classes import CLASSES, tensor_class
from pyengine import bundled_model
from pyengine.native import NativeEngine

Invoke = Callable[..., Result]
MANAGED = (
    "llama qwen2moe deepseek2 gpt-oss q4_k_m unlike-projections odd-f16 no-gate split many-experts merged-deepseek2"
)


@pytest.mark.parametrize("model_id", MANAGED.split())
def test_agrees_with_the_engine(model_id: str, generated_model: ModelFactory) -> None:
    path = generated_model(model_id).path
    experts = inspect_model(path).experts
    assert experts is not None
    engine = NativeEngine(path)
    try:
        info = engine.info
    finally:
        engine.close()
    assert (experts.per_block, experts.used, len(experts.blocks)) == (info.n_expert, info.n_expert_used, info.n_layer)
    assert (experts.total, experts.bytes) == (info.n_experts_total, info.expert_bytes)
    assert (experts.slot_bytes, experts.bytes_per_token) == (info.slot_bytes, info.expert_used_bytes)
    assert len(experts.shape_classes) == info.n_class


@pytest.mark.parametrize("model_id", ["llama", "gpt-oss", "q4_k_m", "split-align64", "merged-gemma4-scales", "llama4"])
def test_agrees_with_the_generator(model_id: str, generated_model: ModelFactory) -> None:
    facts = generated_model(model_id)
    summary = inspect_model(facts.path)
    assert (summary.architecture, summary.files) == (facts.arch, len(facts.files))
    assert summary.file_bytes == sum(p.stat().st_size for p in facts.files)
    assert summary.tensor_bytes == facts.expert_bytes + facts.other_bytes == sum(c.bytes for c in summary.classes)
    assert summary.tensors == sum(c.tensors for c in summary.classes)
    assert summary.experts is not None
    assert summary.experts.blocks == facts.expert_blocks
    assert {
        tuple(sorted((m.projection, m.type, (m.n_in, m.n_out)) for m in c.matrices))
        for c in summary.experts.shape_classes
    } == facts.shape_classes
    assert sum(c.bytes for c in summary.classes if re.match("expert (gate|up|down)", c.name)) == facts.expert_bytes


def test_the_bundled_model() -> None:
    """Numbers from its card."""
    summary = inspect_model(bundled_model())
    experts = summary.experts
    assert experts is not None
    assert (experts.per_block, experts.used, experts.total, experts.n_ff) == (32, 8, 960, (64,))
    assert experts.bytes_per_expert == (3 * 576 * 64 // 32 * 18,)
    assert experts.bytes_per_token == 30 * 8 * 62208
    assert experts.shape_classes[0].slot_bytes == 16 * 4096
    # Embedding and output are one matrix, which every token needs whole.
    assert summary.other_bytes_per_token == summary.tensor_bytes - experts.bytes


def test_an_embedding_of_its_own_costs_a_token_one_row(generated_model: ModelFactory) -> None:
    facts = generated_model("llama")
    (embedding,) = (t for t in gguf.GGUFReader(facts.path).tensors if t.name == "token_embd.weight")
    rows = int(embedding.shape[1])
    other = inspect_model(facts.path).other_bytes_per_token
    assert other == facts.other_bytes - int(embedding.n_bytes) // rows * (rows - 1)


@pytest.mark.parametrize(
    ("name", "class_"),
    [
        ("token_embd.weight", "embeddings and output"),
        ("output.weight", "embeddings and output"),
        ("output_norm.weight", "norms"),
        ("blk.0.attn_q_norm.weight", "norms"),
        ("blk.0.ffn_norm_exps.weight", "norms"),
        ("blk.11.attn_kv_a_mqa.weight", "attention"),
        ("blk.1.attn_sinks.weight", "attention"),
        ("blk.1.ffn_up.weight", "dense FFN"),
        ("blk.1.ffn_up_shexp.weight", "shared experts"),
        ("blk.1.ffn_gate_inp_shexp.weight", "shared experts"),
        ("blk.1.ffn_gate_inp.weight", "router"),
        ("blk.1.exp_probs_b.bias", "router"),
        ("blk.1.ffn_gate_up_exps.weight", "expert gate and up"),
        ("blk.1.ffn_down_exps.weight", "expert down"),
        ("blk.1.ffn_down_exps.scale", "expert biases and scales"),
        ("blk.1.ffn_gate_exps.bias", "expert biases and scales"),
        ("rope_freqs.weight", "other"),
        ("blk.1.ssm_in.weight", "other"),
    ],
)
def test_classes(name: str, class_: str) -> None:
    assert tensor_class(name) == class_
    assert class_ in CLASSES


def test_json_is_the_summary(invoke: Invoke, generated_model: ModelFactory) -> None:
    path = generated_model("q4_k_m").path
    done = invoke("inspect", path, "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said == json.loads(json.dumps(inspect_model(path).as_json()))
    assert [c["name"] for c in said["classes"] if c["name"].startswith("expert ")] == [
        "expert gate",
        "expert up",
        "expert down",
    ]
    assert said["experts"]["shape_classes"][0]["matrices"][2]["type"] == "Q6_K"


def test_the_table(invoke: Invoke, generated_model: ModelFactory) -> None:
    done = invoke("inspect", generated_model("q4_k_m").path)
    assert done.exit_code == 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "expert down 2 620 KiB 30.1 % Q6_K, Q4_K" in [re.sub(r"\d+ KiB \S+ %", "620 KiB 30.1 %", x) for x in lines]
    assert "experts 5 in a layer, 2 used; 10 together" in lines
    assert "layers with experts 2 (0-1)" in lines
    assert any(line.startswith("layers 0 gate 256x256 Q4_K, up 256x256 Q4_K, down 256x256 Q6_K ") for line in lines)
    assert any(line.startswith("layers 1 gate 256x256 Q4_K, up 256x256 Q4_K, down 256x256 Q4_K ") for line in lines)


def test_a_dense_model(invoke: Invoke, tmp_path: Path) -> None:
    path = write_dense_model(tmp_path / "dense.gguf")
    summary = inspect_model(path)
    assert summary.experts is None
    assert {c.name for c in summary.classes} == {"embeddings and output", "attention", "norms", "dense FFN"}
    done = invoke("inspect", path)
    assert done.exit_code == 0
    assert done.stdout.endswith("No experts: a dense model.\n")
    assert json.loads(invoke("inspect", path, "--json").stdout)["experts"] is None


def test_a_split_model_names_its_parts(invoke: Invoke, generated_model: ModelFactory) -> None:
    assert "in 3 files, " in invoke("inspect", generated_model("split").path).stdout


def test_an_unknown_number_of_used_experts_is_said(invoke: Invoke, generated_model: ModelFactory, tmp_path) -> None:
    model = Gguf.read(generated_model("llama").path).without_key("llama.expert_used_count")
    done = invoke("inspect", model.write(tmp_path / "model.gguf"))
    assert "experts 8 in a layer, number used unknown; 24 together" in " ".join(done.stdout.split())


def test_counts_by_layer(generated_model: ModelFactory, tmp_path: Path) -> None:
    model = Gguf.read(generated_model("llama").path)
    model = model.with_key("llama.expert_used_count", ARRAY, array(UINT32, [1, 3, 2]))
    experts = inspect_model(model.write(tmp_path / "model.gguf")).experts
    assert experts is not None and experts.used == 3


def test_names_from_the_file_cannot_steer_a_terminal(invoke: Invoke, generated_model: ModelFactory, tmp_path) -> None:
    model = Gguf.read(generated_model("llama").path)
    model = model.with_key("general.name", STRING, text("evil \x1b[2J[bold]name[/bold]\nnext"))
    done = invoke("inspect", model.write(tmp_path / "model.gguf"))
    assert "\x1b" not in done.stdout
    assert "evil \ufffd[2J[bold]name[/bold] next" in done.stdout.splitlines()[0]


def test_more_experts_used_than_there_are(generated_model: ModelFactory, tmp_path: Path) -> None:
    model = Gguf.read(generated_model("llama").path)
    model = model.with_key("llama.expert_used_count", UINT32, scalar(UINT32, 9))
    with pytest.raises(ModelFileError, match="9 experts for a token do not fit the 8 there are"):
        inspect_model(model.write(tmp_path / "model.gguf"))


def test_numbers_for_people() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 62208, 5 << 30)] == [
        "0 bytes",
        "999 bytes",
        "0.977 KiB",
        "60.8 KiB",
        "5 GiB",
    ]
    assert format_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert format_ranges([3]) == "3"


def test_a_summary_is_plain_data() -> None:
    summary = inspect_model(bundled_model())
    assert isinstance(summary, Summary)
    json.dumps(summary.as_json())
