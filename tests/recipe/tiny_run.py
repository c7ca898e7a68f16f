"""A training run on the tiny base: its configuration and its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from smolmoe.config import DistilConfig, ExpertLayout, LayerwiseConfig, TrainConfig, UpcycleConfig
from smolmoe.corpus_files import TRAINING_STREAM, held_out_file

LAYOUT = ExpertLayout(n_expert=4, n_used=2, width=64)
CONFIG = dataclasses.replace(
    TrainConfig.smoke(),
    rows=4,
    length=32,
    held_out_rows=4,
    figure_windows=4,
    experts=LAYOUT,
    upcycle=UpcycleConfig(calibration_rows=24, cluster_tokens=500),
    layerwise=LayerwiseConfig(seconds=2.0),
    distil=DistilConfig(seconds=4.0, warmup_steps=10),
)


def write_data(folder: Path) -> None:
    """Write generated rows and a corpus, both of random tokens; the rows' tokens are unlike the corpus's."""
    rng = np.random.default_rng(11)
    np.save(folder / "generated.npy", rng.integers(0, 4000, (120, 16)).astype(np.uint16))
    np.save(folder / TRAINING_STREAM, rng.integers(4000, 8000, 4000).astype(np.uint16))
    for name in ("docs", "kjv", "gpl"):
        np.save(folder / held_out_file(name), rng.integers(0, 8000, 300).astype(np.uint16))
