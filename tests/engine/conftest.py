"""Models of the grid, stock llama.cpp to compare with, and the record of what was exact."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from models.facts import ModelFacts
from models.fixtures import ModelFactory, generated_model
from models.grid import FULL, SMALL

from .exactness_record import ExactnessRecord, wanted_at
from .reference import StockProcess

__all__ = ["generated_model"]

_RECORD = ExactnessRecord()
_COMPARED = "compared with stock"  # a property of reports: the model's id and the case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "grid_model" in metafunc.fixturenames:
        grid = FULL if metafunc.config.getoption("--grid") == "full" else SMALL
        metafunc.parametrize("grid_model", grid, indirect=True, scope="session")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    finished = report.when == "call" or report.outcome != "passed"
    if finished and isinstance(item, pytest.Function) and item.originalname == "test_same_bits_as_stock":
        chosen = item.callspec.params
        report.user_properties.append((_COMPARED, [str(chosen["grid_model"]), str(chosen["case"])]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Where tests run in workers, their reports come to the process that started these."""
    for name, value in report.user_properties:
        if name == _COMPARED:
            model_id, case = value
            _RECORD.note(model_id, case, report.outcome)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (path := wanted_at()) and not hasattr(session.config, "workerinput"):
        _RECORD.write(path)


@pytest.fixture(scope="session")
def grid_model(request: pytest.FixtureRequest, generated_model: ModelFactory) -> ModelFacts:
    """Each model of the grid in turn."""
    return generated_model(request.param)


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockProcess]:
    """Stock llama.cpp in a process that never loads pyengine."""
    with StockProcess(tmp_path_factory.mktemp("stock")) as process:
        yield process


@pytest.fixture(scope="session")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faulty_disk.c as a library to preload."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the faulty disk with")
    library = tmp_path_factory.mktemp("faulty_disk") / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", source, "-o", library], check=True)
    return library
