"""Tests in several workers: one that is marked `alone` meets no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
N = 12
# Each test says when it began and when it ended; a fixture's time counts.
PROGRAM = f"""
import time
from pathlib import Path
import pytest

@pytest.fixture(scope="module", autouse=True)
def slow(worker_id):
    with Path("times").open("a") as file:
        file.write(f"{{time.monotonic()}} ")
        time.sleep(0.1)
        file.write(f"{{time.monotonic()}} fixture {{worker_id}}\\n")

@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.alone] * (n % 3 == 0)) for n in range({N})])
def test_it(number, worker_id):
    began = time.monotonic()
    time.sleep(0.05)
    with Path("times").open("a") as file:
        file.write(f"{{began}} {{time.monotonic()}} {{'alone' if number % 3 == 0 else 'beside'}} {{worker_id}}\\n")
"""


def test_nothing_runs_beside_a_test_that_must_be_alone(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (tmp_path / "test_toy.py").write_text(PROGRAM)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "side_by_side", "-n", "3", "--dist", "load", "test_toy.py"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(TESTS), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and f"{N} passed" in done.stdout, done.stdout + done.stderr
    lines = [line.split() for line in (tmp_path / "times").read_text().splitlines()]
    spans = [(float(began), float(ended), kind, worker) for began, ended, kind, worker in lines]
    workers = {worker for *_, worker in spans}
    assert len(workers) == 3 and len(spans) == N + len(workers)
    for began, ended, kind, worker in spans:
        if kind == "alone":
            assert not [s for s in spans if s[3] != worker and s[0] < ended and s[1] > began]
    assert not list(temporary.glob("pyengine-locks-*")), "the locks are gone"
