"""Stock llama.cpp in a process of its own that never loads pyengine: where the logits to compare with come from.

`StockProcess` is the client. Run as a module, this is the process: it reads one job a line (JSON) and answers each with
one line.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import llama_cpp
import numpy as np

from .decoding import Logits, Model, Script, llama_log

_TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """One model to load, one context to make (see Model.context), one script to decode. Logits go to `out`, an .npy
    file."""

    path: str
    script: Script
    n_ctx: int
    n_ubatch: int
    n_threads: int
    embeddings: bool
    out: str


@dataclass(frozen=True)
class WritingJob:
    """One llama_cpp.Llama to make, and tokens to generate greedily."""

    path: str
    prompt: list[int]
    n_new: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Logits [tokens of the script, n_vocab], and what llama.cpp logged from loading to the end."""

    logits: Logits
    log: list[str]


class StockProcess:
    """Computes each job once; the process starts with the first. Use in a with statement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._answers: dict[str, Answer] = {}
        self._written: dict[str, list[int]] = {}

    def __enter__(self) -> StockProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate(timeout=30)  # closes its input: it ends

    def run(
        self,
        path: Path,
        script: Script,
        *,
        n_ctx: int = 256,
        n_ubatch: int = 512,
        n_threads: int = 2,
        embeddings: bool = False,
    ) -> Answer:
        """Decode the script with stock llama.cpp, with a fresh model and context; arguments as of Model.context."""
        key = json.dumps([str(path), script, n_ctx, n_ubatch, n_threads, embeddings])
        if key not in self._answers:
            out = self._folder / f"{len(self._answers)}.npy"
            answered = self._ask(Job(str(path), script, n_ctx, n_ubatch, n_threads, embeddings, str(out)))
            self._answers[key] = Answer(np.load(out), answered["log"])
        return self._answers[key]

    def write(self, path: Path, prompt: list[int], n_new: int, **settings: Any) -> list[int]:
        """The likeliest n_new tokens after the prompt, by llama_cpp.Llama with these settings."""
        key = json.dumps([str(path), prompt, n_new, settings])
        if key not in self._written:
            self._written[key] = self._ask(WritingJob(str(path), prompt, n_new, settings))["tokens"]
        return self._written[key]

    def _ask(self, job: Job | WritingJob) -> dict[str, Any]:
        stdin, stdout = self._pipes()
        stdin.write(json.dumps(asdict(job)) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            self._process = None  # it has crashed; the next job starts another
            raise RuntimeError(f"stock llama.cpp ended without an answer for {job.path}")
        answered: dict[str, Any] = json.loads(line)
        assert not answered["ours"], f"the stock process has loaded {answered['ours']}"
        return answered

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if self._process is None:
            command = [sys.executable, "-m", f"{__package__}.reference"]
            self._process = subprocess.Popen(
                command, cwd=_TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout


def what_is_ours() -> list[str]:
    """Modules and libraries of pyengine in this process: none in a stock one."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    libraries = sorted(path for path in mapped if Path(path).name.startswith("libpyengine"))
    return sorted(name for name in sys.modules if name.partition(".")[0] == "pyengine") + libraries


def write(llama: llama_cpp.Llama, prompt: list[int], n_new: int) -> Iterator[int]:
    """The likeliest n_new tokens after the prompt, one by one."""
    for _, token in zip(range(n_new), llama.generate(prompt, temp=0.0), strict=False):
        yield int(token)


def _decode(job: Job) -> dict[str, Any]:
    with llama_log() as log, Model(Path(job.path)) as model:
        settings = {"n_ctx": job.n_ctx, "n_ubatch": job.n_ubatch, "n_threads": job.n_threads}
        with model.context(**settings, embeddings=job.embeddings) as context:
            np.save(job.out, context.run(job.script))
    return {"log": log}


def _write(job: WritingJob) -> dict[str, Any]:
    with contextlib.closing(llama_cpp.Llama(job.path, verbose=False, **job.settings)) as llama:
        return {"tokens": list(write(llama, job.prompt, job.n_new))}


def _main() -> None:
    for line in sys.stdin:
        fields = json.loads(line)
        done = _decode(Job(**fields)) if "script" in fields else _write(WritingJob(**fields))
        print(json.dumps({"ours": what_is_ours(), **done}), flush=True)


if __name__ == "__main__":
    _main()
