"""Metadata keys that contradict each other or the tensors, or are of wrong types."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from .conftest import Refused, Write
from .gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Gguf,
    array,
    scalar,
    text,
)
from .victim import attempt, in_process

COUNT, USED = "llama.expert_count", "llama.expert_used_count"
FUZZED = 30  # damaged copies of the model


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        (COUNT, 0, "expert_used_count 2 does not fit expert_count 0"),
        (COUNT, 1, "expert_used_count 2 does not fit expert_count 1"),
        (COUNT, 2, "has 4 experts, which does not fit"),
        (COUNT, 3, "has 4 experts, which does not fit"),
        (COUNT, 5, "has wrong shape"),
        (COUNT, 1024, "has wrong shape"),
        (COUNT, 1025, "expert_count 1025 is more than"),
        (COUNT, 2**31, "expert_count 2147483648 is more than"),
        (COUNT, 2**32 - 1, "expert_count 4294967295 is more than"),
        (USED, 0, "expert_used_count 0 does not fit"),
        (USED, 5, "expert_used_count 5 does not fit expert_count 4"),
        (USED, 2**31, "expert_used_count 2147483648 does not fit"),
        (USED, 2**32 - 1, "expert_used_count 4294967295 does not fit"),
        ("llama.expert_group_count", 3, "expert_group_count 3 does not fit"),
        ("llama.expert_group_count", 4, "expert_group_count 4 does not fit"),
        ("llama.expert_group_count", 2, "expert_group_used_count 0 does not fit"),
        ("llama.block_count", 0, "block_count 0 is not between"),
        ("llama.block_count", 1, "wrong number of tensors"),
        ("llama.block_count", 3, "not found"),
        ("llama.block_count", 513, "block_count 513 is not between"),
        ("llama.block_count", 2**32 - 1, "block_count 4294967295 is not between"),
        ("llama.nextn_predict_layers", 3, "nextn_predict_layers 3 does not fit"),
        ("llama.context_length", 2**31, "context_length 2147483648 is absurd"),
        ("llama.embedding_length", 0, "has wrong shape"),
        ("llama.embedding_length", 2**32 - 1, "has wrong shape"),
        ("llama.feed_forward_length", 2**31, "has wrong shape"),
        ("llama.attention.head_count", 0, "has wrong shape"),
        ("llama.attention.head_count", 2**32 - 1, "has wrong shape"),
        ("general.alignment", 0, "damaged or truncated"),
        ("general.alignment", 3, "damaged or truncated"),
        ("general.alignment", 2**31, "damaged or truncated"),
    ],
)
def test_numbers_that_cannot_be(refused: Refused, write: Write, sound: Gguf, key: str, value: int, part: str) -> None:
    refused(write(sound.with_key(key, UINT32, scalar(UINT32, value))), part)


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("-inf")])
def test_an_epsilon_that_cannot_be(refused: Refused, write: Write, sound: Gguf, value: float) -> None:
    key = "llama.attention.layer_norm_rms_epsilon"
    refused(write(sound.with_key(key, FLOAT32, scalar(FLOAT32, value))), f"{key} is negative or no number")


@pytest.mark.parametrize("key", [COUNT, USED])
@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (UINT8, scalar(UINT8, 2)),
        (UINT16, scalar(UINT16, 2)),
        (UINT64, scalar(UINT64, 2)),
        (INT32, scalar(INT32, 2)),
        (INT32, scalar(INT32, -1)),
        (FLOAT32, scalar(FLOAT32, 2)),
        (BOOL, scalar(BOOL, 1)),
        (STRING, text("2")),
        (ARRAY, array(UINT32, [])),
        (ARRAY, array(FLOAT32, [2, 2])),
        (ARRAY, array(INT32, [2, -1])),
        (ARRAY, struct.pack("<IQ", STRING, 2) + text("2") * 2),
    ],
)
def test_counts_of_the_wrong_type(refused: Refused, write: Write, sound: Gguf, key: str, kind: int, raw: bytes) -> None:
    refused(write(sound.with_key(key, kind, raw)))


@pytest.mark.parametrize("key", [COUNT, USED, "llama.block_count", "llama.embedding_length", "tokenizer.ggml.tokens"])
def test_keys_that_are_missing(refused: Refused, write: Write, sound: Gguf, key: str) -> None:
    refused(write(sound.without_key(key)))


def test_neither_count_of_experts(refused: Refused, write: Write, sound: Gguf) -> None:
    refused(write(sound.without_key(COUNT).without_key(USED)))


def test_no_architecture(refused: Refused, write: Write, sound: Gguf) -> None:
    refused(write(sound.without_key("general.architecture")), "general.architecture is missing")
    number = sound.with_key("general.architecture", UINT32, scalar(UINT32, 1))
    refused(write(number), "general.architecture is missing")


@pytest.mark.parametrize("name", ["gpt-7", "", "x" * 2000, "a\nb\x1b[31m", "%s%n", "LLAMA", "llama "])
def test_an_architecture_nobody_knows(write: Write, sound: Gguf, name: str) -> None:
    outcome = in_process(attempt, write(sound.with_key("general.architecture", STRING, text(name))))
    assert outcome.exit_code == 0, outcome
    assert "ModelFileError" in outcome.result.kinds, outcome
    assert outcome.result.message.isprintable()
    assert "architecture" in outcome.result.message or "key not found" in outcome.result.message
    assert (outcome.result.left, outcome.output) == ({}, "")


def test_an_architecture_whose_keys_are_those_of_another(refused: Refused, write: Write, sound: Gguf) -> None:
    refused(write(sound.with_key("general.architecture", STRING, text("qwen3moe"))), "key not found in model")


def test_a_key_twice(refused: Refused, write: Write, sound: Gguf) -> None:
    twice = Gguf([*sound.keys, sound.keys[-1]], sound.tensors, sound.data)
    refused(write(twice), "damaged or truncated: duplicate key")


def test_a_token_twice(refused: Refused, write: Write, sound: Gguf) -> None:
    (tokens,) = [key for key in sound.keys if key.name == "tokenizer.ggml.tokens"]
    doubled = tokens.raw.replace(text("<0x41>"), text("<0x42>"))
    assert doubled != tokens.raw
    refused(write(sound.with_key(tokens.name, tokens.kind, doubled)), "of the vocabulary appears twice")


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% endfor %}", "{% for x in y %}"])
def test_a_broken_chat_template(refused: Refused, write: Write, sound: Gguf, template: str) -> None:
    broken = sound.with_key("tokenizer.chat_template", STRING, text(template))
    refused(write(broken), "the chat template in it is damaged")


def damaged_copies(
    sound_bytes: bytes, end: int, path: Path, seeds: list[int]
) -> list[tuple[int, tuple[str, ...], str]]:
    """What comes of copies with a few bytes changed before `end`: (seed, exception's classes, message). Notes each seed
    in a file beside `path` before trying it."""
    results = []
    for seed in seeds:
        rng = random.Random(seed)
        copy = bytearray(sound_bytes)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            at = rng.choice((rng.randrange(end), rng.randrange(1000), rng.randrange(end - 1500, end)))
            copy[at] = rng.choice((0, 255, rng.randrange(256), copy[at] ^ 1 << rng.randrange(8)))
        path.write_bytes(copy)
        path.with_suffix(".seed").write_text(str(seed))
        result = attempt(path)
        results.append((seed, result.kinds, result.message))
    return results


def test_random_damage_never_ends_the_process(sound: Gguf, sound_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    outcome = in_process(damaged_copies, sound_path.read_bytes(), len(sound.header()), path, list(range(FUZZED)))
    seed = path.with_suffix(".seed").read_text()
    assert outcome.exit_code == 0, f"seed {seed}: {outcome}"
    unlike = [result for result in outcome.result if result[1] and "ModelFileError" not in result[1]]
    assert not unlike
    assert all(message.isprintable() for _, _, message in outcome.result)
    refusals = sum(bool(kinds) for _, kinds, _ in outcome.result)
    assert refusals > FUZZED // 2, "hardly anything was damaged"
