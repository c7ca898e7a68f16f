"""Bundles that are damaged, cut, stale or lie: refused in a clear line, or their experts read from the model instead.

The text is always stock's."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine.decoding import Logits, random_script
from engine.managed import assert_same_bits
from engine.reference import StockProcess
from models.vocabulary import N_VOCAB

from gguf_tools.bundles.format import Tables, read_tables
from pyengine import Llama
from pyengine.errors import ModelFileError, StaleBundleError
from pyengine.native import NativeEngine

from .conftest import Pair
from .making import flip, make, opened, planned

SCRIPT = random_script([1] * 8 + [20], N_VOCAB, seed=5)


@pytest.fixture
def wanted(sound: Pair, stock: StockProcess) -> Logits:
    """Stock's logits of SCRIPT."""
    return stock.run(sound.model, SCRIPT).logits


def reason_against(pair: Pair) -> str:
    """Why the engine refuses the bundle: one line."""
    engine = NativeEngine(pair.model)
    try:
        with pytest.raises((StaleBundleError, ModelFileError)) as refused:
            engine.use_bundle(pair.bundle)
        reason = str(refused.value)
        assert "\n" not in reason and str(pair.bundle) in reason
        assert not engine.info.bundle
        return reason
    finally:
        engine.close()


def change_head(path: Path, change: Callable[[Tables], None]) -> None:
    """Let `change` do something to the tables of a bundle; the checksum is right afterwards."""
    with path.open("r+b") as file:
        tables = read_tables(file.fileno())
        change(tables)
        tables.seal()
        file.write(tables.content)


@pytest.mark.parametrize("where", ["nothing", "magic", "header", "sources", "tables", "head", "records", "last byte"])
def test_truncated(where: str, pair: Pair) -> None:
    tables, size = planned(pair.model), pair.bundle.stat().st_size
    left = {
        "nothing": 0,
        "magic": 5,
        "header": 200,
        "sources": 270,
        "tables": 700,
        "head": len(tables.content),
        "records": len(tables.content) + 30_000,
        "last byte": size - 1,
    }[where]
    os.truncate(pair.bundle, left)
    assert re.search("too short|past its end|truncated", reason_against(pair))


def test_any_bit_of_the_head(pair: Pair) -> None:
    """One flipped bit in each byte before the first record."""
    engine = NativeEngine(pair.model)
    n_bytes = len(planned(pair.model).content)
    rng = np.random.default_rng(0)
    for offset in range(n_bytes):
        bit = int(rng.integers(8))
        flip(pair.bundle, offset, bit)
        with pytest.raises((StaleBundleError, ModelFileError)):
            engine.use_bundle(pair.bundle)
        flip(pair.bundle, offset, bit)
    engine.use_bundle(pair.bundle)  # and whole again, it is taken
    engine.close()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_flipped_bit_in_a_record(share: float, pair: Pair, wanted: Logits) -> None:
    records = planned(pair.model).records()
    for record in records[::2]:
        flip(pair.bundle, int(record["offset"]) + 1234, 3)
    with opened(pair.model, pair.bundle, share) as (engine, model), model.context() as context:
        assert_same_bits(context.run(SCRIPT), wanted)
        notice, stats = engine.take_notice(), engine.stats()
        assert engine.take_notice() == ""  # said once
        assert_same_bits((context.clear(), context.run(SCRIPT))[1], wanted)
    assert "damaged" in notice and str(pair.bundle) in notice, notice
    assert stats["reads"] > stats["misses"]  # the model's three matrices in the place of the record


@pytest.mark.parametrize("raw", [False, True])
def test_every_record_destroyed(raw: bool, pair: Pair, wanted: Logits) -> None:
    make(pair.model, pair.bundle, raw=raw)
    n_head = len(planned(pair.model).content)
    with pair.bundle.open("r+b") as file:
        file.seek(n_head)
        file.write(bytes(pair.bundle.stat().st_size - n_head))
    with opened(pair.model, pair.bundle) as (engine, model), model.context() as context:
        assert_same_bits(context.run(SCRIPT), wanted)
        assert "damaged" in engine.take_notice()


def test_a_damaged_record_is_one_warning(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def text() -> str:
        with contextlib.closing(Llama(pair.model, ram_budget="12.5%", n_ctx=64, n_threads=1, n_threads_batch=1)) as llm:
            assert llm.expert_stats()["bundle"] == str(pair.bundle)
            return str(llm("the rain", max_tokens=6, temperature=0)["choices"][0]["text"])  # type: ignore[index]

    before = text()
    for record in planned(pair.model).records():
        flip(pair.bundle, int(record["offset"]))
    with caplog.at_level(logging.WARNING, "pyengine"):
        assert text() == before
    assert any("damaged" in line for line in caplog.messages)


def restored_date(path: Path, write: Callable[[], None]) -> None:
    """Change a file so that its size and date stay what they were."""
    stat = path.stat()
    write()
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_another_model_of_that_size_and_date(pair: Pair) -> None:
    """Other metadata, or other weights at the beginning of an expert tensor."""
    name = pair.model.read_bytes().index(b"random llama")
    restored_date(pair.model, lambda: flip(pair.model, name + 3))
    assert "another model" in reason_against(pair)
    restored_date(pair.model, lambda: flip(pair.model, name + 3))
    engine = NativeEngine(pair.model)
    engine.use_bundle(pair.bundle)
    engine.close()


def test_a_model_that_was_written_again(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    os.utime(pair.model)
    assert "written after" in reason_against(pair)
    with (
        caplog.at_level(logging.WARNING, "pyengine"),
        contextlib.closing(Llama(pair.model, ram_budget="50%", n_ctx=64, n_threads=1)) as llm,
    ):
        assert llm.expert_stats()["bundle"] is None
    assert [line for line in caplog.messages if "bundle not used" in line and "`gguf_tools bundle`" in line]
    with pytest.raises(StaleBundleError, match="written after"):
        Llama(pair.model, bundle=pair.bundle)


def other_version(tables: Tables) -> None:
    tables.header["ggml_version"] = b"0.1.2"


def other_cpu(tables: Tables) -> None:
    assert tables.layers["matrix"]["signature"].any()
    tables.layers["matrix"]["signature"][tables.layers["matrix"]["signature"] != 0] += 1


def other_shape(tables: Tables) -> None:
    tables.layers["matrix"]["ne1"][0, 0, 0] += 8


def other_layer(tables: Tables) -> None:
    tables.layers["block"][0, -1] += 1


def other_architecture(tables: Tables) -> None:
    tables.header["architecture"] = b"qwen3moe"


def unfinished(tables: Tables) -> None:
    tables.header["n_done"] -= 1


def outside(tables: Tables) -> None:
    tables.places["offset"][0, -1] = tables.header["file_bytes"]


def at_no_page(tables: Tables) -> None:
    tables.places["offset"][0, -1] += 512


def in_the_head(tables: Tables) -> None:
    tables.places["offset"][0, 0] = 0


def far_away(tables: Tables) -> None:
    tables.places["offset"][0, 0] = (1 << 64) - 4096


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_version, "made for ggml 0.1.2"),
        (other_cpu, "another CPU"),
        (other_shape, "another model"),
        (other_layer, "another model"),
        (other_architecture, "another model"),
        (unfinished, "incomplete"),
        (outside, "past its end"),
        (at_no_page, "damaged"),
        (in_the_head, "damaged"),
        (far_away, "damaged"),
    ],
)
def test_a_head_that_is_sound_and_does_not_fit(change: Callable[[Tables], None], reason: str, pair: Pair) -> None:
    change_head(pair.bundle, change)
    assert reason in reason_against(pair)


def test_two_records_exchanged(pair: Pair, wanted: Logits) -> None:
    """Checksums that belong to other records: nothing is computed with the wrong expert."""

    def exchange(tables: Tables) -> None:
        offsets = tables.places["offset"][0]
        offsets[[0, 1]] = offsets[[1, 0]]

    change_head(pair.bundle, exchange)
    with opened(pair.model, pair.bundle) as (_, model), model.context() as context:
        assert_same_bits(context.run(SCRIPT), wanted)


def test_an_unfinished_bundle_is_not_looked_at(pair: Pair) -> None:
    pair.bundle.rename(pair.bundle.with_name(pair.bundle.name + ".partial"))
    with contextlib.closing(Llama(pair.model, ram_budget="50%", n_ctx=64, n_threads=1)) as llm:
        assert llm.expert_stats()["bundle"] is None
