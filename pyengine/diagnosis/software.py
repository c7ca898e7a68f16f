"""What is installed, and whether the model can be run with it."""

from __future__ import annotations

from pyengine import startup
from pyengine.architectures import MANAGED
from pyengine.diagnosis.finding import Finding, fail, note, ok
from pyengine.diagnosis.patient import Patient
from pyengine.errors import PyengineError, StartupError, UnmanagedModelError


def versions(patient: Patient) -> Finding:
    try:
        startup.check()
    except StartupError as error:
        reason, _, remedy = str(error).partition("\n")
        return fail(reason, " ".join(remedy.split()) or "install pyengine again")
    except RuntimeError as error:
        return fail(str(error), "install pyengine again")
    return ok(f"llama-cpp-python {startup.LLAMA_CPP_PYTHON}, ggml {startup.GGML}, as built for")


def amx(patient: Patient) -> Finding:
    flags: set[str] = set()
    for line in (patient.read(patient.proc / "cpuinfo") or "").splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    if "amx_int8" not in flags:
        return ok("not offered by this processor")
    try:
        import llama_cpp

        uses_it = "AMX_INT8 = 1" in llama_cpp.llama_print_system_info().decode()
    except (ImportError, OSError, RuntimeError):
        return note("offered by this processor; whether llama.cpp uses it cannot be seen")
    if uses_it:
        return ok("used by llama.cpp, whose AMX kernels were tried and work")  # else the check of llama.cpp has failed
    return ok("offered by this processor, not used by llama.cpp: safe where a virtual machine only claims it")


def model(patient: Patient) -> Finding:
    try:
        startup.check()
    except (StartupError, RuntimeError):
        return note(f"{patient.model.name} is not looked at before llama.cpp is repaired")
    from pyengine.planning.shape import read_shape

    try:
        shape = patient.shape or read_shape(patient.model)
    except UnmanagedModelError as reason:
        return note(f"{patient.model.name}: {reason}; stock llama.cpp runs it")
    except (PyengineError, OSError) as error:
        return fail(str(error), "name another file with -m, or fetch this one again")
    info = shape.info
    if info.architecture not in MANAGED:
        return note(f"{patient.model.name}: architecture {info.architecture} is not managed; stock llama.cpp runs it")
    return ok(f"{patient.model.name}: {info.architecture}, {info.n_layer} layers of {info.n_expert} experts")
