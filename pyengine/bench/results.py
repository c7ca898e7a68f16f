"""The folder of one benchmark run: bench.csv (every sample), machine.json (where and how it was taken), plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyengine.bench.samples import Sample, read_samples
from pyengine.bench.sampling import BenchModel
from pyengine.bench.settings import Settings
from pyengine.errors import UsageError

CSV, RECORD = "bench.csv", "machine.json"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the samples, and the record (see record())."""

    folder: Path
    samples: Sequence[Sample]
    record: Mapping[str, Any]


def record(
    machine: Mapping[str, Any],
    settings: Settings,
    models: Sequence[BenchModel],
    *,
    command: str,
    busy: float,
    forced: bool,
) -> dict[str, Any]:
    """What machine.json holds, without what only the end of the run knows (caches, probes).

    Args:
        command: the command line, without folders.
        busy: processors' worth of other programs before the run began.
        forced: whether --force was given.
    """
    asked = asdict(settings) | {"trace": settings.trace.name if settings.trace else None}
    return {
        "command": command,
        "forced": forced,
        "other_cpu_before": busy,
        "settings": asked,
        "models": [_model(model) for model in models],
        "machine": dict(machine),
    }


def _model(model: BenchModel) -> dict[str, Any]:
    facts = model.facts
    known = {name: value for name, value in asdict(facts).items() if name not in ("path", "files")}
    return {
        "name": facts.path.name,
        **known,
        "other_bytes": facts.other_bytes,
        "record_bytes": facts.record_bytes,
        "matrix_bytes": facts.matrix_bytes,
        "bundle_bytes": model.bundle.stat().st_size if model.bundle else None,
    }


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Write machine.json. Raises OSError."""
    (folder / RECORD).write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")


def read_run(folder: Path) -> Run:
    """A run from its folder.

    Raises:
        OSError: a file is missing or cannot be read.
        UsageError: a file is not as a benchmark writes it, or there is no sample in it.
    """
    samples = read_samples(folder / CSV)
    if not samples:
        raise UsageError(f"{folder / CSV} holds no samples")
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        content["machine"], content["settings"], content["models"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / RECORD} is no record of a benchmark") from error
    return Run(folder, samples, content)
