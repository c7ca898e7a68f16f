"""The rules for threads and processes: what is allowed works, what is not says so."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine import Llama
from pyengine.errors import UsageError
from pyengine.native import NativeEngine

from .children import Child
from .decoding import DecodeError, Logits, random_script
from .managed import assert_as_stock, managed
from .reference import StockProcess, write

SCRIPT = random_script([1] * 20 + [60] + [1] * 20, N_VOCAB, seed=11)
PROMPT, N_NEW = SCRIPT[20][:30], 12
SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1}


# ---- threads


@pytest.mark.parametrize(("one", "two"), [("qwen2moe", "gpt-oss"), ("q4_k_m", "q4_k_m")])
def test_two_models_in_two_threads(one: str, two: str, generated_model: ModelFactory, stock: StockProcess) -> None:
    paths = [generated_model(model_id).path for model_id in (one, two)]
    wanted = [stock.run(path, SCRIPT, n_threads=1).logits for path in paths]
    together = threading.Barrier(2)

    def compute(path: Path) -> list[Logits]:
        with managed(path, 0.2) as (_, model), model.context(n_threads=1) as context:
            together.wait(30)
            got = []
            for _ in range(3):
                context.clear()
                got.append(context.run(SCRIPT))
            return got

    with ThreadPoolExecutor(2) as pool:
        for got, want in zip(pool.map(compute, paths), wanted, strict=True):
            for logits in got:
                assert_as_stock(logits, want, SCRIPT)


def test_two_contexts_of_one_model_in_two_threads(generated_model: ModelFactory, stock: StockProcess) -> None:
    """They share slots, so one waits for the other's FFN; nothing mixes."""
    facts = generated_model("qwen2moe")
    wanted = stock.run(facts.path, SCRIPT, n_threads=1).logits
    with managed(facts.path, 0.2) as (_, model), contextlib.ExitStack() as stack:
        contexts = [stack.enter_context(model.context(n_threads=1)) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(3):
                for got in pool.map(lambda context: context.run(SCRIPT), contexts):
                    assert_as_stock(got, wanted, SCRIPT)
                for context in contexts:
                    context.clear()


@contextlib.contextmanager
def loaded(path: Path, ram_budget: str = "20%") -> Iterator[Llama]:
    with contextlib.closing(Llama(path, ram_budget=ram_budget, **SETTINGS)) as llama:
        yield llama


@pytest.mark.parametrize("how", ["decode", "eval", "generate", "create_completion"])
def test_a_second_thread_that_computes_is_refused(how: str, generated_model: ModelFactory, stock: StockProcess) -> None:
    """It gets UsageError, and the first thread's text stays what it is."""
    facts = generated_model("qwen2moe")
    wanted = stock.write(facts.path, PROMPT, N_NEW, **SETTINGS)
    with loaded(facts.path) as llama:
        started, inside, refused = threading.Event(), threading.Event(), threading.Event()

        def first() -> list[int]:
            tokens = []
            for token in write(llama, PROMPT, N_NEW):
                tokens.append(token)
                if len(tokens) == 4:
                    started.set()
            return tokens

        # llama.cpp's question whether to stop holds the first thread within llama_decode until the second is refused.
        @llama_cpp.ggml_abort_callback
        def hold(_: object) -> bool:
            if started.is_set():
                inside.set()
                refused.wait(30)
            return False

        llama_cpp.llama_set_abort_callback(llama.ctx, hold, ctypes.c_void_p(0))
        second = {
            "decode": lambda: llama._ctx.decode(llama._batch),
            "eval": lambda: llama.eval([5, 6, 7]),
            "generate": lambda: next(iter(llama.generate([5, 6, 7], temp=0.0))),
            "create_completion": lambda: llama.create_completion("the rain", max_tokens=3),
        }[how]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(first)
            try:
                assert inside.wait(30)
                with pytest.raises(UsageError, match="another thread is computing"):
                    second()
            finally:
                refused.set()
            assert answer.result(30) == wanted
        # Afterwards any thread may, one at a time.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: list(write(llama, PROMPT, N_NEW))).result(30) == wanted


def test_looking_and_budgets_are_allowed_from_any_thread(generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model("qwen2moe")
    wanted = stock.write(facts.path, PROMPT, N_NEW, **SETTINGS)
    with loaded(facts.path) as llama:
        stop = threading.Event()

        def look() -> int:
            times = 0
            while not stop.is_set():
                llama.set_ram_budget(["10%", "90%"][times % 2])
                assert llama.expert_stats()["budget_bytes"] > 0
                assert "layers" in llama.engaged
                times += 1
            return times

        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(look)
            for _ in range(5):
                llama.reset()
                assert list(write(llama, PROMPT, N_NEW)) == wanted
            stop.set()
            assert looking.result(30) > 10


def test_signals_are_not_for_the_io_threads(generated_model: ModelFactory) -> None:
    """A signal that lands on a thread of ours would interrupt a program that never asked for it."""
    before = set(os.listdir("/proc/self/task"))
    with managed(generated_model("qwen2moe").path, 0.2):
        ours = set(os.listdir("/proc/self/task")) - before
        assert ours
        for thread in ours:
            status = Path(f"/proc/self/task/{thread}/status").read_text()
            blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1], 16)
            for signal_number in (1, 2, 13, 14, 15, 17):  # HUP, INT, PIPE, ALRM, TERM, CHLD
                assert blocked >> (signal_number - 1) & 1


def test_closing_ends_the_io_threads(generated_model: ModelFactory) -> None:
    before = set(os.listdir("/proc/self/task"))
    for _ in range(3):
        with managed(generated_model("qwen2moe").path, 0.2) as (_, model), model.context() as context:
            context.run(SCRIPT[:3])
    assert len(os.listdir("/proc/self/task")) <= len(before) + 1  # OpenMP may have made its own


# ---- life time


def test_an_engine_that_is_closed_says_so(generated_model: ModelFactory) -> None:
    engine = NativeEngine(generated_model("qwen2moe").path)
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.stats()


def test_computing_after_closing_fails_cleanly(generated_model: ModelFactory) -> None:
    """The wrong order: the engine is gone, the model still there."""
    facts = generated_model("qwen2moe")
    with managed(facts.path, 0.2) as (engine, model), model.context(n_threads=1) as context:
        context.decode([5])
        engine.close()
        for _ in range(2):
            with pytest.raises(DecodeError):
                context.decode([6])


def test_a_model_is_refused_before_the_engine_has_slots(generated_model: ModelFactory) -> None:
    facts = generated_model("qwen2moe")
    engine = NativeEngine(facts.path)
    try:
        with pytest.raises(UsageError, match="not been started"):
            engine.set_ram_budget(engine.info.slot_bytes)
        engine.start(engine.info.slot_bytes)
        with pytest.raises(UsageError, match="started already"):
            engine.start(engine.info.slot_bytes)
    finally:
        engine.close()


def test_loading_and_closing_again_and_again_keeps_nothing(generated_model: ModelFactory) -> None:
    """No file stays open and no address space stays reserved."""
    facts = generated_model("split")

    def once() -> None:
        with managed(facts.path, 0.5) as (_, model), model.context(n_threads=1) as context:
            context.run(SCRIPT[:2])

    for _ in range(3):
        once()
    files, mapped = len(os.listdir("/proc/self/fd")), mappings()
    for _ in range(10):
        once()
    assert len(os.listdir("/proc/self/fd")) == files
    assert mappings() <= mapped + 5


def mappings() -> int:
    """How many ranges of addresses this process has."""
    return len(Path("/proc/self/maps").read_text().splitlines())


# ---- processes


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while a thread computes"])
def test_a_forked_child_is_refused_and_ends(busy: bool, generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model("qwen2moe")
    wanted = stock.write(facts.path, PROMPT, N_NEW, **SETTINGS)
    said = Child("forks.fork", path=str(facts.path), prompt=PROMPT, n_new=N_NEW, settings=SETTINGS, busy=busy).run()
    for met, status in said["children"]:
        assert status == 0, "the child hangs or crashes at its end"
        assert len(met) == 2
        assert all(error.startswith("UsageError: this process was forked after the model") for error in met)
    assert said["before"] == said["after"] == wanted, "the parent goes on"


def test_a_forked_child_never_waits_for_its_parents_lock(generated_model: ModelFactory) -> None:
    """The bare engine: a child forked in the middle of an FFN has a copy of a lock that nobody will open."""
    met = Child("forks.fork_engine", path=str(generated_model("many-experts").path), script=SCRIPT[20:21]).run()
    for name, children in met.items():
        for said, status in children:
            assert status == 0, f"{name} hangs or crashes"
            if name in ("close", "events"):
                assert said == ""
            else:
                assert said.startswith("UsageError: this process was forked after the model")


def test_a_forked_child_that_closes_leaves_its_own_memory_alone(generated_model: ModelFactory) -> None:
    """Slots are not copied to a child, so their addresses are free for other things there."""
    assert Child("forks.fork_memory", path=str(generated_model("qwen2moe").path)).run() == {"status": 0}
