"""Batches, and what is kept out of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_run import CONFIG, write_data

pytest.importorskip("torch")

import torch
from smolmoe.training_data import TrainingData

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture
def data(data_folder: Path) -> TrainingData:
    return TrainingData(data_folder / "generated.npy", data_folder, CONFIG, CPU)


def test_batches(data: TrainingData) -> None:
    batches = [data.next_batch() for _ in range(18)]
    assert all(batch.shape == (4, 32) for batch in batches)
    generated = torch.cat([batch[:3] for batch in batches])
    assert all((batch[:3] < 4000).all() and (batch[3:] >= 4000).all() for batch in batches)
    # 120 rows of 16 make 60 of 32; 4 are held out; 18 batches of 3 are less than one pass over the other 56
    assert len(set(map(tuple, generated.tolist()))) == 54


def test_held_out_rows_are_never_trained_on(data: TrainingData) -> None:
    held_out = set(map(tuple, data.evaluation_sets()["chat"].tolist()))
    assert len(held_out) == CONFIG.held_out_rows
    for _ in range(60):
        assert not held_out & set(map(tuple, data.next_batch().tolist()))
    assert not held_out & set(map(tuple, data.calibration_rows(56, 1).tolist()))


def test_too_few_rows(data_folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.zeros((8, 16), np.uint16))
    with pytest.raises(ValueError, match="too few"):
        TrainingData(tmp_path / "few.npy", data_folder, CONFIG, CPU)
