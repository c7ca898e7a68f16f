"""Triton kernels for one decoding step of many rows in lockstep.

Every tensor is contiguous. `position` is a one-element int64 tensor on the device, so that one captured CUDA graph
serves every step. Block sizes are powers of two that cover the dimension they mask.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_and_norm(residual, branch, gain, out, add: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
                 eps: tl.constexpr):  # fmt: skip
    """residual += branch (if add), out = rms_norm(residual) * gain. One program per row.

    residual is float32 [rows, width], branch and out are [rows, width], gain is float32 [width].
    """
    start = tl.program_id(0) * width
    i = tl.arange(0, block)
    inside = i < width
    x = tl.load(residual + start + i, mask=inside, other=0.0)
    if add:
        x += tl.load(branch + start + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + start + i, x, mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x) / width + eps)
    gains = tl.load(gain + i, mask=inside, other=0.0)
    tl.store(out + start + i, (x * inverse * gains).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_cache(qkv, cos, sin, position, keys, values, queries, length: tl.constexpr, n_head: tl.constexpr,
                     n_head_kv: tl.constexpr, head_dim: tl.constexpr, pair_block: tl.constexpr,
                     value_block: tl.constexpr):  # fmt: skip
    """Rotate queries and keys; write queries out, keys and values into the cache at `position`. One program per row.

    qkv is [rows, (n_head + 2 * n_head_kv) * head_dim], cos and sin are float32 [length, head_dim / 2], queries is
    [rows, n_head * head_dim], keys and values are [rows, n_head_kv, length, head_dim].
    """
    row = tl.program_id(0).to(tl.int64)
    pos = tl.load(position)
    n_pair: tl.constexpr = head_dim // 2
    source = qkv + row * (n_head + 2 * n_head_kv) * head_dim

    i = tl.arange(0, pair_block)
    inside = i < (n_head + n_head_kv) * n_pair
    head, pair = i // n_pair, i % n_pair
    even = tl.load(source + head * head_dim + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(source + head * head_dim + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + pos * n_pair + pair, mask=inside, other=0.0)
    s = tl.load(sin + pos * n_pair + pair, mask=inside, other=0.0)
    new_even = (even * c - odd * s).to(queries.dtype.element_ty)
    new_odd = (even * s + odd * c).to(queries.dtype.element_ty)

    is_query = i < n_head * n_pair
    query = queries + row * n_head * head_dim + head * head_dim + 2 * pair
    tl.store(query, new_even, mask=is_query)
    tl.store(query + 1, new_odd, mask=is_query)

    is_key = (i >= n_head * n_pair) & inside
    key = keys + ((row * n_head_kv + (head - n_head)) * length + pos) * head_dim + 2 * pair
    tl.store(key, new_even, mask=is_key)
    tl.store(key + 1, new_odd, mask=is_key)

    j = tl.arange(0, value_block)
    is_value = j < n_head_kv * head_dim
    value = tl.load(source + (n_head + n_head_kv) * head_dim + j, mask=is_value, other=0.0)
    target = values + ((row * n_head_kv + j // head_dim) * length + pos) * head_dim + j % head_dim
    tl.store(target, value, mask=is_value)


@triton.jit
def attend(queries, keys, values, out, position, length: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr,
           scale: tl.constexpr, group_block: tl.constexpr, key_block: tl.constexpr):  # fmt: skip
    """Attention of one new token to the cache, with a running softmax. One program per row and key head.

    queries and out are [rows, n_head_kv, group, head_dim], keys and values are [rows, n_head_kv, length, head_dim].
    `group` is the number of query heads per key head; `group_block` is at least 16, the least that tl.dot takes.
    """
    program = tl.program_id(0).to(tl.int64)
    n_key = tl.load(position) + 1
    g, d = tl.arange(0, group_block), tl.arange(0, head_dim)
    is_query = g[:, None] < group
    own = program * group * head_dim + g[:, None] * head_dim + d[None, :]
    q = tl.load(queries + own, mask=is_query, other=0.0)
    largest = tl.full([group_block], -1e30, tl.float32)
    total = tl.zeros([group_block], tl.float32)
    mixed = tl.zeros([group_block, head_dim], tl.float32)
    cache = program * length * head_dim
    for start in range(0, n_key, key_block):
        n = start + tl.arange(0, key_block)
        offset = cache + n[:, None] * head_dim + d[None, :]
        is_key = n[:, None] < n_key
        k = tl.load(keys + offset, mask=is_key, other=0.0)
        score = tl.dot(q, tl.trans(k)).to(tl.float32) * scale
        score = tl.where(n[None, :] < n_key, score, -1e30)
        new_largest = tl.maximum(largest, tl.max(score, 1))
        share = tl.exp(score - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        v = tl.load(values + offset, mask=is_key, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(share.to(v.dtype), v).to(tl.float32)
        total = total * shrink + tl.sum(share, 1)
        largest = new_largest
    tl.store(out + own, (mixed / total[:, None]).to(out.dtype.element_ty), mask=is_query)


@triton.jit
def gated_silu(gate_up, out, width: tl.constexpr, block: tl.constexpr):
    """out = silu(gate) * up. One program per row; gate_up is [rows, 2 * width], out is [rows, width]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    inside = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + i, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def draw_token(logits, temperature, banned, seed, out, vocabulary: tl.constexpr, block: tl.constexpr,
               log_min_p: tl.constexpr):  # fmt: skip
    """Sample with temperature and min-p, by the Gumbel maximum. One program per row.

    logits is [rows, vocabulary], temperature float32 [rows], banned int64 [rows, 2]: tokens that are never drawn, seed
    a one-element int64 tensor, out int64 [rows]. `block` divides `vocabulary`.
    """
    row = tl.program_id(0)
    source = logits + row.to(tl.int64) * vocabulary
    t = tl.load(temperature + row)
    banned_0, banned_1 = tl.load(banned + 2 * row), tl.load(banned + 2 * row + 1)
    state = tl.load(seed).to(tl.int32)
    lane = tl.arange(0, block)

    best_logit = tl.full([block], -1e30, tl.float32)
    for start in range(0, vocabulary, block):
        token = start + lane
        logit = tl.load(source + token).to(tl.float32)
        logit = tl.where((token == banned_0) | (token == banned_1), -1e30, logit)
        best_logit = tl.maximum(best_logit, logit)
    top = tl.max(best_logit, 0)

    best_score = tl.full([block], -1e30, tl.float32)
    best_token = tl.zeros([block], tl.int32)
    for start in range(0, vocabulary, block):
        token = start + lane
        logit = tl.load(source + token).to(tl.float32)
        logit = tl.where((token == banned_0) | (token == banned_1), -1e30, logit)
        log_share = (logit - top) / t
        uniform = tl.rand(state, row * vocabulary + token)
        uniform = tl.minimum(tl.maximum(uniform, 1e-9), 0.9999999)
        score = tl.where(log_share >= log_min_p, log_share - tl.log(-tl.log(uniform)), -1e30)
        best_token = tl.where(score > best_score, token, best_token)
        best_score = tl.maximum(best_score, score)
    winner = tl.argmax(best_score, 0)
    tl.store(out + row, tl.sum(tl.where(lane == winner, best_token, 0), 0).to(tl.int64))
