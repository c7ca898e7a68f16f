"""Weights to GGUF."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_base as tiny
from numpy.typing import NDArray
from smolmoe.checkpoint import load_tensors, save_tensors
from smolmoe.config import ExpertLayout
from smolmoe.export import stored_type, write_gguf

LAYOUT = ExpertLayout(n_expert=4, n_used=2, width=64)
STEPS = {gguf.GGMLQuantizationType.Q4_0: 1 / 8, gguf.GGMLQuantizationType.Q5_0: 1 / 16}
Tensors = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Random weights of a tiny model, in the order of the file."""
    rng = np.random.default_rng(5)
    kv_width = tiny.WIDTH // tiny.N_HEAD * tiny.N_HEAD_KV

    def matrix(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    made = {"token_embd.weight": matrix(tiny.N_VOCAB, tiny.WIDTH)}
    for i in range(tiny.N_LAYER):
        block = {
            "attn_norm": np.ones(tiny.WIDTH, np.float32),
            "attn_q": matrix(tiny.WIDTH, tiny.WIDTH),
            "attn_k": matrix(kv_width, tiny.WIDTH),
            "attn_v": matrix(kv_width, tiny.WIDTH),
            "attn_output": matrix(tiny.WIDTH, tiny.WIDTH),
            "ffn_norm": np.ones(tiny.WIDTH, np.float32),
            "ffn_gate_inp": matrix(LAYOUT.n_expert, tiny.WIDTH),
            "ffn_gate_exps": matrix(LAYOUT.n_expert, LAYOUT.width, tiny.WIDTH),
            "ffn_up_exps": matrix(LAYOUT.n_expert, LAYOUT.width, tiny.WIDTH),
            "ffn_down_exps": matrix(LAYOUT.n_expert, tiny.WIDTH, LAYOUT.width),
        }
        made |= {f"blk.{i}.{name}.weight": values for name, values in block.items()}
    made["output_norm.weight"] = np.ones(tiny.WIDTH, np.float32)
    return made


@pytest.fixture(scope="module")
def exported(tiny_base: Path, tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "tiny-moe.gguf"
    write_gguf(tiny_base, tensors, path, LAYOUT)
    return path


def test_tensors_are_quantised_as_told(exported: Path, tensors: Tensors) -> None:
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(exported).tensors}
    assert list(written) == list(tensors)
    for name, values in tensors.items():
        tensor = written[name]
        assert tensor.tensor_type == stored_type(name)
        assert tuple(reversed(tensor.shape.tolist())) == values.shape
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # a step is a share of a block's largest magnitude, and rounding is off by half a step;
        # only the value opposite to the largest may be cut by a whole one
        step = STEPS.get(tensor.tensor_type, 0)
        largest = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True)
        error = np.abs(stored.reshape(-1, 32) - values.reshape(-1, 32))
        assert (error <= 1.01 * step * largest).all(), name


def test_metadata(exported: Path, tiny_base: Path) -> None:
    base, fields = gguf.GGUFReader(tiny_base).fields, gguf.GGUFReader(exported).fields
    assert fields["llama.expert_count"].contents() == LAYOUT.n_expert
    assert fields["llama.expert_used_count"].contents() == LAYOUT.n_used
    assert fields["llama.feed_forward_length"].contents() == LAYOUT.width
    assert fields["general.name"].contents() != base["general.name"].contents()
    copied = [key for key in base if key.startswith(("tokenizer.", "llama.")) and "feed_forward" not in key]
    assert "tokenizer.ggml.merges" in copied
    for key in copied:
        assert fields[key].contents() == base[key].contents(), key


def test_llama_cpp_runs_it(exported: Path) -> None:
    import llama_cpp

    model = llama_cpp.Llama(str(exported), n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    prompt = model.tokenize(b"the thin", add_bos=False)
    assert model.detokenize(prompt) == b"the thin"
    answers = []
    for _ in range(2):
        model.reset()
        stream = model.generate(prompt, temp=0.0)
        answers.append([next(stream) for _ in range(8)])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_command_line(tiny_base: Path, tensors: Tensors, exported: Path, recipe_folder: Path, tmp_path: Path) -> None:
    weights, out = tmp_path / "weights.npz", tmp_path / "out.gguf"
    save_tensors(weights, tensors)
    assert list(load_tensors(weights)) == list(tensors)

    def export(weights: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "smolmoe", "export", tiny_base, weights, out]
        return subprocess.run(command, cwd=recipe_folder, capture_output=True, text=True)

    assert export(weights).returncode == 0
    assert [t.data.tobytes() for t in gguf.GGUFReader(out).tensors] == [
        t.data.tobytes() for t in gguf.GGUFReader(exported).tensors
    ]

    failed = export(tmp_path / "absent.npz")
    assert failed.returncode == 1
    assert "absent.npz" in failed.stderr and "Traceback" not in failed.stderr


def test_published_tensors_come_out_again(bundled_reader: gguf.GGUFReader, tiny_base: Path, tmp_path: Path) -> None:
    """Weights that are already quantised are exported without a change: scales and codes are found again."""
    chosen = ("token_embd.", "blk.0.", "blk.29.", "output_norm.")
    published = {tensor.name: tensor for tensor in bundled_reader.tensors if tensor.name.startswith(chosen)}
    assert len(published) == 22
    weights = {
        name: np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        for name, tensor in published.items()
    }
    out = tmp_path / "out.gguf"
    write_gguf(tiny_base, weights, out)
    for tensor in gguf.GGUFReader(out).tensors:
        assert tensor.data.tobytes() == published[tensor.name].data.tobytes(), tensor.name


def _short(content: Any) -> Any:
    """Reading and writing the whole vocabulary would take most of this room's time."""
    return content[:100] if isinstance(content, list) else content


def test_published_metadata_comes_out_again(bundled_reader: gguf.GGUFReader, tmp_path: Path) -> None:
    """What export adds to the base's metadata, and the order of all keys, are those of the published file."""
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    added = {"general.architecture", "general.description", "llama.expert_count", "llama.expert_used_count"}
    published = {
        field.name: (field.types, _short(field.contents()))
        for field in bundled_reader.fields.values()
        if not field.name.startswith("GGUF.")
    }
    writer = gguf.GGUFWriter(base, "llama")
    for key, (types, content) in published.items():
        if key not in added and not key.startswith("general.base_model."):
            element_type = types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, content, types[0], sub_type=element_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    write_gguf(base, {"output_norm.weight": np.ones(32, np.float32)}, out)
    written = [
        (field.name, (field.types, field.contents()))
        for field in gguf.GGUFReader(out).fields.values()
        if not field.name.startswith("GGUF.")
    ]
    assert written == list(published.items())
