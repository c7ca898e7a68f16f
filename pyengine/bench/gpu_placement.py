"""Stock llama.cpp on a GPU: the whole model there, or the experts of the first layers on the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU of ggml-backend.h


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override of llama.h, which llama_cpp leaves out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def cpu_layers(n_layer: int, share: float | None) -> int:
    """Layers whose experts stay in RAM when VRAM holds `share` percent of them, rounded in stock's favour."""
    return 0 if share is None else int(n_layer * (1 - share / 100) + 1e-9)


def load_stock(path: str, device: str, n_cpu: int, **how: Any) -> Any:
    """A llama_cpp.Llama on this ggml device, with the experts of the first `n_cpu` layers on the CPU.

    Raises:
        ValueError: there is no such device, or llama.cpp refuses.
    """
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    registry, base = (ctypes.CDLL(str(folder / name)) for name in ("libggml.so", "libggml-base.so"))
    registry.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    base.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    found = registry.ggml_backend_dev_by_name(device.encode())
    if not found:
        raise ValueError(f"this llama.cpp has no device {device}")
    overrides = (_Override * 2)()  # the second one ends the list
    if n_cpu:
        layers = "|".join(map(str, range(n_cpu)))
        overrides[0].pattern = rf"blk\.({layers})\.ffn_(up|down|gate|gate_up)_exps\.weight".encode()
        overrides[0].buft = base.ggml_backend_cpu_buffer_type()
    devices = (ctypes.c_void_p * 2)(found)
    on_cpu = base.ggml_backend_dev_type(found) == _CPU

    class Placed(llama_cpp.Llama):
        # The base class builds and uses this in its __init__; the field is set as soon as it is there.
        @property
        def model_params(self) -> Any:
            return self._params

        @model_params.setter
        def model_params(self, value: Any) -> None:
            if n_cpu:
                value.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
            if on_cpu:
                value.use_extra_bufts = False  # a wrapped CPU computes as a GPU would, without repacking
            else:
                value.devices = ctypes.cast(devices, ctypes.c_void_p)
            self._params = value

    return Placed(path, n_gpu_layers=0 if on_cpu else -1, use_mmap=False, **how)


def one_layer(path: str, device: str) -> int:
    """Bytes of slots on the device for what one token uses in one layer: the least that it can work with."""
    from pyengine.native import NativeEngine

    native = NativeEngine(path)
    try:
        native.use_gpus(device.split(","))
        return native.info.least_budget
    finally:
        native.close()
