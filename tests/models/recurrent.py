"""Building blocks with a recurrent state: state-space mixers, linear attention, short convolutions."""

from __future__ import annotations

from .container import MetadataValue
from .layout import Block, Dims, TensorSpec, blk

CONV = 4  # tokens that a convolution sees
STATE = 16  # values of a state-space mixer's state
DT_RANK = 8
SSM_HEAD = 16  # values in a head of a Mamba-2 mixer
LINEAR_HEAD = 32  # values in a head of linear attention
N_KEY_HEADS, N_VALUE_HEADS = 2, 4  # of gated delta nets
SHORT_CONV = 3


def alternate(recurrent: Block, attention: Block, every: int) -> Block:
    """Attention in every `every`-th block, the recurrent mixer in the others."""
    return lambda d, i: attention(d, i) if is_attention(i, every) else recurrent(d, i)


def is_attention(block: int, every: int) -> bool:
    """Whether this block of an alternating model has attention."""
    return (block + 1) % every == 0


def heads_by_block(d: Dims, every: int) -> dict[str, MetadataValue]:
    """How most architectures say which blocks are recurrent: these have no heads of keys and values."""
    return {"attention.head_count_kv": [d.n_head_kv if is_attention(i, every) else 0 for i in range(d.n_layer)]}


def mamba_keys(d: Dims, *, n_group: int) -> dict[str, MetadataValue]:
    """Of Mamba-2 mixers; n_group 0: of Mamba-1."""
    inner = 2 * d.n_embd
    keys: dict[str, MetadataValue] = {
        "ssm.conv_kernel": CONV,
        "ssm.inner_size": inner,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": inner // SSM_HEAD if n_group else DT_RANK,
    }
    return {**keys, "ssm.group_count": n_group} if n_group else keys


def mamba1(d: Dims, i: int) -> list[TensorSpec]:
    """A Mamba-1 mixer with norms on its inner projections, as Jamba has it."""
    inner = 2 * d.n_embd
    return [
        blk(i, "ssm_in.weight", (d.n_embd, 2 * inner)),
        blk(i, "ssm_conv1d.weight", (CONV, inner), "kernel"),
        blk(i, "ssm_conv1d.bias", (inner,), "bias"),
        blk(i, "ssm_x.weight", (inner, DT_RANK + 2 * STATE)),
        blk(i, "ssm_dt_norm.weight", (DT_RANK,), "norm"),
        blk(i, "ssm_b_norm.weight", (STATE,), "norm"),
        blk(i, "ssm_c_norm.weight", (STATE,), "norm"),
        blk(i, "ssm_dt.weight", (DT_RANK, inner)),
        blk(i, "ssm_dt.bias", (inner,), "bias"),
        blk(i, "ssm_a", (STATE, inner), "decay"),
        blk(i, "ssm_d", (inner,), "scale"),
        blk(i, "ssm_out.weight", (inner, d.n_embd)),
    ]


def mamba2(*, n_group: int) -> Block:
    """A Mamba-2 mixer whose heads share n_group input and output projections of the state."""

    def tensors(d: Dims, i: int) -> list[TensorSpec]:
        inner = 2 * d.n_embd
        n_head, mixed = inner // SSM_HEAD, inner + 2 * n_group * STATE
        return [
            blk(i, "ssm_in.weight", (d.n_embd, inner + mixed + n_head)),
            blk(i, "ssm_conv1d.weight", (CONV, mixed), "kernel"),
            blk(i, "ssm_conv1d.bias", (mixed,), "bias"),
            blk(i, "ssm_dt.bias", (n_head,), "bias"),
            blk(i, "ssm_a", (1, n_head), "decay"),
            blk(i, "ssm_d", (1, n_head), "scale"),
            blk(i, "ssm_norm.weight", (inner // n_group, n_group), "norm"),
            blk(i, "ssm_out.weight", (inner, d.n_embd)),
        ]

    return tensors


def delta_net_keys(every: int) -> dict[str, MetadataValue]:
    """Of gated delta nets, with attention in every `every`-th block."""
    return {
        "ssm.conv_kernel": CONV,
        "ssm.inner_size": LINEAR_HEAD * N_VALUE_HEADS,
        "ssm.state_size": LINEAR_HEAD,
        "ssm.time_step_rank": N_VALUE_HEADS,
        "ssm.group_count": N_KEY_HEADS,
        "full_attention_interval": every,
    }


def delta_net(*, joined: bool) -> Block:
    """A gated delta net. joined: one tensor for the strengths of writing and forgetting."""

    def tensors(d: Dims, i: int) -> list[TensorSpec]:
        key, value = LINEAR_HEAD * N_KEY_HEADS, LINEAR_HEAD * N_VALUE_HEADS
        strengths = {"ba": 2 * N_VALUE_HEADS} if joined else {"beta": N_VALUE_HEADS, "alpha": N_VALUE_HEADS}
        return [
            blk(i, "attn_qkv.weight", (d.n_embd, 2 * key + value)),
            blk(i, "attn_gate.weight", (d.n_embd, value)),
            blk(i, "ssm_conv1d.weight", (CONV, 2 * key + value), "kernel"),
            blk(i, "ssm_dt.bias", (N_VALUE_HEADS,), "bias"),
            blk(i, "ssm_a", (N_VALUE_HEADS,), "decay"),
            *(blk(i, f"ssm_{part}.weight", (d.n_embd, size)) for part, size in strengths.items()),
            blk(i, "ssm_norm.weight", (LINEAR_HEAD,), "norm"),
            blk(i, "ssm_out.weight", (value, d.n_embd)),
        ]

    return tensors


def kimi_delta(*, low_rank_decay: bool, low_rank_gate: bool, gate: str = "g_a", flat_decay: bool = False) -> Block:
    """Kimi delta attention: a delta net whose decay is a vector for each head.

    low_rank_decay, low_rank_gate: through a bottleneck of one head. gate: the name of the gate's first tensor.
    flat_decay: ssm_a is a plain vector.
    """

    def tensors(d: Dims, i: int) -> list[TensorSpec]:
        inner = LINEAR_HEAD * d.n_head
        out = [blk(i, f"ssm_conv1d_{part}.weight", (CONV, 1, inner), "kernel") for part in "qkv"]
        out += [blk(i, f"attn_{part}.weight", (d.n_embd, inner)) for part in "qkv"]
        for name, second, low_rank in (("f_a", "f_b", low_rank_decay), (gate, "g_b", low_rank_gate)):
            out.append(blk(i, f"ssm_{name}.weight", (d.n_embd, LINEAR_HEAD if low_rank else inner)))
            if low_rank:
                out.append(blk(i, f"ssm_{second}.weight", (LINEAR_HEAD, inner)))
        return [
            *out,
            blk(i, "ssm_beta.weight", (d.n_embd, d.n_head)),
            blk(i, "ssm_a", (d.n_head,) if flat_decay else (1, d.n_head), "decay"),
            blk(i, "ssm_dt.bias", (inner,), "bias"),
            blk(i, "ssm_norm.weight", (LINEAR_HEAD,), "norm"),
            blk(i, "attn_output.weight", (inner, d.n_embd)),
        ]

    return tensors


def short_convolution(d: Dims, i: int) -> list[TensorSpec]:
    """A gated convolution over few tokens."""
    return [
        blk(i, "shortconv.conv.weight", (SHORT_CONV, d.n_embd), "kernel"),
        blk(i, "shortconv.in_proj.weight", (d.n_embd, 3 * d.n_embd)),
        blk(i, "shortconv.out_proj.weight", (d.n_embd, d.n_embd)),
    ]


def lightning(d: Dims, i: int) -> list[TensorSpec]:
    """Linear attention with a fixed decay for each head."""
    n_q = d.n_head * d.head_dim
    return [
        blk(i, "attn_qkv.weight", (d.n_embd, 3 * n_q)),
        blk(i, "attn_norm_2.weight", (n_q,), "norm"),
        blk(i, "attn_gate.weight", (d.n_embd, n_q)),
        blk(i, "attn_output.weight", (n_q, d.n_embd)),
    ]
