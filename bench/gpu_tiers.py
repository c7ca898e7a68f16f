"""Experts in VRAM, RAM and disk against stock llama.cpp on a GPU: decode and prefill by VRAM budget.

    .venv/bin/python bench/gpu_tiers.py MODEL [--rows ROW ...] [--rounds 2] [--gpu CUDA0] [--trace TRACE] [--csv CSV]

Needs llama-cpp-python built for the GPU. Rows (see gpu_worker.py) run in turn, each in a fresh process, by round.
The first row's logits are what the others' are compared with: tokens one by one, largest NMSE. With --trace the experts
that our rows use come from it (random weights route at random); --link throttles RAM to VRAM, bytes/s.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = (
    *("model", "row", "round", "link", "recall", "distance", "ram", "load_s", "prefill_tok_per_s"),
    *("decode_tok_per_s", "decode_p50_ms", "decode_p95_ms", "hit_rate", "misses_per_token", "prefetch_hits_per_token"),
    *("syncs_per_token", "ahead_per_token", "again_per_token", "link_mb_per_token", "link_gb_per_s"),
    *("disk_reads_per_token", "predict_ms_per_token", "stall_ms_per_token", "slots", "ram_slots", "policy"),
    *("identical", "nmse", "prompt_nmse"),
)


def compare(reference: Path, other: Path) -> dict[str, Any]:
    """Of two files of logits [token, vocabulary]: whether those of tokens computed one by one are the same, their
    largest NMSE, and that of the prompt, which is last."""
    a, b = np.load(reference), np.load(other)
    error = ((a - b) ** 2).sum(axis=1) / (a**2).sum(axis=1)
    same = bool(np.array_equal(a[:-1], b[:-1]))
    return {"identical": same, "nmse": float(error[:-1].max()), "prompt_nmse": float(error[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", nargs="+", default=["stock", "pyengine:100", "pyengine:50"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--warm-tokens", type=int, default=64)
    parser.add_argument("--warm-chunks", type=int, default=3)
    parser.add_argument("--gpu", default="CUDA0", help="or several, CUDA0,CUDA1: layers divided as llama.cpp does")
    parser.add_argument("--ram", default="100%")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--link", type=int, default=0)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--recall", type=float, help="of a simulated predictor, with --trace")
    parser.add_argument("--distance", type=int, default=1, help="so many layers ahead it looks")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--seconds", type=int, default=90, help="the most that one row may take")
    given = parser.parse_args()

    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        reference: Path | None = None
        for number in range(given.rounds):
            for i, row in enumerate(given.rows):
                logits = Path(folder, f"{number}-{i}.npy")
                task = vars(given) | {
                    "row": row,
                    "model": str(given.model),
                    "trace": str(given.trace) if given.trace else None,
                    "trace_from": 6000 * number,
                    "logits": str(logits),
                    "csv": None,
                }
                result = work(task, given.seconds)
                if result is None:
                    continue
                if reference is None:
                    reference = logits
                result |= compare(reference, logits)
                result |= {"model": given.model.name, "round": number, "link": given.link, "recall": given.recall}
                result |= {"ram": given.ram, "distance": given.distance}
                lines.append(result)
                say(result)
                if given.csv:
                    write(given.csv, lines)
    summarise(lines)


def work(task: dict[str, Any], seconds: int) -> dict[str, Any] | None:
    command = [sys.executable, str(Path(__file__).with_name("gpu_worker.py")), json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        print(f"{task['row']}: not done after {seconds} s", flush=True)
        return None
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line[7:])
            return result
    print(f"{task['row']}: failed ({done.returncode}): {done.stderr[-1500:]}", flush=True)
    return None


def say(r: dict[str, Any]) -> None:
    more = ""
    if "hit_rate" in r:
        more = (
            f", hits {r['hit_rate']:.1%}, {r['misses_per_token']:.1f} missing, {r['prefetch_hits_per_token']:.1f} in "
            f"time, {r['link_mb_per_token']:.1f} MB at {r['link_gb_per_s']:.1f} GB/s, stall "
            f"{r['stall_ms_per_token']:.2f} ms, {r['syncs_per_token']:.0f} waits for the GPU "
            f"({r['ahead_per_token']:.0f} begun ahead, {r['again_per_token']:.1f} again), "
            f"{r['disk_reads_per_token']:.1f} disk reads"
        )
    same = "identical" if r["identical"] else f"NMSE {r['nmse']:.1e}"
    print(
        f"{r['model']} {r['row']} round {r['round']}: decode {r['decode_tok_per_s']:.1f} tok/s (p50 "
        f"{r['decode_p50_ms']:.2f} ms), prefill {r['prefill_tok_per_s']:.0f}, load {r['load_s']:.1f} s, {same}, "
        f"prompt {r['prompt_nmse']:.1e}{more}",
        flush=True,
    )


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as out:
        table = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(lines)


def summarise(lines: list[dict[str, Any]]) -> None:
    print("| row | decode tok/s | of the first row | prefill tok/s | of the first row |")
    print("| --- | ---: | ---: | ---: | ---: |")
    rows = list(dict.fromkeys(line["row"] for line in lines))

    def median(row: str, column: str) -> float:
        return statistics.median(line[column] for line in lines if line["row"] == row)

    for row in rows:
        decode, prefill = median(row, "decode_tok_per_s"), median(row, "prefill_tok_per_s")
        first = rows[0]
        print(
            f"| {row} | {decode:.1f} | {decode / median(first, 'decode_tok_per_s'):.2f} | {prefill:.0f} | "
            f"{prefill / median(first, 'prefill_tok_per_s'):.2f} |"
        )


if __name__ == "__main__":
    main()
