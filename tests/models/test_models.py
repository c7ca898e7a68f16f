"""Stock llama.cpp loads and computes every kind of model that the generator writes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from .architectures import ARCHITECTURES
from .big import write_big_model
from .facts import ModelFacts
from .fixtures import ModelFactory
from .generator import write_model
from .grid import FULL, MORE_TYPES, SMALL, TYPES
from .stock import FloatArray, StockModel

PROMPT = "the rain in an open field"
N_NEW = 12


def answer(path: Path, n_new: int = N_NEW) -> tuple[list[int], FloatArray]:
    # One thread: kernels spin at barriers, so two on a busy machine of two cores take seconds.
    with StockModel(path, n_threads=1) as model:
        return model.greedy(model.tokenize(PROMPT), n_new)


WRITING = [model_id for model_id, entry in SMALL.items() if not ARCHITECTURES[entry["arch"]].embeds]


@pytest.mark.parametrize("model_id", WRITING)
def test_stock_computes_something_varied(model_id: str, generated_model: ModelFactory) -> None:
    facts = generated_model(model_id)
    with StockModel(facts.path, n_threads=1, watch_routing=True) as model:
        prompt = model.tokenize(PROMPT)
        tokens, logits = model.greedy(prompt, N_NEW)
    assert np.isfinite(logits).all()
    assert logits.std(axis=1).min() > 0.2
    assert len(set(tokens)) >= N_NEW // 2, "the greedy text repeats itself"
    assert tuple(sorted(model.routing)) == facts.expert_blocks[ARCHITECTURES[SMALL[model_id]["arch"]].n_hashed :]
    for block, ranked in model.routing.items():
        chosen = [frozenset(row[: facts.n_expert_used]) for row in ranked]
        if facts.n_expert_used < facts.n_expert:
            (_, times), *_ = Counter(chosen).most_common(1)
            assert times <= len(chosen) // 2, f"most tokens of block {block} choose the same experts"
        assert len(frozenset().union(*chosen)) >= facts.n_expert // 2, f"block {block} leaves experts idle"


def test_small_grid_has_every_architecture_and_every_type() -> None:
    assert {e["arch"] for e in SMALL.values()} == set(ARCHITECTURES)
    assert {e["expert_types"] for e in SMALL.values() if isinstance(e.get("expert_types"), str)} >= {
        *TYPES,
        *MORE_TYPES,
    }


def test_full_grid_crosses_architectures_with_types() -> None:
    crossed = {(e["arch"], e["expert_types"]) for e in FULL.values() if isinstance(e.get("expert_types"), str)}
    assert crossed >= {(arch, t) for arch in ARCHITECTURES for t in (*TYPES, *MORE_TYPES)}
    assert SMALL.items() <= FULL.items()
    assert all(model_id == Path(model_id).name for model_id in FULL)


@pytest.mark.parametrize(
    "how", [{"shuffle": False}, {"split": 3}, {"alignment": 4096}, {"split": 4, "alignment": 64}], ids=str
)
def test_how_the_file_is_laid_out_changes_no_logit(how: dict[str, Any], tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain.gguf", "qwen2moe")
    other = write_model(tmp_path / "other.gguf", "qwen2moe", **how)
    assert len(other.files) == how.get("split", 1)
    np.testing.assert_array_equal(answer(other.path)[1], answer(plain.path)[1])


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again, other = (write_model(tmp_path / f"{i}.gguf", "olmoe", seed=i // 2) for i in range(3))
    assert first.path.read_bytes() == again.path.read_bytes()
    assert not np.array_equal(answer(first.path, 1)[1], answer(other.path, 1)[1])


def test_blocks_for_multi_token_prediction_are_not_computed(generated_model: ModelFactory) -> None:
    facts = generated_model("mtp")
    blocks = {t.block for t in facts.expert_tensors}
    assert blocks - set(facts.expert_blocks) == {facts.n_layer}


def test_a_process_of_its_own_computes_the_same(generated_model: ModelFactory, tmp_path: Path) -> None:
    path, out = generated_model("qwen2moe").path, tmp_path / "out.npz"
    package = __package__ or ""
    root = Path(__file__).parents[package.count(".") + 1]
    command = [sys.executable, "-m", f"{package}.stock", str(path), str(out), "--n-new", str(N_NEW)]
    subprocess.run([*command, "--prompt", PROMPT, "--n-threads", "1"], check=True, cwd=root, capture_output=True)
    tokens, logits = answer(path)
    with np.load(out) as there:
        assert there["tokens"].tolist() == tokens
        np.testing.assert_array_equal(there["logits"], logits)


def test_the_vocabulary_keeps_text(generated_model: ModelFactory) -> None:
    with StockModel(generated_model("llama").path, n_threads=1) as model:
        tokens = model.tokenize("the end, 42")
        assert model.text(tokens[1:]) == "the end, 42"
        assert len(tokens) < len("the end, 42"), "merged pieces are used"
        assert len(model.tokenize("é")) == 3, "unknown letters fall back to bytes"


def test_the_high_level_interface_chats(generated_model: ModelFactory) -> None:
    path = str(generated_model("llama").path)
    llama = llama_cpp.Llama(path, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
    try:
        messages: list[llama_cpp.ChatCompletionRequestMessage] = [{"role": "user", "content": "hello"}]
        answered = llama.create_chat_completion(messages, max_tokens=6, temperature=0)
        assert isinstance(answered, dict)
        assert answered["usage"]["completion_tokens"] == 6
        assert answered["choices"][0]["message"]["content"]
    finally:
        llama.close()


def test_a_broken_file_is_refused(generated_model: ModelFactory, tmp_path: Path) -> None:
    whole = generated_model("llama").path.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match="cannot load"):
        StockModel(broken)


def _expert_bytes(facts: ModelFacts) -> list[bytes]:
    out = []
    for t in facts.expert_tensors:
        with t.path.open("rb") as file:
            file.seek(t.offset)
            out += [file.read(t.stride) for _ in range(t.shape[2])]
    return out


@pytest.mark.parametrize("split", [None, 3])
def test_big_models_stream_and_repeat_no_expert(split: int | None, tmp_path: Path) -> None:
    gib = 1 / 64
    facts = write_big_model(tmp_path / "big.gguf", gib, n_expert=16, n_embd=512, n_ff=256, split=split)
    assert gib <= facts.expert_bytes / (1 << 30) < 2 * gib
    assert facts.expert_bytes + facts.other_bytes < sum(p.stat().st_size for p in facts.files)
    every = _expert_bytes(facts)
    assert len(set(every)) == len(every)
    tokens, logits = answer(facts.path)
    assert np.isfinite(logits).all()
    assert len(set(tokens)) >= N_NEW // 2
