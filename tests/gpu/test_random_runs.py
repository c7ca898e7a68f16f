"""Random scripts under random circumstances: whatever happens, the logits are stock's, or there is an error and a
second try gives them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
from engine.decoding import Context, Logits, Model, random_script
from engine.grid_settings import settings
from engine.managed import assert_same_bits, bytes_for, nmse
from engine.random_predictors import native_predictors
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine.native import NativeEngine

from .placed import placed

RECURRENT = "jamba"  # llama.cpp cannot take a failed step back there
MODELS = ("many-experts", "qwen2moe", "gpt-oss", "llama-q4_0", "merged-deepseek2", "q4_k_m", RECURRENT)
SPLITS = ((1.0,), (1.0,), (1.0, 3.0), (1.0, 1.0))
SEEDS = range(24)


def _events(engine: NativeEngine, n_gpu: int, chance: random.Random) -> list[Callable[[], object]]:
    info = engine.info
    most = info.n_expert_used + 1

    def one_budget() -> None:
        number = chance.randrange(n_gpu)
        part = engine.gpus()[number]
        if part.n_layer:
            engine.set_vram_budget(chance.randint(part.least_budget, max(part.slot_bytes, part.least_budget)), number)

    def less_memory() -> None:
        number = chance.randrange(n_gpu)
        engine.limit_vram(number, chance.randint(engine.gpus()[number].least_budget, info.slot_bytes))

    return [
        lambda: engine.set_vram_budget(bytes_for(engine, chance.random() * 1.1)),
        one_budget,
        lambda: engine.set_ram_budget(int(chance.random() * info.slot_bytes)),
        lambda: engine.set_link_limit(chance.choice([0, 10**7, 10**9])),
        lambda: engine.set_recording(ids=chance.random() < 0.5, inputs=chance.random() < 0.5),
        lambda: engine.set_priorities(
            np.random.default_rng(chance.randrange(99)).random((info.n_layer, info.n_expert), np.float32)
        ),
        lambda: engine.expect(
            chance.randrange(info.n_layer), chance.sample(range(info.n_expert), min(most, info.n_expert)), keep=True
        ),
        engine.fill_ram,
        less_memory,
        lambda: engine.take_recording(64, info, inputs=True),
    ]


def _decode(engine: NativeEngine, context: Context, step: list[int], chance: random.Random, may_fail: bool) -> Logits:
    failing = may_fail and chance.random() < 0.1
    if failing:
        engine.inject_read_errors(chance.randrange(6), chance.randint(1, 3))
    try:
        return context.decode(step)
    except RuntimeError:
        assert failing and engine.take_failure() is not None
        engine.inject_read_errors(0, 0)
        return context.decode(step)
    finally:
        engine.inject_read_errors(0, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_runs(seed: int, generated_model: ModelFactory) -> None:
    chance = random.Random(seed)
    name = chance.choice(MODELS)
    facts = generated_model(name)
    alone = chance.random() < 0.5
    sizes = [1 if alone or chance.random() < 0.7 else chance.choice([2, 3, 9, 17, 33, 60]) for _ in range(40)]
    script = random_script(sizes, N_VOCAB, seed=seed)
    beside = random_script([1] * 40, N_VOCAB, seed=seed + 1000)  # in a second context of the same model
    how = settings(facts, script, chance.choice([1, 4, 512])) | {"n_ctx": 2048, "n_threads": 1}
    with Model(facts.path, plain=True) as model, model.context(**how) as context:
        wanted = context.run(script)
        context.clear()
        wanted_beside = context.run(beside)
    split = chance.choice(SPLITS)
    host_threads = chance.choice([0, 0, 1])
    got, got_beside = [], []
    share = chance.choice([chance.random(), 0.9])  # with most experts there, layers are begun ahead of their ids
    with placed(facts.path, share, chance.random(), split, host_threads) as (engine, model):
        if chance.random() < 0.6:
            look = chance.choice(["linear 1", "mlp 1+2", "wild 1"])
            engine.set_predictors(native_predictors(engine.info, look, seed))
            engine.set_prefetch_rules(least_chance=0.0)
        events = _events(engine, len(split), chance)
        stop = threading.Event()
        other = random.Random(seed + 1)
        meanwhile = _events(engine, len(split), other)
        failures: list[BaseException] = []

        def disturb() -> None:
            try:
                while not stop.wait(other.random() * 0.01):
                    other.choice(meanwhile)()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=disturb)
        with model.context(**how) as context, model.context(**how) as second:
            if chance.random() < 0.5:
                thread.start()
            try:
                for step, step_beside in zip(script, beside, strict=True):
                    if chance.random() < 0.2:
                        chance.choice(events)()
                    got.append(_decode(engine, context, step, chance, name != RECURRENT))
                    if seed % 3 == 0:
                        got_beside.append(second.decode(step_beside))
            finally:
                stop.set()
                if thread.ident is not None:
                    thread.join()
    assert not failures, failures
    if alone and host_threads == 0:
        assert_same_bits(np.concatenate(got), wanted)
    if got_beside and host_threads == 0:
        assert_same_bits(np.concatenate(got_beside), wanted_beside)
    assert (error := nmse(np.concatenate(got), wanted)) < 1e-6, f"NMSE {error:.2g}"
