"""Takes memory away, so that what else runs has no more than is asked for: where control groups cannot be made, this is
how a machine is made smaller. The memory is touched, and locked where that is allowed; the kernel ends these processes
first."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PROCESSES = 8  # touching pages is bound by a core
_STEP = 256 << 20


@contextlib.contextmanager
def leave(wanted: int) -> Iterator[int]:
    """Within, about `wanted` bytes can be had, page cache included; the value is what is left in fact. Raises
    RuntimeError if less than that is free, or a process ends early."""
    from pyengine.budget import available_memory

    free = available_memory()
    take = free - wanted
    if take < 0:
        raise RuntimeError(f"only {free / 1e9:.1f} GB of memory are free, {wanted / 1e9:.1f} are asked for")
    command = [sys.executable, __file__, str(take // _PROCESSES)]
    balloons = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(_PROCESSES)]
    try:
        for balloon in balloons:
            assert balloon.stdout is not None
            if balloon.stdout.readline() != b"full\n":
                raise RuntimeError("the memory could not be taken")
        yield available_memory()
    finally:
        for balloon in balloons:
            balloon.kill()
        for balloon in balloons:
            balloon.wait()


def _fill(size: int) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    held = []
    libc = ctypes.CDLL(None, use_errno=True)
    for at in range(0, size, _STEP):
        part = min(_STEP, size - at)
        memory = mmap.mmap(-1, part)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ctypes.memset(address, 1, part)
        # May be forbidden: without swap it makes no difference.
        libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(part))
        held.append(memory)
    print("full", flush=True)
    while sys.stdin.buffer.read(1):  # until the other end has gone
        time.sleep(1)


if __name__ == "__main__":
    _fill(int(sys.argv[1]))
