"""Figures of gpu_tiers.py: one turn of one row as a line of CSV, and ratios of turns of the same round."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_rows

from pyengine.bench.verdicts import paired

COLUMNS = (
    *(
        "model",
        "row",
        "kind",
        "share",
        "match",
        "round",
        "what",
        "prompt_tokens",
        "link_gb_per_s",
        "r",
        "recall",
        "distance",
    ),
    *("ram", "ubatch", "tokens", "seconds", "tok_per_s", "p50_ms", "p95_ms", "hit_rate", "misses_per_token"),
    *("prefetch_hits_per_token", "host_pairs_per_token", "link_mb_per_token", "link_share", "syncs_per_token"),
    *("begun_ahead_per_token", "computed_again_per_token", "reads_per_token", "predict_ms_per_token"),
    *("stall_ms_per_token", "slots", "policy"),
)


def line(answer: dict[str, Any], speed: float, **known: Any) -> dict[str, Any]:
    """A turn. speed: of the link, bytes/s; link_share: how much of the time moving alone would take at that."""
    times = answer["times"]
    n = answer.get("tokens", len(times))
    out = known | {"tokens": n, "seconds": sum(times), "tok_per_s": n / sum(times), "link_gb_per_s": speed / 1e9}
    if len(times) > 1:
        out["p50_ms"] = statistics.median(times) * 1000
        out["p95_ms"] = statistics.quantiles(times, n=20)[-1] * 1000
    if "hits" not in answer:
        return out
    seen = answer["hits"] + answer["misses"]
    out["hit_rate"] = answer["hits"] / seen if seen else 1.0
    for name in ("misses", "prefetch_hits", "host_pairs", "syncs", "begun_ahead", "computed_again", "reads"):
        if name in answer:
            out[f"{name}_per_token"] = answer[name] / n
    for name in ("predict", "stall"):
        out[f"{name}_ms_per_token"] = answer[f"{name}_ns"] / n / 1e6
    out["link_mb_per_token"] = answer["link_bytes"] / n / 1e6
    out["link_share"] = answer["link_bytes"] / speed / sum(times)
    return out | {"slots": answer["slots"], "policy": answer["policy"]}


def say(turn: dict[str, Any]) -> None:
    what = f"prompt of {turn['prompt_tokens']}" if turn["prompt_tokens"] else "decode"
    more = ""
    if "hit_rate" in turn:
        more = (
            f", hits {turn['hit_rate']:.1%}, {turn['misses_per_token']:.1f} missing, "
            f"{turn.get('host_pairs_per_token', 0):.1f} on the CPU, {turn['link_mb_per_token']:.1f} MB = "
            f"{turn['link_share']:.0%} of the link, stall {turn['stall_ms_per_token']:.2f} ms, {turn['policy']}"
        )
    print(
        f"{turn['row']} round {turn['round']}, {turn['link_gb_per_s']:.1f} GB/s, {what}: {turn['tok_per_s']:.1f} tok/s"
        f"{more}",
        flush=True,
    )


def add_r(turns: Sequence[dict[str, Any]], n_layer: int) -> None:
    """R: the time to move one expert over that of one layer of stock with all in VRAM."""
    times = [t["p50_ms"] for t in turns if t["kind"] == gpu_rows.STOCK and "p50_ms" in t]
    experts = [t["expert_mb"] for t in turns if t["expert_mb"]]
    for t in turns if times and experts else ():
        t["r"] = experts[0] / t["link_gb_per_s"] / (statistics.median(times) / n_layer)


def write(path: Path, turns: Sequence[dict[str, Any]]) -> None:
    def cell(value: Any) -> Any:
        return f"{value:.6g}" if isinstance(value, float) else value

    with path.open("w", newline="") as out:
        table = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows({name: cell(value) for name, value in turn.items()} for turn in turns)


class _Turn(NamedTuple):
    """What verdicts.paired() looks at."""

    round: tuple[str, int]
    decode_tok_per_s: float


def ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    """Our speed over theirs in rounds that both played, loaded together: geometric mean and 95 % interval."""
    found = paired(*([_Turn((t["match"], t["round"]), t["tok_per_s"]) for t in turns] for turns in (ours, theirs)))  # type: ignore
    if found is None:
        return ""
    interval = "" if found.low is None else f" ({found.low:.3f} to {found.high:.3f})"
    return f"{found.middle:.3f}{interval}"


def summarise(turns: Sequence[dict[str, Any]]) -> None:
    """Tables of medians, and of the ratios of pyengine's best row of each share, `auto` if it played, to the others of
    the same share, or of none."""
    for what, prompt, link in dict.fromkeys((t["what"], t["prompt_tokens"], t["link"]) for t in turns):
        here = [t for t in turns if (t["what"], t["prompt_tokens"], t["link"]) == (what, prompt, link)]
        r = f", R = {here[0]['r']:.2f}" if here[0].get("r") else ""
        print(f"\n{what} {prompt or ''}, {here[0]['link_gb_per_s']:.1f} GB/s{r}")
        print("| row | tok/s, median | link share | `auto` of the same share / row |\n| --- | ---: | ---: | --- |")
        for row in dict.fromkeys(t["row"] for t in here):
            mine = [t for t in here if t["row"] == row]
            speed = statistics.median(t["tok_per_s"] for t in mine)
            shares = [t["link_share"] for t in mine if "link_share" in t]
            share = f"{statistics.median(shares):.0%}" if shares else ""
            against = []
            for auto in dict.fromkeys(t["row"] for t in here if t["kind"] == gpu_rows.AUTO and t["row"] != row):
                ours = [t for t in here if t["row"] == auto]
                if mine[0]["share"] in (None, ours[0]["share"]):
                    against.append(f"{auto}: {ratio(ours, mine)}")
            print(f"| {row} | {speed:.1f} | {share} | {'; '.join(against)} |")
