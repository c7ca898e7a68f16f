"""Another process takes the GPU's memory while a model decodes: it must go on with fewer slots, or say clearly why not,
and never give wrong tokens.

    .venv/bin/python bench/gpu_out_of_memory.py MODEL [--rows all-moved:50 auto:50] [--most BYTES] [--csv CSV]

The same tokens are computed after every event and compared with those from before. --most: so much is taken; without
it all, to the last MiB.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu_rows
import numpy as np
from gpu_exactness import nmse
from gpu_players import GoneError, Player

from pyengine.bench.model_facts import read_facts

#: More than that is garbage where all is computed on the GPU. Where the CPU takes part 0.2 was seen; numbers that have
#: nothing to do with each other differ by more than 1.
_GPU_NMSE, _CPU_NMSE = 1e-6, 0.5

_LIMIT_S = 90.0


class Thief:
    """A process that takes the device's memory."""

    def __init__(self, gpu: str, most: int | None) -> None:
        program = [sys.executable, str(Path(__file__).with_name("gpu_device.py")), gpu, "--take"]
        if most is not None:
            program += ["--most", str(most)]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        self.taken = int(self._process.stdout.readline().split()[-1])

    def give_back(self) -> None:
        self._process.communicate()


class Story:
    """What happens to one row."""

    def __init__(self, row: gpu_rows.Row, task: dict[str, Any], folder: Path) -> None:
        self._row, self._folder = row, folder
        self._player = Player(row, task)
        self._wanted: dict[tuple[int, ...], Any] = {}
        self.lines: list[dict[str, Any]] = []

    def tell(self, gpu: str, most: int | None) -> None:
        """Raises GoneError if the process did not live through it."""
        thief: Thief | None = None
        try:
            self._player.ready()
            self._compute("at first")
            self._compute("again")
            thief = Thief(gpu, most)
            self._compute(f"others have taken {thief.taken / 1e6:.0f} MB more")
            self._event("vram_budget 100%", "budget", vram="100%")
            self._compute("after it")
            self._event("one more model, n_ctx 16384", "another_context", n_ctx=16384)
            self._compute("after it")
            thief.give_back()
            thief = None
            self._event("given back, vram_budget 100%", "budget", vram="100%")
            self._compute("after it")
            thief = Thief(gpu, most)
            # More at once than ever before: kernels of llama.cpp's own may want memory for it.
            self._compute(f"others have taken {thief.taken / 1e6:.0f} MB more; a longer prompt", prompts=(300,))
            self._compute("after it")
            thief.give_back()
            thief = None
            self._compute("given back; the longer prompt again", prompts=(300,))
        finally:
            if thief is not None:
                thief.give_back()
            self._player.end()

    def _event(self, name: str, do: str, **arguments: Any) -> None:
        answer = self._player.ask(do, _LIMIT_S, **arguments)
        outcome = answer.get("error") or f"{answer['slots']} slots"
        self._say(name, "; ".join([outcome, *answer["warnings"]]))

    def _compute(self, name: str, prompts: tuple[int, ...] = (100, 200)) -> None:
        rng = np.random.default_rng(3)
        most = self._player.facts["n_vocab"] - 1
        ids = rng.integers(min(300, most // 2), most, 24 + 300).tolist()
        steps, at = [[token] for token in ids[:24]], 24
        for length in prompts:
            steps.append(ids[at : at + length])
            at += length
        path = self._folder / "logits.npy"
        answer = self._player.ask("logits", _LIMIT_S, windows=[steps], keep=len(ids), path=str(path))
        if "error" in answer:
            self._say(name, answer["error"])
            return
        got = np.load(path)
        wanted = self._wanted.setdefault(prompts, got)
        error = float(nmse(got, wanted).max())
        mixed = self._row.kind == gpu_rows.AUTO
        garbage = not error < (_CPU_NMSE if mixed else _GPU_NMSE)
        same = "the same logits" if np.array_equal(got, wanted) else f"NMSE at most {error:.1e}"
        outcome = f"GARBAGE, {same}" if garbage else same
        self._say(name, "; ".join([f"{outcome}, {answer['slots']} slots", *answer["warnings"]]))

    def _say(self, event: str, outcome: str) -> None:
        self.lines.append({"row": str(self._row), "event": event, "outcome": outcome})
        print(f"{self._row}: {event}: {outcome}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", nargs="+", default=["all-moved:50", "auto:50"])
    parser.add_argument("--most", type=int)
    parser.add_argument("--gpu", default="CUDA0")
    parser.add_argument("--ram", default="100%")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    task = {"model": str(given.model), "n_layer": read_facts(given.model).n_layer, "n_ctx": 1024, "ubatch": 512}
    task |= {"gpu": given.gpu, "ram": given.ram, "threads": given.threads, "logits_all": True}
    task |= {"recall": None, "distance": None, "trace": None}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for text in given.rows:
            story = Story(gpu_rows.parse(text), task, Path(folder))
            try:
                story.tell(given.gpu, given.most)
            except GoneError as error:
                story._say("the process", str(error))
            lines += story.lines
    if given.csv:
        with given.csv.open("w", newline="") as out:
            table = csv.DictWriter(out, ("row", "event", "outcome"))
            table.writeheader()
            table.writerows(lines)


if __name__ == "__main__":
    main()
