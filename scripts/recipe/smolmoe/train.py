"""Step 4: the dense model becomes a mixture of experts and learns from the dense model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from .checkpoint import save_tensors
from .config import TrainConfig
from .dense import load_dense
from .distil import Student, distil
from .layerwise import train_layerwise
from .measure import measure
from .mixture import MoeModel
from .teacher import Teacher
from .training_data import TrainingData
from .upcycle import upcycle

_log = logging.getLogger(__name__)


def train(base: Path, generated: Path, corpus: Path, out: Path, config: TrainConfig) -> None:
    """Run all stages; write the weights to `out`/weights.npz and the figures to `out`/figures.json.

    The weights are float32 under their GGUF names, ready for `export`.

    Args:
        base: GGUF of the dense model.
        generated: rows that the dense model wrote, from `generate`.
        corpus: folder that `corpus` wrote.
        out: created if absent.
        config: everything else.

    Raises:
        ValueError: the base or the data do not fit the configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    data = TrainingData(generated, corpus, config, device)
    _log.info("data: %s", data)
    teacher = Teacher(load_dense(base, device), config.length, config.compiled)

    torch.set_float32_matmul_precision("highest")  # the least-squares systems need it
    layers = upcycle(teacher, data, config)
    torch.set_float32_matmul_precision("high")
    train_layerwise(layers, teacher, data, config)
    dense = teacher.dense
    model = MoeModel(dense.shape, config.experts, dense.embedding.clone(), dense.output_norm.clone(), layers)
    student = Student(model, teacher.rope, config.compiled)
    distil(student, teacher, data, config)

    save_tensors(out / "weights.npz", model.tensors())
    figures = measure(student, teacher, data.evaluation_sets())
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    _log.info("weights and figures are in %s", out)
