"""Whether a model says what it did: logits and perplexity of rows of gpu_rows.py against stock llama.cpp, all in VRAM.

    .venv/bin/python bench/gpu_exactness.py MODEL [--rows ncmoe:50 auto:50 all-moved:50 auto:25] [--csv CSV]

Each row computes the same prose twice: one token after the other, and in prompts of several lengths. Reported are
whether the bits of the first tokens' logits are the same, their largest and mean NMSE, and the perplexity of all with
its relative difference from stock's (95 % interval, from the differences of single tokens). `all-moved` computes on the
GPU alone; `auto` may compute experts on the CPU, whose kernels round otherwise, as they do in stock's `ncmoe`.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import gpu_rows
import numpy as np
from gpu_players import GoneError, Player

from pyengine.bench.model_facts import read_facts

#: Tokens of a text that are computed before it is forgotten.
WINDOW = 512

#: What prompts are cut into, in turn.
_PROMPTS = (2, 30, 96, 128, 256)

#: Tokens whose logits are compared.
_KEPT = 160

_Logits = np.ndarray[Any, np.dtype[np.float32]]


def nmse(ours: _Logits, wanted: _Logits) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64 [tokens]."""
    return np.array([float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip(ours, wanted, strict=True)])


def steps(ids: list[int], single: bool) -> list[list[list[int]]]:
    """A text as windows of steps."""
    windows = []
    for start in range(0, len(ids), WINDOW):
        window, cut, at = ids[start : start + WINDOW], [], 0
        while at < len(window):
            length = 1 if single else _PROMPTS[len(cut) % len(_PROMPTS)]
            cut.append(window[at : at + length])
            at += length
        windows.append(cut)
    return windows


def compare(ours: _Logits, wanted: _Logits, losses: list[float], wanted_losses: list[float]) -> dict[str, Any]:
    error = nmse(ours, wanted)
    differences = [a - b for a, b in zip(losses, wanted_losses, strict=True)]
    middle = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "identical": bool(np.array_equal(ours, wanted)),
        "nmse_max": float(error.max()),
        "nmse_mean": float(error.mean()),
        "perplexity": math.exp(statistics.fmean(losses)),
        "difference": math.expm1(middle),
        "difference_low": math.expm1(middle - half),
        "difference_high": math.expm1(middle + half),
    }


class Reader:
    """A row's answers about the prose; files of logits go to a folder."""

    def __init__(self, row: gpu_rows.Row, task: dict[str, Any], folder: Path) -> None:
        self._folder = folder
        self._player = Player(row, task)

    def read(self, single: int, tokens: int) -> dict[str, tuple[_Logits, dict[str, Any]]]:
        """Of "single" and "prompts": logits and what the worker says. Raises GoneError."""
        try:
            self._player.ready()
            ids = self._player.ask("text", 60, tokens=tokens)["ids"]
            return {"single": self._part(ids[:single], True), "prompts": self._part(ids, False)}
        finally:
            self._player.end()

    def _part(self, ids: list[int], single: bool) -> tuple[_Logits, dict[str, Any]]:
        path = self._folder / "logits.npy"
        asked = {"windows": steps(ids, single), "keep": min(_KEPT, len(ids)), "path": str(path)}
        answer = self._player.ask("logits", 240, **asked)
        if "error" in answer:
            raise GoneError(answer["error"])
        return np.load(path), answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", nargs="+", default=["ncmoe:50", "all-moved:50", "auto:100", "auto:50", "auto:25"])
    parser.add_argument("--single", type=int, default=1024, help="tokens computed one by one")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens computed in prompts")
    parser.add_argument("--gpu", default="CUDA0")
    parser.add_argument("--ram", default="100%")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    try:
        rows = [gpu_rows.parse(text) for text in given.rows]
    except ValueError as error:
        parser.error(str(error))
    task = {"model": str(given.model), "n_layer": read_facts(given.model).n_layer, "n_ctx": WINDOW, "ubatch": WINDOW}
    task |= {"gpu": given.gpu, "ram": given.ram, "threads": given.threads, "logits_all": True}
    task |= {"recall": None, "distance": None, "trace": None}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        stock = Reader(gpu_rows.Row(gpu_rows.STOCK, None), task, Path(folder)).read(given.single, given.tokens)
        for row in rows:
            try:
                ours = Reader(row, task, Path(folder)).read(given.single, given.tokens)
            except GoneError as error:
                print(f"{row}: {error}", flush=True)
                continue
            for part, (logits, answer) in ours.items():
                wanted, reference = stock[part]
                found = compare(logits, wanted, answer["losses"], reference["losses"])
                known = {"model": given.model.name, "row": str(row), "part": part, "tokens": len(answer["losses"])}
                lines.append(known | found | {name: answer.get(name, "") for name in ("misses", "host_pairs")})
                say(lines[-1])
    if given.csv and lines:
        with given.csv.open("w", newline="") as out:
            table = csv.DictWriter(out, list(lines[0]))
            table.writeheader()
            table.writerows(lines)


def say(line: dict[str, Any]) -> None:
    same = "identical" if line["identical"] else f"NMSE at most {line['nmse_max']:.1e}, mean {line['nmse_mean']:.1e}"
    print(
        f"{line['row']} {line['part']}: {same}; perplexity of {line['tokens']} tokens {line['perplexity']:.4f}, "
        f"{line['difference']:+.3%} ({line['difference_low']:+.3%} to {line['difference_high']:+.3%}); "
        f"{line['misses'] or 0} missing, {line['host_pairs'] or 0} pairs on the CPU",
        flush=True,
    )


if __name__ == "__main__":
    main()
