"""A disk that fails in mid-decode: a clear error, never a wrong token, and the conversation goes on afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.facts import ModelFacts
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine import Llama
from pyengine.errors import ExpertReadError

from .children import Child
from .decoding import Context, DecodeError, random_script
from .managed import EVICT, MISS, Managed, assert_as_stock, managed
from .reference import StockProcess, write

PROMPT = random_script([40], N_VOCAB, seed=8)[0]
N_NEW = 16
SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_batch": 32, "n_ubatch": 16, "n_threads": 2, "n_threads_batch": 2}
SCRIPT = random_script([1] * 3 + [40] + [1] * 6, N_VOCAB, seed=9)
MODELS = ["qwen2moe", "deepseek2", "gpt-oss", "q4_k_m"]


@contextlib.contextmanager
def opened(path: Path, ram_budget: str = "60%") -> Iterator[Llama]:
    # The plain cache: the order of loads is known, and the events are ours to take.
    with contextlib.closing(Llama(path, ram_budget=ram_budget, policy="lru", look_ahead="off", **SETTINGS)) as llama:
        yield llama


def until_failure(tokens: Iterator[int]) -> list[int]:
    """The tokens before ExpertReadError, which must come."""
    before = []
    with pytest.raises(ExpertReadError, match=r"reading .*\.gguf at byte \d+: injected error"):
        for token in tokens:
            before.append(token)
    return before


def loads(llama: Llama) -> list[tuple[int, int]]:
    """(token, layer) of every load so far; tokens of the prompt count as one for each micro-batch."""
    assert llama.engine is not None
    events = llama.engine.native.events()
    n_layer = llama.engine.info.n_layer
    return [(int(e["step"]) // n_layer, int(e["layer"])) for e in events if e["kind"] == MISS]


@pytest.mark.parametrize("where", ["prompt", "answer"])
@pytest.mark.parametrize("layer", ["first", "last"])
# With slots for all that 16 tokens want of a layer, the order of loads is the same in every run.
@pytest.mark.parametrize("model_id", ["qwen2moe", "deepseek2", "gpt-oss", "llama-q4_k"])
def test_the_conversation_survives_a_read_error(
    model_id: str, where: str, layer: str, generated_model: ModelFactory, stock: StockProcess
) -> None:
    facts = generated_model(model_id)
    wanted = stock.write(facts.path, PROMPT, N_NEW, **SETTINGS)
    with opened(facts.path) as llama:
        assert list(write(llama, PROMPT, N_NEW)) == wanted
        order = loads(llama)
    n_prompt = -(-len(PROMPT) // SETTINGS["n_ubatch"])  # micro-batches
    layer_number = 0 if layer == "first" else len(facts.expert_blocks) - 1
    positions = [
        i for i, (step, of) in enumerate(order) if of == layer_number and (step < n_prompt) == (where == "prompt")
    ]
    for position in (positions[0], positions[len(positions) // 2], positions[-1]):
        with opened(facts.path) as llama:
            assert llama.engine is not None
            llama.engine.native.inject_read_errors(position, 1)
            before = until_failure(write(llama, PROMPT, N_NEW))
            step = order[position][0]
            assert len(before) == max(0, step - n_prompt + 1), "it fails at the token whose expert fails"
            assert before == wanted[: len(before)]
            assert llama.expert_stats()["read_errors"] > 0
            assert before + list(write(llama, PROMPT + before, N_NEW - len(before))) == wanted


def test_a_disk_that_stays_broken_fails_every_time(generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model("qwen2moe")
    wanted = stock.write(facts.path, PROMPT, N_NEW, **SETTINGS)
    with opened(facts.path) as llama:
        assert llama.engine is not None
        tokens = list(write(llama, PROMPT, 5))
        llama.engine.native.inject_read_errors(0, 1 << 40)
        for _ in range(5):
            tokens += until_failure(write(llama, PROMPT + tokens, N_NEW - len(tokens)))
        llama.engine.native.inject_read_errors(0, 0)
        tokens += write(llama, PROMPT + tokens, N_NEW - len(tokens))
    assert tokens == wanted


def test_a_completion_stream_ends_with_the_error(generated_model: ModelFactory) -> None:
    facts = generated_model("qwen2moe")
    with opened(facts.path) as llama:
        assert llama.engine is not None
        whole = llama.create_completion("the rain", max_tokens=N_NEW, temperature=0.0)["choices"][0]["text"]
        llama.reset()
        llama.engine.native.inject_read_errors(20, 1)
        pieces = []
        with pytest.raises(ExpertReadError):
            for chunk in llama.create_completion("the rain", max_tokens=N_NEW, temperature=0.0, stream=True):
                pieces.append(chunk["choices"][0]["text"])
        again = llama.create_completion("the rain", max_tokens=N_NEW, temperature=0.0)["choices"][0]["text"]
    assert whole.startswith("".join(pieces)) and len("".join(pieces)) < len(whole)
    assert again == whole


# ---- by the C API: every bit


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("model_id", MODELS)
def test_every_fifth_load_may_fail(
    model_id: str, share: float, generated_model: ModelFactory, stock: StockProcess
) -> None:
    """Wherever the disk fails, decoding the same tokens again gives stock's logits."""
    facts = generated_model(model_id)
    wanted = stock.run(facts.path, SCRIPT).logits
    failures = 0
    with managed(facts.path, share) as opened_model, opened_model.model.context() as context:
        got = []
        for i, chunk in enumerate(SCRIPT):
            opened_model.engine.inject_read_errors(i % 5, 1)
            try:
                logits = context.decode(chunk)
            except DecodeError:
                check_failure(opened_model, facts)
                failures += 1
                opened_model.engine.inject_read_errors(0, 0)
                logits = context.decode(chunk)
            got.append(logits)
            assert opened_model.engine.take_failure() is None
        check_counters(opened_model)
    assert failures >= 3
    assert_as_stock(np.concatenate(got), wanted, SCRIPT)


def check_failure(opened_model: Managed, facts: ModelFacts) -> None:
    """The reason is there once, and names a place within an expert of this file."""
    reason = opened_model.engine.take_failure()
    assert isinstance(reason, ExpertReadError)
    match = re.fullmatch(r"expert load failed: reading (.+) at byte (\d+): injected error", str(reason))
    assert match is not None
    place = int(match[2])
    assert any(
        str(t.path) == match[1] and t.offset <= place < t.offset + t.n_bytes and (place - t.offset) % t.stride == 0
        for t in facts.expert_tensors
    )
    assert opened_model.engine.take_failure() is None


def check_counters(opened_model: Managed) -> None:
    """Counters and events agree after failures, too."""
    stats, events = opened_model.engine.stats(), opened_model.engine.events()
    kinds = np.bincount(events["kind"], minlength=3)
    assert (stats["hits"], stats["misses"], stats["evictions"]) == tuple(kinds)
    assert stats["resident"] <= stats["slots"]
    assert stats["read_errors"] > 0
    assert np.all(events[events["kind"] == EVICT]["tokens"] == 0)


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[tuple[Managed, Context]]:
    with managed(path, 0.0) as opened_model, opened_model.model.context() as context:
        yield opened_model, context


def test_a_file_that_is_truncated_while_it_is_used(
    generated_model: ModelFactory, stock: StockProcess, tmp_path: Path
) -> None:
    facts = generated_model("qwen2moe")
    wanted = stock.run(facts.path, SCRIPT).logits
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(facts.path, copy)
    whole, before = copy.read_bytes(), copy.stat()
    first_expert = min(t.offset for t in facts.expert_tensors)
    with decoding(copy) as (opened_model, context):
        got = [context.decode(chunk) for chunk in SCRIPT[:2]]
        for size in (first_expert + 100, 4096, 0):
            os.truncate(copy, size)
            with pytest.raises(DecodeError):
                context.decode(SCRIPT[2])
            reason = opened_model.engine.take_failure()
            assert isinstance(reason, ExpertReadError)
            assert re.search(r"copy\.gguf at byte \d+: the file ends too early .*truncated", str(reason))
        with copy.open("r+b") as file:
            file.write(whole)
        with pytest.raises(DecodeError):  # whole again, but nobody can know that
            context.decode(SCRIPT[2])
        assert str(opened_model.engine.take_failure()).endswith("was changed while it was in use; load the model again")
        os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
        got += [context.decode(chunk) for chunk in SCRIPT[2:]]
    assert_as_stock(np.concatenate(got), wanted, SCRIPT)


def test_a_file_that_is_deleted_while_it_is_used(
    generated_model: ModelFactory, stock: StockProcess, tmp_path: Path
) -> None:
    facts = generated_model("qwen2moe")
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(facts.path, copy)
    with decoding(copy) as (_, context):
        copy.unlink()
        got = context.run(SCRIPT)
    assert_as_stock(got, stock.run(facts.path, SCRIPT).logits, SCRIPT)


@pytest.mark.parametrize("number", [0, 1, 25])
def test_an_error_from_the_system(
    number: int, generated_model: ModelFactory, stock: StockProcess, faulty_disk: Path, tmp_path: Path
) -> None:
    """A real read that fails, not an injected one."""
    facts, out = generated_model("qwen2moe"), tmp_path / "logits.npy"
    task = Child("disk.decode_over_errors", path=str(facts.path), script=SCRIPT, share=0.0, out=str(out), after=number)
    said = task.run({"LD_PRELOAD": str(faulty_disk)})
    assert said["faults"] == 1
    assert len(said["errors"]) == 1 and "Input/output error" in said["errors"][0]
    assert_as_stock(np.load(out), stock.run(facts.path, SCRIPT).logits, SCRIPT)
