"""Files of predictors: what is written is read back; what is damaged or hostile is one clear error."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyengine.predictors import Calibration, Predictor, PredictorError, PredictorSet, load_predictors, save_predictors
from pyengine.predictors.archive import FORMAT, VERSION
from pyengine.traces import TracedModel

MODEL = TracedModel("m.gguf", "llama", 3, 5, 2)


def example() -> PredictorSet:
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32)

    chances = np.linspace(1, 0, 5).astype(np.float32)
    calibration = Calibration(chances, chances / 2, 1.5, -0.25, 0.4)
    linear = Predictor("linear", 1, 1, matrix(5, 7), matrix(5), calibration=calibration, figures={"recall@k": 0.75})
    mlp = Predictor("mlp", 2, 2, matrix(5, 4), matrix(5), matrix(4, 7), matrix(4))
    return PredictorSet(MODEL, (linear, mlp))


def test_round_trip(tmp_path: Path) -> None:
    written = example()
    save_predictors(tmp_path / "deep" / "p.npz", written)
    read = load_predictors(tmp_path / "deep" / "p.npz")
    assert read.model == MODEL and [p.target for p in read.at(2)] == [2]
    x = np.random.default_rng(1).standard_normal((6, 7)).astype(np.float32)
    for a, b in zip(written.predictors, read.predictors, strict=True):
        assert (a.form, a.target, a.distance, a.figures) == (b.form, b.target, b.distance, b.figures)
        np.testing.assert_array_equal(a.scores(x), b.scores(x))
    first = read.predictors[0].calibration
    assert first is not None and (first.slope, first.intercept, first.threshold) == (1.5, -0.25, 0.4)
    assert first.by_rank.tolist() == np.linspace(1, 0, 5).astype(np.float32).tolist()
    assert read.predictors[1].calibration is None
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["p.npz"]


def test_scores_are_two_layers_with_a_relu() -> None:
    p = Predictor(
        "mlp",
        1,
        1,
        np.array([[1, 2], [0, 1]], np.float32),
        np.array([0.5, 0], np.float32),
        np.array([[1, 0], [0, -1]], np.float32),
        np.array([0, 1], np.float32),
    )
    assert p.scores(np.array([[3, 4], [-1, -1]], np.float32)).tolist() == [[3.5, 0.0], [4.5, 2.0]]
    assert (p.n_embd, p.n_expert, p.source, p.multiply_adds) == (2, 2, 0, 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"b2": np.zeros(4, np.float32)}, "fit each other"),
        ({"w2": np.zeros((5, 7), np.float64)}, "float32"),
        ({"w2": np.full((5, 7), np.nan, np.float32)}, "finite"),
        ({"w1": np.zeros((3, 7), np.float32)}, "half"),
        ({"w1": np.zeros((3, 7), np.float32), "b1": np.zeros(3, np.float32)}, "fit each other"),
        ({"target": 0}, "before it"),
        ({"distance": -1}, "cannot read"),
    ],
)
def test_impossible_predictors(change: dict[str, Any], says: str) -> None:
    with pytest.raises(PredictorError, match=says):
        replace(example().predictors[0], **change)


def test_predictors_that_do_not_belong_together() -> None:
    one, other = example().predictors
    with pytest.raises(PredictorError, match="same target"):
        PredictorSet(MODEL, (one, one))
    with pytest.raises(PredictorError, match="does not fit"):
        PredictorSet(replace(MODEL, n_layer=2), (one, other))
    with pytest.raises(PredictorError, match="does not fit"):
        PredictorSet(replace(MODEL, n_expert=4), (one, other))
    narrow = replace(one, target=2, w2=np.zeros((5, 3), np.float32))
    with pytest.raises(PredictorError, match="widths"):
        PredictorSet(MODEL, (one, narrow))


def _meta(**changes: Any) -> bytes:
    good = {"format": FORMAT, "version": VERSION, "model": vars(MODEL) | {}, "predictors": []}
    return json.dumps(good | changes).encode()


def _entry(**changes: Any) -> list[dict[str, Any]]:
    return [{"form": "linear", "target": 1, "distance": 1, "figures": {}} | changes]


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (b"not json", "Expecting value"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 100_000, ""),
        (b"[]", "another format"),
        (_meta(format="pyengine routing trace"), "another format"),
        (_meta(version=99), "version 99"),
        (_meta(model=None), "which model"),
        (_meta(model=vars(MODEL) | {"n_layer": True}), "n_layer"),
        (_meta(model=vars(MODEL) | {"n_expert": "5"}), "n_expert"),
        (_meta(predictors={}), "list"),
        (_meta(predictors=[3]), "predictor 0"),
        (_meta(predictors=_entry(target="1")), "predictor 0"),
        (_meta(predictors=_entry(figures={"recall@k": "x"})), "no number"),
        (_meta(predictors=_entry(figures={"recall@k": float("nan")})), "no number"),
        (_meta(predictors=_entry(target=7)), "does not fit"),
        (_meta(predictors=_entry(calibration={})), "by_rank_0"),
        (_meta(predictors=_entry() * 2), "w2_1"),
    ],
)
def test_hostile_meta(tmp_path: Path, meta: bytes, says: str) -> None:
    file = tmp_path / "p.npz"
    matrices = {"w2_0": np.zeros((5, 7), np.float32), "b2_0": np.zeros(5, np.float32)}
    np.savez(file, meta=np.frombuffer(meta, np.uint8), **matrices)
    _refused(file, says)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("w2_0", np.zeros((5, 7), np.float64), "not as it should be"),
        ("w2_0", np.zeros((5, 7, 1), np.float32), "not as it should be"),
        ("w2_0", np.zeros((0, 7), np.float32), "fit each other"),
        ("b2_0", np.full(5, np.inf, np.float32), "finite"),
        ("b2_0", np.array([None] * 5, object), "not as it should be"),
        ("w1_0", np.zeros((4, 7), np.float32), "b1_0"),
    ],
)
def test_hostile_arrays(tmp_path: Path, name: str, array: Any, says: str) -> None:
    arrays: dict[str, Any] = {"w2_0": np.zeros((5, 7), np.float32), "b2_0": np.zeros(5, np.float32), name: array}
    np.savez(tmp_path / "p.npz", meta=np.frombuffer(_meta(predictors=_entry()), np.uint8), **arrays)
    _refused(tmp_path / "p.npz", says)


def test_a_header_that_claims_too_much_costs_no_memory(tmp_path: Path) -> None:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 40)}
    np.lib.format.write_array_header_1_0(stream, header)
    file = tmp_path / "p.npz"
    np.savez(file, meta=np.frombuffer(_meta(predictors=_entry()), np.uint8), b2_0=np.zeros(5, np.float32))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("w2_0.npy", stream.getvalue() + b"\0" * 16)
    _refused(file, "truncated")


def test_every_truncation_and_many_damages_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.npz"
    save_predictors(file, example())
    content = file.read_bytes()
    random = np.random.default_rng(7)
    for length in [0, 1, 30, *random.integers(31, len(content) - 1, 20).tolist()]:
        file.write_bytes(content[:length])
        _refused(file, "")
    for at in random.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[at] ^= 1 + int(random.integers(255))
        file.write_bytes(damaged)
        try:
            load_predictors(file)  # a changed time of a member, say, changes nothing
        except PredictorError as error:
            assert "\n" not in str(error)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_predictors(tmp_path / "absent.npz")


def _refused(file: Path, says: str) -> None:
    with pytest.raises(PredictorError) as caught:
        load_predictors(file)
    message = str(caught.value)
    assert message.startswith(f"{file} holds no usable predictors: ") and says in message and "\n" not in message
