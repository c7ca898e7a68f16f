"""Which metadata keys say how wide an expert is, and which shared experts take their width from that.

llama.cpp's models differ: most read expert_feed_forward_length, those whose blocks all have experts (Mixtral's llama,
olmoe, granitemoe ...) read feed_forward_length, and some converters write both. Shared experts have a key of their own
(expert_shared_feed_forward_length), or else are expert_shared_count times as wide as an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gguf_tools.errors import RequestError
from gguf_tools.header import KeyEntry, TensorEntry
from gguf_tools.model import Model
from gguf_tools.rewrite import INTEGERS, encoded_numbers

OF_EXPERTS, OF_ALL = "expert_feed_forward_length", "feed_forward_length"
_OF_SHARED, _SHARED_COUNT = "expert_shared_feed_forward_length", "expert_shared_count"

_DENSE = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight")
_SHARED = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_shexp\.(weight|bias)")


def changed_keys(model: Model, widths: Mapping[int, int], n_ff: int) -> dict[str, bytes]:
    """The keys that must change for experts of width n_ff, by name, with their new entries as bytes.

    widths: of the experts now, by block. Raises RequestError when the metadata does not say where the width comes from.
    """
    dense = _dense_widths(model)
    own, common = model.key(OF_EXPERTS), model.key(OF_ALL)
    changed = {}
    if own is not None:
        changed[own.name] = _with_width(model, own, widths, n_ff, {})
    if common is not None:
        # With a key of their own for experts, a common key of the same value may be read as well.
        changed[common.name] = _with_width(model, common, widths, n_ff, dense)
    found = {name: raw for name, raw in changed.items() if raw is not None}
    if found:
        return found
    if common is not None and own is None and _with_width(model, common, widths, n_ff, {}) is not None:
        raise RequestError(f"{model.path}: {common.name} is the width of dense layers, too, so it cannot be changed")
    raise RequestError(
        f"{model.path}: neither {model.architecture}.{OF_EXPERTS} nor {model.architecture}.{OF_ALL} is the width of "
        f"an expert ({', '.join(map(str, sorted(set(widths.values()))))})"
    )


def _with_width(
    model: Model, key: KeyEntry, widths: Mapping[int, int], n_ff: int, dense: Mapping[int, set[int]]
) -> bytes | None:
    """The key's new entry; None if it says another width than the experts have, or that of dense tensors, too."""
    if key.items not in INTEGERS:
        return None
    values = [int(n) for n in model.numbers(key.name.removeprefix(f"{model.architecture}."))]
    if key.item_type is None:
        everywhere = set().union(*dense.values())
        if set(widths.values()) != {values[0]} or values[0] in everywhere:
            return None
        new = [n_ff]
    else:
        new = list(values)
        for block, width in widths.items():
            if block >= len(values) or values[block] != width or width in dense.get(block, ()):
                return None
            new[block] = n_ff
    try:
        with model.path.open("rb") as file:
            return encoded_numbers(file, key, new)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _dense_widths(model: Model) -> dict[int, set[int]]:
    """Widths of the dense FFNs of each block that has one."""
    found: dict[int, set[int]] = {}
    for tensor in model.tensors.values():
        named = _DENSE.fullmatch(tensor.name)
        if named:
            found.setdefault(int(named[1]), set()).add(hidden_width(tensor, named[2]))
    return found


def hidden_width(tensor: TensorEntry, projection: str) -> int:
    """Neurons of the hidden layer of an FFN, from one of its weights or from a bias of gate or up."""
    return tensor.shape[0] if projection == "down" or len(tensor.shape) == 1 else tensor.shape[1]


def shared_experts_that_follow(model: Model, widths: Mapping[int, int]) -> dict[str, tuple[TensorEntry, str, int]]:
    """The tensors of shared experts whose width llama.cpp works out from that of the others: by name, the tensor, its
    projection, and how many experts it is wide."""
    if model.count(_OF_SHARED):
        return {}
    times = max(1, model.count(_SHARED_COUNT))
    found = {}
    for tensor in model.tensors.values():
        named = _SHARED.fullmatch(tensor.name)
        if named is None or (named[2] == "down" and named[3] == "bias"):
            continue
        width = widths.get(int(named[1]))
        if width is not None and hidden_width(tensor, named[2]) == times * width:
            found[tensor.name] = (tensor, named[2], times)
    return found
