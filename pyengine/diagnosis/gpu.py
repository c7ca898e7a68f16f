"""The GPU: whether this llama.cpp can use one that is there, how it is connected, and who else has its memory."""

from __future__ import annotations

from pyengine.cli.output import format_bytes
from pyengine.diagnosis.finding import Finding, note, ok, slow
from pyengine.diagnosis.patient import Patient
from pyengine.startup import rebuild_command

#: A link below this is not what a graphics slot gives: PCIe 4 with 4 lanes, PCIe 3 with 8; bytes/s.
_SLOW_LINK = 8e9
#: Of a GPU's memory, what its own driver and this process's context may take.
_MOST_TAKEN = 0.08

#: PCI vendor: (who, the option of ggml that makes use of it).
_VENDORS = {"0x10de": ("NVIDIA", "CUDA"), "0x1002": ("AMD", "HIP"), "0x8086": ("Intel", "VULKAN")}
#: PCI classes of display and 3D controllers begin so.
_DISPLAY = ("0x0300", "0x0302", "0x0380")


def gpu(patient: Patient) -> Finding:
    devices = [device for device in patient.devices() if device.gpu]
    if not devices:
        return _unused(patient)
    found, remedies = [], []
    for device in devices:
        words = f"{device.name} ({device.description}), {format_bytes(device.free_bytes)} free"
        taken = device.total_bytes - device.free_bytes
        if not device.unified and taken > _MOST_TAKEN * device.total_bytes:
            words += f" of {format_bytes(device.total_bytes)}: other programs have {format_bytes(taken)}"
            remedies.append("end the programs that nvidia-smi, or your GPU's tool, lists: they take slots")
        if device.unified:
            words += ", unified memory: nothing is moved to it"
        else:
            link = patient.link(device)
            if link is not None:
                words += f", link {link.bytes_per_s / 1e9:.3g} GB/s"
                if link.bytes_per_s < _SLOW_LINK:
                    words += f", slow{_lanes(patient)}"
                    remedies.append("put the card into the slot with most lanes; see also its BIOS settings")
        found.append(words)
    text = "; ".join(found)
    return slow(text, "; ".join(dict.fromkeys(remedies))) if remedies else ok(text)


def _unused(patient: Patient) -> Finding:
    present = _present(patient)
    if present is None:
        return ok("none")
    vendor, option = present
    if patient.built_for_gpu():
        return slow(
            f"a GPU of {vendor} is there, and llama.cpp was built for GPUs but finds none: experts stay in RAM",
            "see that its driver is loaded (nvidia-smi, rocm-smi or vulkaninfo) and may be used by this user",
        )
    certain = vendor == "NVIDIA"
    say = slow if certain else note  # others are often part of the processor, and no faster than it
    return say(
        f"a GPU of {vendor} is there, and llama.cpp was built without one: experts stay in RAM",
        rebuild_command().replace('CMAKE_ARGS="', f'CMAKE_ARGS="-DGGML_{option}=on ', 1),
    )


def _present(patient: Patient) -> tuple[str, str] | None:
    """(vendor, option of ggml) of a GPU that the system knows; discrete ones first."""
    found = []
    for folder in sorted((patient.sys / "bus/pci/devices").glob("*")):
        if (patient.read(folder / "class") or "").startswith(_DISPLAY):
            found.append(patient.read(folder / "vendor") or "")
    if list(patient.dev.glob("nvidia[0-9]*")):
        found.append("0x10de")
    if (patient.dev / "kfd").exists():
        found.append("0x1002")
    return next((words for vendor, words in _VENDORS.items() if vendor in found), None)


def _lanes(patient: Patient) -> str:
    """How many of its lanes a GPU is connected with, if it is fewer than it has."""
    for folder in sorted((patient.sys / "bus/pci/devices").glob("*")):
        if not (patient.read(folder / "class") or "").startswith(_DISPLAY):
            continue
        now, most = (patient.read(folder / f"{name}_link_width") or "" for name in ("current", "max"))
        if now.isdigit() and most.isdigit() and 0 < int(now) < int(most):
            return f": {now} of its {most} PCIe lanes"
    return " for a graphics slot: fewer PCIe lanes, or an older PCIe"
