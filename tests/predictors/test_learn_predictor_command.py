"""`pyengine learn-predictor` from end to end, on a small trace of a generated model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from models.fixtures import ModelFactory

from pyengine.cli import main
from pyengine.predictors import load_predictors
from pyengine.predictors.fate import fate
from pyengine.predictors.routers import read_routers
from pyengine.traces import Trace, TracedModel, save_trace

MODEL = "llama"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["learn-predictor", *map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def traced(generated_model: ModelFactory) -> Trace:
    """Residuals that change a little from layer to layer, and what the model's own routers choose of them."""
    routers = read_routers(generated_model(MODEL).path)
    k = generated_model(MODEL).n_expert_used
    random = np.random.default_rng(0)
    n, n_embd = 300, routers[0].weight.shape[1]
    residual = random.standard_normal((n, n_embd))
    inputs = np.zeros((n, len(routers), n_embd), np.float16)
    ids = np.zeros((n, len(routers), k), np.uint16)
    for layer, router in enumerate(routers):
        assert router.input_gain is not None
        inputs[:, layer] = residual * router.input_gain
        scores = fate(routers, layer, 0, corrected=False).scores(inputs[:, layer])
        ids[:, layer] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        residual = residual + 0.1 * random.standard_normal((n, n_embd))
    model = TracedModel("other.gguf", "llama", len(routers), len(routers[0].weight), k)
    return Trace(model, ids=ids, starts=np.arange(0, n, 20), tokens=np.arange(n, dtype="<i4") % 7, inputs=inputs)


@pytest.fixture
def files(generated_model: ModelFactory, traced: Trace, tmp_path: Path) -> tuple[Path, Path]:
    """(model, trace)"""
    save_trace(tmp_path / "trace.npz", traced)
    return generated_model(MODEL).path, tmp_path / "trace.npz"


def test_tables_and_the_cache_folder(files: tuple[Path, Path], cache: Path) -> None:
    model, trace = files
    result = run("-m", model, trace)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for word in (
        "fate-",
        "linear",
        "mlp",
        "fresh-gate",
        "popularity",
        "token-table",
        "auto",
        "1 layer ahead",
        "2 layers",
    ):
        assert word in result.stdout
    (file,) = (cache / "predictors").iterdir()
    kept = load_predictors(file)
    assert str(file) in result.stderr.replace("\n", "")
    assert {(p.target, p.distance) for p in kept.predictors} == {(1, 1), (2, 1), (2, 2)}


def test_json_and_a_chosen_form(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, trace = files
    result = run("-m", model, trace, "--distance", "1", "--form", "fate-corrected", "-o", tmp_path / "p.npz", "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["means"]["0"]["fresh-gate"]["recall@k"] == 1.0
    assert sum(found["tokens"].values()) == 300 and found["by_sequence"] is True
    layers = {(r["target"], r["distance"]): r for r in found["layers"]}
    chosen = layers[1, 1]
    assert chosen["choice"]["form"] == "fate-corrected" and list(chosen["figures"]) == ["fate-corrected"]
    figures = chosen["figures"]["fate-corrected"]
    assert 0.8 < figures["recall@k"] <= figures["recall@k+2"] <= figures["recall@k+8"] == 1.0
    assert {p.form for p in load_predictors(tmp_path / "p.npz").predictors} == {"fate-corrected"}


def test_the_picture(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, trace = files
    result = run("-m", model, trace, "--form", "linear", "-o", tmp_path / "p.npz", "--plot", tmp_path / "r.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("distance", ["0", "-1", "1,", "one", "1.5", "99999999999"])
def test_bad_distances(files: tuple[Path, Path], distance: str, tmp_path: Path) -> None:
    model, trace = files
    result = run("-m", model, trace, "--distance", distance, "-o", tmp_path / "p.npz")
    if distance == "99999999999":  # a distance no model has: nothing to learn
        assert result.exit_code == 0 and not load_predictors(tmp_path / "p.npz").predictors
    else:
        assert result.exit_code == 2 and "list of distances" in result.stderr


def test_bad_traces_are_one_line(files: tuple[Path, Path], traced: Trace, tmp_path: Path) -> None:
    model, _ = files
    file = tmp_path / "bad.npz"

    def message(trace: Trace | bytes) -> str:
        if isinstance(trace, bytes):
            file.write_bytes(trace)
        else:
            save_trace(file, trace)
        result = run("-m", model, file, "-o", tmp_path / "p.npz")
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and not (tmp_path / "p.npz").exists()
        return result.stderr

    assert "usable routing trace" in message(b"nonsense")
    assert "no gate inputs" in message(replace(traced, inputs=np.zeros((0, 0, 0), np.float16)))
    other = replace(traced.model, n_expert=traced.model.n_expert + 1)
    assert "the trace is of a model with" in message(replace(traced, model=other))
    infinite = traced.inputs.copy()
    infinite[0, 0, 0] = np.nan
    assert "not finite" in message(replace(traced, inputs=infinite))
    narrow = run("-m", model, tmp_path / "absent.npz")
    assert narrow.exit_code == 1 and "absent.npz: No such file" in narrow.stderr


def test_narrow_inputs_are_learned_without_routers(files: tuple[Path, Path], traced: Trace, tmp_path: Path) -> None:
    model, _ = files
    save_trace(tmp_path / "narrow.npz", replace(traced, inputs=traced.inputs[:, :, :-8]))
    result = run("-m", model, tmp_path / "narrow.npz", "-o", tmp_path / "p.npz", "--json", "--distance", "1")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "0" not in found["means"] and set(found["means"]["1"]) <= {"linear", "mlp", "auto"}


def test_a_file_that_is_no_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    result = run("-m", tmp_path / "model.gguf", files[1])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
