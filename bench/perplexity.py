"""Perplexity of the bundled model at several budgets against stock llama.cpp: prefill must not change the numbers.

.venv/bin/python bench/perplexity.py [--text /usr/share/common-licenses/GPL-3] [--windows 8]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from common import in_stock_process, write_csv

BUDGETS = ("12.5%", "25%", "50%", "100%")
WINDOW = 512


def log_likelihood(llm: Any, tokens: list[int]) -> tuple[float, int]:
    """Sum of the natural logarithms of the probabilities of tokens[1:], and their number. One prefill per window."""
    import numpy as np

    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, WINDOW):
        window = tokens[start : start + WINDOW]
        llm.reset()
        llm.eval(window)
        logits = llm.scores[: len(window) - 1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total += float(logits[np.arange(len(window) - 1), window[1:]].sum())
        count += len(window) - 1
    return total, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="/usr/share/common-licenses/GPL-3")
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores this process may use")
    parser.add_argument("--model", default="")
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    text = Path(arguments.text).read_bytes()

    def measure(llm: Any) -> tuple[float, int]:
        return log_likelihood(llm, llm.tokenize(text)[: arguments.windows * WINDOW])

    common = {"n_ctx": WINDOW, "logits_all": True, "n_threads": arguments.threads, "verbose": False}
    if arguments.stock:
        from llama_cpp import Llama as Stock

        print(json.dumps(measure(Stock(arguments.model, **common, n_threads_batch=arguments.threads))))
        return

    from pyengine import Llama, bundled_model
    from pyengine.llama import default_threads

    model, threads = arguments.model or str(bundled_model()), arguments.threads or default_threads()
    common["n_threads"] = threads
    same = ["--model", model, "--threads", threads, "--text", arguments.text, "--windows", arguments.windows]
    results = {"stock": in_stock_process(__file__, *map(str, same))}
    for budget in BUDGETS:
        llm = Llama(model, ram_budget=budget, **common, n_threads_batch=threads)
        results[budget] = measure(llm)
        llm.close()
    rows = []
    for name, (total, count) in results.items():
        difference = math.exp(-total / count) / math.exp(-results["stock"][0] / results["stock"][1]) - 1
        rows.append((name, count, f"{math.exp(-total / count):.6f}", f"{difference:.2e}", threads))
        print(f"{name:>6}: perplexity {math.exp(-total / count):.6f} over {count} tokens, {difference:+.2e} of stock")
    write_csv("perplexity.csv", ("run", "tokens", "perplexity", "relative_difference", "n_threads"), rows)


if __name__ == "__main__":
    main()
