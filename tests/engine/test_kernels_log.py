"""ggml says something for every matrix that it repacks; where experts are read, nobody is called for it."""

from __future__ import annotations

from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from .decoding import Model, llama_log, random_script
from .managed import managed

SAID = "repack tensor"


def test_no_python_on_the_threads_that_read(generated_model: ModelFactory) -> None:
    path = generated_model("many-experts").path
    with llama_log() as stock, Model(path):
        pass
    assert any(SAID in line for line in stock)
    with llama_log() as ours, managed(path, 0.0) as (engine, model), model.context(n_threads=1) as context:
        assert "repacked" in engine.info.kernels
        context.run(random_script([1] * 20, N_VOCAB))
        assert engine.stats()["misses"] > 100
    assert ours, "what llama.cpp says is heard"
    assert not any(SAID in line for line in ours)
