"""LoRA adapters: those of attention work as in stock llama.cpp, those of experts are refused before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models.adapters import Target, write_adapter
from models.facts import ModelFacts
from models.fixtures import ModelFactory

from pyengine import Llama
from pyengine.errors import ModelFileError, UnmanagedModelError

from .conftest import Ask
from .probes import THREADS

PROMPT = "the rain in an open field"


@pytest.fixture
def facts(generated_model: ModelFactory) -> ModelFacts:
    return generated_model("qwen3moe")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_adapter_of_attention_works(ours: Ask, stock: Ask, facts: ModelFacts, tmp_path: Path, scale: float) -> None:
    adapter = tmp_path / "attention.gguf"
    write_adapter(adapter, facts, "attention")
    options = {"n_ctx": 128, "lora_path": str(adapter), "lora_scale": scale}
    question = {"model": facts.path, "prompt": PROMPT, "n": 16}
    tokens = ours("greedy", options, **question)
    assert tokens == stock("greedy", options, **question)
    assert tokens != stock("greedy", {"n_ctx": 128}, **question), "the adapter changes nothing: the test is blind"


@pytest.mark.parametrize("target", ["experts", "both"])
def test_an_adapter_of_experts_is_refused_before_loading(
    facts: ModelFacts, tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "experts.gguf"
    changed = [name for name in write_adapter(adapter, facts, target) if "_exps" in name]
    loads: list[Any] = []
    monkeypatch.setattr(Llama, "_load", lambda *args: loads.append(args))
    with pytest.raises(UnmanagedModelError) as refusal:
        Llama(facts.path, lora_path=str(adapter), **THREADS)
    assert not loads
    message = str(refusal.value)
    assert message.startswith(f"the LoRA adapter {adapter.name} changes experts (")
    assert any(name in message for name in changed)
    assert "\n" not in message


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not an adapter"], ids=str)
def test_a_broken_adapter_is_refused(facts: ModelFacts, tmp_path: Path, content: bytes | None) -> None:
    adapter = tmp_path / "broken.gguf"
    if content is not None:
        adapter.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"broken\.gguf") as refusal:
        Llama(facts.path, lora_path=str(adapter), **THREADS)
    assert "\n" not in str(refusal.value)
