"""Weights to GGUF."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_base as tiny
from gguf import GGUFValueType
from numpy.typing import NDArray
from smolmoe.checkpoint import load_tensors, save_tensors
from smolmoe.config import ExpertLayout
from smolmoe.export import stored_type, write_gguf

from pyengine import bundled as bundled_module

LAYOUT = ExpertLayout(n_expert=4, n_used=2, width=64)
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
        # a block's step is 1/8 (Q4_0) or 1/16 (Q5_0) of its largest magnitude, and rounding is off by half a step;
        # only the value opposite to the largest may be cut by a whole one
        step = {gguf.GGMLQuantizationType.Q4_0: 1 / 8, gguf.GGMLQuantizationType.Q5_0: 1 / 16}.get(tensor.tensor_type, 0)
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
    command = [sys.executable, "-m", "smolmoe", "export", tiny_base, weights, out]
    subprocess.run(command, cwd=recipe_folder, check=True, capture_output=True)
    assert [t.data.tobytes() for t in gguf.GGUFReader(out).tensors] == [
        t.data.tobytes() for t in gguf.GGUFReader(exported).tensors
    ]

    failed = subprocess.run([*command[:-2], tmp_path / "absent.npz", out], cwd=recipe_folder, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "absent.npz" in failed.stderr and "Traceback" not in failed.stderr


def test_the_published_file_comes_out_again(bundled: Path, tmp_path: Path) -> None:
    """Its own weights, dequantised, and its metadata without what export adds give the same bytes."""
    reader = gguf.GGUFReader(bundled)
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    added = {"general.description", "llama.expert_count", "llama.expert_used_count"}
    writer = gguf.GGUFWriter(base, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "general.architecture", "general.base_model.")) or field.name in added:
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    weights = {
        tensor.name: np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        for tensor in reader.tensors
    }
    write_gguf(base, weights, out)
    assert hashlib.sha256(out.read_bytes()).hexdigest() == bundled_module._SHA256
