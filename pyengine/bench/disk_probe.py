"""What the disk gives, measured by a child (`python -m pyengine.bench.disk_probe`), so that it can be put under a
limit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pyengine.planning.disk import THREADS, measure_disk


def main() -> None:
    """Probe the file, read size (bytes) and time (seconds) of the task on standard input; print one line of JSON."""
    task = json.load(sys.stdin)
    try:
        speed = measure_disk(Path(task["file"]), task["size"], task["seconds"])
        result: dict[str, Any] = {
            "size": speed.record_bytes,
            "threads": THREADS,
            "direct": speed.direct,
            "bytes_per_s": speed.bytes_per_s,
            "latency_s": speed.latency_s,
        }
    except OSError as error:
        result = {"status": "failed", "reason": " ".join(str(error).split())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
