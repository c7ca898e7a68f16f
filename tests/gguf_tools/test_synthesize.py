"""Models of a real shape, scaled down: stock llama.cpp computes finite logits with them, and a seed repeats them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import Result
from models.facts import read_facts
from models.stock import StockModel

from gguf_tools import cli
from gguf_tools.errors import RequestError
from gguf_tools.inspect_model import inspect_model
from gguf_tools.placeholder_vocabulary import LEAST_TOKENS, UNWRITABLE
from gguf_tools.shapes import SHAPES, Shape
from gguf_tools.synthesize import plan_shape, plan_synthesis
from gguf_tools.widen import plan_widening
from pyengine import Llama

Invoke = Callable[..., Result]
N_VOCAB = LEAST_TOKENS + 100

# Bytes of the published files in the same types, to a tenth: general.file_type MXFP4_MOE and Q4_0.
PUBLISHED = {"gpt-oss-20b": 12.1e9, "qwen3-30b-a3b": 17.3e9, "deepseek-v2-lite": 8.9e9, "mixtral-8x7b": 26.4e9}


def scaled(name: str) -> Shape:
    """The shape with everything small but what makes the architecture: ratios, types, layouts, keys."""
    shape = SHAPES[name]
    mla = shape.mla and replace(shape.mla, kv_lora=64, nope=32, rope=32, value=32)
    return replace(
        shape,
        n_layer=2 + shape.n_dense_lead,
        n_embd=128,
        n_head=4,
        n_head_kv=min(shape.n_head_kv, 2),
        head_dim=32,
        n_ff=64 if shape.n_ff == shape.n_ff_exp else 192,
        n_ff_exp=64,
        n_vocab=N_VOCAB,
        mla=mla,
    )


def write(name: str, path: Path, seed: int = 0) -> Path:
    synthesis = plan_shape(scaled(name), name, seed)
    written: list[int] = []
    synthesis.write(path, written.append)
    assert sum(written) == synthesis.tensor_bytes
    assert path.stat().st_size == synthesis.file_bytes
    return path


@pytest.fixture(scope="module", params=SHAPES)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a shape and a scaled-down model of it."""
    return request.param, write(request.param, tmp_path_factory.mktemp("synthetic") / "model.gguf")


def test_stock_computes_finite_and_varied_logits(named: tuple[str, Path]) -> None:
    shape = scaled(named[0])
    with StockModel(named[1], n_threads=1, watch_routing=True) as model:
        assert model.n_vocab == N_VOCAB
        tokens, logits = model.greedy(model.tokenize("how now, brown cow"), 12)
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 5
    assert len(set(tokens)) > 3, "not one token for ever"
    assert min(tokens) >= UNWRITABLE, "text that neither ends nor breaks UTF-8"
    assert sorted(model.routing) == list(range(shape.n_dense_lead, shape.n_layer))
    for rows in model.routing.values():
        assert len({e for row in rows for e in row[: shape.n_expert_used]}) > 1.5 * shape.n_expert_used


def test_what_is_in_it(named: tuple[str, Path]) -> None:
    name, path = named
    shape = scaled(name)
    summary = inspect_model(path)
    experts = summary.experts
    assert experts is not None
    assert summary.architecture == shape.architecture
    assert (experts.per_block, experts.used, experts.n_ff) == (shape.n_expert, shape.n_expert_used, (shape.n_ff_exp,))
    assert experts.blocks == tuple(range(shape.n_dense_lead, shape.n_layer))
    assert {m.type for c in experts.shape_classes for m in c.matrices} == {shape.expert_type}
    assert any(c.name == "shared experts" for c in summary.classes) == bool(shape.n_shared)
    fields = gguf.GGUFReader(path).fields
    for key in ("general.name", "general.description"):
        assert "random weights" in fields[key].contents() and "text meaningless" in fields[key].contents()


def test_no_two_experts_are_alike(named: tuple[str, Path]) -> None:
    seen = set()
    for tensor in read_facts([named[1]]).expert_tensors:
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            seen |= {
                (tensor.projection, hashlib.sha256(file.read(tensor.stride)).digest()) for _ in range(tensor.shape[2])
            }
    shape = scaled(named[0])
    assert len(seen) == 3 * shape.n_expert * (shape.n_layer - shape.n_dense_lead)


def test_weights_keep_the_size_of_activations(named: tuple[str, Path]) -> None:
    for tensor in gguf.GGUFReader(named[1]).tensors:
        if tensor.name.endswith("_exps.weight"):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert values.std() * math.sqrt(tensor.shape[0]) == pytest.approx(1, rel=0.1)
            assert abs(values.mean()) < 0.05 * values.std()


def test_pyengine_manages_it(named: tuple[str, Path]) -> None:
    llm = Llama(named[1], ram_budget="50%", n_ctx=64, n_threads=1, n_threads_batch=1)
    try:
        answer = llm("now", max_tokens=4, temperature=0)
        assert answer["usage"]["completion_tokens"] == 4
        assert llm.expert_stats()["experts"] == inspect_model(named[1]).experts.total
    finally:
        llm.close()


def test_it_can_be_widened(named: tuple[str, Path], tmp_path: Path) -> None:
    plan_widening(named[1], 256).write(tmp_path / "wide.gguf", lambda n: None)
    with StockModel(named[1], n_threads=1) as model:
        before = model.decode(model.tokenize("how now"))
    with StockModel(tmp_path / "wide.gguf", n_threads=1) as model:
        np.testing.assert_array_equal(model.decode(model.tokenize("how now")), before)


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first, again, other = (write("qwen3-30b-a3b", tmp_path / f"{i}.gguf", i // 2).read_bytes() for i in range(3))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", SHAPES)
def test_the_real_sizes(name: str) -> None:
    assert plan_synthesis(name).file_bytes == pytest.approx(PUBLISHED[name], rel=0.03)


def test_widths_divided_make_experts_smaller_by_the_square() -> None:
    whole, half = (plan_synthesis("mixtral-8x7b", layers=2, divisor=divisor) for divisor in (1, 2))
    sizes = [
        sum(math.prod(spec.shape) for spec, _ in model.tensors if spec.role == "expert") for model in (whole, half)
    ]
    assert sizes[0] == 4 * sizes[1]
    assert (half.shape.n_expert, half.shape.n_head_kv, half.shape.n_vocab) == (8, 4, 32000)


def test_the_command(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "mixtral-8x7b", scaled("mixtral-8x7b"))
    out = tmp_path / "model.gguf"
    done = invoke("synthesize", "mixtral-8x7b", out, "--layers", "1", "--seed", "7")
    assert done.exit_code == 0
    assert "1 layer in the shape of mixtral-8x7b; random weights, text meaningless" in done.stdout
    assert inspect_model(out).experts.blocks == (0,)
    assert "exists already" in invoke("synthesize", "mixtral-8x7b", out).stderr
    assert cli.COMMANDS["synthesize"]


def test_refusals() -> None:
    with pytest.raises(RequestError, match="no shape is called gpt-5; there are gpt-oss-20b, "):
        plan_synthesis("gpt-5")
    with pytest.raises(RequestError, match="gpt-oss-20b cannot be divided by 4: its n_embd is 2880"):
        plan_synthesis("gpt-oss-20b", divisor=4)
    with pytest.raises(RequestError, match="has experts from layer 1 on"):
        plan_synthesis("deepseek-v2-lite", layers=1)
