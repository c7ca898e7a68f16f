"""Keywords and models of all kinds: what is taken, what is refused, and what is said about it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from models.fixtures import ModelFactory

import pyengine
from pyengine import Llama, bundled_model
from pyengine.errors import BudgetError

from .conftest import Ask
from .probes import PROBES, THREADS

Opened = Callable[..., Llama]
PROMPT = "the rain in an open field"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the package has said to a user so far."""
    caplog.set_level(logging.WARNING, logger="pyengine")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "pyengine"]


def test_without_a_path_it_is_the_bundled_model(opened: Opened, said: Callable[[], list[str]]) -> None:
    llm = opened()
    assert llm.model_path == str(bundled_model())
    assert llm.engaged.startswith("30 layers x ")
    assert said() == []


def test_the_defaults_that_differ_are_the_documented_ones() -> None:
    with_defaults = Llama(n_ctx=64)
    try:
        assert with_defaults.verbose is False
        assert with_defaults.n_threads == with_defaults.n_threads_batch == pyengine.llama.default_threads()
        assert with_defaults.n_threads >= 1
    finally:
        with_defaults.close()


@pytest.mark.parametrize("path", [str, lambda p: p, lambda p: str(p).encode().decode()], ids=["str", "Path", "copy"])
def test_paths_may_be_text_or_paths(opened: Opened, path: Callable[[Path], Any]) -> None:
    assert opened(path(bundled_model()), vocab_only=True).tokenize(b"a", add_bos=False)


@pytest.mark.parametrize("keyword", ["ram_buget", "n_ctxx", "model", "kwargs", "temperature"])
def test_unknown_keywords_are_errors(keyword: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        Llama(**{keyword: 1})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_too_many_positional_arguments_are_an_error() -> None:
    with pytest.raises(TypeError, match="positional"):
        Llama("a.gguf", "50%")  # type: ignore[call-arg]


def test_every_keyword_of_stock_is_known(opened: Opened) -> None:
    defaults = llama_cpp.Llama.__init__.__kwdefaults__ or {}
    assert len(defaults) > 40
    llm = opened(**{name: value for name, value in defaults.items() if name not in ("n_ctx", "verbose", *THREADS)})
    assert PROBES["greedy"](llm, "One, two,", 3)


def test_a_gpu_is_asked_for_with_one_line(opened: Opened, said: Callable[[], list[str]]) -> None:
    llm = opened(n_gpu_layers=1)
    assert llm.expert_stats()["managed"]
    (line,) = said()
    assert line.startswith("n_gpu_layers: experts stay in RAM")


def test_mlock_is_declined_with_one_line(opened: Opened, said: Callable[[], list[str]]) -> None:
    assert opened(use_mlock=True).expert_stats()["managed"]
    (line,) = said()
    assert line.startswith("use_mlock: ")


def test_the_vocabulary_alone(opened: Opened, stock: Ask, said: Callable[[], list[str]]) -> None:
    llm = opened(vocab_only=True)
    assert llm.engaged == "vocabulary only"
    assert llm.expert_stats()["managed"] is False
    facts = stock("facts")
    assert llm.n_vocab() == facts["n_vocab"]
    assert llm.tokenize("Straße, 42 \U0001f600 <|im_start|>".encode(), special=True) == facts["tokens"]
    assert said() == []


@pytest.mark.parametrize(
    "overrides",
    [{"llama.expert_used_count": 0}, {"llama.expert_used_count": 33}, {"llama.expert_count": 64}],
    ids=str,
)
def test_overrides_that_cannot_be_are_refused(overrides: dict[str, int]) -> None:
    (key,) = overrides
    with pytest.raises(ValueError, match=key):
        Llama(kv_overrides=overrides, **THREADS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n_ctx": -5}, "Failed to create llama_context: failed to initialize the context: n_ctx_seq == 0"),
        ({"n_ctx": 0, "n_batch": 0}, "n_batch and n_ubatch cannot both be zero"),
        ({"type_v": llama_cpp.GGML_TYPE_Q8_0}, "quantized V cache requires flash_attn"),
        ({"n_threads": 513}, "n_threads and n_threads_batch must be at most 512"),
    ],
    ids=str,
)
def test_a_context_that_cannot_be_says_why(options: dict[str, Any], reason: str, generated_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        Llama(generated_model("llama").path, **(THREADS | options))


def test_a_model_without_experts_runs_as_stock(
    ours: Ask, stock: Ask, opened: Opened, dense_model: Path, said: Callable[[], list[str]]
) -> None:
    question = {"model": dense_model, "prompt": PROMPT, "n": 12}
    assert ours("greedy", {"n_ctx": 128}, **question) == stock("greedy", {"n_ctx": 128}, **question)
    (line,) = said()
    assert line == opened(dense_model, n_ctx=64).engaged
    reason = "no experts in this model: nothing to manage"
    assert line == f"no experts managed, stock llama.cpp: {dense_model.name}: {reason}"


def test_a_model_without_experts_has_nothing_to_count_or_to_set(opened: Opened, dense_model: Path) -> None:
    llm = opened(dense_model, n_ctx=64, ram_budget="1GiB")
    stats = llm.expert_stats()
    assert stats.pop("managed") is False
    assert stats.pop("hit_rate") is stats.pop("bundle") is stats.pop("gpu") is None
    assert stats.pop("gpus") == ()
    assert set(stats.values()) == {0}
    assert llm.engine is None
    llm.set_ram_budget("50%")
    with pytest.raises(BudgetError):
        llm.set_ram_budget("much")
    with pytest.raises(BudgetError):
        Llama(dense_model, ram_budget="much")


def test_an_architecture_that_is_not_managed_runs_as_stock(
    opened: Opened,
    stock: Ask,
    generated_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr("pyengine.engine.MANAGED", frozenset())
    path = generated_model("llama").path
    llm = opened(path, n_ctx=128)
    (line,) = said()
    assert "architecture 'llama' is not managed" in line
    assert llm.engaged == line
    assert llm.expert_stats()["managed"] is False
    assert PROBES["greedy"](llm, PROMPT, 12) == stock("greedy", {"n_ctx": 128}, model=path, prompt=PROMPT, n=12)


def test_verbose_shows_what_stock_shows(opened: Opened, capfd: pytest.CaptureFixture[str]) -> None:
    opened(n_ctx=64, verbose=True)
    err = capfd.readouterr().err
    assert "llama_model_loader: loaded meta data" in err
    assert "n_ctx_seq (256) < n_ctx_train" in err  # a warning of the context


def test_otherwise_nothing_is_printed(opened: Opened, capfd: pytest.CaptureFixture[str]) -> None:
    llm = opened(n_ctx=64)
    llm.create_completion("x", max_tokens=2)
    llm.close()
    assert capfd.readouterr() == ("", "")
