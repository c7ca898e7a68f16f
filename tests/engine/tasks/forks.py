"""Forking after a model was loaded."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pyengine import Llama
from pyengine.native import NativeEngine

from ..managed import managed
from ..reference import write


def fork(path: str, prompt: list[int], n_new: int, settings: dict[str, Any], busy: bool) -> dict[str, Any]:
    """Fork after writing, or while another thread writes: what the forked child meets, and how it ends."""

    def forked(llama: Llama) -> tuple[list[str], int]:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            met = []
            for action in (lambda: llama.eval(prompt), lambda: llama.set_ram_budget("50%")):
                try:
                    action()
                except Exception as error:
                    met.append(f"{type(error).__name__}: {error}")
            os.write(writer, json.dumps(met).encode())
            sys.exit(0)  # with all clean-up
        os.close(writer)
        status = _wait(pid, 10)
        with open(reader) as pipe:
            return json.loads(pipe.read() or "[]"), status

    with contextlib.closing(Llama(path, ram_budget="20%", **settings)) as llama:
        tokens = list(write(llama, prompt, n_new))
        stop = threading.Event()

        def keep_writing() -> None:
            while not stop.is_set():
                llama.reset()
                list(write(llama, prompt, n_new))

        thread = threading.Thread(target=keep_writing)
        if busy:
            thread.start()
        children = [forked(llama) for _ in range(3 if busy else 1)]
        stop.set()
        if busy:
            thread.join()
        llama.reset()
        return {"before": tokens, "children": children, "after": list(write(llama, prompt, n_new))}


def fork_engine(path: str, script: list[list[int]]) -> dict[str, Any]:
    """Fork the bare engine while another thread computes: what each of its functions does in a forked child."""

    def forked(action: Callable[[], object]) -> tuple[str, int]:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                action()
                met = ""
            except Exception as error:
                met = f"{type(error).__name__}: {error}"
            os.write(writer, met.encode())
            os._exit(0)
        os.close(writer)
        status = _wait(pid, 5)
        with open(reader) as pipe:
            return pipe.read(), status

    with managed(Path(path), 0.0) as (engine, model), model.context(n_threads=1) as context:
        least, shape = engine.info.least_budget, (engine.info.n_layer, engine.info.n_expert)
        actions: dict[str, Callable[[], object]] = {
            "info": lambda: engine.info,
            "stats": engine.stats,
            "set_ram_budget": lambda: engine.set_ram_budget(least),
            "set_priorities": lambda: engine.set_priorities(np.zeros(shape, np.float32)),
            "events": engine.events,
            "close": engine.close,
        }
        stop = threading.Event()

        def compute() -> None:
            while not stop.is_set():
                context.clear()
                context.run(script)

        thread = threading.Thread(target=compute)
        thread.start()
        met = {name: [forked(action) for _ in range(3)] for name, action in actions.items()}
        stop.set()
        thread.join()
        return met


def fork_memory(path: str) -> dict[str, Any]:
    """Fork an engine whose slots the child does not get; put other memory in their place, and close it there."""
    engine = NativeEngine(Path(path))
    before = _ranges()
    engine.start(engine.info.slot_bytes)
    size = engine.info.slot_bytes + mmap.PAGESIZE
    (address,) = (first for first, last in _ranges() - before if last - first == size)
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        protection, fixed_noreplace = mmap.PROT_READ | mmap.PROT_WRITE, 0x100000
        got = libc.mmap(address, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace, -1, 0)
        if got != address:
            os._exit(1)
        ctypes.memset(address, 42, size)
        engine.close()
        os._exit(0 if ctypes.string_at(address, size) == bytes([42]) * size else 2)
    status = _wait(pid, 10)
    engine.close()
    return {"status": status}


def _ranges() -> set[tuple[int, int]]:
    """Addresses of the memory that this process has."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines}  # type: ignore[misc]


def _wait(pid: int, seconds: float) -> int:
    """The exit status of a forked child; it is killed if it takes longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
