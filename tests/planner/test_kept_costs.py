"""The file that costs are kept in: what is read back, and everything that must count as none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_up_costs import costs

from pyengine.planner import kept_costs
from pyengine.planner.kept_costs import Kept, LastRun, costs_file, load_costs, save_costs

KEY: dict[str, Any] = {"version": 1, "model": ["m.gguf", 5, 7], "machine": ["here"], "bundle": True}
RUN = LastRun(n_sequences=8, n_steps=20, planned_step_s=0.1, actual_step_s=0.125)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profiles" / "m.costs.json"


def test_what_is_kept_comes_back(path: Path) -> None:
    save_costs(path, KEY, Kept(costs(), RUN))
    assert load_costs(path, KEY) == Kept(costs(), RUN)
    assert RUN.error == pytest.approx(-0.2)
    save_costs(path, KEY, Kept(costs(recall=0.5)))
    assert load_costs(path, KEY) == Kept(costs(recall=0.5), None)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left"


def test_another_model_machine_or_version_has_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_costs(path, KEY, Kept(costs()))
    for name, value in (("machine", ["there"]), ("model", ["m.gguf", 5, 8]), ("version", 2), ("bundle", False)):
        assert load_costs(path, KEY | {name: value}) is None
    monkeypatch.setattr(kept_costs, "VERSION", kept_costs.VERSION + 1)
    assert load_costs(path, KEY) is None


def test_no_file_is_no_costs(path: Path) -> None:
    assert load_costs(path, KEY) is None


def test_every_cut_and_every_byte_that_changes_is_survived(path: Path) -> None:
    save_costs(path, KEY, Kept(costs(), RUN))
    whole = path.read_bytes()
    for n in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:n])
        assert load_costs(path, KEY) is None
    for n in range(0, len(whole), 3):
        path.write_bytes(whole[:n] + b"\xff" + whole[n + 1 :])
        assert load_costs(path, KEY) is None, "not UTF-8"
        path.write_bytes(whole[:n] + b"9" + whole[n + 1 :])
        found = load_costs(path, KEY)
        assert found is None or found.costs.sound


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transfer_s", -1.0),
        ("transfer_s", float("nan")),
        ("transfer_s", "2"),
        ("latency_s", float("inf")),
        ("recall", 1.5),
        ("transfer_bytes", 0.0),
        ("n_threads", True),
        ("bundle", 1),
        ("layer", []),
        ("layer", [[0, 1.0]]),
        ("layer", [[2, 1.0], [1, 2.0]]),
        ("expert", [[1, 0.0]]),
        ("expert", [[1.5, 1.0]]),
        ("expert", [[1]]),
        ("expert", None),
    ],
)
def test_numbers_out_of_their_ranges_are_no_costs(name: str, value: object, path: Path) -> None:
    save_costs(path, KEY, Kept(costs()))
    content = json.loads(path.read_text())
    content["costs"][name] = value
    path.write_text(json.dumps(content))
    assert load_costs(path, KEY) is None


def test_fields_that_are_missing_or_of_nobody_are_no_costs(path: Path) -> None:
    save_costs(path, KEY, Kept(costs()))
    whole = json.loads(path.read_text())
    for name in whole["costs"]:
        path.write_text(json.dumps(whole | {"costs": {k: v for k, v in whole["costs"].items() if k != name}}))
        assert load_costs(path, KEY) is None, name
    for other in ([], 5, {"format": "pyengine profile"}, {**whole, "costs": []}, {**whole, "run": {"n_steps": 3}}):
        path.write_text(json.dumps(other))
        assert load_costs(path, KEY) is None


def test_a_last_run_that_cannot_be_is_left_out(path: Path) -> None:
    save_costs(path, KEY, Kept(costs(), LastRun(8, 20, 0.1, 0.0)))
    assert load_costs(path, KEY) == Kept(costs(), None)


def test_a_folder_that_cannot_be_written_is_an_error_and_the_old_stays(path: Path) -> None:
    save_costs(path, KEY, Kept(costs()))
    path.with_name(f"{path.name}.blocked").mkdir()
    with pytest.raises(OSError):
        save_costs(path.with_name(f"{path.name}.blocked"), KEY, Kept(costs(), RUN))
    assert load_costs(path, KEY) == Kept(costs())


def test_they_lie_beside_the_model_s_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyengine.advice.profile import profile_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tmp_path / "some.model-v1.5.gguf"
    model.write_bytes(b"GGUF and more")
    assert costs_file(model).parent == profile_file(model).parent
    assert costs_file(model).name == profile_file(model).name.removesuffix(".npz") + ".costs.json"
