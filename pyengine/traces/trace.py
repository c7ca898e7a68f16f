"""What a routing trace holds. It knows nothing of budgets, time or files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import PyengineError

_MOST_EXPERTS = 1 << 16


class TraceError(PyengineError, ValueError):
    """A routing trace that is damaged, of another model, or empty."""


@dataclass(frozen=True)
class TracedModel:
    """The model a trace belongs to. `name` is the file's name, empty if unknown, as is `architecture`."""

    name: str
    architecture: str
    n_layer: int
    n_expert: int
    n_expert_used: int


def _none(dtype: str, *shape: int) -> Callable[[], npt.NDArray[Any]]:
    return lambda: np.zeros(shape, dtype)


@dataclass(frozen=True)
class Prompts:
    """Micro-batches of several tokens: the distinct experts of each layer. Entry i * n_layer + layer of `offsets` and
    the one after it bound the experts of micro-batch i in one layer."""

    at: npt.NDArray[np.int64] = field(default_factory=_none("<i8", 0))
    """int64 [n]: decoded tokens before each; ascending"""
    tokens: npt.NDArray[np.int64] = field(default_factory=_none("<i8", 0))
    """int64 [n]: tokens of each"""
    offsets: npt.NDArray[np.int64] = field(default_factory=_none("<i8", 1))
    """int64 [n * n_layer + 1]"""
    experts: npt.NDArray[np.uint16] = field(default_factory=_none("<u2", 0))
    """uint16 [offsets[-1]]: ids within their layer, ascending in each layer"""
    pairs: npt.NDArray[np.uint16] = field(default_factory=_none("<u2", 0))
    """uint16 [offsets[-1]]: tokens that chose each, at most 65535"""

    def __len__(self) -> int:
        return len(self.tokens)

    def counts(self, n_layer: int) -> npt.NDArray[np.int64]:
        """int64 [n, n_layer]: distinct experts in each layer."""
        return np.diff(self.offsets).reshape(-1, n_layer)

    def of(self, index: int, layer: int, n_layer: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
        """(experts, pairs) of one micro-batch in one layer."""
        begin, end = self.offsets[index * n_layer + layer : index * n_layer + layer + 2]
        return self.experts[begin:end], self.pairs[begin:end]


@dataclass(frozen=True)
class Trace:
    """The routing of tokens computed one at a time, in order, and of the prompts between them.

    Layers are counted among those that have experts; ids are within their layer. What was not recorded has length 0.
    """

    model: TracedModel
    ids: npt.NDArray[np.uint16]
    """uint16 [n_token, n_layer, n_expert_used]: the router's order, most probable first, if the recorder knew it"""
    starts: npt.NDArray[np.int64] = field(default_factory=_none("<i8", 0))
    """int64 [n]: the tokens of `ids` that begin a sequence or come right after a prompt; ascending"""
    prompts: Prompts = field(default_factory=Prompts)
    tokens: npt.NDArray[np.int32] = field(default_factory=_none("<i4", 0))
    """int32 [n_token]: ids in the vocabulary"""
    weights: npt.NDArray[np.float16] = field(default_factory=_none("<f2", 0, 0, 0))
    """float16 [n_token, n_layer, n_expert_used]: routing weights of `ids`"""
    inputs: npt.NDArray[np.float16] = field(default_factory=_none("<f2", 0, 0, 0))
    """float16 [n_token, n_layer, n_embd]: gate inputs, what each layer's router and experts read"""
    seconds: npt.NDArray[np.float32] = field(default_factory=_none("<f4", 0))
    """float32 [n_token]: time that each took"""

    def __post_init__(self) -> None:
        _check(self)


def _check(trace: Trace) -> None:
    """Raise TraceError unless shapes and ranges agree."""
    model, ids = trace.model, trace.ids
    if not (0 < model.n_expert_used <= model.n_expert <= _MOST_EXPERTS and model.n_layer > 0):
        raise TraceError("its model's numbers of layers and experts are impossible")
    if ids.ndim != 3 or ids.shape[1:] != (model.n_layer, model.n_expert_used):
        raise TraceError(f"its ids have the shape {ids.shape}, which does not fit its model")
    if ids.size and int(ids.max()) >= model.n_expert:
        raise TraceError(f"it names expert {int(ids.max())} of {model.n_expert}")
    if not _ascending(trace.starts, len(ids)):
        raise TraceError("its starts are not ascending positions in the trace")
    _check_prompts(trace)
    for name in ("tokens", "weights", "inputs", "seconds"):
        if len(getattr(trace, name)) not in (0, len(ids)):
            raise TraceError(f"its {name} are not those of its tokens")
    if len(trace.weights) and trace.weights.shape != ids.shape:
        raise TraceError(f"its weights have the shape {trace.weights.shape}, its ids {ids.shape}")
    if len(trace.inputs) and trace.inputs.shape[1] != model.n_layer:
        raise TraceError(f"its gate inputs have the shape {trace.inputs.shape}, which does not fit its model")


def _check_prompts(trace: Trace) -> None:
    prompts, model = trace.prompts, trace.model
    if len(prompts.tokens) and int(prompts.tokens.min()) < 1:
        raise TraceError("its prompts have impossible lengths")
    if len(prompts.at) != len(prompts) or not _ascending(prompts.at, len(trace.ids)):
        raise TraceError("its prompts are not at ascending positions in the trace")
    offsets, n = prompts.offsets, len(prompts.experts)
    bounds = len(offsets) == len(prompts) * model.n_layer + 1 and _ascending(offsets, n)
    if not bounds or offsets[0] != 0 or offsets[-1] != n or len(prompts.pairs) != n:
        raise TraceError("its prompts' experts are not divided into layers")
    if n and int(prompts.experts.max()) >= model.n_expert:
        raise TraceError(f"its prompts name expert {int(prompts.experts.max())} of {model.n_expert}")
    if np.any(np.diff(offsets) > model.n_expert):
        raise TraceError("its prompts use impossible numbers of experts")


def _ascending(positions: npt.NDArray[np.int64], most: int) -> bool:
    if not len(positions):
        return True
    return bool(positions[0] >= 0 and positions[-1] <= most and not np.any(np.diff(positions) < 0))
