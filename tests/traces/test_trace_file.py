"""Trace files: they come back as they were written, and hostile ones are one line."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine.traces import Prompts, Trace, TracedModel, TraceError, load_trace, save_trace

MODEL = TracedModel("m.gguf", "llama", n_layer=3, n_expert=8, n_expert_used=2)


def trace(n_token: int = 5) -> Trace:
    chance = np.random.default_rng(0)
    ids = np.array([[chance.permutation(8)[:2] for _ in range(3)] for _ in range(n_token)], np.uint16)
    return Trace(
        MODEL,
        ids.reshape(n_token, 3, 2),
        np.array([0, n_token]),
        Prompts(
            at=np.array([0, n_token]),
            tokens=np.array([17, 512]),
            offsets=np.array([0, 2, 3, 5, 7, 8, 9]),
            experts=np.array([1, 4, 7, 0, 3, 2, 5, 6, 6], np.uint16),
            pairs=np.array([3, 31, 34, 30, 4, 512, 512, 1024, 2], np.uint16),
        ),
        tokens=np.arange(n_token, dtype=np.int32),
        weights=chance.random((n_token, 3, 2)).astype(np.float16),
        inputs=chance.random((n_token, 3, 16)).astype(np.float16),
        seconds=np.full(n_token, 0.25, np.float32),
    )


def test_a_trace_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.npz"
    save_trace(path, trace())
    back = load_trace(path)
    assert back.model == MODEL
    for name in ("ids", "starts", "tokens", "weights", "inputs", "seconds"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trace(), name))
    for name, array in vars(trace().prompts).items():
        np.testing.assert_array_equal(getattr(back.prompts, name), array)
    assert back.prompts.counts(3).tolist() == [[2, 1, 2], [2, 1, 1]]
    assert [part.tolist() for part in back.prompts.of(1, 0, 3)] == [[2, 5], [512, 512]]
    assert back.ids.dtype == np.uint16


def test_writing_replaces_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    save_trace(path, trace(3))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_trace(path, trace(5))
    assert len(load_trace(path).ids) == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_of_another_origin_is_known_by_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "foreign.npz"
    ids = np.array([[[7, 1], [2, 3]], [[4, 5], [6, 0]]], np.uint8)
    np.savez(path, ids=ids, probs=np.zeros((2, 2, 2), np.float16), starts=np.array([0]), labels=np.array(["a"]))
    found = load_trace(path)
    assert found.model == TracedModel("", "", 2, 8, 2)
    np.testing.assert_array_equal(found.ids, ids)
    assert found.weights.shape == ids.shape and not len(found.prompts)


Change = Callable[[dict[str, Any], dict[str, Any]], None]


def _set(**values: Any) -> Change:
    def change(meta: dict[str, Any], arrays: dict[str, Any]) -> None:
        for name, value in values.items():
            (meta if name in ("format", "version", "model") else arrays)[name] = value

    return change


def _model(**values: Any) -> Change:
    return lambda meta, _: meta["model"].update(values)


HOSTILE: dict[str, tuple[Change, str]] = {
    "another format": (_set(format="diary"), "another format"),
    "a later version": (_set(version=99), "format version 99"),
    "no model": (_set(model=None), "which model"),
    "a model with too much in it": (_model(colour="red"), "which model"),
    "a number that is a text": (_model(n_layer="3"), "n_layer is not understood"),
    "a number that is a truth": (_model(n_expert_used=True), "n_expert_used is not understood"),
    "more experts used than there are": (_model(n_expert_used=9), "impossible"),
    "absurdly many experts": (_model(n_expert=10**9), "impossible"),
    "fewer layers": (_model(n_layer=2), "shape"),
    "an expert that is not there": (_set(ids=np.full((5, 3, 2), 8, np.uint16)), "names expert 8 of 8"),
    "floats": (_set(ids=np.zeros((5, 3, 2))), "not as they should be"),
    "another rank": (_set(ids=np.zeros((5, 6), np.uint16)), "not as they should be"),
    "starts that go back": (_set(starts=np.array([3, 1])), "starts"),
    "starts behind the end": (_set(starts=np.array([6])), "starts"),
    "a prompt of no tokens": (_set(prompt_tokens=np.array([0, 3])), "lengths"),
    "prompts behind the end": (_set(prompt_at=np.array([0, 6])), "ascending positions"),
    "prompts without places": (_set(prompt_at=np.zeros(0, np.int64)), "ascending positions"),
    "prompts without experts": (_set(prompt_experts=np.zeros(0, np.uint16)), "divided into layers"),
    "prompts that go back": (_set(prompt_offsets=np.array([0, 2, 1, 5, 7, 8, 9])), "divided into layers"),
    "experts of no prompt": (_set(prompt_offsets=np.array([0, 2, 3, 5, 7, 8, 8])), "divided into layers"),
    "a prompt's expert that is not there": (_set(prompt_experts=np.full(9, 8, np.uint16)), "prompts name expert 8"),
    "tokens of somebody else": (_set(tokens=np.arange(4, dtype=np.int32)), "tokens are not those"),
    "weights of another shape": (_set(weights=np.zeros((5, 3, 4), np.float16)), "weights have the shape"),
    "gate inputs of other layers": (_set(inputs=np.zeros((5, 2, 16), np.float16)), "gate inputs have the shape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_trace_is_one_line(name: str, tmp_path: Path) -> None:
    change, reason = HOSTILE[name]
    good = trace()
    meta = {"format": "pyengine routing trace", "version": 2, "model": dict(vars(MODEL))}
    arrays = {n: getattr(good, n) for n in ("ids", "starts", "tokens", "weights", "inputs", "seconds")}
    arrays |= {f"prompt_{n}": array for n, array in vars(good.prompts).items()}
    path = tmp_path / "hostile.npz"
    write = lambda: np.savez(path, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)  # noqa: E731
    write()
    load_trace(path)  # good before the change
    change(meta, arrays)
    write()
    with pytest.raises(TraceError, match=reason) as caught:
        load_trace(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def _npy(shape: str, dtype: str = "<u2", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body


class _Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle was run')",))


BYTES = {
    "empty": b"",
    "no archive": b"not a zip archive at all",
    "ids that claim the memory": _npy("(1000000000, 1000, 1000)"),
    "ids of a negative size": _npy("(-1, 3, 2)"),
    "ids without an end": _npy("(5, 3, 2)", body=b"\0" * 59),
    "ids of objects": _npy("(1, 1, 1)", "|O", pickle.dumps([_Evil()])),
    "ids of nothing": b"",
    "a header of nonsense": b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118,
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_trace(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bytes.npz"
    if "ids" in name or "header" in name:
        starts = io.BytesIO()
        np.save(starts, np.array([0]))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("ids.npy", BYTES[name])
            archive.writestr("starts.npy", starts.getvalue())
    else:
        path.write_bytes(BYTES[name])
    with pytest.raises(TraceError, match="usable routing trace") as caught:
        load_trace(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_or_flipped_file_never_gives_another_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save_trace(path, trace(40))
    good = path.read_bytes()
    chance = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        if chance.random() < 0.3:
            del bad[int(chance.integers(len(bad))) :]
        else:
            bad[int(chance.integers(len(bad)))] ^= 1 << int(chance.integers(8))
        path.write_bytes(bad)
        try:
            back = load_trace(path)
        except TraceError:
            refused += 1
        else:  # the archive's own bookkeeping was hit, not its content
            np.testing.assert_array_equal(back.ids, trace(40).ids)
    assert refused > 150


def test_a_missing_file_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "none.npz")
