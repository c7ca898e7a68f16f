"""A whole training run on a tiny model, and its result in llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tiny_base as tiny
from smolmoe.checkpoint import load_tensors
from smolmoe.export import write_gguf
from tiny_run import CONFIG, LAYOUT, write_data

pytest.importorskip("torch")

import torch
from smolmoe.dense import load_dense, rotation
from smolmoe.distil import Student
from smolmoe.mixture import MoeLayer, MoeModel
from smolmoe.train import train

CPU = torch.device("cpu")
Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny_base: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a whole training run writes."""
    out = tmp_path_factory.mktemp("trained")
    train(tiny_base, data_folder / "generated.npy", data_folder, out, CONFIG)
    return out


def test_run_comes_near_the_teacher(trained: Path, recipe_folder: Path) -> None:
    figures = json.loads((trained / "figures.json").read_text())
    recorded = json.loads((recipe_folder / "figures.json").read_text())
    for part in ("ppl", "routing"):
        assert figures[part].keys() == recorded[part].keys()
        for name, values in figures[part].items():
            assert values.keys() == recorded[part][name].keys()
    for values in figures["ppl"].values():
        assert 0 < values["kl"] < 0.5
    for values in figures["routing"].values():
        assert sum(values["mean_sorted_weights"]) == pytest.approx(1.0, abs=0.01)
        assert all(0 <= share <= LAYOUT.n_expert for share in values["max_share"])


def _halved(values: np.ndarray) -> np.ndarray:
    return values / 2


def _reversed_rows(values: np.ndarray) -> np.ndarray:
    return values[::-1]


def _pairs_apart(values: np.ndarray) -> np.ndarray:
    """Rows of adjacent pairs in the order for rotating halves."""
    heads = values.reshape(-1, tiny.WIDTH // tiny.N_HEAD // 2, 2, values.shape[1])
    return heads.transpose(0, 2, 1, 3).reshape(values.shape)


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        (None, None, True),
        ("ffn_down_exps", _halved, False),
        ("ffn_gate_inp", _reversed_rows, False),
        ("ffn_up_exps", _reversed_rows, False),
        ("attn_k", _pairs_apart, False),
    ],
)
def test_llama_cpp_computes_what_was_trained(
    trained: Path, tiny_base: Path, tmp_path: Path, name: str | None, change: Change | None, same: bool
) -> None:
    """The exported file gives the student's logits, and a wrong scale, order of experts or rotation would be seen."""
    tensors = load_tensors(trained / "weights.npz")
    tokens = np.random.default_rng(4).integers(0, 8000, 32).tolist()
    expected = _student_logits(tensors, tiny_base, tokens)
    if change is not None:
        for i in range(tiny.N_LAYER):
            tensors[f"blk.{i}.{name}.weight"] = change(tensors[f"blk.{i}.{name}.weight"])
    got = _llama_cpp_logits(tensors, tiny_base, tokens, tmp_path / "tiny-moe.gguf")
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    # bfloat16 there, 8-bit activations here; the median, because a near tie of two experts may be broken differently
    assert (np.median(error) < 0.03) == same, np.median(error)


def _llama_cpp_logits(tensors: dict[str, np.ndarray], base: Path, tokens: list[int], path: Path) -> np.ndarray:
    write_gguf(base, tensors, path, LAYOUT)
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)], dtype=np.float64)


def _student_logits(tensors: dict[str, np.ndarray], base: Path, tokens: list[int]) -> np.ndarray:
    model = _model(tensors, base)
    student = Student(model, rotation(model.shape, len(tokens), CPU), compiled=False)
    with torch.no_grad():
        output = student.forward(torch.tensor([tokens]))
        return (output.hidden[0].float() @ output.head.float().t()).double().numpy()


def _model(tensors: dict[str, np.ndarray], base: Path) -> MoeModel:
    """The inverse of MoeModel.tensors."""
    shape = load_dense(base, CPU).shape
    layers = []
    for i in range(shape.n_layer):
        weights = {name: torch.from_numpy(tensors[f"blk.{i}.{name}.weight"]) for name in MoeLayer._fields}
        down = weights["ffn_down_exps"].transpose(0, 1).flatten(1) / LAYOUT.n_used
        weights["ffn_down_exps"] = down.contiguous()
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            weights[name] = weights[name].flatten(0, 1)
        layers.append(MoeLayer(**weights))
    embedding, norm = (torch.from_numpy(tensors[f"{name}.weight"]) for name in ("token_embd", "output_norm"))
    return MoeModel(shape, LAYOUT, embedding, norm, layers)
