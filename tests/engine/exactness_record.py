"""What the exactness tests found, model by model: docs/architectures.md is made from it.

With the environment variable EXACTNESS_RECORD=FILE a run of tests/engine writes FILE (JSON): for each model of the grid
its architecture, what is special about it, its expert types, and the outcome of each case.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypedDict

from models.architectures import ARCHITECTURES
from models.generator import plan_model
from models.grid import FULL

VARIABLE = "EXACTNESS_RECORD"
_NOT_SIZES = ("seed", "split", "alignment", "shuffle")


class ModelRecord(TypedDict):
    """features: how the experts are stored. outcomes: case -> passed, failed or skipped."""

    architecture: str
    features: list[str]
    expert_types: list[str]
    outcomes: dict[str, str]


class ExactnessRecord:
    """Collects outcomes in one run of pytest."""

    def __init__(self) -> None:
        self._models: dict[str, ModelRecord] = {}

    def note(self, model_id: str, case: str, outcome: str) -> None:
        """Note one test's outcome: of the grid's model of that id, under that budget."""
        self._models.setdefault(model_id, _describe(model_id))["outcomes"][case] = outcome

    def write(self, path: Path) -> None:
        """Write all that was noted."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._models, indent=1) + "\n")


def wanted_at() -> Path | None:
    """Where a record is to be written, if anywhere."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else None


def _describe(model_id: str) -> ModelRecord:
    entry = FULL[model_id]
    arch = ARCHITECTURES[entry["arch"]]
    plan = plan_model(**{name: value for name, value in entry.items() if name not in _NOT_SIZES})
    experts = {spec.name: plan.types[spec.name] for spec in plan.tensors if spec.role == "expert"}
    features = {
        "gate and up in one tensor": any("gate_up" in name for name in experts),
        "no gate": not any("gate" in name for name in experts),
        "biases": arch.layout.bias,
        "scales": bool(entry.get("expert_scales")),
        "shared experts": arch.shared != "none",
        "dense first blocks": arch.dense_lead > 0,
        "latent experts": arch.latent,
        "blocks of different widths": len({s.shape for s in plan.tensors if ".ffn_up_exps.weight" in s.name}) > 1,
        "blocks chosen by token": arch.n_hashed > 0,
        "blocks for multi-token prediction": bool(entry.get("n_mtp")),
        "split file": bool(entry.get("split")),
    }
    return {
        "architecture": arch.name,
        "features": [name for name, has in features.items() if has],
        "expert_types": sorted(set(experts.values())),
        "outcomes": {},
    }
