"""Prompts that begin alike are computed once, in memory and from a file, and that changes no answer."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models.fixtures import ModelFactory

from pyengine import Llama
from pyengine.errors import UsageError
from pyengine.sessions import PrefixCache, PrefixFileError, Scheduler, Session

from .conftest import SETTINGS
from .requests import greedy, prompt
from .tape import Tape, nmse

Make = Callable[..., Scheduler]
SYSTEM = prompt(80, seed=40)


def answered(scheduler: Scheduler, *requests: Any) -> list[Session]:
    sessions = [scheduler.submit(request) for request in requests]
    for _ in scheduler.run():
        pass
    return sessions


def test_sessions_at_the_same_time_compute_what_they_share_once(
    scheduler: Make, tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scheduler(prefixes=PrefixCache(), max_sequences=4)
    tape = Tape(tiny, monkeypatch)
    requests = [greedy(SYSTEM + prompt(9, seed=i), 6) for i in range(4)]
    sessions = answered(one, *requests)
    assert [s.cached_tokens for s in sessions] == [0, 80, 80, 80]
    computed = sum(len(batch) for batch in tape.batches)
    assert computed == 80 + 4 * 9 + 4 * 5


def test_a_chat_goes_on_where_it_was(scheduler: Make) -> None:
    one = scheduler(prefixes=PrefixCache())
    (first,) = answered(one, greedy(SYSTEM, 10))
    history = SYSTEM + first.tokens
    (second,) = answered(one, greedy(history + prompt(5, seed=1), 4))
    # The last token of an answer is never computed.
    assert second.cached_tokens == len(history) - 1


def test_the_same_prompt_again_computes_its_last_token(scheduler: Make) -> None:
    one = scheduler(prefixes=PrefixCache())
    first, again = [answered(one, greedy(SYSTEM, 10))[0] for _ in range(2)]
    assert again.cached_tokens == len(SYSTEM) - 1
    assert again.tokens == first.tokens


def test_short_beginnings_are_not_shared(scheduler: Make) -> None:
    one = scheduler(prefixes=PrefixCache(least_tokens=50))
    answered(one, greedy(SYSTEM[:49], 1))
    (session,) = answered(one, greedy(SYSTEM, 1))
    assert session.cached_tokens == 0


def test_prefixes_make_room_least_recently_used_first(scheduler: Make) -> None:
    cache = PrefixCache(max_cells=512)
    one = scheduler(prefixes=cache, max_sequences=2)
    texts = [prompt(100, seed=i) for i in range(3)]
    for text in texts:
        answered(one, greedy(text, 0))
    assert cache.prefixes == [tuple(text) for text in texts]
    answered(one, greedy(texts[0], 1))  # now it was used after the others
    answered(one, greedy(prompt(250, seed=9), 20))
    kept = [text[:100] for text in cache.prefixes]
    assert tuple(texts[1]) not in kept and tuple(texts[0]) in kept


def test_prefixes_stay_within_their_cells(scheduler: Make) -> None:
    cache = PrefixCache(max_cells=150)
    one = scheduler(prefixes=cache)
    for i in range(4):
        answered(one, greedy(prompt(60, seed=i), 0))
        assert one._cells.used <= 150
    assert [text[:60] for text in cache.prefixes] == [tuple(prompt(60, seed=i)) for i in (2, 3)]
    answered(one, greedy(prompt(200), 0))
    assert cache.prefixes == []


def test_prefixes_give_their_sequences_to_sessions(scheduler: Make) -> None:
    cache = PrefixCache()
    one = scheduler(prefixes=cache, max_sequences=8)
    for i in range(8):
        answered(one, greedy(prompt(20, seed=i), 0))
    sessions = [one.submit(greedy(prompt(7, seed=20 + i), 5)) for i in range(8)]
    one.step()
    assert all(s.state.value == "decoding" for s in sessions)
    list(one.run())


# Attention only; sliding windows; recurrent and hybrid state; latent attention.
@pytest.mark.parametrize("model_id", ["qwen2moe", "gpt-oss", "nemotron_h_moe", "qwen3next", "deepseek2"])
def test_shared_prefixes_in_every_kind_of_memory(
    model_id: str, generated_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = SETTINGS | {"ram_budget": "60%", "policy": "lru", "look_ahead": "off"}
    texts = [SYSTEM, SYSTEM + prompt(12, seed=1), SYSTEM[:60] + prompt(30, seed=2), SYSTEM]
    requests = [greedy(text, 5, logprobs=1) for text in texts]
    with contextlib.closing(Llama(generated_model(model_id).path, n_sequences=8, **options)) as llama:
        with Scheduler(llama) as one:
            plain = [answered(one, request)[0] for request in requests]
        with Scheduler(llama, prefixes=PrefixCache(), prompt_chunk=16) as one:
            with monkeypatch.context() as patch:
                tape = Tape(llama, patch)
                answered(one, greedy(SYSTEM, 0))
                shared = [answered(one, request)[0] for request in requests]
                answered(one, *requests)
            cuts = one._cells.cuts
    assert cuts == (model_id not in ("nemotron_h_moe", "qwen3next"))
    assert [s.cached_tokens for s in shared] == ([79, 80, 60, 79] if cuts else [0, 80, 0, 0])
    # Computed in other batches, the numbers are a little different, as they are in stock llama.cpp.
    for ours, alone in zip(shared, plain, strict=True):
        assert ours.tokens[0] == alone.tokens[0]
        assert ours.logprobs[0].logprob == pytest.approx(alone.logprobs[0].logprob, abs=0.02)
    assert any(step[0] == "copy" for step in tape.steps)
    # In the same batches they are the same up to rounding.
    wanted = tape.replayed_by_stock(tmp_path, n_sequences=8, **SETTINGS)
    assert nmse(np.array(tape.logits), np.array(wanted)) < 1e-6


# ---- files


@pytest.fixture
def saved(scheduler: Make, tmp_path: Path) -> Path:
    """SYSTEM's state in a file, by a scheduler that is closed."""
    cache, path = PrefixCache(), tmp_path / "system.prefix"
    with scheduler(prefixes=cache) as one:
        answered(one, greedy(SYSTEM + prompt(5), 3))
        assert cache.save(path, SYSTEM) > 0
    return path


def test_a_saved_prefix_is_as_good_as_one_in_memory(saved: Path, scheduler: Make, tiny: Llama) -> None:
    request = greedy(SYSTEM + prompt(20, seed=1), 10)
    with Scheduler(tiny) as one:
        (wanted,) = answered(one, request)
    cache = PrefixCache()
    one = scheduler(prefixes=cache)
    assert cache.load(saved) == tuple(SYSTEM)
    assert one._cells.used == len(SYSTEM)
    (session,) = answered(one, request)
    assert session.cached_tokens == len(SYSTEM)
    assert session.tokens == wanted.tokens


@pytest.mark.parametrize("at", [0, 8, 40, -20, -1])
def test_a_damaged_file_is_refused(saved: Path, scheduler: Make, at: int) -> None:
    content = bytearray(saved.read_bytes())
    content[at] ^= 1
    saved.write_bytes(content)
    cache = PrefixCache()
    one = scheduler(prefixes=cache)
    with pytest.raises(PrefixFileError, match=r"damaged|not a saved prefix|version"):
        cache.load(saved)
    assert one._cells.used == 0


@pytest.mark.parametrize("size", [0, 3, 20, 1000])
def test_a_file_that_ends_early_is_refused(saved: Path, scheduler: Make, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    cache = PrefixCache()
    scheduler(prefixes=cache)
    with pytest.raises(PrefixFileError, match=r"damaged|not a saved prefix"):
        cache.load(saved)


def test_files_of_other_versions_and_none_at_all_are_said_so(saved: Path, scheduler: Make, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[8:12] = struct.pack("<I", 99)
    saved.write_bytes(content)
    cache = PrefixCache()
    scheduler(prefixes=cache)
    with pytest.raises(PrefixFileError, match="version 99"):
        cache.load(saved)
    with pytest.raises(PrefixFileError, match="cannot be read"):
        cache.load(tmp_path / "nothing")


def test_a_file_that_cannot_be_written_is_said_so(scheduler: Make, tmp_path: Path) -> None:
    cache = PrefixCache()
    answered(scheduler(prefixes=cache), greedy(SYSTEM, 0))
    (tmp_path / "file").touch()
    with pytest.raises(PrefixFileError, match="cannot be saved"):
        cache.save(tmp_path / "file" / "prefix", SYSTEM)


def test_another_model_and_other_settings_are_refused(
    saved: Path, generated_model: ModelFactory, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"ram_budget": "60%", "n_sequences": 2, "n_ctx": 512}
    other_weights = tmp_path / "same-metadata.gguf"
    content = bytearray(generated_model("qwen2moe").path.read_bytes())
    content[-100] ^= 0x10
    other_weights.write_bytes(content)
    for path, more, reason in (
        (generated_model("gpt-oss").path, {}, "another model"),
        (other_weights, {}, "another model"),
        (generated_model("qwen2moe").path, {"type_k": 8}, "type_k"),
        (generated_model("qwen2moe").path, {"rope_freq_base": 5000.0}, "rope_freq_base"),
    ):
        with contextlib.closing(Llama(path, **options, **more)) as llama:
            cache = PrefixCache()
            with Scheduler(llama, prefixes=cache), pytest.raises(PrefixFileError, match=reason):
                cache.load(saved)


def test_only_what_is_kept_can_be_saved(scheduler: Make, tmp_path: Path) -> None:
    cache = PrefixCache()
    with pytest.raises(UsageError, match="no Scheduler"):
        cache.save(tmp_path / "x", SYSTEM)
    one = scheduler(prefixes=cache)
    answered(one, greedy(SYSTEM, 0))
    with pytest.raises(UsageError, match="no prefix is kept"):
        cache.save(tmp_path / "x", [*SYSTEM, 300])
    assert not (tmp_path / "x").exists()


def test_a_cache_serves_one_scheduler(scheduler: Make, tiny: Llama) -> None:
    cache = PrefixCache()
    with scheduler(prefixes=cache) as one:
        answered(one, greedy(SYSTEM, 0))
        assert cache.prefixes
    assert cache.prefixes == []
    scheduler(prefixes=cache)  # closed: it can have another one
