"""Multiplies matrices with ggml's AMX kernels, in a process whose death harms nobody. Run by pyengine.startup.

    python amx_trial.py FOLDER

FOLDER holds the ggml libraries to try. The kernels themselves run, on two threads, and not just some AMX instructions,
because the machine is not all that can be wrong: GCC 12's intrinsic for ldtilecfg claims to read 8 of its 64 bytes, so
the compiler drops most of ggml's set-up of the tiles, and the processor refuses the rest. Exit status: WORKS (also if
ggml does not offer AMX here), WRONG_RESULT or TOO_SLOW; otherwise the process dies of a signal or hangs.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

WORKS, WRONG_RESULT, TOO_SLOW = 0, 3, 4

INPUTS, OUTPUTS, TOKENS, THREADS = 1024, 256, 128, 2
#: Quantising the activations costs 1e-5 or so; garbage is about 1. (Mean square of the error by that of the result.)
LARGEST_ERROR = 1e-3
#: AMX is several times as fast as the plain kernels, and emulated AMX a hundred times slower.
LARGEST_SLOWDOWN = 10.0
REPEATS = 3

# enum ggml_type in ggml.h
GGML_TYPE_F32, GGML_TYPE_Q8_0 = 0, 8


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


#: Result type and argument types of what is used of ggml.h, ggml-backend.h and ggml-cpu.h.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
}


class Ggml:
    """The functions above, found in the libraries of a folder."""

    def __init__(self, folder: Path) -> None:
        libraries = [ctypes.CDLL(str(next(folder.glob(f"{name}.so.*")))) for name in ("libggml-base", "libggml-cpu")]
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(next(library for library in libraries if hasattr(library, name)), name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def amx_buffer_type(self) -> int | None:
        """The buffer type whose tensors the AMX kernels multiply; None if ggml does not offer it on this machine."""
        registry = self.ggml_backend_cpu_reg()
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.ggml_backend_reg_dev_get(registry, 0))
        index = 0
        while extra and extra[index]:
            if self.ggml_backend_buft_name(extra[index]) == b"AMX":
                return int(extra[index])
            index += 1
        return None

    def multiply(self, buffer_type: int) -> tuple[list[float], float]:
        """OUTPUTS x TOKENS products with weights in a buffer of this type, and the seconds of the fastest run."""
        size = 1 << 20
        weights_context = self.ggml_init(InitParams(size, None, True))
        weights = self.ggml_new_tensor_2d(weights_context, GGML_TYPE_Q8_0, INPUTS, OUTPUTS)
        context = self.ggml_init(InitParams(size, None, True))
        activations = self.ggml_new_tensor_2d(context, GGML_TYPE_F32, INPUTS, TOKENS)
        product = self.ggml_mul_mat(context, weights, activations)
        graph = self.ggml_new_graph(context)
        self.ggml_build_forward_expand(graph, product)
        buffers = [
            self.ggml_backend_alloc_ctx_tensors_from_buft(weights_context, buffer_type),
            self.ggml_backend_alloc_ctx_tensors_from_buft(context, self.ggml_backend_cpu_buffer_type()),
        ]

        values = wave(INPUTS * OUTPUTS, 0.7)
        quantised = ctypes.create_string_buffer(INPUTS // 32 * 34 * OUTPUTS)
        self.ggml_quantize_chunk(GGML_TYPE_Q8_0, byref(values), byref(quantised), 0, OUTPUTS, INPUTS, None)
        self.ggml_backend_tensor_set(weights, byref(quantised), 0, len(quantised))
        values = wave(INPUTS * TOKENS, 1.3)
        self.ggml_backend_tensor_set(activations, byref(values), 0, ctypes.sizeof(values))

        backend = self.ggml_backend_cpu_init()
        self.ggml_backend_cpu_set_n_threads(backend, THREADS)
        fastest = math.inf
        for _ in range(REPEATS):
            started = time.perf_counter()
            self.ggml_backend_graph_compute(backend, graph)
            fastest = min(fastest, time.perf_counter() - started)
        result = (c_float * (OUTPUTS * TOKENS))()
        self.ggml_backend_tensor_get(product, byref(result), 0, ctypes.sizeof(result))
        for buffer in buffers:
            self.ggml_backend_buffer_free(buffer)
        self.ggml_free(context)
        self.ggml_free(weights_context)
        return list(result), fastest


def wave(count: int, step: float) -> ctypes.Array[c_float]:
    """Numbers from -1 to 1 that look random enough."""
    return (c_float * count)(*(math.sin(step * i * i) for i in range(count)))


def trial(folder: Path) -> int:
    ggml = Ggml(folder)
    amx = ggml.amx_buffer_type()
    if amx is None:
        return WORKS
    expected, plain_seconds = ggml.multiply(ggml.ggml_backend_cpu_buffer_type())
    found, amx_seconds = ggml.multiply(amx)
    error = sum((f - e) ** 2 for f, e in zip(found, expected, strict=True)) / sum(e**2 for e in expected)
    if not error <= LARGEST_ERROR:  # not a number is wrong, too
        return WRONG_RESULT
    return TOO_SLOW if amx_seconds > LARGEST_SLOWDOWN * plain_seconds else WORKS


if __name__ == "__main__":
    sys.exit(trial(Path(sys.argv[1])))
