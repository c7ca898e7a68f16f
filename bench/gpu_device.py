"""A ggml device by its name: how fast copies to it from host memory are, and taking its memory away from others.

.venv/bin/python bench/gpu_device.py CUDA0            prints bytes/s of copies from pinned memory
.venv/bin/python bench/gpu_device.py CUDA0 --take     takes all memory that is left, prints the bytes, and gives it
                                                      back at the end of standard input
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from pathlib import Path

import llama_cpp

_LIB = Path(llama_cpp.__file__).parent / "lib"
_COPY = 16 << 20
_TYPE_I8 = 24  # GGML_TYPE_I8 of ggml.h


class _InitParams(ctypes.Structure):
    """ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _library(name: str, **returns: type) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(_LIB / name))
    for function, kind in returns.items():
        getattr(lib, function).restype = kind
    return lib


_P = ctypes.c_void_p
_registry = _library("libggml.so", ggml_backend_dev_by_name=_P)
_ggml = _library(
    "libggml-base.so",
    ggml_backend_dev_buffer_type=_P,
    ggml_backend_dev_host_buffer_type=_P,
    ggml_backend_cpu_buffer_type=_P,
    ggml_backend_buft_alloc_buffer=_P,
    ggml_backend_buffer_get_base=_P,
    ggml_init=_P,
    ggml_new_tensor_1d=_P,
)


def device(name: str) -> _P:
    """Raises SystemExit if there is none of that name."""
    found = _registry.ggml_backend_dev_by_name(name.encode())
    if not found:
        raise SystemExit(f"this llama.cpp has no device {name}")
    return _P(found)


def allocate(buffer_type: int, size: int) -> _P | None:
    """A buffer; None if there is no room."""
    buffer = _ggml.ggml_backend_buft_alloc_buffer(_P(buffer_type), ctypes.c_size_t(size))
    return _P(buffer) if buffer else None


def copy_speed(name: str) -> float:
    """Bytes/s from pinned host memory, if the device has it, to the device: the median of copies of 16 MiB."""
    to = device(name)
    host_type = _ggml.ggml_backend_dev_host_buffer_type(to) or _ggml.ggml_backend_cpu_buffer_type()
    host = allocate(host_type, _COPY)
    there = allocate(_ggml.ggml_backend_dev_buffer_type(to), 2 * _COPY)
    assert host is not None and there is not None
    context = _P(_ggml.ggml_init(_InitParams(1 << 16, None, True)))
    tensor = _P(_ggml.ggml_new_tensor_1d(context, _TYPE_I8, ctypes.c_int64(_COPY)))
    _ggml.ggml_backend_tensor_alloc(there, tensor, _P(_ggml.ggml_backend_buffer_get_base(there)))
    source = _P(_ggml.ggml_backend_buffer_get_base(host))
    ctypes.memset(source, 1, _COPY)
    times = []
    for _ in range(24):
        start = time.perf_counter()
        _ggml.ggml_backend_tensor_set(tensor, source, ctypes.c_size_t(0), ctypes.c_size_t(_COPY))
        times.append(time.perf_counter() - start)
    return _COPY / statistics.median(times[4:])


def take(name: str, most: int) -> int:
    """Take the device's memory in ever smaller pieces, to the last MiB or to `most` bytes; returns the bytes."""
    buffer_type = _ggml.ggml_backend_dev_buffer_type(device(name))
    taken, piece = 0, 1 << 30
    while piece >= 1 << 20 and taken < most:
        piece = min(piece, max(1, most - taken))
        if allocate(buffer_type, piece) is None:
            piece //= 2
        else:
            taken += piece
    return taken


def measured(name: str) -> float:
    """copy_speed() in a process of its own, which leaves nothing on the device. Raises SystemExit."""
    done = subprocess.run([sys.executable, __file__, name], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device")
    parser.add_argument("--take", action="store_true")
    parser.add_argument("--most", type=int, default=1 << 50, help="bytes to take")
    given = parser.parse_args()
    if given.take:
        print(take(given.device, given.most), flush=True)
        sys.stdin.read()
    else:
        print(copy_speed(given.device), flush=True)


if __name__ == "__main__":
    main()
