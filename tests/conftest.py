"""What all rooms share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from side_by_side import pytest_configure, pytest_configure_node, pytest_runtest_protocol, pytest_unconfigure

__all__ = ["pytest_configure", "pytest_configure_node", "pytest_runtest_protocol", "pytest_unconfigure"]

# Kernels spin at barriers by default: two threads on a busy machine of two cores then take seconds for a token. It must
# be set before the first of them loads OpenMP; child processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True, scope="session")
def cache_folder() -> Iterator[None]:
    """A cache folder of the tests' own: what a user keeps about models (bundles, traces, measurements) must change no
    result. What builds have fetched stays in reach. And what one test leaves about the bundled model must not warm the
    next one's start: where profiles would be kept there is a file."""
    before = os.environ.get("XDG_CACHE_HOME")
    theirs = Path(before or Path.home() / ".cache") / "pyengine"
    ours = Path(tempfile.mkdtemp(prefix="pyengine-tests-"))
    (ours / "pyengine").mkdir()
    for name in ("headers", "model-sources", "wheels"):
        (theirs / name).mkdir(parents=True, exist_ok=True)
        (ours / "pyengine" / name).symlink_to(theirs / name)
    (ours / "pyengine" / "profiles").touch()
    os.environ["XDG_CACHE_HOME"] = str(ours)
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
    shutil.rmtree(ours, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--grid",
        choices=("small", "full"),
        default="small",
        help="generated models that the exactness tests run over: every architecture once and every type once, or all "
        "architectures with all types",
    )
