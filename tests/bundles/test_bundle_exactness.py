"""The same logits as stock llama.cpp when experts come from a bundle, and one read for each miss."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.decoding import random_script
from engine.managed import assert_same_bits
from engine.reference import StockProcess
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from .making import make, opened

SCRIPT = random_script([1] * 6 + [2, 33, 90] + [1] * 3, N_VOCAB, seed=21)

# Every type that is repacked somewhere, types that never are, and every layout of experts in a file.
MODELS = (
    "llama-q4_0",
    "llama-q8_0",
    "llama-iq4_nl",
    "llama-q5_1",
    "gpt-oss",
    "q4_k_m",
    "unlike-projections",
    "odd-rows-q4_0",
    "merged-deepseek2",
    "no-gate",
    "scales",
    "align64",
    "split",
    "one-expert",
)


@pytest.mark.parametrize("form", ["repacked", "raw", "shuffled"])
@pytest.mark.parametrize("model_id", MODELS)
def test_same_bits_as_stock(
    model_id: str, form: str, generated_model: ModelFactory, stock: StockProcess, tmp_path: Path
) -> None:
    path = generated_model(model_id).path
    wanted = stock.run(path, SCRIPT).logits
    bundle = tmp_path / "experts.bundle"
    made = make(path, bundle, raw=form == "raw", shuffled=7 if form == "shuffled" else None)
    assert bundle.stat().st_size == made.file_bytes
    for share in (0.0, 0.5):
        with opened(path, bundle, share) as (engine, model), model.context() as context:
            assert_same_bits(context.run(SCRIPT), wanted)
            info, stats = engine.info, engine.stats()
            assert engine.take_notice() == ""
        assert info.bundle
        assert stats["misses"] > 0
        assert stats["reads"] == stats["misses"], "a miss is one read"
        if info.n_experts_total > stats["slots"]:
            assert stats["evictions"] > 0


def test_a_repacked_bundle_needs_no_repacking(generated_model: ModelFactory, tmp_path: Path) -> None:
    path = generated_model("llama-q4_0").path
    for raw in (False, True):
        make(path, tmp_path / "b", raw=raw)
        with opened(path, tmp_path / "b") as (engine, _):
            assert engine.info.bundle_repacked is not raw
