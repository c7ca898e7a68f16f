"""What a scheduler has llama.cpp do, recorded, so that stock llama.cpp can do just the same in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from pyengine import Llama

Logits = npt.NDArray[np.float32]


def batch_of(raw: Any) -> list[list[int]]:
    """Of a llama_batch: [token, position, sequence, whether it is an output] for each of its tokens."""
    return [
        [raw.token[i], raw.pos[i], raw.seq_id[i][0], int(raw.logits[i] != 0)]  #
        for i in range(raw.n_tokens)
    ]


def outputs(context: Any, batch: list[list[int]], n_vocab: int) -> list[Logits]:
    """Logits of a batch that was just computed."""
    rows = [row for row, (*_, output) in enumerate(batch) if output]
    return [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (n_vocab,)).copy()  #
        for row in rows
    ]


class Tape:
    """Records from its construction on, until the test's monkeypatch is undone.

    Attributes:
        steps: what was done: ["decode", batch], ["copy", *arguments], ["remove", *arguments].
        logits: of every output of every batch.
    """

    def __init__(self, llama: Llama, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[Any]] = []
        self.logits: list[Logits] = []
        self._llama = llama
        decode = llama._ctx.decode

        def recorded(batch: Any) -> None:
            decode(batch)
            taken = batch_of(batch.batch)
            self.steps.append(["decode", taken])
            self.logits += outputs(llama.ctx, taken, llama.n_vocab())

        patch.setattr(llama._ctx, "decode", recorded)
        for name, function in (("copy", "llama_memory_seq_cp"), ("remove", "llama_memory_seq_rm")):
            patch.setattr(llama_cpp, function, self._noted(name, getattr(llama_cpp, function)))

    def _noted(self, name: str, function: Any) -> Any:
        def noted(memory: Any, *arguments: int) -> Any:
            self.steps.append([name, *arguments])
            return function(memory, *arguments)

        return noted

    @property
    def batches(self) -> list[list[list[int]]]:
        return [step[1] for step in self.steps if step[0] == "decode"]

    def replayed_by_stock(self, folder: Path, **options: Any) -> list[Logits]:
        """The logits that stock llama.cpp has for the same steps; `options` as the model was opened with."""
        job = {"model": self._llama.model_path, "options": options, "steps": self.steps, "out": str(folder / "l.npy")}
        subprocess.run(
            [sys.executable, "-m", f"{__package__}.stock_replay"],
            cwd=Path(__file__).parents[1],
            input=json.dumps(job),
            text=True,
            check=True,
        )
        return list(np.load(job["out"]))


def nmse(got: Logits, wanted: Logits) -> float:
    """Mean square of the error over mean square of what is wanted."""
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def assert_same_bits(got: Logits, wanted: Logits) -> None:
    assert got.shape == wanted.shape
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32)), f"NMSE {nmse(got, wanted):.2g}"
