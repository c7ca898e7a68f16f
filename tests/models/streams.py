"""Building blocks of sparse attention, which looks at a chosen few of the tokens, and of residuals in streams."""

from __future__ import annotations

from typing import Literal

from .container import MetadataValue
from .layout import MLA, Dims, Role, TensorSpec, blk

INDEX_HEADS, INDEX_HEAD = 2, 64  # heads of an indexer, and values in one: llama.cpp rotates 64 at once
TOP_K = 8  # tokens that it chooses
STREAMS = 4  # of the residual: llama.cpp knows no other number
LOW_RANK = 8


def index_keys(*, n_head: int = INDEX_HEADS, top_k: int = TOP_K) -> dict[str, MetadataValue]:
    """Of an indexer: a small attention that chooses the tokens for the large one."""
    return {
        "attention.indexer.head_count": n_head,
        "attention.indexer.key_length": INDEX_HEAD,
        "attention.indexer.top_k": top_k,
    }


def latent_indexer(d: Dims, i: int) -> list[TensorSpec]:
    """The indexer beside multi-head latent attention, whose compressed query it takes."""
    return [
        blk(i, "indexer.k_norm.weight", (INDEX_HEAD,), "norm"),
        blk(i, "indexer.k_norm.bias", (INDEX_HEAD,), "bias"),
        blk(i, "indexer.proj.weight", (d.n_embd, INDEX_HEADS)),
        blk(i, "indexer.attn_k.weight", (d.n_embd, INDEX_HEAD)),
        blk(i, "indexer.attn_q_b.weight", (MLA.q_lora, INDEX_HEADS * INDEX_HEAD)),
    ]


def plain_indexer(d: Dims, i: int, n_head: int) -> list[TensorSpec]:
    """The indexer beside attention with grouped queries."""
    return [
        blk(i, "indexer.q_proj.weight", (d.n_embd, n_head * INDEX_HEAD)),
        blk(i, "indexer.k_proj.weight", (d.n_embd, INDEX_HEAD)),
        blk(i, "indexer.q_norm.weight", (INDEX_HEAD,), "norm"),
        blk(i, "indexer.k_norm.weight", (INDEX_HEAD,), "norm"),
    ]


def stream_keys(**more: MetadataValue) -> dict[str, MetadataValue]:
    """Of a residual in several streams (hyper-connections); more: further keys after `hyper_connection.`."""
    keys = {"count": STREAMS, "epsilon": 1e-6, **more}
    return {f"hyper_connection.{name}": value for name, value in keys.items()}


def mixed_streams(d: Dims, i: int, *, n_mix: int, n_scale: int) -> list[TensorSpec]:
    """How a block reads and writes the streams. n_mix: coefficients for one token. n_scale: scales on them."""
    out = []
    for part in ("attn", "ffn"):
        shapes: dict[str, tuple[tuple[int, ...], Role]] = {
            "fn": ((STREAMS * d.n_embd, n_mix), "kernel"),
            "base": ((n_mix,), "bias"),
            "scale": ((n_scale,), "scale"),
        }
        out += [blk(i, f"hc_{part}_{name}.weight", shape, role) for name, (shape, role) in shapes.items()]
    return out


def stream_head(d: Dims) -> list[TensorSpec]:
    """How the output reads the streams."""
    return [
        TensorSpec("output_hc_fn.weight", (STREAMS * d.n_embd, STREAMS), "kernel"),
        TensorSpec("output_hc_base.weight", (STREAMS,), "bias"),
        TensorSpec("output_hc_scale.weight", (1,), "scale"),
    ]


def low_rank_streams(d: Dims, i: int | None, part: Literal["attn", "ffn", "output"]) -> list[TensorSpec]:
    """Reading the streams through a bottleneck. i: the block, None for the output."""
    prefix = "output_hc" if i is None else f"blk.{i}.hc_{part}"
    wide = STREAMS * d.n_embd
    out = [
        TensorSpec(f"{prefix}_norm.weight", (d.n_embd, STREAMS), "norm"),
        TensorSpec(f"{prefix}_down.weight", (wide, LOW_RANK), "kernel"),
        TensorSpec(f"{prefix}_up.weight", (LOW_RANK, wide), "kernel"),
    ]
    return out if i is None else [*out, TensorSpec(f"{prefix}_inject.weight", (wide, STREAMS), "kernel")]
