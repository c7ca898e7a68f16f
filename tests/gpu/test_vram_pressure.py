"""Others take a GPU's memory while a model writes: experts give some of theirs, and take it again when it is free."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from engine.decoding import random_script
from engine.reference import write
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine import Llama, vram
from pyengine.background_bundle import consider
from pyengine.native import Device, NativeEngine

PROMPT, N_NEW = random_script([30], N_VOCAB, seed=12)[0], 12


class Gpu:
    """A wrapped CPU device that says how much memory it has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 1 << 40
        self._real = vram.find
        monkeypatch.setattr(vram, "find", self._find)
        monkeypatch.setattr(vram, "_PERIOD", 0.002)

    def _find(self, name: str) -> Device:
        return replace(self._real(name), free_bytes=self.free)


def _open(path: str, budget: str) -> contextlib.closing[Llama]:
    how = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "hybrid": False}
    return contextlib.closing(Llama(path, gpu="CPU", vram_budget=budget, ram_budget="100%", **how))


def _write_until(llama: Llama, wanted: list[int], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        llama.reset()
        assert list(write(llama, PROMPT, N_NEW)) == wanted


def _wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("budget", ["60%", "100%"])
def test_slots_go_and_come_back_while_a_model_writes(
    generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, budget: str
) -> None:
    path = str(generated_model("qwen2moe").path)
    gpu = Gpu(monkeypatch)
    with _open(path, budget) as llama:
        wanted = list(write(llama, PROMPT, N_NEW))
        roomy = llama.expert_stats()["slots"]
        assert roomy > 1
        gpu.free = 0
        _write_until(llama, wanted, lambda: llama.expert_stats()["slots"] < roomy)
        gpu.free = 1 << 40
        _write_until(llama, wanted, lambda: llama.expert_stats()["slots"] == roomy)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "CPU memory is short: expert budget" in said[0] and "CPU memory is free again" in said[-1]


def test_a_budget_of_the_user_is_the_one_that_comes_back(
    generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(generated_model("llama-q4_0").path)
    gpu = Gpu(monkeypatch)
    with _open(path, "100%") as llama:
        wanted = list(write(llama, PROMPT, N_NEW))
        llama.set_vram_budget("50%")
        half = llama.expert_stats()["slots"]
        gpu.free = 0
        _write_until(llama, wanted, lambda: llama.expert_stats()["slots"] < half)
        gpu.free = 1 << 40
        _write_until(llama, wanted, lambda: llama.expert_stats()["slots"] == half)
        for _ in range(5):
            llama.reset()
            assert list(write(llama, PROMPT, N_NEW)) == wanted
        assert llama.expert_stats()["slots"] == half


def test_not_even_the_least_is_an_error_that_is_said(
    generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu(monkeypatch)
    with _open(str(generated_model("llama-q4_0").path), "100%") as llama:
        wanted = list(write(llama, PROMPT, N_NEW))
        real = NativeEngine.set_vram_budget

        def refused(self: NativeEngine, budget: int, number: int | None = None) -> None:
            raise MemoryError("no memory")

        monkeypatch.setattr(NativeEngine, "set_vram_budget", refused)
        gpu.free = 0
        _wait_until(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
        monkeypatch.setattr(NativeEngine, "set_vram_budget", real)
        llama.reset()
        assert list(write(llama, PROMPT, N_NEW)) == wanted
    assert any("CPU: no memory" in record.getMessage() for record in caplog.records)


def test_a_gpu_that_gave_everything_gets_slots_again(
    generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu(monkeypatch)
    with _open(str(generated_model("llama-q4_0").path), "100%") as llama:
        wanted = list(write(llama, PROMPT, N_NEW))
        assert llama.engine is not None
        llama.engine.native.limit_vram(0, 0)
        gpu.free = 0
        _wait_until(lambda: llama.expert_stats()["slots"] == 0)
        llama.reset()
        with pytest.raises(MemoryError, match="no GPU memory for experts"):
            llama.eval(PROMPT)
        llama.engine.native.limit_vram(0, 1 << 40)
        gpu.free = 1 << 40
        _wait_until(lambda: llama.expert_stats()["slots"] == llama.expert_stats()["experts"])
        llama.reset()
        assert list(write(llama, PROMPT, N_NEW)) == wanted
    assert any("may not take" in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


def test_a_model_that_was_all_in_vram_gets_a_policy_when_it_shrinks(generated_model: ModelFactory) -> None:
    with _open(str(generated_model("llama-q4_0").path), "100%") as llama:
        wanted = list(write(llama, PROMPT, N_NEW))
        assert llama.engine is not None and llama.engine.foresight == "off"
        llama.set_vram_budget("50%")
        assert llama.engine.policy != "auto" and llama.engine.foresight != "off"
        llama.reset()
        assert list(write(llama, PROMPT, N_NEW)) == wanted
        llama.set_vram_budget("100%")
        _write_until(llama, wanted, lambda: llama.expert_stats()["resident"] == llama.expert_stats()["experts"])


def test_no_bundle_is_made_for_a_gpu(generated_model: ModelFactory) -> None:
    path = generated_model("llama-q4_0").path
    with _open(str(path), "50%") as llama:
        assert "a GPU is in use" in str(consider(llama.engine, path))
