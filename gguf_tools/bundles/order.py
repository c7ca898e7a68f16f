"""Which experts of a layer should lie side by side on disk: those that tokens use together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_tools.bundles.format import Tables
from gguf_tools.errors import RequestError
from pyengine.traces import TraceError, load_trace

_MOST_ROUNDS = 50


def order_by_trace(tables: Tables, path: Path) -> None:
    """Give the records of each layer places in the order that a routing trace suggests; layers stay where they are.

    Raises:
        RequestError: the file is no trace, or one of another model.
        OSError: it cannot be read.
    """
    try:
        trace = load_trace(path)
    except TraceError as error:
        raise RequestError(str(error)) from error
    n_layer, n_expert = tables.layers.shape[1], int(tables.layers["n_expert"].max())
    if trace.model.n_layer != n_layer or trace.model.n_expert > n_expert:
        raise RequestError(
            f"{path} is of another model: {trace.model.n_layer} layers of {trace.model.n_expert} experts, not "
            f"{n_layer} of {n_expert}"
        )
    orders = [
        chain(used_together(trace.ids[:, layer, :], int(row["n_expert"]))) for layer, row in enumerate(tables.layers[0])
    ]
    place(tables, orders)
    tables.set_order(f"trace {path.name}")


def used_together(ids: npt.NDArray[Any], n_expert: int) -> npt.NDArray[np.int64]:
    """How many tokens use both of two experts: int64 [n_expert, n_expert], zero on the diagonal.

    Args:
        ids: the experts of each token in one layer, [n_token, n_used].
        n_expert: at least 1 + the largest of them.
    """
    pairs = np.zeros((n_expert, n_expert), np.int64)
    for a in range(ids.shape[1]):
        for b in range(ids.shape[1]):
            if a != b:
                np.add.at(pairs, (ids[:, a], ids[:, b]), 1)
    return pairs


def chain(together: npt.NDArray[np.int64]) -> list[int]:
    """An order of all experts in which neighbours are used together often.

    Joins the pairs from the strongest to the weakest wherever both are still ends of a chain, then turns pieces of the
    chain round as long as that helps (the greedy and the 2-opt heuristic of the travelling salesman).

    Args:
        together: symmetric, [n_expert, n_expert].
    """
    order = _improved(_greedy(together), together)
    return [int(e) for e in order]


def _greedy(together: npt.NDArray[np.int64]) -> list[int]:
    n = len(together)
    chains = {e: [e] for e in range(n)}  # the chain each expert is in
    first, second = np.triu_indices(n, 1)
    for i in np.argsort(-together[first, second], kind="stable"):
        a, b = chains[int(first[i])], chains[int(second[i])]
        e, f = int(first[i]), int(second[i])
        if a is b or e not in (a[0], a[-1]) or f not in (b[0], b[-1]):
            continue
        joined = (a if a[-1] == e else a[::-1]) + (b if b[0] == f else b[::-1])
        for expert in joined:
            chains[expert] = joined
    return chains[0]


def _improved(order: list[int], together: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    path = np.array(order, np.intp)
    n = len(path)
    # A partner beyond each end that is worth nothing makes turning round an end an ordinary case.
    weight = np.zeros((n + 1, n + 1), np.int64)
    weight[:n, :n] = together
    for _ in range(_MOST_ROUNDS):
        better = False
        for i in range(n - 1):
            inner = np.concatenate(([n], path, [n]))
            # Turn path[i:j+1] round, for every j > i: what its two ends gain.
            before, after = inner[i], inner[i + 3 :]
            j = path[i + 1 :]
            gain = weight[before, j] + weight[path[i], after] - weight[before, path[i]] - weight[j, after]
            best = int(np.argmax(gain))
            if gain[best] > 0:
                path[i : i + 2 + best] = path[i : i + 2 + best][::-1]
                better = True
        if not better:
            break
    return path


def place(tables: Tables, orders: list[list[int]]) -> None:
    """Put the records of layer after layer in these orders, for every variant."""
    at = len(tables.content)
    for layers, places in zip(tables.layers, tables.places, strict=True):
        for layer, order in zip(layers, orders, strict=True):
            experts = int(layer["first"]) + np.array(order)
            places["offset"][experts] = at + int(layer["record_bytes"]) * np.arange(len(order), dtype=np.uint64)
            at += int(layer["record_bytes"]) * len(order)
