"""`pyengine plan` and `--trace`: tables, JSON, profiles, bad files; no test here looks at how fast anything was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from made_up_measured import MEASURED
from models.fixtures import ModelFactory

from pyengine import Llama, bundled_model
from pyengine.cli import main
from pyengine.planning import measured as kept
from pyengine.planning import probe
from pyengine.planning.controlled_run import ControlledRun, budget_of_one_token
from pyengine.planning.measured import Measured
from pyengine.planning.shape import read_shape
from pyengine.traces import Trace, TracedModel, load_trace, save_trace


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were measured; nothing is run."""
    made: list[Path] = []

    def measure(shape: Any, *_: Any, **__: Any) -> Measured:
        made.append(shape.path)
        return MEASURED

    monkeypatch.setattr(probe, "measure", measure)
    return made


def plan(*arguments: str, columns: int = 80) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})


def as_json(*arguments: str) -> dict[str, Any]:
    done = plan("--json", *arguments)
    assert done.exit_code == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def skewed_trace(path: Path, **model: Any) -> Path:
    """Tokens that use the first twelve experts of each layer only."""
    chance = np.random.default_rng(0)
    ids = np.array([[chance.permutation(12)[:8] for _ in range(30)] for _ in range(64)], np.uint16)
    save_trace(path, Trace(replace(TracedModel(bundled_model().name, "llama", 30, 32, 8), **model), ids))
    return path


def test_the_table_fits_80_columns_and_says_what_it_stands_on(probes: list[Path]) -> None:
    done = plan()
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    budgets = [
        line.split()[0] for line in lines if line.strip().startswith(("12.5%", "25%", "50%", "75%", "100%", "auto"))
    ]
    assert budgets == ["12.5%", "25%", "50%", "75%", "100%", "auto"]
    text = " ".join(done.stdout.split())
    for words in ("decode prefill", "least budget 64 KiB", "uniform, no trace", "measured now", "8192 tokens 180 MiB"):
        assert words in text
    assert "does not fit" not in text
    assert len(probes) == 1


def test_a_measurement_is_kept_until_it_is_asked_for_again(probes: list[Path], cache: Path) -> None:
    assert as_json()["probe"].startswith("measured now")
    assert as_json()["probe"].startswith("measured earlier")
    assert as_json("--no-probe")["budgets"][0]["decode_tokens_per_s"] > 0
    assert len(probes) == 1
    assert as_json("--probe")["probe"].startswith("measured now")
    assert len(probes) == 2
    for damage in ("", "{}", '{"key": 1, "measured": {}}', "[" * 5000):
        (file,) = (cache / "probes").iterdir()
        file.write_text(damage)
        assert as_json()["probe"].startswith("measured now")


def test_a_measurement_of_another_machine_does_not_count(tmp_path: Path) -> None:
    key = kept.machine_key(bundled_model(), False)
    kept.save(tmp_path / "p.json", key, MEASURED)
    assert kept.load(tmp_path / "p.json", key) == MEASURED
    assert kept.load(tmp_path / "p.json", kept.machine_key(bundled_model(), True)) is None
    assert kept.load(tmp_path / "p.json", key | {"kernel": "another"}) is None
    kept.save(tmp_path / "p.json", key, replace(MEASURED, token_s=float("nan")))
    assert kept.load(tmp_path / "p.json", key) is None


def test_without_a_probe_there_are_no_speeds(probes: list[Path]) -> None:
    done = plan("--no-probe")
    assert done.exit_code == 0
    assert "tok/s" not in done.stdout and "no speeds" in done.stdout
    report = as_json("--no-probe")
    assert report["measured"] is None and "decode_tokens_per_s" not in report["budgets"][0]
    assert probes == []


def test_a_trace_changes_what_is_expected(probes: list[Path], tmp_path: Path) -> None:
    uniform = as_json()
    traced = as_json("--trace", str(skewed_trace(tmp_path / "t.npz")))
    assert traced["routing"] == "trace t.npz, 64 tokens"
    half = {name: next(b for b in r["budgets"] if b["budget"] == "50%") for name, r in (("u", uniform), ("t", traced))}
    assert half["u"]["hit_rate"] < 0.5
    assert half["t"]["hit_rate"] == 1, "twelve experts of a layer have room in sixteen slots"
    assert half["t"]["decode_tokens_per_s"] == pytest.approx(1 / (0.010 + 256e-6))
    assert half["u"]["bytes_per_token"] == pytest.approx(240 * (1 - half["u"]["hit_rate"]) * 63e3)
    assert half["t"]["bytes_per_token"] == 0


def test_a_recorded_trace_is_found_and_a_damaged_one_forgotten(probes: list[Path], cache: Path) -> None:
    from pyengine.planning.plan import default_trace

    path = default_trace(bundled_model())
    assert path.parent == cache / "traces"
    skewed_trace(path)
    assert as_json()["routing"] == "recorded trace, 64 tokens"
    path.write_bytes(path.read_bytes()[:-50])
    assert as_json()["routing"].startswith("uniform")


@pytest.mark.parametrize(
    ("other", "says"), [({"n_expert": 64}, "of another model"), ({"architecture": "olmoe"}, "of another model")]
)
def test_a_trace_of_another_model_is_refused(
    other: dict[str, Any], says: str, probes: list[Path], tmp_path: Path
) -> None:
    done = plan("--trace", str(skewed_trace(tmp_path / "t.npz", **other)))
    assert done.exit_code == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1
    done = plan("--trace", str(tmp_path / "none.npz"))
    assert (
        done.exit_code == 1 and done.stderr == f"pyengine: error: {tmp_path / 'none.npz'}: No such file or directory\n"
    )


def test_the_wanted_budget_is_a_line_of_its_own(probes: list[Path]) -> None:
    report = as_json("--ram-budget", "20MiB")
    line = next(b for b in report["budgets"] if b["budget"] == "20MiB")
    assert line["bytes"] == 20 << 20 and line["slots_per_layer"] == pytest.approx(320 / 30)
    done = plan("--ram-budget", "5")
    assert done.exit_code == 1 and "at least 65,536" in done.stderr
    assert plan("--ram-budget", "lots").exit_code == 1


def test_speeds_grow_with_the_budget_and_the_largest_has_no_misses(probes: list[Path]) -> None:
    budgets = as_json()["budgets"]
    speeds = [b["decode_tokens_per_s"] for b in budgets]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    assert budgets[-1]["hit_rate"] == 1 and budgets[0]["hit_rate"] == 0
    assert budgets[0]["first_token_s"] >= budgets[-1]["first_token_s"] > 0
    assert budgets[-1]["cold_prefill_tokens_per_s"]["512"] < budgets[-1]["prefill_tokens_per_s"]["512"]


def test_what_does_not_fit_is_said(probes: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from pyengine.planning import plan as planning

    # 57 MiB of other weights and overhead, 90 of KV cache: 13 are left for slots.
    monkeypatch.setattr(planning, "available_memory", lambda: 190 << 20)
    monkeypatch.setattr(planning, "reserve", lambda: 1 << 20)
    report = as_json()
    fits = {b["budget"]: b["fits"] for b in report["budgets"]}
    assert fits == {"12.5%": True, "25%": False, "50%": False, "75%": False, "100%": False, "auto": True}
    assert [c["fits"] for c in report["contexts"]] == [True, False]
    assert 4096 < report["largest_context"] < 8192 and report["largest_context"] % 256 == 0
    done = plan()
    marks = [line.split()[6] for line in done.stdout.splitlines() if "%" in line]
    assert marks == ["yes", "no", "no", "no", "no", "yes"]
    assert "8192 tokens   180 MiB  does not fit" in done.stdout and "the largest that fits" in done.stdout


def test_models_nothing_is_planned_for(generated_model: ModelFactory, tmp_path: Path, probes: list[Path]) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    done = plan("-m", str(text))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"pyengine: error: {text} is not a GGUF file\n"
    damaged = tmp_path / "damaged.gguf"
    shutil.copy(generated_model("llama").path, damaged)
    with damaged.open("r+b") as file:
        file.truncate(2000)
    assert plan("-m", str(damaged)).exit_code == 1
    assert plan("-m", str(tmp_path / "none.gguf")).exit_code == 1
    assert plan("--probe", "--no-probe").exit_code == 2


@pytest.mark.parametrize("model_id", ["q4_k_m", "many-experts", "gpt-oss"])
def test_the_real_probe_runs_any_layout(model_id: str, generated_model: ModelFactory) -> None:
    """Several shape classes, many experts, biases."""
    shape = read_shape(generated_model(model_id).path)
    found = probe.measure(shape)
    most = min(shape.info.n_expert_used, shape.info.n_expert - shape.info.n_expert_used)
    assert found.missing[-1][0] == most
    assert found.token_s > 0 and found.pair_s > 0
    aligned = max(c.expert_bytes + c.n_matrix * 2 * 4096 for c in shape.classes)
    assert min(c.expert_bytes for c in shape.classes) <= found.bytes_per_miss <= aligned


def test_the_probe_controls_what_is_missing() -> None:
    shape = read_shape(bundled_model())
    llm = Llama(
        ram_budget=budget_of_one_token(shape),
        policy="lru",
        look_ahead="off",
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
    )
    run = ControlledRun(llm, shape)
    run.prompt(16, 0)
    for missing in (0, 1, 4, 8, 0):
        run.decode(missing, 16)
        steps = [run.decode(missing, 16) for _ in range(3)]
        assert [step.misses for step in steps] == [missing * 30] * 3
    assert [run.prompt(4, missing).misses for missing in (8, 8, 0)] == [240, 240, 0]
    llm.close()


def test_the_real_probe_measures_what_a_machine_can_do() -> None:
    """Not how fast: that everything is there, positive and in order."""
    shape = read_shape(bundled_model())
    found = probe.measure(shape)
    assert found.token_s > 0 and 0 < found.expert_share < 1
    numbers = [m for m, _ in found.missing]
    assert numbers == [1, 4, 8]
    assert [s for _, s in found.missing] == sorted(s for _, s in found.missing)
    assert found.pair_s > 0 and found.prompt_token_s > 0
    assert shape.expert_bytes <= found.bytes_per_miss <= shape.expert_bytes + 3 * 2 * 4096
    assert found.disk_bytes_per_s > 0 and found.disk_latency_s > 0


def test_run_writes_the_trace_of_a_prompt_and_its_tokens(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    arguments = ["run", "-p", "The capital of France is", "-n", "9", "--temp", "0", "-c", "256", "-t", "1"]
    done = CliRunner().invoke(main, [*arguments, "--trace", str(path)])
    assert done.exit_code == 0, done.stderr
    trace = load_trace(path)
    assert trace.model == TracedModel(bundled_model().name, "llama", 30, 32, 8)
    assert len(trace.ids) == 8, "the last token is sampled, not computed"
    assert trace.prompts.tokens.tolist() == [5] and trace.starts.tolist() == [0]
    assert len({tuple(sorted(ids)) for ids in trace.ids[:, 0].tolist()}) > 1
    assert (np.diff(np.sort(trace.ids, axis=2), axis=2) > 0).all(), "a set has no expert twice"
