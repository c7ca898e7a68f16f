"""Things that tests must do in a process of their own, and how to start one.

Run as a module, this is the process: a name of TASKS and its arguments (JSON); it answers with the last line it prints.
Tasks import what they need themselves, so that a measurement finds nothing else in the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parents[1]


class Child:
    """A process that does one task."""

    def __init__(self, task: str, **arguments: Any) -> None:
        self._command = [sys.executable, "-m", f"{__package__}.children", task, json.dumps(arguments)]

    def start(self, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start it, with more environment variables."""
        return subprocess.Popen(
            self._command,
            cwd=_TESTS,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, environment: dict[str, str] | None = None, timeout: float = 120) -> dict[str, Any]:
        """What it answers. Fails with its error output if it fails."""
        with self.start(environment) as process:
            try:
                out, error = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert process.returncode == 0, f"exit status {process.returncode}\n{error}"
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer


def decode(path: str, script: list[list[int]], share: float, out: str, n_ubatch: int, agitate: bool) -> dict[str, Any]:
    """Decode with our engine; logits to `out`. With faulty_disk.c preloaded: how many reads and faults it saw."""
    import contextlib
    import ctypes

    import numpy as np

    from .agitation import Agitation, random_budgets, random_priorities
    from .managed import managed

    with managed(Path(path), share) as (engine, model), model.context(n_ubatch=n_ubatch) as context:
        with contextlib.ExitStack() as stack:
            if agitate:
                stack.enter_context(Agitation(random_budgets(engine)))
                stack.enter_context(Agitation(random_priorities(engine)))
            np.save(out, context.run(script))
        stats = engine.stats()
    disk = ctypes.CDLL(None)
    return {"stats": stats, "reads": disk.faulty_disk_reads(), "faults": disk.faulty_disk_faults()}


def decode_over_errors(path: str, script: list[list[int]], share: float, out: str, after: int) -> dict[str, Any]:
    """Decode with faulty_disk.c preloaded; the read `after` those of loading fails. A chunk that fails is decoded again."""
    import ctypes

    import numpy as np

    from .decoding import DecodeError
    from .managed import managed

    disk = ctypes.CDLL(None)
    got, errors = [], []
    with managed(Path(path), share) as (engine, model), model.context() as context:
        os.environ["FAULTY_DISK_EIO_AFTER"] = str(disk.faulty_disk_reads() + after)
        for chunk in script:
            try:
                got.append(context.decode(chunk))
            except DecodeError:
                errors.append(str(engine.take_failure()))
                got.append(context.decode(chunk))
    np.save(out, np.concatenate(got))
    return {"errors": errors, "faults": disk.faulty_disk_faults()}


def abort(path: str, tokens: list[int], share: float, after: int) -> dict[str, Any]:
    """Prefill with faulty_disk.c preloaded, and want to stop once `after` reads have begun: the reads at the end, and
    what llama_decode answers."""
    import ctypes

    from .decoding import DecodeError
    from .managed import managed

    disk = ctypes.CDLL(None)
    with managed(Path(path), share) as (_, model), model.context() as context:
        start = disk.faulty_disk_reads()
        context.set_abort(lambda: disk.faulty_disk_reads() - start >= after)
        try:
            context.decode(tokens)
            status = 0
        except DecodeError as error:
            status = error.status
        return {"status": status, "reads": disk.faulty_disk_reads() - start}


def load(path: str, files: list[str]) -> dict[str, Any]:
    """Load a model that is not in the page cache: what that reads, until it is ready to decode."""
    import time

    from pyengine import Llama, startup

    from . import page_cache

    startup.check()  # runs a program once in a process
    page_cache.drop(map(Path, files))
    cold = not any(page_cache.resident(Path(file)).any() for file in files)
    before, start = _io(), time.perf_counter()
    llama = Llama(path, n_ctx=512)
    seconds, after = time.perf_counter() - start, _io()
    reads_of_experts = llama.expert_stats()["reads"]
    pages = {file: page_cache.resident(Path(file)).nonzero()[0].tolist() for file in files}
    llama.eval([1, 2, 3])
    llama.close()
    return {
        "cold": cold,
        "seconds": seconds,
        "io": {name: after[name] - before[name] for name in after},
        "reads_of_experts": reads_of_experts,
        "pages": pages,
    }


def interrupted(path: str, ram_budget: str, prompt: list[int], n_new: int, settings: dict[str, int]) -> dict[str, Any]:
    """Write tokens again and again until Ctrl-C, five times; then write them once more. Says "writing" each time it
    starts."""
    import contextlib

    from pyengine import Llama

    from .reference import write

    rounds = 0
    with contextlib.closing(Llama(path, ram_budget=ram_budget, **settings)) as llama:
        for _ in range(5):
            print("writing", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    for _ in write(llama, prompt, n_new):
                        pass
                    llama.reset()
            rounds += 1
        return {"rounds": rounds, "tokens": list(write(llama, prompt, n_new))}


def load_over_and_over(path: str) -> dict[str, Any]:
    """Load a model until something stops it. Says "loading" when it starts."""
    import contextlib

    from pyengine import Llama

    print("loading", flush=True)
    while True:
        with contextlib.closing(Llama(path, n_ctx=64)) as llama:
            llama.eval([1, 2, 3])


def fork(path: str, prompt: list[int], n_new: int, settings: dict[str, int], busy: bool) -> dict[str, Any]:
    """Fork after writing, or while another thread writes: what the forked child meets, and how it ends."""
    import contextlib
    import threading

    from pyengine import Llama

    from .reference import write

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
    import threading

    from .managed import managed

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
            "set_priorities": lambda: engine.set_priorities(_zeros(shape)),
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


def _zeros(shape: tuple[int, int]) -> Any:
    import numpy as np

    return np.zeros(shape, np.float32)


def fork_memory(path: str) -> dict[str, Any]:
    """Fork an engine whose slots the child does not get; put other memory in their place, and close it there."""
    import ctypes
    import mmap

    from pyengine.native import NativeEngine

    engine = NativeEngine(Path(path))
    engine.start(engine.info.slot_bytes)
    size = engine.info.slot_bytes + mmap.PAGESIZE
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    (address,) = (int(first, 16) for first, last in ranges if int(last, 16) - int(first, 16) == size)
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


def _wait(pid: int, seconds: float) -> int:
    """The exit status of a forked child; it is killed if it takes longer."""
    import signal
    import time

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def remember(path: str, ram_budget: str, n_prompt: int, n_new: int) -> dict[str, Any]:
    """Answer a long prompt: how much memory that takes, bytes, and what llama.cpp says of its buffers."""
    import contextlib
    import io

    from pyengine import Llama

    said = io.StringIO()
    at_start = _memory()
    with contextlib.redirect_stderr(said):
        llama = Llama(path, ram_budget=ram_budget, n_ctx=1024, n_batch=512, n_ubatch=512, verbose=True)
    loaded = _memory()
    llama.eval([3 + i % 300 for i in range(n_prompt)])
    prefilled = _memory()
    for i in range(n_new):
        llama.eval([3 + 7 * i % 300])
    return {
        "at_start": at_start,
        "loaded": loaded,
        "prefilled": prefilled,
        "decoded": _memory(),
        "stats": llama.expert_stats(),
        "log": said.getvalue().splitlines(),
    }


def _memory() -> dict[str, int]:
    """Resident bytes: the most so far, now, and of that what belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(values[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssAnon")}


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task
    for task in (decode, decode_over_errors, abort, load, interrupted, load_over_and_over, fork, fork_engine, fork_memory, remember)
}


if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
