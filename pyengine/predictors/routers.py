"""Routers of a model's file, and the norm gains that lie between a residual and what a router reads.

llama.cpp's graphs differ in the norm before the experts (src/models/*.cpp of the pinned version); most use ffn_norm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyengine.planning.gguf_header import Tensor, read_header, split_files
from pyengine.predictors.predictor import PredictorError

Floats = npt.NDArray[np.float32]

#: general.architecture -> tensor that holds the gains of the norm before the experts, where it is not ffn_norm.
_NORMS = {
    "arctic": "ffn_norm_exps",
    "cohere2moe": "attn_norm",
    "dbrx": "attn_output_norm",
    "gemma4": "pre_ffw_norm_2",
    "glm4moe": "post_attention_norm",
    "gpt-oss": "post_attention_norm",
    "nemotron_h": "attn_norm",
    "nemotron_h_moe": "attn_norm",
    "qwen35moe": "post_attention_norm",
    "qwen3next": "post_attention_norm",
}
#: Here the normed vector itself goes on as the residual, so nothing is left to be normed with other gains.
_NORMED_RESIDUAL = frozenset({"minimax-01"})

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(?:gate_up|up)_exps\.weight")


@dataclass(frozen=True, eq=False)
class Router:
    """The router of one layer, as it reads a gate input."""

    weight: Floats
    """float32 [n_expert, n_embd]: blk.N.ffn_gate_inp.weight"""
    bias: Floats
    """float32 [n_expert]: blk.N.ffn_gate_inp.bias, else zero"""
    input_gain: Floats | None
    """float32 [n_embd]: what the normed residual is multiplied by to become the experts' input; None if unknown"""
    input_shift: Floats
    """float32 [n_embd]: what is added after that (the norm's bias), else zero"""
    router_gain: Floats | None
    """float32 [n_embd]: the same for the router's input, which differs in few architectures"""
    choice_bias: Floats | None
    """float32 [n_expert]: blk.N.exp_probs_b, which llama.cpp adds to the scores' sigmoids (some architectures: another
    function) before it chooses; None if there is none"""


def read_routers(path: Path, n_layer: int | None = None) -> list[Router]:
    """Routers of the layers that have experts, of a model that NativeEngine has accepted.

    Args:
        path: the GGUF file, of a split model the first one.
        n_layer: layers wanted, from the first one; all without it.

    Raises:
        ModelFileError: the metadata cannot be read.
        OSError: the file cannot be read.
        PredictorError: a layer has no router that can be read, or there are fewer layers.
    """
    header = read_header(path)
    arch = str(header.keys.get("general.architecture", ""))
    files = split_files(path, header)
    tensors = {t.name: (files[0], t) for t in header.tensors}
    for file in files[1:]:
        tensors |= {t.name: (file, t) for t in read_header(file).tensors}
    blocks = sorted({int(found[1]) for name in tensors if (found := _EXPERTS.fullmatch(name))})
    if n_layer is not None and len(blocks) < n_layer:
        raise PredictorError(f"{path.name} has {len(blocks)} layers with experts, not {n_layer}")
    return [_router(tensors, block, arch) for block in blocks[:n_layer]]


def _router(tensors: dict[str, tuple[Path, Tensor]], block: int, arch: str) -> Router:
    def read(name: str, n_dim: int = 1) -> Floats | None:
        found = tensors.get(f"blk.{block}.{name}")
        return None if found is None else _dequantised(*found, n_dim)

    weight = read("ffn_gate_inp.weight", 2)
    if weight is None:
        raise PredictorError(f"block {block} has no router (blk.{block}.ffn_gate_inp.weight)")
    bias = read("ffn_gate_inp.bias")
    name = _NORMS.get(arch, "ffn_norm")
    norm = None if arch in _NORMED_RESIDUAL else read(f"{name}.weight")
    shift = read(f"{name}.bias")
    of_router = norm
    if arch == "gemma4":  # the router reads the residual with gains of its own
        of_router = read("ffn_gate_inp.scale")
    elif arch == "smallthinker":  # the router reads the residual as it is
        of_router = None if norm is None else np.ones_like(norm)
    return Router(
        weight,
        np.zeros(len(weight), np.float32) if bias is None else bias,
        norm,
        np.zeros(weight.shape[1], np.float32) if shift is None else shift,
        of_router,
        next((b for b in map(read, ("exp_probs_b.bias", "exp_probs_b")) if b is not None), None),
    )


def _dequantised(path: Path, tensor: Tensor, n_dim: int) -> Floats:
    """The tensor's numbers, float32 of n_dim dimensions, the contiguous one last."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.n_bytes)
    shape = tensor.shape[:n_dim][::-1]
    try:
        kind = GGMLQuantizationType(tensor.ggml_type)
        if len(data) != tensor.n_bytes:
            raise ValueError("the file ends in it")
        rows = np.frombuffer(data, np.uint8).reshape(int(np.prod(shape[:-1])), -1)
        values = dequantize(rows, kind)
        return np.ascontiguousarray(np.asarray(values, np.float32).reshape(shape))
    except (ValueError, NotImplementedError) as error:
        raise PredictorError(f"{path.name}: {tensor.name} cannot be read: {error}") from error
