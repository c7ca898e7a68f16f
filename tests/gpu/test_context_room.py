"""A context must have room in VRAM beside the least slots: pyengine.Llama says so before it loads anything."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import Any

import pytest
from llama_cpp import _internals, llama_cpp
from models.fixtures import ModelFactory

from pyengine import Llama, vram
from pyengine.errors import BudgetError
from pyengine.native import Device, NativeEngine
from pyengine.planning.shape import read_shape
from pyengine.planning.vram_needs import Context, on_device, read_sizes
from pyengine.sessions import Scheduler

MIB = 1 << 20
CONTEXT = 65536


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """free(bytes): what the device says that it has."""
    real = vram.find

    def set_free(n_bytes: int) -> None:
        def find(name: str) -> Device:
            return replace(real(name), free_bytes=n_bytes)

        monkeypatch.setattr(vram, "find", find)

    return set_free


def _open(path: Any, **how: Any) -> contextlib.closing[Llama]:
    how = {"gpu": "CPU", "n_threads": 1, "n_threads_batch": 1, "ram_budget": "100%"} | how
    return contextlib.closing(Llama(path, **how))


def _needs(path: Any, context: Context) -> int:
    """Bytes that are taken for sure, the least slots among them."""
    shape = on_device(read_shape(path), "CPU")
    return read_sizes(shape, context).needs(context.n_ctx).certain + shape.info.least_budget


def test_a_context_without_room_is_refused_before_anything_is_loaded(
    generated_model: ModelFactory, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = generated_model("llama-q4_0").path
    free(_needs(path, Context(CONTEXT)) - 1)
    refusal = f"a context of {CONTEXT} tokens has no room in the memory of CPU"
    with monkeypatch.context() as patched:
        for owner, name in ((NativeEngine, "start_on_gpu"), (_internals.LlamaModel, "__init__")):
            patched.setattr(owner, name, lambda *_, **__: pytest.fail("loading has begun"))
        with pytest.raises(BudgetError, match=refusal) as error:
            Llama(path, gpu="CPU", n_ctx=CONTEXT)
    fits = re.search(r"largest context that fits is (\d+) tokens", str(error.value))
    assert fits is not None
    with _open(path, n_ctx=int(fits[1])) as llama:
        llama.eval([5, 6, 7])


def test_attention_scores_count_and_a_smaller_micro_batch_makes_room(generated_model: ModelFactory, free: Any) -> None:
    path = generated_model("llama-q4_0").path
    free(_needs(path, Context(CONTEXT, n_ubatch=64)) + MIB)
    with pytest.raises(BudgetError, match="to compute"):
        Llama(path, gpu="CPU", n_ctx=CONTEXT)
    for less in ({"n_ubatch": 64}, {"n_batch": 64}, {"flash_attn": True}, {"n_ctx": 0}):
        with _open(path, **{"n_ctx": CONTEXT, **less}) as llama:
            llama.eval([5, 6, 7])


def test_states_of_many_sequences_count(generated_model: ModelFactory, free: Any) -> None:
    path = generated_model("qwen35moe").path
    free(_needs(path, Context(512, n_sequences=200)))
    with _open(path, n_ctx=512, n_sequences=200) as llama:
        Scheduler(llama)
    with pytest.raises(BudgetError, match="no room"):
        Llama(path, gpu="CPU", n_ctx=512, n_sequences=256)


def test_llama_cpps_failure_for_want_of_memory_has_the_numbers(
    generated_model: ModelFactory, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = generated_model("llama-q4_0").path
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
    free(_needs(path, Context(CONTEXT)))
    with pytest.raises(BudgetError, match="largest context that fits"):
        Llama(path, gpu="CPU", n_ctx=CONTEXT)
    free(1 << 40)
    with pytest.raises(ValueError, match="Failed to create llama_context"):
        Llama(path, gpu="CPU", n_ctx=CONTEXT)


def test_slots_for_less_than_a_token_are_said(
    generated_model: ModelFactory, free: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = generated_model("llama-q4_0").path
    with _open(path, n_ctx=256, vram_budget="100%"):
        assert not caplog.records
    free(64 * MIB)
    with _open(path, n_ctx=256, vram_budget="auto"):
        assert "nothing stays there from one token to the next" in caplog.records[0].getMessage()


def test_layers_that_stay_on_the_cpu_are_not_counted(generated_model: ModelFactory, free: Any) -> None:
    path = generated_model("llama-q4_0").path
    free(0)
    with _open(path, n_ctx=256, n_gpu_layers=1, vram_budget="100%") as llama:
        llama.eval([5, 6])
