"""`pyengine plan --gpu` and the room on a GPU, which is a wrapped CPU device here, with made-up memory and speeds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from models.fixtures import ModelFactory

from pyengine import budget, vram
from pyengine.cli import main
from pyengine.native import Device, devices
from pyengine.planning import gpu_probe, link
from pyengine.planning.gpu_probe import GpuMeasured, load_gpu, measure_on_gpu
from pyengine.planning.link import LinkSpeed, known_link, measure_link
from pyengine.planning.measured import save
from pyengine.planning.shape import read_shape
from pyengine.planning.vram_needs import on_device

MIB = 1 << 20
MEASURED = GpuMeasured(found_s=0.006, resident_s=0.004, move_s=3e-5, disk_bytes_per_s=1e9, took_s=2.0)


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probe, "measure_on_gpu", lambda *_: MEASURED)
    monkeypatch.setattr(link, "measure_link", lambda _: LinkSpeed(25e9, 1e-5))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """memory(free bytes): what the device says that it has."""

    def free(size: int, unified: bool = False) -> Device:
        device = Device("CPU", "a small card", "", size, 24 << 30, gpu=True, unified=unified)
        monkeypatch.setattr(vram, "devices", lambda: [device])
        monkeypatch.setattr(vram, "find_device", lambda name: device)
        return device

    return free


def plan(*arguments: str) -> Result:
    environment = {"COLUMNS": "80", "NO_COLOR": "1"}
    return CliRunner().invoke(main, ["plan", "--gpu", "CPU", *arguments], env=environment)


def as_json(*arguments: str) -> dict[str, Any]:
    done = plan("--json", *arguments)
    assert done.exit_code == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_the_tables_fit_80_columns_and_say_where_everything_is() -> None:
    done = plan("--vram-budget", "40%", "--ram-budget", "30%")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(done.stdout.split())
    for words in (
        "VRAM 35.8 MiB weights that are no experts",
        "VRAM 90 MiB KV cache, 4096 tokens",
        "VRAM 24 MiB 384 40 %",
        "RAM 18 MiB 288 30 %",
        "disk 18 MiB 288 30 %",
        "25 GB/s from RAM",
        "measured now in 2 s",
    ):
        assert words in text
    assert [line.split()[0] for line in lines if re.match(r" *[0-9.]+% ", line)] == [
        *("12.5%", "25%", "50%", "75%", "100%", "40%")
    ]
    assert "auto" in text


def test_times_add_up_and_name_their_bound(memory: Any) -> None:
    memory(20 << 30)
    report = as_json("--ram-budget", "100%")
    for line in report["budgets"]:
        assert line["in_vram"] + line["in_ram"] + line["from_disk"] == pytest.approx(1)
        assert line["from_disk"] == 0, "all experts have room in RAM"
        assert line["link_s"] == pytest.approx(line["missing_per_token"] * 3e-5)
        assert line["decode_tokens_per_s"] == pytest.approx(1 / (line["compute_s"] + line["link_s"] + line["disk_s"]))
    whole = next(line for line in report["budgets"] if line["budget"] == "100%")
    assert whole["compute_s"] == 0.004 and whole["bound"] == "compute"
    speeds = [line["decode_tokens_per_s"] for line in report["budgets"]]
    assert speeds[:5] == sorted(speeds[:5])
    assert report["chosen"]["budget"] == "auto" and report["chosen"]["slots"] == 960
    assert as_json("--ram-budget", "0")["budgets"][0]["in_ram"] == 0


@pytest.mark.parametrize(("unified", "left"), [(False, 24 * 1024 * MIB // 20), (True, 3 << 30)])
def test_auto_is_planned_as_it_is_taken(memory: Any, monkeypatch: pytest.MonkeyPatch, unified: bool, left: int) -> None:
    for module in (budget, vram):
        monkeypatch.setattr(module, "reserve", lambda: 3 << 30)
    memory(4 << 30)
    needs = sum(as_json("--no-probe")["gpu"][name] for name in ("dense_bytes", "kv_bytes", "compute_bytes"))
    memory(left + needs + 30 * MIB, unified)
    report = as_json("--no-probe")
    assert report["gpu"]["left_bytes"] == left
    assert report["chosen"]["vram_bytes"] == 30 * MIB and 0 < report["chosen"]["slots"] < 960


def test_a_measurement_is_kept_and_damage_is_noticed(tmp_path: Path) -> None:
    assert as_json()["probe"].startswith("measured now")
    assert as_json("--no-probe")["probe"].startswith("measured earlier")
    path, key = tmp_path / "p.json", {"a": 1}
    save(path, key, MEASURED)
    assert load_gpu(path, key) == MEASURED
    assert load_gpu(path, {"a": 2}) is None
    save(path, key, GpuMeasured(float("inf"), None, 0.0, 1.0, 1.0))
    assert load_gpu(path, key) is None
    path.write_text("[")
    assert load_gpu(path, key) is None


def test_without_a_probe_there_are_places_and_no_speeds() -> None:
    done = plan("--no-probe")
    assert done.exit_code == 0 and "tok/s" not in done.stdout and "no speeds" in done.stdout
    assert "decode_tokens_per_s" not in as_json("--no-probe")["chosen"]


def test_unified_memory_has_no_link_and_no_second_tier(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(8 << 30, unified=True)
    report = as_json("--ram-budget", "100%", "--vram-budget", "50%")
    assert report["gpu"]["link_bytes_per_s"] is None
    assert report["chosen"]["ram_slots"] == 0 and report["chosen"]["link_s"] == 0
    assert report["chosen"]["from_disk"] == pytest.approx(1 - report["chosen"]["in_vram"])


def test_a_context_without_room_is_an_error_with_numbers(memory: Any) -> None:
    memory(200 * MIB)
    assert plan("-c", "2048", "--no-probe").exit_code == 0
    done = plan("-c", "8192")
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
    for words in ("8192 tokens", "180 MiB for its KV cache", "36 MiB for weights", "of which 200 MiB are free"):
        assert words in done.stderr
    fits = re.search(r"largest context that fits is (\d+) tokens", done.stderr)
    assert fits and plan("-c", fits[1], "--no-probe").exit_code == 0
    assert plan("-c", str(int(fits[1]) + 256)).exit_code == 1


def test_run_refuses_such_a_context_before_loading(memory: Any) -> None:
    memory(200 * MIB)
    arguments = ["run", "--gpu", "CPU", "-p", "Hi", "-n", "1"]
    done = CliRunner().invoke(main, [*arguments, "-c", "8192"])
    assert done.exit_code == 1 and "180 MiB for its KV cache" in done.stderr and done.stdout == ""


def test_run_names_device_slots_and_link_and_warns_of_too_few(memory: Any, generated_model: ModelFactory) -> None:
    path = generated_model("llama-q4_0").path
    memory(64 * MIB)
    arguments = ["run", "-m", str(path), "--gpu", "CPU", "-p", "Hi", "-n", "1", "-c", "256", "-t", "1"]
    done = CliRunner().invoke(main, [*arguments, "--ram-budget", "100%"])
    assert done.exit_code == 0, done.stderr
    assert "in memory of CPU over" in done.stderr and "in RAM over disk" in done.stderr
    assert "link 25 GB/s" in done.stderr
    assert "nothing stays there from one token to the next" in done.stderr, "auto leaves 1.2 GiB free"
    done = CliRunner().invoke(main, [*arguments, "--vram-budget", "100%", "--ram-budget", "0", "--json"])
    assert "link 25 GB/s" in json.loads(done.stdout)["engaged"] and "nothing stays" not in done.stderr


def test_the_link_is_measured_once_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def measure(name: str) -> LinkSpeed:
        made.append(name)
        return LinkSpeed(10e9, 1e-6)

    monkeypatch.setattr(link, "measure_link", measure)
    device = devices()[0]
    assert known_link(device) == known_link(device) == LinkSpeed(10e9, 1e-6)
    assert len(made) == 1
    link.link_file(device).write_text('{"key": 1}')
    known_link(device)
    known_link(device, again=True)
    assert len(made) == 3


def test_copies_to_a_real_device() -> None:
    found = measure_link("CPU")
    assert 1e6 < found.bytes_per_s < 1e13 and 0 <= found.latency_s < 1
    with pytest.raises(OSError, match="no device CUDA7"):
        measure_link("CUDA7")


def test_the_real_probe_on_a_wrapped_device(generated_model: ModelFactory) -> None:
    shape = on_device(read_shape(generated_model("llama-q4_0").path), "CPU")
    found = measure_on_gpu(shape, vram.find("CPU"))
    assert found.found_s > 0 and found.move_s >= 0 and found.disk_bytes_per_s > 0
    assert found.resident_s is not None and found.resident_s > 0
    costs = found.costs(shape, LinkSpeed(1e9, 0.0))
    assert costs.move_s > 0 and costs.look_s >= 0


def test_budgets_of_several_gpus_are_added() -> None:
    several = ("plan", "--gpu", "CPU,CPU", "--no-probe", "--json", "--vram-budget")
    for budgets, total in (("20MiB,10MiB", 30 * MIB), ("20MiB, 10485760", 30 * MIB), ("30MiB", 30 * MIB)):
        done = CliRunner().invoke(main, [*several, budgets])
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["chosen"]["vram_bytes"] == total
    done = CliRunner().invoke(main, [*several, "50%,50%"])
    assert json.loads(done.stdout)["chosen"]["budget"] == "50%"
    done = CliRunner().invoke(main, [*several, "50%,20MiB"])
    assert done.exit_code == 1 and "plan takes several GPUs as one" in done.stderr
    done = plan("--vram-budget", "20MiB,20MiB")
    assert done.exit_code == 1 and "vram_budget has 2 sizes for 1 GPU; write one, or one each" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "off", "--ram-limit", "nonsense"], "--ram-limit needs --batch"),
        (["--gpu", "CPU", "--vram-limit", "nonsense"], "--vram-limit needs --batch"),
        (["--gpu", "off", "--prompt-tokens", "5"], "--prompt-tokens needs --batch"),
        (["--gpu", "off", "--answer-tokens", "128"], "--answer-tokens needs --batch"),
        (["--gpu", "off", "--batch", "--vram-limit", "1GiB"], "--vram-limit needs a GPU"),
        (["--gpu", "CPU", "--batch", "--ram-limit", "1GiB"], "--ram-limit needs --gpu off"),
    ],
)
def test_a_limit_that_nobody_would_read_is_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["plan", "--no-probe", *arguments])
    assert done.exit_code == 2 and message in done.stderr
