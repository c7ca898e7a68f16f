"""llama.cpp's samplers as llama_cpp.Llama chains them, so that a session alone gives what create_completion gives."""

from __future__ import annotations

import llama_cpp
import numpy as np
from llama_cpp import _internals

import pyengine
from pyengine.sessions.request import SamplingParams
from pyengine.sessions.session import TokenLogprobs


def make_sampler(llama: pyengine.Llama, params: SamplingParams) -> _internals.LlamaSampler:
    """A chain with a memory of its own; close() frees it."""
    sampler = _internals.LlamaSampler()  # type: ignore[no-untyped-call]
    sampler.add_penalties(
        n_vocab=llama.n_vocab(),
        penalty_last_n=llama.last_n_tokens_size,
        penalty_repeat=params.repeat_penalty,
        penalty_freq=params.frequency_penalty,
        penalty_present=params.presence_penalty,
    )
    if params.temperature == 0:
        sampler.add_greedy()  # type: ignore[no-untyped-call]
        return sampler
    sampler.add_top_k(params.top_k)
    sampler.add_top_p(params.top_p)
    sampler.add_min_p(params.min_p)
    sampler.add_temp(params.temperature)
    sampler.add_dist(llama_cpp.LLAMA_DEFAULT_SEED if params.seed is None else params.seed)
    return sampler


def token_logprobs(llama: pyengine.Llama, row: int, token: int, n_likeliest: int) -> TokenLogprobs:
    """Of the last computation's `row` of the batch, which must be an output."""
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, row), (llama.n_vocab(),))
    logprobs = logits.astype(np.float64)
    logprobs -= logprobs.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best = np.argsort(-logprobs, kind="stable")[:n_likeliest]
    return TokenLogprobs(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))
