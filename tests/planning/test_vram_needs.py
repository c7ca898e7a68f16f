"""A context is refused by what it takes for sure, so that much must never be more than llama.cpp takes."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import llama_cpp
import pytest
from models.architectures import ARCHITECTURES
from models.fixtures import ModelFactory

from pyengine.planning.shape import read_shape
from pyengine.planning.vram_needs import Context, read_sizes

MIB = 1 << 20
Q8_0 = 8
#: What llama.cpp rounds in its log.
_ROUNDED = MIB // 100

#: Of the KV cache less is known than llama.cpp takes: it also keeps an indexer's keys, or compresses.
_MORE = {"deepseek32", "glm-dsa", "dots3note", "minimax-m3", "hy_v4", "deepseek4", "deepseek4-hashed", "glm5-next"} | {
    "qwen4exp"
}


def _taken(path: Path, context: Context, capfd: pytest.CaptureFixture[str]) -> tuple[int, int, int]:
    """Bytes of KV cache, recurrent states and compute buffers, as llama.cpp says."""
    llm_params = asdict(context)
    n_sequences = llm_params.pop("n_sequences")

    class Several(llama_cpp.Llama):
        @property
        def context_params(self) -> object:
            return self._given

        @context_params.setter
        def context_params(self, value: object) -> None:
            value.n_seq_max, value.kv_unified = n_sequences, n_sequences > 1  # type: ignore[attr-defined]
            self._given = value

    Several(str(path), n_threads=1, n_threads_batch=1, verbose=True, **llm_params).close()
    said = capfd.readouterr().err

    def total(what: str) -> int:
        return int(sum(float(size) * MIB for size in re.findall(rf"{what} buffer size = +([\d.]+) MiB", said)))

    assert total("compute") > 0
    return total("KV"), total("RS"), total("compute")


@pytest.mark.parametrize("name", [name.replace("/", "-") for name in ARCHITECTURES])
def test_no_more_is_certain_than_is_taken(
    name: str, generated_model: ModelFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    path = generated_model(name).path
    shape = read_shape(path)
    for context in (Context(4096), Context(2048, n_batch=256, n_sequences=64)):
        sizes = read_sizes(shape, context)
        needs = sizes.needs(context.n_ctx)
        kv, states, compute = _taken(path, context, capfd)
        assert needs.kv - sizes.states <= kv + _ROUNDED
        assert sizes.states <= states + _ROUNDED
        assert needs.scores <= compute
        if name not in _MORE:
            assert needs.kv - sizes.states >= kv - _ROUNDED
    assert name.startswith(("llada", "rnd1", "nomic", "llama-embed")) or read_sizes(shape).needs(4096).scores > 0


def test_a_cache_of_another_type(generated_model: ModelFactory, capfd: pytest.CaptureFixture[str]) -> None:
    path = generated_model("gpt-oss").path
    context = Context(4096, flash_attn=True, type_k=Q8_0, type_v=Q8_0)
    needs = read_sizes(read_shape(path), context).needs(4096)
    assert abs(needs.kv - _taken(path, context, capfd)[0]) <= 2 * _ROUNDED


def test_what_an_application_asks_for_counts(generated_model: ModelFactory) -> None:
    shape = read_shape(generated_model("gpt-oss").path)
    usual = read_sizes(shape).needs(1024)
    assert read_sizes(shape, Context(n_ubatch=64)).needs(1024).compute == usual.compute // 8
    assert read_sizes(shape, Context(n_batch=64)).needs(1024).scores == usual.scores // 8
    assert read_sizes(shape, Context(flash_attn=True)).needs(1024).scores == 0
    assert read_sizes(shape, Context(type_k=Q8_0, type_v=Q8_0)).needs(1024).kv == usual.kv * 17 // 32
    assert read_sizes(shape, Context(offload_kqv=False)).needs(1024).certain == usual.dense
    assert read_sizes(shape, Context(swa_full=False)).needs(1024).kv == 0, "layers that look back a little keep little"
    recurrent = read_shape(generated_model("qwen35moe").path)
    one, many = (read_sizes(recurrent, Context(n_sequences=n)).states for n in (1, 64))
    assert many == 64 * one > 0
