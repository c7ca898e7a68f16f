"""How fast a GPU's memory is filled from RAM: copies through its own ggml back-end, as the engine makes them."""

from __future__ import annotations

import ctypes
import json
import math
import platform
import re
import statistics
import time
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pyengine.cache import cache_dir
from pyengine.native import Device, built_for
from pyengine.startup import GGML_LIBRARY
from pyengine.whole_file import written_whole

_VERSION = 1
#: Bytes of a copy whose speed counts, and of one whose time is all beginning and end.
_LARGE, _SMALL = 16 << 20, 4096
_WARM, _TIMED = 2, 6

_TYPE_I8 = 24  # GGML_TYPE_I8 of ggml.h

#: The library that knows the devices lies beside the one that knows tensors.
_REGISTRY_LIBRARY = GGML_LIBRARY.replace("libggml-base", "libggml")


@dataclass(frozen=True)
class LinkSpeed:
    bytes_per_s: float
    """from host memory, pinned where the device has that, copies of 16 MiB, median"""
    latency_s: float
    """of a copy of 4 KiB, median"""

    def seconds(self, n_bytes: float, n_copies: int) -> float:
        """What so many copies of together `n_bytes` take one after the other."""
        return n_bytes / self.bytes_per_s + n_copies * self.latency_s


class _InitParams(ctypes.Structure):
    """struct ggml_init_params of ggml.h"""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


#: Result type and argument types of what is used of ggml.h, ggml-backend.h and ggml-alloc.h.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_host_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, c_int, c_int64]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
}


@cache
def _libraries() -> tuple[Any, Any]:
    """(registry of devices, tensors and buffers)"""
    import llama_cpp  # noqa: F401  (loads the libraries that are named here)

    registry, base = ctypes.CDLL(_REGISTRY_LIBRARY), ctypes.CDLL(GGML_LIBRARY)
    registry.ggml_backend_dev_by_name.restype = c_void_p
    registry.ggml_backend_dev_by_name.argtypes = [c_char_p]
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return registry, base


def measure_link(name: str) -> LinkSpeed:
    """Copy to the ggml device of this name for a few milliseconds.

    Raises:
        OSError: there is no such device, or no room on it or in RAM for 16 MiB.
    """
    registry, base = _libraries()
    device = registry.ggml_backend_dev_by_name(name.encode())
    if not device:
        raise OSError(f"this llama.cpp has no device {name}")
    pinned = base.ggml_backend_dev_host_buffer_type(device)
    # Pinned memory can be short when ordinary memory is not.
    host = (pinned and base.ggml_backend_buft_alloc_buffer(pinned, _LARGE)) or base.ggml_backend_buft_alloc_buffer(
        base.ggml_backend_cpu_buffer_type(), _LARGE
    )
    # Some back-ends want room for alignment beside the tensor.
    there = base.ggml_backend_buft_alloc_buffer(base.ggml_backend_dev_buffer_type(device), _LARGE + (1 << 20))
    context = base.ggml_init(_InitParams(1 << 14, None, True))
    try:
        if not host or not there or not context:
            raise OSError(f"{name} has no {_LARGE >> 20} MiB left to measure its link with")
        tensor = base.ggml_new_tensor_1d(context, _TYPE_I8, _LARGE)
        if base.ggml_backend_tensor_alloc(there, tensor, base.ggml_backend_buffer_get_base(there)) != 0:
            raise OSError(f"{name} takes no tensor to measure its link with")
        source = base.ggml_backend_buffer_get_base(host)
        ctypes.memset(source, 1, _LARGE)
        large = _median_time(lambda: base.ggml_backend_tensor_set(tensor, source, 0, _LARGE))
        small = _median_time(lambda: base.ggml_backend_tensor_set(tensor, source, 0, _SMALL))
        return LinkSpeed(_LARGE / max(1e-9, large - small), small)
    finally:
        for buffer in (host, there):
            if buffer:
                base.ggml_backend_buffer_free(buffer)
        if context:
            base.ggml_free(context)


def _median_time(copy: Any) -> float:
    times = []
    for _ in range(_WARM + _TIMED):
        start = time.perf_counter()
        copy()
        times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM:])


def link_file(device: Device) -> Path:
    """Where the speed of this device's link is kept."""
    return cache_dir() / "links" / f"{re.sub(r'[^A-Za-z0-9]', '_', device.name)}.json"


def _key(device: Device) -> list[Any]:
    """What must be equal for a measurement to hold."""
    where = [platform.node(), platform.release(), built_for()]
    return [_VERSION, device.name, device.description, device.total_bytes, *where]


def known_link(device: Device, *, again: bool = False) -> LinkSpeed | None:
    """The speed measured earlier on this machine, else measured now and kept; None where nothing is moved (unified
    memory), or it cannot be measured now."""
    if device.unified:
        return None
    path, key = link_file(device), _key(device)
    found = None if again else _kept(path, key)
    if found is not None:
        return found
    try:
        found = measure_link(device.name)
    except OSError:
        return None
    try:
        with written_whole(path, durable=False) as file:
            file.write(json.dumps({"key": key, "link": asdict(found)}).encode())
    except OSError:
        pass  # no cache folder: measured again next time
    return found


def _kept(path: Path, key: list[Any]) -> LinkSpeed | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return None
        found = LinkSpeed(**{name: float(value) for name, value in kept["link"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    sane = math.isfinite(found.bytes_per_s) and found.bytes_per_s > 0 and 0 <= found.latency_s < 1
    return found if sane else None
