"""The table of checks, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyengine.diagnosis import gpu, machine, memory, software, storage
from pyengine.diagnosis.finding import Finding
from pyengine.diagnosis.patient import Patient

Check = Callable[[Patient], Finding]

CHECKS: dict[str, Check] = {
    "llama.cpp": software.versions,
    "AMX": software.amx,
    "model": software.model,
    "memory": memory.memory,
    "address limit": memory.address_limit,
    "swap": memory.swap,
    "GPU": gpu.gpu,
    "huge pages": machine.huge_pages,
    "cores": machine.cores,
    "governor": machine.governor,
    "OpenMP": machine.openmp,
    "load": machine.busy,
    "direct reads": storage.direct_reads,
    "file system": storage.file_system,
    "disk": storage.disk_speed,
    "bundle": storage.bundle,
    "cache": storage.cache_folder,
}


def examine(patient: Patient) -> Iterator[tuple[str, Finding]]:
    """(name, finding) of every check, as it is made."""
    for name, check in CHECKS.items():
        yield name, check(patient)
