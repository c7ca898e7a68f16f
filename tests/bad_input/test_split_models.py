"""Split models of which something is missing or misnamed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from models.generator import write_model

from .conftest import Refused
from .gguf_bytes import UINT16, Gguf, scalar
from .victim import attempt, in_process

N_PARTS = 3


@pytest.fixture(scope="module")
def sound_parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("split") / "model.gguf"
    facts = write_model(path, "llama", n_layer=2, n_expert=4, n_embd=64, n_ff=32, split=N_PARTS)
    return list(facts.files)


@pytest.fixture
def parts(sound_parts: list[Path], tmp_path: Path) -> list[Path]:
    """A copy of the parts, to be broken."""
    return [Path(shutil.copy(part, tmp_path)) for part in sound_parts]


def test_the_sound_parts_work(parts: list[Path]) -> None:
    outcome = in_process(attempt, parts[0])
    assert outcome.result.kinds == (), outcome
    assert outcome.result.text


@pytest.mark.parametrize("missing", [1, 2])
def test_a_part_is_missing(refused: Refused, parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    outcome = in_process(attempt, parts[0])
    assert "ModelFileError" in outcome.result.kinds, outcome
    assert outcome.result.message == f"cannot open {parts[missing]}: No such file or directory"
    assert (outcome.result.left, outcome.output) == ({}, "")


@pytest.mark.parametrize("part", [1, 2])
def test_another_part_than_the_first_is_given(refused: Refused, parts: list[Path], part: int) -> None:
    refused(parts[part])


def test_a_part_is_truncated(parts: list[Path]) -> None:
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[:-100])
    outcome = in_process(attempt, parts[0])
    assert "ModelFileError" in outcome.result.kinds, outcome
    assert parts[1].name in outcome.result.message
    assert "truncated" in outcome.result.message


def test_a_part_is_another_file(parts: list[Path]) -> None:
    parts[2].write_bytes(b"no model")
    outcome = in_process(attempt, parts[0])
    assert "ModelFileError" in outcome.result.kinds, outcome
    assert outcome.result.message == f"{parts[2]} is not a GGUF file"


def test_a_part_is_there_twice(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    outcome = in_process(attempt, parts[0])
    assert outcome.exit_code == 0, outcome
    assert "ModelFileError" in outcome.result.kinds, outcome


@pytest.mark.parametrize("count", [0, 1, 2, 4, 10_000, 65_535])
def test_the_count_is_wrong(refused: Refused, parts: list[Path], count: int) -> None:
    Gguf.read(parts[0]).with_key("split.count", UINT16, scalar(UINT16, count)).write(parts[0])
    refused(parts[0])


@pytest.mark.parametrize("name", ["renamed.gguf", "model-00001-of-00004.gguf", "model-1-of-3.gguf", "-00001-of-00003"])
def test_the_name_is_wrong(refused: Refused, parts: list[Path], name: str) -> None:
    renamed = parts[0].rename(parts[0].with_name(name))
    refused(renamed, "is part of 3 files, but is not named like the first of them (-00001-of-00003.gguf)")
