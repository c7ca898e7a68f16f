"""llama_cpp.Llama in a process of its own that never loads pyengine: what "as stock" means in these tests.

Run as a module it answers questions, one JSON object a line: {"model", "options", "probe", "arguments"}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .probes import PROBES, Answer, as_json, options_for

TESTS = Path(__file__).parents[1]


class StockProcess:
    """Asks stock llama.cpp. The model stays loaded until a question is about another one. Use in a with statement."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> StockProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, model: Path, options: dict[str, Any], probe: str, **arguments: Any) -> Answer:
        """What the probe gives on llama_cpp.Llama(model, **options)."""
        question = {"model": str(model), "options": options, "probe": probe, "arguments": arguments}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the stock process has died"
        return json.loads(line)


def main() -> None:
    import llama_cpp

    loaded, llm = None, None
    for line in sys.stdin:
        question = json.loads(line)
        wanted = (question["model"], question["options"])
        if wanted != loaded:
            if llm is not None:
                llm.close()
            llm = llama_cpp.Llama(question["model"], **options_for(question["options"]))
            loaded = wanted
        answer = PROBES[question["probe"]](llm, **question["arguments"])
        assert "pyengine" not in sys.modules
        print(as_json(answer), flush=True)


if __name__ == "__main__":
    main()
