"""Greedy text at several budgets against stock llama.cpp, token by token.

.venv/bin/python bench/greedy_identity.py [--prompts 20] [--tokens 256] [--threads 0]
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from common import PROMPTS, in_stock_process, write_csv

BUDGETS = ("12.5%", "25%", "50%", "100%")


def greedy(llm: Any, prompt: str, n_tokens: int) -> list[int]:
    """Token ids of the model's answer to one user turn, temperature 0, end-of-text ignored so that all are as long."""
    import numpy as np

    turn = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    llm.reset()
    llm.eval(llm.tokenize(turn.encode(), special=True))
    tokens: list[int] = []
    for _ in range(n_tokens):
        logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))
        tokens.append(int(logits.argmax()))
        llm.eval(tokens[-1:])
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores this process may use")
    parser.add_argument("--model", default="")
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prompts = PROMPTS[: arguments.prompts]
    common = {"n_ctx": 1024, "n_threads": arguments.threads, "n_threads_batch": arguments.threads, "verbose": False}
    if arguments.stock:
        from llama_cpp import Llama as Stock

        llm = Stock(arguments.model, **common)
        print(json.dumps([greedy(llm, prompt, arguments.tokens) for prompt in prompts]))
        return

    from pyengine import Llama, bundled_model
    from pyengine.llama import default_threads

    model, threads = arguments.model or str(bundled_model()), arguments.threads or default_threads()
    common |= {"n_threads": threads, "n_threads_batch": threads}
    same = ["--model", model, "--threads", threads, "--prompts", len(prompts), "--tokens", arguments.tokens]
    expected = in_stock_process(__file__, *map(str, same))
    rows, wrong = [], 0
    for budget in BUDGETS:
        llm = Llama(model, ram_budget=budget, **common)
        for number, prompt in enumerate(prompts):
            before = llm.expert_stats()
            identical = greedy(llm, prompt, arguments.tokens) == expected[number]
            after = llm.expert_stats()
            hits, misses = after["hits"] - before["hits"], after["misses"] - before["misses"]
            read = after["bytes_read"] - before["bytes_read"]
            rows.append((budget, number, arguments.tokens, identical, f"{hits / (hits + misses):.4f}", read, threads))
            wrong += not identical
        llm.close()
        mine = [row for row in rows if row[0] == budget]
        rate = sum(float(row[4]) for row in mine) / len(mine)
        print(f"{budget:>6}: {sum(row[3] for row in mine)} of {len(mine)} identical, hit rate {rate:.1%}", flush=True)
    write_csv(
        "greedy_identity.csv", ("budget", "prompt", "tokens", "identical", "hit_rate", "bytes_read", "n_threads"), rows
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
