"""pyengine.Llama with several GPUs: which are taken, how budgets are shared, what is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import llama_cpp
import numpy as np
import pytest
from models.fixtures import ModelFactory

from pyengine import Llama, vram
from pyengine.errors import BudgetError, UsageError
from pyengine.native import Device

_GB = 10**9


def _machine(monkeypatch: pytest.MonkeyPatch, *devices: Device) -> None:
    monkeypatch.setattr(vram, "devices", lambda: [*devices, Device("CPU", "", "", 64 * _GB, 64 * _GB, False, False)])


def _gpu(name: str, device_id: str = "", *, free: int = 80 * _GB, unified: bool = False) -> Device:
    return Device(name, "a GPU", device_id or name, free, 80 * _GB, True, unified)


def _open(path: Any, **how: Any) -> contextlib.closing[Llama]:
    how = {"gpu": "CPU,CPU", "vram_budget": "50%", "ram_budget": "100%", "n_ctx": 128} | how
    return contextlib.closing(Llama(path, n_threads=2, n_threads_batch=2, **how))


def test_auto_takes_every_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both = (_gpu("CUDA0", "0000:01", free=60 * _GB), _gpu("CUDA1", "0000:02", free=20 * _GB))
    _machine(monkeypatch, *both, _gpu("Vulkan0", "0000:01"), _gpu("Vulkan1", "0000:07", unified=True))
    chosen = vram.choose("auto", "auto", "auto")
    assert chosen is not None and chosen.devices == ("CUDA0", "CUDA1") and chosen.name == "CUDA0,CUDA1"
    assert chosen.shares == (60 * _GB, 20 * _GB)
    _machine(monkeypatch, _gpu("Vulkan1", unified=True))
    assert (chosen := vram.choose("auto", "auto", "auto")) is not None and chosen.devices == ("Vulkan1",)


def test_names_are_taken_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, _gpu("CUDA0"), _gpu("CUDA1"), _gpu("CUDA2"))
    for given in ("CUDA2,CUDA0", "CUDA2, CUDA0", ["CUDA2", "CUDA0"]):
        chosen = vram.choose(given, "auto", "auto", vram.Split(shares=[1, 3, 5]))
        assert chosen is not None and chosen.devices == ("CUDA2", "CUDA0") and chosen.shares == (1.0, 3.0)
    for given in ("CUDA3", "CUDA0,", "", [], "CUDA0,auto"):
        with pytest.raises(UsageError, match="which has CUDA0, CUDA1"):
            vram.choose(given, "auto", "auto")
    with pytest.raises(UsageError, match="twice"):
        vram.choose("CUDA0,CUDA0", "auto", "auto")


def test_split_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, _gpu("CUDA0"), _gpu("CUDA1"))
    none = llama_cpp.LLAMA_SPLIT_MODE_NONE
    chosen = vram.choose("auto", "auto", "auto", vram.Split(none, 1, [1, 0]))
    assert chosen is not None and chosen.devices == ("CUDA1",)
    assert vram.choose("auto", "auto", "auto", vram.Split(none, -1)) is None
    with pytest.raises(UsageError, match="main_gpu 2"):
        vram.choose("auto", "auto", "auto", vram.Split(none, 2))
    with pytest.raises(UsageError, match="split_mode"):
        vram.choose("auto", "auto", "auto", vram.Split(llama_cpp.LLAMA_SPLIT_MODE_ROW))
    for shares in ([1, -1], [float("nan")]):
        with pytest.raises(UsageError, match="tensor_split"):
            vram.choose("auto", "auto", "auto", vram.Split(shares=shares))
    assert (chosen := vram.choose("auto", "auto", "auto", vram.Split(shares=[0, 0]))) is not None
    assert chosen.shares == (80 * _GB, 80 * _GB)


def test_a_budget_is_shared_and_no_gpu_gets_more_than_it_has() -> None:
    limits = [(10, 110), (10, 310)]
    assert vram.shared(20, limits, [1000, 1000]) == [10, 10]
    assert vram.shared(220, limits, [1000, 1000]) == [60, 160]
    assert vram.shared(420, limits, [1000, 1000]) == [110, 310]
    assert vram.shared(220, limits, [30, 1000]) == [30, 190]
    assert vram.shared(420, limits, [30, 100]) == [30, 100]
    assert vram.shared(420, limits, [0, 0]) == [10, 10]
    assert sum(vram.shared(333, [(1, 100), (2, 200), (3, 300)], [50, 1000, 1000])) == 333


def _logits(llama: Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), (llama.n_vocab(),)).copy()


def test_one_model_on_two(generated_model: ModelFactory) -> None:
    path = generated_model("llama-q4_0").path
    tokens = [5, 6, 7, 8, 9]
    with _open(path, gpu="CPU") as llama:
        llama.eval(tokens)
        wanted = _logits(llama)
    with _open(path) as llama:
        llama.eval(tokens)
        stats = llama.expert_stats()
        engaged = llama.engaged
        assert np.array_equal(_logits(llama), wanted)
        llama.set_vram_budget(["100%", "50%"])
        full, half = llama.expert_stats()["gpus"]
        assert full["budget_bytes"] == full["slot_bytes"] and half["budget_bytes"] <= half["slot_bytes"] // 2
        llama.set_vram_budget("100%")
        assert llama.expert_stats()["slots"] == stats["experts"]
        with pytest.raises(BudgetError, match="3 sizes for 2 GPUs"):
            llama.set_vram_budget("50%,50%,50%")
        llama.reset()
        llama.eval(tokens)
        assert np.array_equal(_logits(llama), wanted)
    assert stats["gpu"] == "CPU,CPU" and all(part["ffns"] > 0 for part in stats["gpus"])
    assert stats["slots"] == sum(part["slots"] for part in stats["gpus"])
    assert all(f"CPU ({part['n_layer']} layers, {part['slots']} slots)" in engaged for part in stats["gpus"])


def test_layers_follow_tensor_split(generated_model: ModelFactory) -> None:
    path = generated_model("llama-q4_0").path
    with _open(path, tensor_split=[1.0, 0.0]) as llama:
        llama.eval([5])
        first, second = llama.expert_stats()["gpus"]
        assert (first["n_layer"], second["n_layer"]) == (llama.expert_stats()["layers"], 0) and second["ffns"] == 0
    with pytest.raises(UsageError, match="split_mode"):
        Llama(path, gpu="CPU,CPU", split_mode=llama_cpp.LLAMA_SPLIT_MODE_ROW)
