"""Layers of which the CPU computes a part. Both parts run on the CPU here, with the same kernels: their sum has the
same bits as when all of it runs on one."""

from __future__ import annotations

import pytest
from engine.decoding import Model, random_script
from engine.grid_settings import settings
from engine.managed import assert_same_bits, nmse
from models.architectures import ARCHITECTURES
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from .placed import placed

SCRIPT = random_script([1] * 24 + [2, 3, 8, 2, 40] + [1] * 8, N_VOCAB, seed=11)
ALONE = 24  # tokens of the script that are computed one by one at first
_SLOW = 2_000_000  # bytes per second, so that nothing is worth moving

_NAMES = [name.replace("/", "-") for name in ARCHITECTURES]
MODELS = sorted({*_NAMES[1::5], "gpt-oss", "many-experts", "llama-q4_0", "q4_k_m", "merged-deepseek2"})


@pytest.mark.parametrize("model_id", MODELS)
def test_same_bits_with_a_part_on_the_cpu(model_id: str, generated_model: ModelFactory) -> None:
    facts = generated_model(model_id)
    how = settings(facts, SCRIPT)
    with Model(facts.path, plain=True) as model, model.context(**how) as context:
        wanted = context.run(SCRIPT)
    for share, ram_share in ((0.5, 1.0), (0.0, 0.6)):
        with placed(facts.path, share, ram_share, host_threads=2) as (engine, model), model.context(**how) as context:
            context.run(SCRIPT)  # what is read from disk passes through RAM
            engine.set_link_limit(_SLOW)
            for _ in range(8):  # it takes part once it has been timed in 16 steps that miss something
                context.clear()
                got = context.run(SCRIPT)
                if engine.stats()["host_pairs"]:
                    break
            else:
                pytest.fail("the CPU had no part in it")
        assert_same_bits(got[:ALONE], wanted[:ALONE])
        assert (error := nmse(got[ALONE:], wanted[ALONE:])) < 1e-6, f"NMSE {error:.2g} at {share}"
