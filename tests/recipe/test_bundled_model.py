"""The model that comes with the package: present, whole, and what its card and the recipe say."""

from __future__ import annotations

import json
import re
import zipfile
from importlib import resources
from pathlib import Path

import gguf
import pytest
from smolmoe.config import ExpertLayout
from smolmoe.export import stored_type

from pyengine import bundled as bundled_module
from pyengine.errors import ModelFileError

NAME = "smolmoe-32x8-q4_0.gguf"
SIZE = 99_084_800


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without a model; returns the path where its model belongs."""
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / NAME


@pytest.fixture(scope="module")
def card(bundled: Path) -> str:
    return bundled.with_name("MODEL_CARD.md").read_text(encoding="utf-8")


def test_verify_accepts_the_published_file() -> None:
    bundled_module.verify()


def test_missing(package: Path) -> None:
    with pytest.raises(ModelFileError, match=re.escape(str(package)) + ".*No such file"):
        bundled_module.bundled_model()


def test_not_fetched_by_lfs(package: Path) -> None:
    package.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {SIZE}\n")
    with pytest.raises(ModelFileError, match="git lfs pull"):
        bundled_module.bundled_model()


def test_incomplete(package: Path, bundled: Path) -> None:
    package.write_bytes(bundled.read_bytes()[: SIZE // 2])
    with pytest.raises(ModelFileError, match=f"{SIZE // 2} bytes instead of {SIZE}"):
        bundled_module.bundled_model()


def test_verify_finds_one_changed_byte(package: Path, bundled: Path) -> None:
    content = bytearray(bundled.read_bytes())
    content[SIZE // 2] ^= 1
    package.write_bytes(content)
    assert bundled_module.bundled_model() == package
    with pytest.raises(ModelFileError, match="damaged"):
        bundled_module.verify()


def test_directory_in_its_place(package: Path) -> None:
    package.mkdir()
    with pytest.raises(ModelFileError, match=re.escape(str(package))):
        bundled_module.bundled_model()


def test_zipped_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"data/{NAME}", b"GGUF")
    monkeypatch.setattr(resources, "files", lambda _: zipfile.Path(archive))
    with pytest.raises(ModelFileError, match="unpacked"):
        bundled_module.bundled_model()


def test_file_follows_the_recipe(bundled_reader: gguf.GGUFReader) -> None:
    layout = ExpertLayout()
    keys = {
        "general.architecture": "llama",
        "general.license": "apache-2.0",
        "llama.expert_count": layout.n_expert,
        "llama.expert_used_count": layout.n_used,
        "llama.feed_forward_length": layout.width,
    }
    assert {key: bundled_reader.fields[key].contents() for key in keys} == keys
    types = {tensor.name: tensor.tensor_type for tensor in bundled_reader.tensors}
    assert types == {name: stored_type(name) for name in types}
    assert {"blk.0.ffn_gate_inp.weight", "blk.29.ffn_down_exps.weight"} <= set(types)


def test_card_states_the_file(bundled: Path, bundled_reader: gguf.GGUFReader, card: str) -> None:
    tensors = bundled_reader.tensors
    parameters = sum(int(tensor.n_elements) for tensor in tensors)
    experts = [tensor for tensor in tensors if tensor.name.endswith("_exps.weight")]
    matrix = int(experts[0].n_bytes) // ExpertLayout().n_expert
    assert f"{parameters / 1e6:.1f} M" in card
    assert f"{bundled.stat().st_size:,} bytes" in card
    assert bundled_module._SHA256 in card
    assert f"{3 * matrix:,} bytes: three matrices of {matrix:,}" in card
    assert f"{sum(int(tensor.n_bytes) for tensor in experts) / 1e6:.1f} MB" in card


def test_card_states_the_figures(card: str, recipe_folder: Path) -> None:
    figures = json.loads((recipe_folder / "figures.json").read_text())
    rows = {
        "chat": "own chats",
        "docs": "developer's reference",
        "gpl": "GPL-3 \\(7 k",
        "kjv": "King James Bible \\(65",
    }
    for name, start in rows.items():
        row = re.search(rf"^\|[^|]*{start}[^|]*\|(.+)\|$", card, re.MULTILINE)
        assert row is not None, name
        teacher, student, kl, agreement = (cell.strip() for cell in row[1].split("|"))
        measured = figures["ppl"][name]
        assert float(teacher) == pytest.approx(measured["teacher"], rel=5e-4)
        assert float(student) == pytest.approx(measured["moe"], rel=5e-4)
        assert float(kl) == pytest.approx(measured["kl"], abs=5e-4)
        assert float(agreement.removesuffix(" %")) / 100 == pytest.approx(measured["top1_agreement"], abs=5e-4)


def test_licence_lies_beside(bundled: Path) -> None:
    licence = bundled.with_name("LICENSE-MODEL").read_text(encoding="utf-8")
    assert "SmolLM2-135M-Instruct" in licence and "HuggingFaceTB" in licence
    assert "Apache License\n" in licence and "END OF TERMS AND CONDITIONS" in licence
