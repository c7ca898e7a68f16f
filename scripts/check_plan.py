"""Compare the planner's predictions with real runs: decode and prefill at several budgets, before and after a trace.

    python scripts/check_plan.py [-m MODEL] [--bundle FILE] [--budgets 12.5 25 50 75 100] [--tokens 64] [--rounds 2]
    python scripts/check_plan.py -m MODEL --bench FOLDER

The first form runs the benchmark's child itself; the second takes what `pyengine bench` wrote. Of several rounds the
fastest counts. Unless --trace names one, a trace is recorded from other continuations than those that are measured. The
machine should be idle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pyengine import Llama, bundled_model
from pyengine.bench.results import read_run
from pyengine.bench.texts import long_text, short_prompts
from pyengine.planning.measured import Measured
from pyengine.planning.predict import ExpertCounts, decode_seconds, prefill_seconds
from pyengine.planning.probe import measure
from pyengine.planning.routing import Routing, routing_of_trace, uniform_routing
from pyengine.planning.shape import ModelShape, read_shape
from pyengine.recorder import TraceRecorder
from pyengine.trace import Trace, load_trace

PROMPTS = 3
#: Tokens of context before a decoded one, besides half of those decoded: the benchmark's short prompts.
PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Real:
    """What was measured at one budget. Speeds in tokens per second."""

    name: str
    bundle: str
    budget: int
    prefill_tokens: int
    n_tokens: int
    hits: float
    decode: float
    prefill: float


def record(model: Path, n_token: int) -> Trace:
    """The routing of other continuations of such prompts as are measured: drawn at random, not the likeliest."""
    llm = Llama(model, ram_budget="auto", n_ctx=512)
    try:
        assert llm.engine is not None
        recorder = TraceRecorder(llm.engine.native, model)
        llm.observers.append(recorder.drain)
        llm.set_seed(1)
        for prompt in short_prompts()[1:PROMPTS]:
            llm.reset()
            for _ in itertools.islice(llm.generate(llm.tokenize(prompt.encode()), temp=0.8), n_token):
                pass
        llm.reset()
        llm.eval(llm.tokenize(long_text().encode())[-300:])
        return recorder.trace()
    finally:
        llm.close()


def own_runs(shape: ModelShape, arguments: argparse.Namespace, n_threads: int) -> Iterator[Real]:
    """Run the benchmark's child at every budget."""
    for share in arguments.budgets:
        budget = max(shape.info.least_budget, int(share / 100 * shape.info.slot_bytes))
        task = {
            "model": str(shape.path),
            "kind": "lru",
            "budget": budget,
            "bundle": arguments.bundle,
            "n_tokens": arguments.tokens,
            "n_prompts": PROMPTS,
            "prefill_tokens": arguments.prefill,
            "limit_s": 60.0,
            "n_threads": n_threads,
        }
        rounds = []
        for _ in range(arguments.rounds):
            command = [sys.executable, "-m", "pyengine.bench.child"]
            child = subprocess.run(
                command,
                input=json.dumps(task),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
            result = json.loads(child.stdout)
            if result["status"] != "ok":
                raise SystemExit(f"the run failed: {result['reason']}")
            rounds.append(result["phases"])
        decode, prefill = (max(r[n]["tokens"] / r[n]["seconds"] for r in rounds) for n in ("decode", "prefill"))
        counts = rounds[0]["decode"]["counts"]
        hits = counts["hits"] / (counts["hits"] + counts["misses"])
        name = f"{share:g}%"
        yield Real(name, arguments.bundle, budget, arguments.prefill, arguments.tokens, hits, decode, prefill)


def bench_runs(shape: ModelShape, folder: Path) -> Iterator[Real]:
    """The rows of a benchmark that ran this model from limited slots."""
    run = read_run(folder)
    settings = run.record["settings"]
    usable = [
        s
        for s in run.samples
        if s.model == shape.path.name and s.kind in ("lru", "lru-bundle") and s.decode_tok_per_s and s.prefill_tok_per_s
    ]
    for name in dict.fromkeys(s.row for s in usable):
        group = [s for s in usable if s.row == name]
        yield Real(
            name,
            "use" if group[0].kind == "lru-bundle" else "off",
            group[0].budget_bytes,
            settings["prefill_tokens"],
            settings["n_tokens"],
            max(s.hit_rate or 0.0 for s in group),
            max(s.decode_tok_per_s or 0.0 for s in group),
            max(s.prefill_tok_per_s or 0.0 for s in group),
        )


def predicted(shape: ModelShape, routing: Routing, measured: Measured, real: Real) -> tuple[float, float, float]:
    """(hit rate, decode, prefill) for what was run; speeds in tokens per second."""
    layers, slots = [c.layers for c in shape.classes], shape.slots(real.budget)
    counts = ExpertCounts(shape.info.n_layer, shape.info.n_expert_used)
    prefill = prefill_seconds(
        measured,
        counts,
        real.prefill_tokens,
        lambda n, first: routing.prefill(n, layers, slots, cold=first),
        cold=False,
    )
    decode = routing.decode(layers, slots)
    n_past = PROMPT_TOKENS + real.n_tokens // 2
    return decode.hit_rate, 1 / decode_seconds(measured, decode, n_past), real.prefill_tokens / prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=None)
    parser.add_argument("--bench", type=Path, help="folder of a finished benchmark to compare with")
    parser.add_argument("--trace", type=Path, help="routing trace")
    parser.add_argument("--budgets", type=float, nargs="+", default=[12.5, 25, 50, 75, 100], help="percent")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bundle", default="off", help="use, off, or the bundle's file")
    parser.add_argument("--out", type=Path, help="write all figures here, as JSON")
    arguments = parser.parse_args()
    model = arguments.model or Path(bundled_model())
    shape = read_shape(model)
    info = shape.info
    bundles = ("off", "use") if arguments.bench else (arguments.bundle,)
    probes = {bundle: measure(shape, bundle=bundle) for bundle in bundles}
    for bundle, measured in probes.items():
        print(f"probe, bundle {bundle}: {json.dumps(asdict(measured))}", flush=True)
    traced = routing_of_trace(load_trace(arguments.trace) if arguments.trace else record(model, arguments.tokens))
    assert traced is not None
    routings = {"uniform": uniform_routing(info.n_layer, info.n_expert, info.n_expert_used), "trace": traced}
    runs = (
        bench_runs(shape, arguments.bench)
        if arguments.bench
        else own_runs(shape, arguments, probes[bundles[0]].n_threads)
    )
    report, worst = [], dict.fromkeys(routings, 0.0)
    for real in runs:
        print(f"{real.name:>16}  hits {100 * real.hits:5.1f} %", end="")
        for name, routing in routings.items():
            hits, decode, prefill = predicted(shape, routing, probes[real.bundle], real)
            errors = decode / real.decode - 1, prefill / real.prefill - 1
            worst[name] = max(worst[name], *map(abs, errors))
            print(
                f" | {name}: hits {100 * hits:5.1f} %, "
                f"decode {decode:.3g} of {real.decode:.3g} ({100 * errors[0]:+.0f} %), "
                f"prefill {prefill:.3g} of {real.prefill:.3g} ({100 * errors[1]:+.0f} %)",
                end="",
            )
            report.append({"real": asdict(real), "routing": name, "hits": hits, "decode": decode, "prefill": prefill})
        print(flush=True)
    print("largest error: " + ", ".join(f"{name} {100 * error:.0f} %" for name, error in worst.items()))
    if arguments.out:
        probed = {bundle: asdict(measured) for bundle, measured in probes.items()}
        arguments.out.write_text(json.dumps({"probes": probed, "runs": report}, indent=1))


if __name__ == "__main__":
    main()
