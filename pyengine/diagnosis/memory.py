"""Memory: how much there is, what limits it, what takes it away."""

from __future__ import annotations

from pyengine.cli.output import format_bytes
from pyengine.diagnosis.finding import Finding, fail, note, ok, slow
from pyengine.diagnosis.patient import Patient

#: Swap in use that no longer is a rounding error, bytes.
_SWAPPED = 64 << 20
#: Context a model is checked with, tokens.
_CONTEXT = 4096


def swap(patient: Patient) -> Finding:
    total, free = patient.meminfo("SwapTotal"), patient.meminfo("SwapFree")
    if not total or free is None:
        return ok("none")
    if total - free > _SWAPPED:
        return slow(
            f"{format_bytes(total - free)} in use: experts may be read from swap instead of from the model",
            "end what needs the memory or lower --ram-budget, then: swapoff -a && swapon -a",
        )
    return note(f"{format_bytes(total)}, unused; experts could go there under pressure", "sysctl vm.swappiness=1")


def memory(patient: Patient) -> Finding:
    total, limit, available = patient.memory_total(), patient.memory_limit(), patient.memory_available()
    limited = f", limited to {format_bytes(limit)} by a control group" if limit < total else ""
    found = f"{format_bytes(available)} of {format_bytes(total)} available{limited}"
    shape = patient.shape
    if shape is None:
        return note(found, "raise the limit of the container") if limited else ok(found)
    needed = shape.other_bytes + shape.info.least_budget + _CONTEXT * shape.kv_bytes_per_token
    if needed > available:
        return fail(
            f"{found}; this model needs {format_bytes(needed)} at least",
            "end other programs, use a smaller context or a smaller quantisation of the model",
        )
    spare = available - needed + shape.info.least_budget
    if spare < shape.info.expert_used_bytes:
        return slow(
            f"{found}; that is room for {format_bytes(spare)} of experts, less than one token needs",
            "end other programs: below one token's experts nothing stays in memory",
        )
    share = min(100.0, 100 * spare / shape.info.slot_bytes)
    return ok(f"{found}: room for {share:.3g} % of the experts")


def address_limit(patient: Patient) -> Finding:
    limit = patient.address_limit()
    if limit is None:
        return ok("none; nothing is locked in memory, so ulimit -l does not matter")
    shape = patient.shape
    if shape is not None:
        needed = shape.info.slot_bytes + shape.info.file_bytes + _CONTEXT * shape.kv_bytes_per_token + (2 << 30)
        if needed > limit:
            return fail(
                f"ulimit -v is {format_bytes(limit)}; addresses for {format_bytes(needed)} are reserved for this model",
                "ulimit -v unlimited",
            )
    return note(f"ulimit -v is {format_bytes(limit)}: addresses are reserved for all experts", "ulimit -v unlimited")
