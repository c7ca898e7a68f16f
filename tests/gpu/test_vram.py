"""pyengine.Llama with a GPU, which is a wrapped CPU device here: options, budgets, what it says."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import Any

import pytest
from engine.decoding import random_script
from engine.reference import write
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine import Llama, budget, vram
from pyengine.errors import BudgetError, UsageError
from pyengine.native import Device, NativeEngine


def _open(path: Any, **how: Any) -> contextlib.closing[Llama]:
    how = {"gpu": "CPU", "vram_budget": "50%", "ram_budget": "100%", "n_ctx": 128} | how
    return contextlib.closing(Llama(path, n_threads=2, n_threads_batch=2, **how))


def test_it_says_what_is_where_and_counts(generated_model: ModelFactory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyengine")
    path = generated_model("llama-q4_0").path
    with _open(path) as llama:
        llama.eval([5, 6, 7])
        llama.eval([8])
        stats = llama.expert_stats()
        assert "in memory of CPU over" in llama.engaged and "in RAM over disk" in llama.engaged
        assert any("in memory of CPU" in record.message for record in caplog.records)
    assert stats["gpu"] == "CPU" and stats["slots"] == stats["experts"] // 2
    assert stats["link_bytes"] > 0 and stats["syncs"] > 0 and stats["ram_slots"] == stats["experts"]


def test_the_budget_can_be_changed_and_refused(generated_model: ModelFactory) -> None:
    with _open(generated_model("llama-q4_0").path) as llama:
        llama.eval([5, 6, 7])
        llama.set_vram_budget("100%")
        stats = llama.expert_stats()
        assert stats["slots"] == stats["experts"]
        llama.eval([8])
        with pytest.raises(BudgetError, match="vram_budget"):
            llama.set_vram_budget(1)
        with pytest.raises(BudgetError, match="vram_budget"):
            llama.set_vram_budget("much")
        llama.eval([9])


def test_the_budget_of_ram_behind_it_can_be_changed_and_refused(generated_model: ModelFactory) -> None:
    with _open(generated_model("llama-q4_0").path) as llama:
        llama.eval([5, 6, 7])
        for wording, share in (("50%", 0.5), ("0", 0.0), ("100%", 1.0)):
            llama.set_ram_budget(wording)
            stats = llama.expert_stats()
            assert stats["ram_slots"] == share * stats["experts"]
            llama.eval([8])
        llama.set_ram_budget("auto")
        assert llama.expert_stats()["ram_slots"] == stats["experts"], "this machine has room for so small a model"
        with pytest.raises(BudgetError, match="ram_budget"):
            llama.set_ram_budget("much")
        llama.eval([9])


@pytest.mark.parametrize("vram_budget", ["50%", "90%", "100%"])
def test_a_prompt_token_by_token(generated_model: ModelFactory, vram_budget: str) -> None:
    """llama.cpp gives the last layer no tokens at all then, but for the last one."""
    prompt = random_script([60], N_VOCAB, seed=8)[0]
    path = str(generated_model("many-experts").path)
    texts = []
    for n_ubatch in (1, 512):
        with _open(path, vram_budget=vram_budget, n_ubatch=n_ubatch, hybrid=False) as llama:
            texts.append([list(write(llama, prompt, 12)) for _ in range(2)])
    assert texts[0] == texts[1]


def test_tokens_without_output_are_not_recorded(generated_model: ModelFactory) -> None:
    for where in ({"gpu": "off"}, {"gpu": "CPU"}):
        how = {"n_ubatch": 1, "policy": "lru", "look_ahead": "off"} | where
        with _open(generated_model("many-experts").path, **how) as llama:
            assert llama.engine is not None
            native, info = llama.engine.native, llama.engine.info
            native.set_recording(ids=True)
            llama.eval(random_script([20], N_VOCAB, seed=9)[0])
            llama.eval([5])
            ids, _, _ = native.take_recording(64, info, inputs=False)
        assert ids.shape == (2, info.n_layer, info.n_expert_used), where  # the prompt's last token and the one behind
        assert all(len(set(chosen)) == info.n_expert_used for chosen in ids.reshape(-1, info.n_expert_used).tolist())


@pytest.mark.parametrize("how", [{"gpu": "off"}, {"gpu": "CPU", "n_gpu_layers": 0}, {"gpu": "auto"}])
def test_without_a_gpu_experts_are_in_ram(generated_model: ModelFactory, how: dict[str, Any]) -> None:
    """No build in these tests has a GPU, so "auto" finds none."""
    with _open(generated_model("llama-q4_0").path, **how) as llama:
        assert llama.expert_stats()["gpu"] is None
        with pytest.raises(UsageError, match="no GPU"):
            llama.set_vram_budget("50%")


def test_an_unknown_gpu_is_an_error_that_names_the_known(generated_model: ModelFactory) -> None:
    with pytest.raises(UsageError, match="which has CPU"):
        Llama(generated_model("llama-q4_0").path, gpu="CUDA7")
    with pytest.raises(BudgetError, match="vram_budget"):
        Llama(generated_model("llama-q4_0").path, vram_budget="-3")


def test_a_gpu_with_less_memory_than_it_said_gets_fewer_slots(
    generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = generated_model("llama-q4_0").path
    real = NativeEngine.start_on_gpu

    def start_on_gpu(self: NativeEngine, vram_budget: int, ram_budget: int) -> None:
        real(self, vram_budget, ram_budget)
        self.limit_vram(0, int(0.7 * self.info.slot_bytes))

    monkeypatch.setattr(NativeEngine, "start_on_gpu", start_on_gpu)
    with _open(path, vram_budget="100%") as llama:
        llama.eval([5])
        stats = llama.expert_stats()
        assert 0.5 * stats["experts"] <= stats["slots"] <= 0.7 * stats["experts"]
    (said,) = [record.getMessage() for record in caplog.records if "has no" in record.getMessage()]
    assert "MiB left for experts: taking" in said


@pytest.mark.parametrize(("unified", "left"), [(False, 800 << 20), (True, 3 << 30)])
def test_auto_leaves_what_kernels_take_and_the_hosts_reserve_only_where_memory_is_the_hosts(
    generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, unified: bool, left: int
) -> None:
    path = generated_model("llama-q4_0").path
    half = NativeEngine(path).info.slot_bytes // 2
    device = Device("CPU", "a card", "", 0, 16_000 << 20, gpu=True, unified=unified)
    for module in (budget, vram):
        monkeypatch.setattr(module, "reserve", lambda: 3 << 30)
    monkeypatch.setattr(budget, "_group_limits", lambda: True)  # where RAM leaves room for choosing, too

    def now(name: str) -> Device:  # free is what slots have not taken
        taken = engines[0].gpus()[0].budget_bytes if engines else 0
        return replace(device, free_bytes=left + half - taken)

    engines: list[NativeEngine] = []
    start = NativeEngine.start_on_gpu
    monkeypatch.setattr(
        NativeEngine, "start_on_gpu", lambda self, *budgets: (start(self, *budgets), engines.append(self))[0]
    )
    monkeypatch.setattr(vram, "find", now)
    with _open(path, vram_budget="auto") as llama:
        stats = llama.expert_stats()
        assert stats["slots"] == stats["experts"] // 2
        llama.eval([5, 6])


@pytest.mark.parametrize(("free", "ram_budget", "there"), [(16, "auto", False), (16, "100%", True), (2, "auto", True)])
def test_no_ram_is_taken_behind_a_gpu_that_surely_holds_all(
    generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, free: int, ram_budget: str, there: bool
) -> None:
    device = Device("CPU", "a card", "", free << 30, 16 << 30, gpu=True, unified=False)
    monkeypatch.setattr(vram, "devices", lambda: [device])
    monkeypatch.setattr(vram, "find_device", lambda name: device)
    with _open(generated_model("llama-q4_0").path, vram_budget="auto", ram_budget=ram_budget) as llama:
        llama.eval([5, 6])
        stats = llama.expert_stats()
        assert stats["slots"] == stats["experts"] and (stats["ram_slots"] > 0) == there


def test_with_unified_memory_there_is_one_copy(generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device("CPU", "a board", "", 8 << 30, 16 << 30, gpu=True, unified=True)
    monkeypatch.setattr(vram, "devices", lambda: [device])
    monkeypatch.setattr(vram, "find_device", lambda name: device)
    with _open(generated_model("llama-q4_0").path, gpu="auto", ram_budget="auto") as llama:
        stats = llama.expert_stats()
        assert stats["gpu"] == "CPU" and stats["ram_slots"] == 0
        with pytest.raises(UsageError, match="is RAM"):
            llama.set_ram_budget("50%")
        llama.eval([5])
