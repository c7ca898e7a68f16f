"""A model larger than VRAM and RAM together: experts in both and on disk, beside stock llama.cpp with the same limits.

    .venv/bin/python bench/gpu_three_tiers.py MODEL [--vram 12.5] [--ram 37.5] [--trace TRACE] [--csv CSV]

Every row runs in a fresh process, with the file out of the page cache and memory taken away down to the RAM budget and
--beside GB for everything else (balloon.py). Rows: `stock` has as many of the last layers' experts in VRAM as the
budget allows and maps the rest, so the kernel keeps in RAM what fits there; `pyengine` routes as stock does;
`pyengine-trace` takes its experts from the trace, as a trained router would (random weights route at random).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import balloon
import gpu_rows
import llama_cpp
import numpy as np

COLUMNS = (
    *("model", "row", "round", "vram_percent", "ram_percent", "beside_gb", "left_gb", "load_s", "fill_s"),
    *("prefill_cold_tok_per_s", "prefill_tok_per_s", "first_token_ms", "decode_tok_per_s", "decode_p50_ms"),
    *("decode_p95_ms", "tokens", "read_mb_per_token", "disk_gb_per_s", "hit_rate", "misses_per_token"),
    *("ram_hits_per_token", "disk_reads_per_token", "demotions_per_token", "link_mb_per_token", "back_mb_per_token"),
    *("stall_ms_per_token", "slots", "ram_slots", "policy"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", nargs="+", default=["pyengine", "stock", "pyengine-trace"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vram", type=float, default=12.5, help="percent of the expert bytes")
    parser.add_argument("--ram", type=float, default=37.5, help="likewise")
    parser.add_argument("--beside", type=float, default=4.0, help="GB left to everything but experts")
    parser.add_argument("--no-limit", action="store_true", help="take no memory away: stock then has all of it")
    parser.add_argument("--tokens", type=int, default=128, help="the most that are decoded")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode-seconds", type=float, default=15)
    parser.add_argument("--gpu", default="CUDA0")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--trace-from", type=int, default=6000)
    parser.add_argument("--recall", type=float, help="of a simulated predictor, with --trace")
    parser.add_argument("--distance", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=100, help="the most that one row may take")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print("RESULT " + json.dumps(work(given, given.work)), flush=True)
        return
    lines: list[dict[str, Any]] = []
    for number in range(given.rounds):
        for row in given.rows:
            if row == "pyengine-trace" and given.trace is None:
                continue
            try:
                result = in_a_small_machine(given, row)
            except (RuntimeError, subprocess.TimeoutExpired) as why:
                print(f"{row}: {why}", flush=True)
                continue
            result |= {"model": given.model.name, "row": row, "round": number, "beside_gb": given.beside}
            result |= {"vram_percent": given.vram, "ram_percent": given.ram}
            lines.append(result)
            print(", ".join(f"{name} {round_off(result[name])}" for name in COLUMNS if name in result), flush=True)
            if given.csv:
                with given.csv.open("w", newline="") as out:
                    table = csv.DictWriter(out, COLUMNS)
                    table.writeheader()
                    table.writerows(lines)


def round_off(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def in_a_small_machine(given: argparse.Namespace, row: str) -> dict[str, Any]:
    forget_pages(given.model)
    command = [sys.executable, __file__, *sys.argv[1:], "--work", row]
    if given.no_limit:
        return result_of(command, given.seconds)
    experts = expert_bytes(given.model)
    with balloon.leave(int(given.ram / 100 * experts + given.beside * 1e9)) as left:
        return result_of(command, given.seconds) | {"left_gb": left / 1e9}


def result_of(command: list[str], seconds: int) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line[7:])
            return result
    raise RuntimeError(f"failed ({done.returncode}): {done.stderr[-1500:]}")


def expert_bytes(model: Path) -> int:
    from pyengine.native import NativeEngine

    engine = NativeEngine(model)
    try:
        return engine.info.slot_bytes
    finally:
        engine.close()


def forget_pages(model: Path) -> None:
    with model.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """What this process has had read from storage, mapped files included; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def work(given: argparse.Namespace, row: str) -> dict[str, Any]:
    """One row, in this process."""
    options = {"n_ctx": 4096, "n_batch": 512, "n_threads": given.threads, "n_threads_batch": given.threads}
    out: dict[str, Any] = {}
    start = time.perf_counter()
    engine = None
    if row == "stock":
        from pyengine.native import NativeEngine

        probe = NativeEngine(given.model)
        n_layer = probe.info.n_layer
        probe.close()
        row_task = {"model": str(given.model), "gpu": given.gpu, "n_layer": n_layer, "ubatch": 512, "n_ctx": 4096}
        model: Any = gpu_rows.load(
            gpu_rows.parse(f"ncmoe:{given.vram}"), row_task | {"threads": given.threads, "ram": "0", "recall": None}
        )
    else:
        from pyengine import Llama

        budgets = {"vram_budget": f"{given.vram}%", "ram_budget": f"{given.ram}%"}
        model = Llama(str(given.model), gpu=given.gpu, **budgets, **options)
        engine = model.engine.native
    out["load_s"] = time.perf_counter() - start
    run = Run(model, 7)
    out["first_token_ms"] = run.compute(run.tokens(1)) * 1000
    start = time.perf_counter()
    while engine is not None and time.perf_counter() - start < 15:
        stats = engine.stats()
        if stats["ram_resident"] >= stats["ram_slots"]:
            break
        time.sleep(0.05)
    out["fill_s"] = time.perf_counter() - start
    if row == "pyengine-trace":
        with np.load(given.trace) as trace:
            ids = trace["ids"][given.trace_from : given.trace_from + 6000].astype(np.int32)
        engine.set_replay(ids)
        if given.recall is not None:
            engine.set_prefetch_rules(replay_recall=given.recall, replay_distance=given.distance)
    prompt = run.tokens(given.prompt)
    for name in ("prefill_cold_tok_per_s", "prefill_tok_per_s"):
        run.forget()
        out[name] = len(prompt) / run.compute(prompt)
    run.forget()
    decode(run, 64, given.decode_seconds / 2)
    before, read = ({} if engine is None else engine.stats()), bytes_read()
    times = decode(run, given.tokens, given.decode_seconds)
    out["read_mb_per_token"] = (bytes_read() - read) / 1e6 / len(times)
    out["tokens"] = len(times)
    out["decode_tok_per_s"] = len(times) / sum(times)
    out["decode_p50_ms"], out["decode_p95_ms"] = (float(q) * 1000 for q in np.percentile(times, (50, 95)))
    if engine is not None:
        after = engine.stats()
        per = {name: (after[name] - before[name]) / len(times) for name in after}
        seen = per["hits"] + per["misses"]
        out |= {"hit_rate": per["hits"] / seen if seen else 1.0, "misses_per_token": per["misses"]}
        out |= {"ram_hits_per_token": per["ram_hits"], "disk_reads_per_token": per["reads"]}
        out |= {"demotions_per_token": per["ram_demotions"], "stall_ms_per_token": per["stall_ns"] / 1e6}
        out |= {"link_mb_per_token": per["link_bytes"] / 1e6, "back_mb_per_token": per["back_bytes"] / 1e6}
        out["read_mb_per_token"] = per["bytes_read"] / 1e6
        out["disk_gb_per_s"] = per["bytes_read"] / per["io_ns"] if per["io_ns"] else 0.0
        out |= {"slots": after["slots"], "ram_slots": after["ram_slots"], "policy": model.engine.policy}
    model.close()
    return out


class Run:
    """A model and the tokens that it is given: the same for every row."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self._past = model, 0
        self._random = np.random.default_rng(seed)

    def tokens(self, n: int) -> list[int]:
        return [int(t) for t in self._random.integers(300, min(30000, self.model.n_vocab() - 1), n)]

    def compute(self, tokens: list[int]) -> float:
        """Seconds that it took."""
        batch, context = self.model._batch, self.model._ctx
        start = time.perf_counter()
        for at in range(0, len(tokens), 512):
            part = tokens[at : at + 512]
            batch.set_batch(part, self._past, False)
            context.decode(batch)
            self._past += len(part)
        llama_cpp.llama_synchronize(context.ctx)
        return time.perf_counter() - start

    def forget(self) -> None:
        self.model._ctx.kv_cache_clear()
        self._past = 0


def decode(run: Run, most: int, seconds: float) -> list[float]:
    """Times of single tokens, as many as fit."""
    times: list[float] = []
    while len(times) < most and sum(times) < seconds:
        times.append(run.compute(run.tokens(1)))
    return times


if __name__ == "__main__":
    main()
