"""Processor, scheduler and environment."""

from __future__ import annotations

from pyengine.diagnosis.finding import Finding, note, ok, slow
from pyengine.diagnosis.patient import Patient

#: Frequency drivers whose "powersave" follows the load.
_ADAPTIVE = ("intel_pstate", "amd-pstate-epp")
#: Runnable processes per core, over the last minute, from which measurements and speeds suffer.
_BUSY = 0.5


def cores(patient: Patient) -> Finding:
    allowed = patient.allowed_cores()
    quota = _quota(patient)
    if quota is not None and quota < allowed - 0.05:
        threads = max(1, int(quota))
        return slow(
            f"{allowed} cores, but a quota of {quota:.2g}: threads wait for each other's turn",
            f"raise the CPU limit of the container, or run with --threads {threads}",
        )
    if allowed < 2:
        return slow("one core: loading and computing take turns", "give the process more cores (taskset, container)")
    return ok(f"{allowed} cores")


def _quota(patient: Patient) -> float | None:
    """Cores' worth of time the control groups allow; None without a limit."""
    least: float | None = None
    for folder in patient.control_groups():
        two = (patient.read(folder / "cpu.max") or "").split()
        one = [patient.read(folder / "cpu.cfs_quota_us"), patient.read(folder / "cpu.cfs_period_us")]
        words = two if len(two) == 2 else [word for word in one if word is not None]
        if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
            continue  # "max", or -1: no limit here
        quota = int(words[0]) / int(words[1])
        least = quota if least is None else min(least, quota)
    return least


def governor(patient: Patient) -> Finding:
    folder = patient.sys / "devices/system/cpu"
    found = sorted(folder.glob("cpu[0-9]*/cpufreq/scaling_governor")) if folder.is_dir() else []
    names = {patient.read(path) or "" for path in found}
    if not names:
        return ok("the processor's frequency is not ours to see (virtual machine)")
    driver = patient.read(found[0].with_name("scaling_driver")) or ""
    if "powersave" in names and driver not in _ADAPTIVE:
        return slow("powersave: the processor stays at its lowest frequency", "cpupower frequency-set -g performance")
    if names & {"powersave", "conservative"}:
        return note(
            f"{', '.join(sorted(names))} ({driver}): frequency follows the load with a delay",
            "cpupower frequency-set -g performance",
        )
    return ok(", ".join(sorted(names)))


def busy(patient: Patient) -> Finding:
    words = (patient.read(patient.proc / "loadavg") or "").split()
    try:
        load = float(words[0])
    except (IndexError, ValueError):
        return ok("load unknown")
    per_core = load / patient.allowed_cores()
    if per_core > _BUSY:
        return slow(
            f"load {load:.2f} on {patient.allowed_cores()} cores: kernels wait for each other at every step",
            "end other programs, or leave them a core with --threads",
        )
    return ok(f"load {load:.2f}")


def openmp(patient: Patient) -> Finding:
    env = patient.environ
    limit = env.get("OMP_THREAD_LIMIT", "")
    if limit.isdigit() and int(limit) < patient.allowed_cores():
        return slow(f"OMP_THREAD_LIMIT={limit} keeps cores idle", "unset OMP_THREAD_LIMIT")
    if env.get("OMP_WAIT_POLICY", "").lower() == "active":
        return slow("OMP_WAIT_POLICY=active: waiting kernels take the cores from loading", "unset OMP_WAIT_POLICY")
    if env.get("OMP_PROC_BIND", "false").lower() not in ("false", ""):
        return slow(
            f"OMP_PROC_BIND={env['OMP_PROC_BIND']}: loading is bound to the kernels' first core", "unset OMP_PROC_BIND"
        )
    if env.get("OMP_DYNAMIC", "").lower() == "true":
        return slow("OMP_DYNAMIC=true: kernels may get fewer threads than asked for", "unset OMP_DYNAMIC")
    given = sorted(name for name in env if name.startswith(("OMP_", "GOMP_")))
    return ok(", ".join(f"{name}={env[name]}" for name in given) or "no settings")


def huge_pages(patient: Patient) -> Finding:
    text = patient.read(patient.sys / "kernel/mm/transparent_hugepage/enabled") or ""
    chosen = text.partition("[")[2].partition("]")[0]
    if not chosen:
        return ok("not offered by this kernel")
    if chosen == "never":
        return note(
            "never: large slots cost more page-table look-ups",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return ok(chosen)
