"""The dense model writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from smolmoe.config import ChatTokens, GenerateConfig
from smolmoe.prompts import ASSISTANT, CHAT, FREE, PLAIN_TEXT, USER, Prompts

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from smolmoe import generate
from torch import Tensor


def test_generate_in_the_interpreter(tiny_base: Path, recipe_folder: Path, tmp_path: Path) -> None:
    """The Triton kernels agree with the plain forward pass."""
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


class ScriptedDraw:
    """In the place of the sampling kernel: draws the given tokens, one list per step, and records temperatures."""

    def __init__(self, script: list[list[int]]) -> None:
        self._script = iter(script)
        self.temperatures: list[list[float]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> ScriptedDraw:
        return self

    def __call__(
        self, logits: Tensor, temperature: Tensor, banned: Tensor, seed: Tensor, out: Tensor, **_: Any
    ) -> None:
        self.temperatures.append(temperature.tolist())
        out.copy_(torch.tensor(next(self._script)))


def test_turns_of_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatTokens()
    end = chat.im_end
    # what is drawn where a token is forced, or where plain text ends a turn, means nothing
    drawn = [9, 50, end, *[end] * len(chat.open_assistant), 60, 61, end, 9, 9]
    expected_chat = [1, 300, 50, end, *chat.open_assistant, 60, 61, end, *chat.open_user[:2]]
    expected_text = [0, *drawn]
    draw = ScriptedDraw([[token, token] for token in drawn])
    decoder = SimpleNamespace(logits=lambda token, position: torch.zeros(2, 8))
    monkeypatch.setattr(generate, "kernels", SimpleNamespace(draw_token=draw))
    monkeypatch.setattr(generate, "LockstepDecoder", lambda *_: decoder)
    monkeypatch.setattr(generate, "decoding_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(generate, "INTERPRETED", True)

    prefix = np.array([[1, 300], [0, FREE]], np.int32)
    kind, role = np.array([CHAT, PLAIN_TEXT], np.int8), np.array([USER, ASSISTANT], np.int8)
    prompts = Prompts(prefix, kind, role, np.array([0.8, 0.9], np.float32))
    writer = generate.LockstepWriter(SimpleNamespace(), GenerateConfig(rows=2, length=len(drawn) + 1))
    written = writer.write(prompts, np.arange(2), seed=1)

    assert written.tolist() == [expected_chat, expected_text]
    of_chat, of_text = zip(*draw.temperatures, strict=True)
    assistant = len(chat.open_assistant) + 3
    assert of_chat == pytest.approx([1.0] * 3 + [0.8] * assistant + [1.0] * 2)
    assert of_text == pytest.approx([0.9] * len(drawn))


def test_distinct_trigrams() -> None:
    rows = torch.tensor([list(range(12)), [7] * 12, [1, 2, 3] * 4])
    # of the 9 pairs of neighbours in a sorted list of 10 trigrams, those that differ
    assert generate.distinct_trigrams(rows).tolist() == pytest.approx([1.0, 0.0, 2 / 9])
