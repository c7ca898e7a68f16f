"""Batches of rows that the dense model wrote and of real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .config import TrainConfig
from .corpus_files import TRAINING_STREAM, held_out_file

_HELD_OUT_SETS = ("docs", "kjv", "gpl")


class TrainingData:
    """All tokens live on the training device; rows are int64 [n, length]."""

    def __init__(self, generated: Path, corpus: Path, config: TrainConfig, device: torch.device) -> None:
        """Read the data.

        Args:
            generated: rows that the dense model wrote, uint16 [n, their length]; several short ones make one row.
            corpus: the corpus's folder.
            config: sizes, shares and seeds.
            device: the training device.

        Raises:
            ValueError: there are too few generated rows.
        """
        self._device = device
        self._length = config.length
        self._corpus = corpus
        self._windows = config.figure_windows
        self._generator = torch.Generator().manual_seed(config.data_seed)

        written = np.load(generated)
        per_row = config.length // written.shape[1]
        if per_row == 0:
            raise ValueError(f"{generated}: rows of {written.shape[1]} tokens are longer than {config.length}")
        rows = written[: len(written) // per_row * per_row].reshape(-1, per_row * written.shape[1])
        self._n_real = max(1, round(config.rows * config.real_share))
        self._n_generated = config.rows - self._n_real
        if len(rows) < config.held_out_rows + self._n_generated:
            raise ValueError(f"{generated}: {len(rows)} rows of {config.length} tokens are too few")
        self._held_out_chats = torch.from_numpy(rows[-config.held_out_rows :].astype(np.int64)).to(device)
        self._generated = torch.from_numpy(rows[: -config.held_out_rows].astype(np.int32)).to(device)
        self._real = torch.from_numpy(np.load(corpus / TRAINING_STREAM).astype(np.int32)).to(device)
        self._shuffle()

    def __str__(self) -> str:
        return (
            f"{self._generated.numel() / 1e6:.1f} M generated and {self._real.numel() / 1e6:.1f} M real tokens; "
            f"batches of {self._n_generated} + {self._n_real} rows of {self._length}"
        )

    def next_batch(self) -> Tensor:
        """The next training batch; every generated row is used once before any is used again."""
        if self._cursor + self._n_generated > len(self._order):
            self._shuffle()
        chosen = self._order[self._cursor : self._cursor + self._n_generated]
        self._cursor += self._n_generated
        return torch.cat([self._generated[chosen.to(self._device)].long(), self._real_rows(self._n_real)])

    def calibration_rows(self, n_generated: int, n_real: int) -> Tensor:
        """A random sample of rows."""
        chosen = torch.randperm(len(self._generated), generator=self._generator)[:n_generated]
        return torch.cat([self._generated[chosen.to(self._device)].long(), self._real_rows(n_real)])

    def evaluation_sets(self) -> dict[str, Tensor]:
        """Held-out windows by the name of their set: chats, and evenly spaced pieces of real text."""
        sets = {"chat": self._held_out_chats}
        for name in _HELD_OUT_SETS:
            tokens = np.load(self._corpus / held_out_file(name)).astype(np.int64)
            n = min(self._windows, len(tokens) // self._length)
            stride = max(self._length, (len(tokens) - self._length) // n)
            windows = np.stack([tokens[i * stride : i * stride + self._length] for i in range(n)])
            sets[name] = torch.from_numpy(windows).to(self._device)
        return sets

    def _shuffle(self) -> None:
        self._order = torch.randperm(len(self._generated), generator=self._generator)
        self._cursor = 0

    def _real_rows(self, n: int) -> Tensor:
        starts = torch.randint(0, len(self._real) - self._length, (n,), generator=self._generator).to(self._device)
        return self._real[starts[:, None] + torch.arange(self._length, device=self._device)].long()
