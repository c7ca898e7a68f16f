"""What all rooms share."""

from __future__ import annotations

import os

import pytest

# Kernels spin at barriers by default: two threads on a busy machine of two cores then take seconds for a token. It must
# be set before the first of them loads OpenMP; child processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--grid",
        choices=("small", "full"),
        default="small",
        help="generated models that the exactness tests run over: every architecture once and every type once, or all "
        "architectures with all types",
    )
