"""`gguf_tools` in a process of its own whose progress can be stopped at a place that a test names.

Run as a module: the number of reports of progress after which it happens, what happens ("kill", "wait" or "no"), then
arguments for gguf_tools. Every record is a batch, every second one a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from gguf_tools.bundles import records, writer
from gguf_tools.cli import main
from gguf_tools.cli import progress as shown


def _main() -> None:
    after, what, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    reports = 0

    @contextlib.contextmanager
    def progress(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
        yield report

    def report(_n: int) -> None:
        nonlocal reports
        reports += 1
        if reports == after and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if reports == after and what == "wait":
            print("waiting", flush=True)
            for _ in range(1200):  # a signal just before a long sleep would not cut it short
                time.sleep(0.1)

    shown.byte_progress = progress
    records.BATCH_BYTES = 1
    writer.CHECKPOINT_BYTES = 1 << 14
    main(arguments, prog_name="gguf_tools")


if __name__ == "__main__":
    _main()
