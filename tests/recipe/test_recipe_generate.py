"""The dense model writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from smolmoe.prompts import ASSISTANT, CHAT, FREE, PLAIN_TEXT, USER, Prompts

pytest.importorskip("torch")
pytest.importorskip("triton")


def test_generate_in_the_interpreter(tiny_base: Path, recipe_folder: Path, tmp_path: Path) -> None:
    """The Triton kernels agree with the plain forward pass, and chats change turns as they should."""
    rows, length, prefix_length = 2, 24, 4
    prefix = np.full((rows, prefix_length), FREE, np.int32)
    prefix[0] = (1, 300, 301, 302)
    prefix[1, :2] = (0, 303)
    kind, role = np.array([CHAT, PLAIN_TEXT], np.int8), np.array([USER, ASSISTANT], np.int8)
    prompts = Prompts(prefix, kind, role, np.full(rows, 0.9, np.float32))
    prompts.save(tmp_path / "prompts.npz")
    arguments = [tiny_base, tmp_path / "prompts.npz", tmp_path / "out.npy"]
    options = ["--rows", str(rows), "--length", str(length), "--rounds", "1", "--check"]
    done = subprocess.run(
        [sys.executable, "-m", "smolmoe", "generate", *arguments, *options],
        cwd=recipe_folder, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "relative error" in done.stdout
    written = np.load(tmp_path / "out.npy")
    assert written.shape == (rows, length) and written.dtype == np.uint16
    np.testing.assert_array_equal(written[0, :4], prefix[0])
    np.testing.assert_array_equal(written[1, :2], prefix[1, :2])
    assert 1 not in written[0, 4:] and 1 not in written[1] and 2 not in written[1]
