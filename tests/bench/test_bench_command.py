"""`pyengine bench` from the outside."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from pyengine import bundled_model
from pyengine.bench import run as bench_run
from pyengine.bench.run import bytes_per_second
from pyengine.bench.widened import require_space, widened_model
from pyengine.cli import main
from pyengine.errors import UsageError

TINY = ["--tokens", "3", "--prompts", "1", "--prompt-tokens", "16", "--rounds", "1", "--no-plots", "--force"]


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], prog_name="pyengine")


def test_rows_are_listed():
    done = invoke("--rows", "help")
    assert done.exit_code == 0
    assert "stock-mmap-plain" in done.stdout and "on-demand" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "fast"], "there is no row 'fast'"),
        (["--rows", "lru", "--budgets", "0.01"], "is below the least that"),
        (["--rows", "lru", "--disk-limit", "fast"], "a disk limit of 'fast' is not understood"),
        (["-m", "missing.gguf"], "missing.gguf"),
        (["--widened", "8"], "has 64 neurons per expert already"),
        (["--rows", "lru", "--trace", "missing.npz"], "missing.npz: No such file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    done = invoke(*arguments, *TINY, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budgets", ["a", "25,,50", ""])
def test_budgets_that_are_no_numbers(budgets):
    done = invoke("--budgets", budgets)
    assert done.exit_code == 2
    assert "is not a list of numbers" in done.stderr


def test_a_busy_machine_is_refused_without_force(tmp_path, monkeypatch):
    def busy():
        raise UsageError("the machine is busy")

    monkeypatch.setattr(bench_run.quiet, "refuse_busy_machine", busy)
    done = invoke("--rows", "lru", *[a for a in TINY if a != "--force"], "--out", tmp_path / "out")
    assert (done.exit_code, done.stderr) == (1, "pyengine: error: the machine is busy\n")


def test_a_small_run_writes_samples_record_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run.quiet, "_DROP", tmp_path / "no such folder" / "drop_caches")  # spare the neighbours
    out, page = tmp_path / "out", tmp_path / "docs" / "page.md"
    rows = ["--rows", "stock-resident,lru", "--budgets", "20%,100"]
    done = invoke("-m", bundled_model(), *rows, *TINY, "--out", out, "--report", page, "--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [row["row"] for row in summary["rows"]] == ["stock-resident", "lru 20%", "lru 100%"]
    assert all(row["exact"] == "yes" and row["statuses"] == {"ok": 1} for row in summary["rows"])
    assert summary["faults"] == []
    assert summary["forced"] is True
    with (out / "bench.csv").open() as file:
        samples = list(csv.DictReader(file))
    assert len(samples) == 3
    assert len({sample["text"] for sample in samples}) == 1
    record = json.loads((out / "machine.json").read_text())
    assert record["caches"] == "posix_fadvise"
    assert len(record["probes"]) == 2
    assert str(tmp_path) not in (out / "machine.json").read_text()
    assert "| lru 20% |" in page.read_text()


def test_interrupt_keeps_the_samples_and_leaves_no_process(tmp_path):
    out = tmp_path / "out"
    rows = ["--rows", "stock-resident,lru", "--budgets", "50,100", "--rounds", "50"]
    # A shell's background job ignores SIGINT, and what it starts inherits that.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import pathlib, sys; from pyengine.bench import quiet; quiet._DROP = pathlib.Path('/no such folder/drop'); "
        "sys.argv[0] = 'pyengine'; from pyengine.__main__ import entry; entry()"
    )
    command = [sys.executable, "-c", script, "bench", *TINY, *rows, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        _wait_for(lambda: (out / "bench.csv").is_file() and len((out / "bench.csv").read_text().splitlines()) > 1)
        _wait_for(lambda: psutil.Process(process.pid).children(recursive=True))
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert len((out / "bench.csv").read_text().splitlines()) > 1
    assert json.loads((out / "machine.json").read_text())["settings"]["rounds"] == 50
    assert not list(Path("/sys/fs/cgroup").glob(f"**/pyengine-bench-{process.pid}-*"))


def _wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_speeds_as_people_write_them():
    assert [bytes_per_second(text) for text in ("200M", "1.5g", "80kB/s", "12345")] == [
        200_000_000,
        1_500_000_000,
        80_000,
        12345,
    ]
    for text in ("", "fast", "-1M", "0", "200T"):
        with pytest.raises(UsageError, match="not understood"):
            bytes_per_second(text)


def test_a_widened_model_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"smolmoe-ff640000000\.gguf needs .* GB .*XDG_CACHE_HOME"):
        widened_model(640_000_000, print)
    with pytest.raises(UsageError, match="make room"):
        require_space(tmp_path / "big", 10**18)
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_widened_model_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []
    path = widened_model(96, said.append)
    assert path.stat().st_size > bundled_model().stat().st_size
    assert len(said) == 1
    before = path.stat().st_mtime_ns
    assert widened_model(96, said.append) == path
    assert (len(said), path.stat().st_mtime_ns) == (1, before)
