"""Damaged and hostile files: one clear sentence, little memory, no traceback."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bad_input.gguf_bytes import ARRAY, MAGIC, STRING, UINT8, UINT32, Gguf, Key, array, scalar, text
from click.testing import Result
from models.fixtures import ModelFactory

from gguf_tools.errors import ModelFileError
from gguf_tools.inspect_model import inspect_model

Invoke = Callable[..., Result]
HUGE = 1 << 60
MOST_MEMORY = 32 << 20  # bytes that reading a small file's header may take, however large it claims to be


@pytest.fixture
def model(generated_model: ModelFactory) -> Gguf:
    return Gguf.read(generated_model("model-order").path)


def refusal(path: Path) -> str:
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as refused:
            inspect_model(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    return str(refused.value)


def raw_key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def header(*keys: bytes, n_keys: int | None = None, n_tensors: int = 0, version: int = 3) -> bytes:
    count = len(keys) if n_keys is None else n_keys
    return MAGIC + struct.pack("<IQQ", version, n_tensors, count) + b"".join(keys)


ARCH = raw_key("general.architecture", STRING, text("llama"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"GG", "is not a GGUF file"),
        (b"\x7fELF" + bytes(100), "is not a GGUF file"),
        (header()[:10], "metadata is damaged"),
        (header(version=1), "GGUF version 1 is not known"),
        (header(version=99), "GGUF version 99 is not known"),
        (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big-endian files are not supported"),
        (header(), "general.architecture is missing"),
        (header(n_keys=HUGE), f"it claims {HUGE} keys"),
        (header(ARCH, n_tensors=HUGE), f"1 keys and {HUGE} tensors"),
        (header(ARCH, n_keys=60000), "metadata is damaged"),
        (header(ARCH, ARCH), "general.architecture appears twice"),
        (header(raw_key("general.architecture", UINT32, scalar(UINT32, 7))), "general.architecture is missing"),
        (header(struct.pack("<Q", HUGE)), f"a name of {HUGE} bytes"),
        (header(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", UINT8) + b"\0"), "a name is not UTF-8"),
        (header(raw_key("a", 77, b"")), "no value type has the number 77"),
        (header(raw_key("a", STRING, struct.pack("<Q", HUGE))), f"{HUGE} bytes are wanted"),
        (header(raw_key("a", STRING, struct.pack("<Q", (1 << 64) - 1))), "bytes are wanted"),
        (header(raw_key("a", ARRAY, struct.pack("<IQ", UINT8, HUGE))), f"array of {HUGE} items"),
        (header(raw_key("a", ARRAY, struct.pack("<IQ", UINT8, 10_000_000))), "10000000 bytes are wanted"),
        (header(raw_key("a", ARRAY, struct.pack("<IQ", STRING, 10_000_000))), "bytes are wanted"),
        (header(raw_key("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1))), "items of type ARRAY"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_bad_beginnings(content: bytes, said: str, tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert said in refusal(path)
    done = invoke("inspect", path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"gguf_tools: error: {path}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"type": 99}, "type 99, which the installed gguf package does not know"),
        ({"shape": (95, 64, 8)}, "rows of Q4_0 come in multiples of 32 values, not 95"),
        ({"shape": (96, 64, HUGE)}, "past the end"),
        ({"shape": (1 << 63, 1 << 63, 1 << 63, 1 << 63)}, "past the end"),
        ({"shape": ()}, "has 0 dimensions"),
        ({"shape": (96, 1, 1, 1, 64)}, "has 5 dimensions"),
        ({"shape": (96, 64 * 8)}, "does not fit"),
        ({"shape": (96, 64, 2, 4)}, "has the impossible shape 96x64x2x4"),
        ({"shape": (96, 64, 0)}, "has the impossible shape 96x64x0"),
        ({"shape": (32, 1, 1536)}, "has the impossible shape 32x1x1536"),
        ({"shape": (96, 32, 8)}, "does not fit"),
        ({"offset": HUGE}, "past the end"),
        ({"offset": (1 << 64) - 32}, "past the end"),
        ({"name": "blk.0.ffn_down_exps.weight"}, "appears twice"),
        ({"name": "evil \x1b[2J"}, "a tensor is called evil \ufffd[2J"),
    ],
    ids=str,
)
def test_bad_tensors(changes: dict[str, object], said: str, model: Gguf, tmp_path: Path) -> None:
    bad = model.with_tensor("blk.0.ffn_up_exps.weight", **changes)
    assert said in refusal(bad.write(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("value", [0, 48, (1 << 32) - 1])
def test_bad_alignments(value: int, model: Gguf, tmp_path: Path) -> None:
    bad = model.with_key("general.alignment", UINT32, scalar(UINT32, value))
    assert "general.alignment is no power of two" in refusal(bad.write(tmp_path / "bad.gguf"))


def test_an_alignment_of_another_type(model: Gguf, tmp_path: Path) -> None:
    bad = model.with_key("general.alignment", ARRAY, array(UINT32, [32]))
    assert "general.alignment is no power of two" in refusal(bad.write(tmp_path / "bad.gguf"))


def test_a_huge_alignment(model: Gguf, tmp_path: Path) -> None:
    bad = model.with_key("general.alignment", UINT32, scalar(UINT32, 1 << 31))
    assert "past the end" in refusal(bad.write(tmp_path / "bad.gguf"))


def test_files_cut_short_anywhere(model: Gguf, tmp_path: Path) -> None:
    whole = model.header() + model.data
    path = tmp_path / "cut.gguf"
    n_header = len(model.header())
    for n in (*range(0, n_header, 97), n_header, n_header + 1, len(whole) // 2, len(whole) - 1 - 32):
        path.write_bytes(whole[:n])
        assert str(path) in refusal(path)


def test_random_damage_never_ends_in_a_traceback(model: Gguf, tmp_path: Path) -> None:
    """Bytes of the header replaced at random, most of them where lengths, types and offsets are."""
    rng = random.Random(0)
    whole = bytearray(model.header() + model.data)
    n_header = len(model.header())
    vocabulary = next(key for key in model.keys if key.name == "tokenizer.ggml.tokens")
    start = whole.index(text(vocabulary.name))
    outside = [i for i in range(n_header) if not start < i < start + len(vocabulary.raw)]
    path = tmp_path / "damaged.gguf"
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(200):
            damaged = bytearray(whole)
            for at in rng.sample(outside, rng.randint(1, 4)):
                damaged[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            path.write_bytes(damaged)
            try:
                inspect_model(path)
            except ModelFileError as error:
                assert str(path) in str(error)
                refused += 1
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert 50 < refused < 200


def test_split_models_that_are_not_whole(generated_model: ModelFactory, tmp_path: Path) -> None:
    facts = generated_model("split")
    first, second, third = (tmp_path / part.name for part in facts.files)
    for part in facts.files:
        (tmp_path / part.name).write_bytes(part.read_bytes())
    assert f"{second} is part 2 of a split model; give the first part" in refusal(second)
    third.rename(tmp_path / "away.gguf")
    assert refusal(first) == f"{third}: no such file"
    third.write_bytes(second.read_bytes())
    assert "is also in" in refusal(first)
    renamed = first.rename(tmp_path / "model.gguf")
    assert "is not named like the first of them (-00001-of-00003.gguf)" in refusal(renamed)


def test_parts_of_different_models(generated_model: ModelFactory, tmp_path: Path) -> None:
    facts = generated_model("split")
    for part in facts.files:
        (tmp_path / part.name).write_bytes(part.read_bytes())
    last = tmp_path / facts.files[-1].name
    part = Gguf.read(last)
    replace(part, tensors=part.tensors[:-1]).write(last)
    said = refusal(tmp_path / facts.files[0].name)
    assert "its parts hold " in said and " tensors together instead of " in said


def test_folders_and_missing_files(tmp_path: Path) -> None:
    assert "is not a regular file" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none.gguf")


def test_a_name_too_long_to_believe(model: Gguf, tmp_path: Path) -> None:
    bad = replace(model, keys=[*model.keys, Key("x" * 100_000, UINT8, b"\0")])
    assert "a name of 100000 bytes" in refusal(bad.write(tmp_path / "bad.gguf"))
