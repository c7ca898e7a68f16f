"""The format: its golden file, and every field where the public header says it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_tools.bundles.format import HEADER, LAYER, PLACE, SOURCE, BundleError, Tables, read_tables
from pyengine.native import NativeEngine, built_for, checksum

from . import golden_files
from .golden_files import BLOCKS, BUNDLE, MTIME_NS, N_EMBD, N_EXPERT, N_FF, content, unpack, write_bundle, write_model


def test_the_golden_file_is_still_what_we_write(tmp_path: Path) -> None:
    assert write_bundle(tmp_path).read_bytes() == BUNDLE.read_bytes(), golden_files.__doc__


def test_the_engine_takes_the_golden_file(tmp_path: Path) -> None:
    engine = NativeEngine(write_model(tmp_path / "tiny.gguf"))
    engine.use_bundle(BUNDLE)
    assert engine.info.bundle
    engine.close()


def test_the_golden_file_field_by_field(tmp_path: Path) -> None:
    """Read with nothing but numbers from pyengine.h."""
    raw = BUNDLE.read_bytes()
    model = write_model(tmp_path / "tiny.gguf").read_bytes()
    magic, version, header_bytes, head_sum, data_offset, file_bytes, n_done = unpack("8sII4Q", raw, 0)
    n_source, n_variant, n_layer, n_record = unpack("4I", raw, 48)
    ggml, architecture, order, reserved = unpack("32s64s64s32s", raw, 64)
    assert (magic, version, header_bytes) == (b"pyebndl\0", 1, 256)
    assert head_sum == checksum(raw[24:data_offset])
    assert (data_offset, file_bytes, n_done) == (4096, len(raw), 4)
    assert (n_source, n_variant, n_layer, n_record) == (1, 1, 2, 4)
    assert ggml == built_for().split()[-1].encode().ljust(32, b"\0")
    assert (architecture, order, reserved) == (b"llama".ljust(64, b"\0"), b"file".ljust(64, b"\0"), bytes(32))

    source_bytes, mtime, digest = unpack("QqQ", raw, 256)
    metadata = len(model) - sum(len(content(b, r, e)) for b in BLOCKS for r in ("gate", "up", "down") for e in (0, 1))
    tensors = b"".join(
        b"".join(content(b, r, e) for e in range(N_EXPERT))[:4096] for b in BLOCKS for r in ("gate", "up", "down")
    )
    assert (source_bytes, mtime) == (len(model), MTIME_NS)
    assert digest == checksum(model[:metadata] + tensors)

    sums = []
    for i, block in enumerate(BLOCKS):
        at = 280 + 216 * i
        number, n_expert, n_matrix, first, record_bytes = unpack("4IQ", raw, at)
        assert (number, n_expert, n_matrix, first) == (block, N_EXPERT, 3, i * N_EXPERT)
        for expert in range(N_EXPERT):
            offset, record_sum = unpack("QQ", raw, 280 + 216 * 2 + 16 * (first + expert))
            assert offset == 4096 + (first + expert) * record_bytes
            record = raw[offset:][:record_bytes]
            assert record_sum == checksum(record)
            sums.append(record_sum)
            for m, role in enumerate(("gate", "up", "down")):
                name, kind, repacked, ne0, ne1, inside, size, signature = unpack("16sII5Q", raw, at + 24 + 64 * m)
                assert (name, repacked, signature) == (role.encode().ljust(16, b"\0"), 0, 0)
                assert (kind, ne0, ne1) == ((1, N_FF, N_EMBD) if role == "down" else (2, N_EMBD, N_FF))
                assert record[inside : inside + size] == content(block, role, expert)
    assert len(set(sums)) == len(sums), "all records are alike: the model shows nothing"


def test_sizes() -> None:
    assert (HEADER.itemsize, SOURCE.itemsize, LAYER.itemsize, PLACE.itemsize) == (256, 24, 216, 16)


def sealed(**changes: int) -> bytearray:
    """The golden head with fields of the header changed and the checksum right."""
    tables = Tables(bytearray(BUNDLE.read_bytes()[:4096]))
    for name, value in changes.items():
        tables.header[name] = value
    tables.seal()
    return tables.content


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"magic": 0}, "not a bundle"),
        ({"format_version": 2}, "format version 2"),
        ({"header_bytes": 264}, "format version"),
        ({"data_offset": 4095}, "impossible"),
        ({"data_offset": 1 << 40}, "impossible"),
        ({"data_offset": 8192 << 10}, "past its end"),
        ({"n_source": 200}, "do not fit"),
        ({"n_source": 0xFFFFFFFF, "n_variant": 0xFFFFFFFF}, "do not fit"),
        ({"n_layer": 0xFFFFFFFF}, "do not fit"),
        ({"n_variant": 0}, "holds nothing"),
        ({"n_record": 3}, "contradict"),
        ({"n_record": 5}, "contradict"),
        ({"file_bytes": 4096}, "outside it"),
    ],
)
def test_a_head_that_lies_is_refused(changes: dict[str, int], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "lying.bundle"
    path.write_bytes(bytes(sealed(**changes)) + BUNDLE.read_bytes()[4096:])
    with path.open("rb") as file, pytest.raises(BundleError, match=reason):
        read_tables(file.fileno()).records()


def test_records_that_overlap_are_refused() -> None:
    tables = Tables(sealed())
    tables.places["offset"][0, 1] = tables.places["offset"][0, 0]
    with pytest.raises(BundleError, match="over each other"):
        tables.records()
