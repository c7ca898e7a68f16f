"""What metadata says about a model agrees with what llama.cpp and the native engine make of it."""

from __future__ import annotations

import llama_cpp
import pytest
from models.fixtures import ModelFactory

from pyengine import bundled_model
from pyengine.errors import ModelFileError
from pyengine.native import NativeEngine
from pyengine.planning.gguf_header import read_header
from pyengine.planning.shape import kv_bytes_per_token, read_shape

#: One of each kind of KV cache: grouped heads, other head sizes than width / heads, multi-head latent attention.
MODELS = ["llama", "qwen3moe", "deepseek2", "olmoe", "granitemoe", "qwen2moe", "split-align64"]
#: Of a saved sequence: position and the ids of sequences.
_CELL_BYTES = 16


# Not gpt-oss: of layers with an attention window llama.cpp saves nothing, though it keeps them in full.
@pytest.mark.parametrize("model_id", MODELS)
def test_kv_cache_is_as_large_as_llama_cpp_makes_it(model_id: str, generated_model: ModelFactory) -> None:
    facts = generated_model(model_id)
    llm = llama_cpp.Llama(str(facts.path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    sizes = []
    for n in (16, 32):
        llm.reset()
        llm.eval([1] * n)
        sizes.append(llama_cpp.llama_state_seq_get_size(llm.ctx, 0))
    per_token = (sizes[1] - sizes[0]) / 16
    llm.close()
    shape = read_shape(facts.path)
    assert shape.kv_bytes_per_token <= per_token <= shape.kv_bytes_per_token + _CELL_BYTES


@pytest.mark.parametrize("model_id", [*MODELS, "gpt-oss", "q4_k_m", "unlike-projections", "many-experts"])
def test_shape_classes_and_slots_are_the_engines(model_id: str, generated_model: ModelFactory) -> None:
    facts = generated_model(model_id)
    shape = read_shape(facts.path)
    info = shape.info
    assert len(shape.classes) == info.n_class
    assert sorted(layer for c in shape.classes for layer in c.layers) == list(range(info.n_layer))
    assert sum(c.expert_bytes * c.n_expert * len(c.layers) for c in shape.classes) == info.expert_bytes
    for share in (0.0, 0.3, 0.5, 0.8, 1.0):
        engine = NativeEngine(facts.path)
        budget = max(info.least_budget, int(share * info.slot_bytes))
        engine.start(budget)
        wanted = engine.stats()["slots"]
        engine.close()
        # The engine also gives away what rounding leaves.
        assert wanted - len(shape.classes) < sum(shape.slots(budget)) <= wanted


def test_kv_cache_of_a_file_that_says_little() -> None:
    """Heads per layer as an array, no lengths: width / heads; layers without attention have no cache."""
    header = read_header(bundled_model())
    keys = {
        "a.block_count": 3,
        "a.embedding_length": 64,
        "a.attention.head_count": [4, 8, 4],
        "a.attention.head_count_kv": [2, 0, 1],
    }
    assert kv_bytes_per_token(type(header)(keys, []), "a") == 2 * (2 + 0 + 1) * (8 + 8)
    keys |= {"a.attention.key_length": 24, "a.attention.value_length": 16}
    assert kv_bytes_per_token(type(header)(keys, []), "a") == 2 * 3 * (24 + 16)
    assert kv_bytes_per_token(type(header)(keys | {"a.attention.key_length_mla": 24}, []), "a") == 2 * 3 * 24


def test_a_header_has_what_the_gguf_package_reads() -> None:
    from gguf import GGUFReader

    header, reader = read_header(bundled_model()), GGUFReader(bundled_model())
    assert header.keys["general.architecture"] == "llama"
    assert header.keys["llama.rope.freq_base"] == pytest.approx(
        reader.fields["llama.rope.freq_base"].parts[-1][0].item()
    )
    assert [(t.name, t.offset, t.n_bytes) for t in header.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]


def test_files_that_cannot_be_planned() -> None:
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        read_shape(bundled_model().with_name("none.gguf"))
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        read_shape(bundled_model().with_name("MODEL_CARD.md"))
