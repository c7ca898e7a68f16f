"""Disks: where experts are read from, and where caches are written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pyengine.cli.output import format_bytes
from pyengine.diagnosis.finding import Finding, fail, note, ok, slow
from pyengine.diagnosis.patient import Patient
from pyengine.planning.disk import can_read_directly, measure_disk

_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "fuse.sshfs", "fuse.rclone", "afs", "glusterfs", "virtiofs")
#: Random reads of whole experts below this are the bottleneck of every model, bytes/s.
_SLOW_DISK = 300e6
_RECORD = 1 << 20
_SECONDS = 0.4
_LOCAL = "copy the model to a local disk with a usual file system (ext4, xfs)"


def direct_reads(patient: Patient) -> Finding:
    if not patient.model.is_file():
        return note("no model to look at")
    if not can_read_directly([patient.model]):
        kind = patient.mount(patient.model)
        where = f" on {kind[0]}" if kind else ""
        return slow(f"no direct reads{where}: experts also fill the page cache, and are copied", _LOCAL)
    return ok("possible: experts are read past the page cache")


def file_system(patient: Patient) -> Finding:
    found = patient.mount(patient.model)
    if found is None:
        return ok("unknown")
    kind, device = found
    if kind in _NETWORK or kind.startswith("fuse.") or kind == "fuse":
        return slow(f"the model lies on {kind}: every miss may cross a network", _LOCAL)
    if kind in ("tmpfs", "ramfs"):
        return note(f"the model lies on {kind}, in memory: it takes the memory its experts could have", _LOCAL)
    block = patient.sys / "dev/block" / device
    if {"virtual", "xen"} & set(block.resolve().parts) or any("virtio" in part for part in block.resolve().parts):
        return ok(f"{kind} on a virtual disk")  # which calls itself rotating whatever it is
    for folder in (block / "queue", block.resolve().parent / "queue"):  # of the disk, or of the partition's disk
        if patient.read(folder / "rotational") == "1":
            return slow(f"{kind} on a rotating disk: a miss takes milliseconds", "copy the model to an SSD")
    return ok(kind)


def disk_speed(patient: Patient) -> Finding:
    shape = patient.shape
    record = int(shape.expert_bytes) if shape is not None else _RECORD
    try:
        speed = measure_disk(patient.model, record, _SECONDS)
    except OSError as error:
        return note(f"not measured: {error.strerror or error}")
    found = (
        f"{speed.bytes_per_s / 1e6:.0f} MB/s in random reads of {format_bytes(speed.record_bytes)}, "
        f"{1e3 * speed.latency_s:.2g} ms for one alone"
    )
    if speed.bytes_per_s < _SLOW_DISK:
        return slow(found, "use a faster disk, a larger --ram-budget, or a bundle (gguf_tools bundle)")
    return ok(found)


def bundle(patient: Patient) -> Finding:
    if patient.shape is None:
        return ok("no model that could have one")
    from pyengine.bundles import candidates  # needs the native part, which the model's check has found to work

    for path in candidates(patient.model):
        if path.is_file():
            return ok(f"{path.name}")
    needed = patient.shape.info.slot_bytes
    if shutil.disk_usage(patient.model.parent).free < needed:
        return note(f"none, and no room for its {format_bytes(needed)} beside the model")
    return note("none: a miss takes several reads and is repacked", f"gguf_tools bundle {patient.model.name}")


def cache_folder(patient: Patient) -> Finding:
    folder = patient.cache
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        return slow(
            f"{folder} cannot be written: measurements and traces are not kept",
            "set XDG_CACHE_HOME to a folder of yours",
        )
    free = shutil.disk_usage(existing).free
    if free < _RECORD:
        return fail(f"no space left on the disk of {folder}", "delete something there")
    return ok(f"{folder}, {format_bytes(free)} free")
