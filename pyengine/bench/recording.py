"""Records the routing of a benchmark's own texts, in a child (`python -m pyengine.bench.recording`), so that the
planner can be checked with the trace of what is measured. Nothing is timed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pyengine.bench.child import LoadedModel, Task, load, n_ctx_of, texts_of
from pyengine.bench.measuring import measure
from pyengine.errors import one_line


def record(task: Task, out: Path) -> int:
    """Run a row's texts and write their trace. Returns the number of decoded tokens in it."""
    from pyengine.traces import save_trace
    from pyengine.traces.recorder import TraceRecorder

    llm = load(task, n_ctx_of(task))
    try:
        recorder = TraceRecorder(llm.engine.routing_log, llm.engine.info, Path(task.model))
        measure(LoadedModel(llm, None), texts_of(llm, task), task.n_tokens, task.limit_s, lambda _: None)
        trace = recorder.trace()
        save_trace(out, trace)
        return len(trace.ids)
    finally:
        llm.close()


def main() -> None:
    """Record as standard input says: {"task": fields of Task, "out": file}. Prints one line of JSON."""
    asked = json.load(sys.stdin)
    try:
        result: dict[str, Any] = {"n_token": record(Task(**asked["task"]), Path(asked["out"]))}
    except Exception as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {one_line(str(error))}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
