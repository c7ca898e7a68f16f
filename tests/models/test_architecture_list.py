"""The list of llama.cpp's architectures with expert FFNs, what the generator covers of it, the table in the docs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pyengine.architectures import MANAGED

from .architectures import ARCHITECTURES

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "architectures"))

import architecture_notes
import cpp_outline
import list_moe
import model_sources
import table

WITH_EXPERTS = {e["architecture"] for e in list_moe.checked_in() if e["loads_experts"]}


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """The pinned llama.cpp's model sources: from the cache, or fetched once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        patch.setenv("PIP_DEFAULT_TIMEOUT", "15")
        try:
            return model_sources.find()
        except (SystemExit, OSError) as error:
            pytest.skip(f"no sources of llama.cpp's models: {error}")


def test_the_list_is_what_the_sources_say(llama_cpp: Path) -> None:
    assert list_moe.text_of(list_moe.architectures(llama_cpp)) == list_moe.LIST.read_text()


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no src/ folder"):
        model_sources.find(tmp_path)


def test_the_generator_covers_the_list_or_the_docs_say_why_not() -> None:
    covered = {a.name for a in ARCHITECTURES.values()}
    assert covered <= WITH_EXPERTS
    assert WITH_EXPERTS - covered == set(architecture_notes.NOT_COVERED)


def test_the_table_says_what_is_managed() -> None:
    said = table.rows(table.TABLE.read_text())
    assert set(said) == {e["architecture"] for e in list_moe.checked_in()}
    assert {name for name, result in said.items() if result.startswith("exact")} == MANAGED
    assert all(result.startswith(("exact", "falls back: ")) for result in said.values())


def record(outcome: str) -> table.Record:
    described = {"features": [], "expert_types": ["Q4_0"], "outcomes": {"100 %": outcome}}
    return {name: {"architecture": name, **described} for name in MANAGED}


def test_a_table_is_not_made_from_a_run_that_contradicts_it() -> None:
    entries = list_moe.checked_in()
    assert table.rows(table.document(record("passed"), entries))["llama"].startswith("exact")
    with pytest.raises(SystemExit, match="was not exact"):
        table.document(record("failed"), entries)
    less = record("passed")
    del less["gpt-oss"]
    with pytest.raises(SystemExit, match="gpt-oss was not exact"):
        table.document(less, entries)
    more = record("passed")
    more["lfm2"] = {**more["llama"], "architecture": "lfm2"}
    with pytest.raises(SystemExit, match="lfm2 was exact, but is not"):
        table.document(more, entries)


# ---- reading C++


def write_sources(folder: Path, models: str, header: str, mapping: str) -> Path:
    (folder / "models").mkdir()
    (folder / "models" / "a.cpp").write_text(models)
    (folder / "models" / "models.h").write_text(header)
    (folder / "llama-arch.cpp").write_text('{ LLM_ARCH_A, "a" }, { LLM_ARCH_B, "b-moe" }, { LLM_ARCH_C, "c" },')
    (folder / "llama-model.cpp").write_text(mapping)
    return folder


HEADER = """
struct model_a : public base { // a comment with a brace {
    struct graph : public context { graph(const model & m); ggml * ffn(int il); };
};
struct model_b : public model_a { using graph = model_a::graph; };
struct model_c : public base { template <bool x> struct graph : public context { graph(const model & m); }; };
"""
MODELS = """
void model_a::load_arch_tensors(loader &) { create(LLM_TENSOR_FFN_UP_EXPS); }
void model_b::load_arch_tensors(loader &) { create(LLM_TENSOR_FFN_UP); }
std::unique_ptr<context> model_a::build_arch_graph(int p) const { return std::make_unique<graph>(*this, p); }
model_a::graph::graph(const model & m) : context(m), x{1} { for (;;) { ffn(0); } /* build_moe_ffn( */ }
ggml * model_a::graph::ffn(int il) { return build_moe_ffn("}", il); }
std::unique_ptr<context> model_c::build_arch_graph(int p) const { return std::make_unique<graph<true>>(*this, p); }
template <bool x>
model_c::graph<x>::graph(const model & m) : context(m) { // build_moe_ffn(
    build_ffn();
}
"""
MAPPING = """
case LLM_ARCH_A: return new model_a(params);
case LLM_ARCH_B: return new model_b(params);
case LLM_ARCH_C: return new model_c(params);
"""


def test_graphs_are_found_through_aliases_bases_and_helpers(tmp_path: Path) -> None:
    found = list_moe.architectures(write_sources(tmp_path, MODELS, HEADER, MAPPING))
    where = ["src/models/a.cpp"]
    assert found == [
        {"architecture": "a", "sources": where, "loads_experts": True},
        {"architecture": "b-moe", "sources": where, "loads_experts": False},
    ]


def test_a_call_that_belongs_to_no_architecture_is_an_error(tmp_path: Path) -> None:
    lost = MODELS.replace("model_a::graph::ffn", "helper::ffn").replace("build_ffn", "build_moe_ffn")
    folder = write_sources(tmp_path, lost, HEADER, MAPPING.replace("LLM_ARCH_C", "LLM_ARCH_UNSEEN = "))
    with pytest.raises(SystemExit, match=r"no architecture was found .*a\.cpp"):
        list_moe.architectures(folder)


def test_comments_and_strings_hide_no_braces() -> None:
    text = cpp_outline.bare("f() { \"}\" /* } */ '}'; } // }\nint x;")
    assert [head for head, _ in cpp_outline.blocks(text)] == ["f()"]
