"""A small synthetic model: a residual that changes from layer to layer, normed with random gains, and routers."""

from __future__ import annotations

import numpy as np

from pyengine.predictors.routers import Router
from pyengine.traces import Trace, TracedModel

N_LAYER, N_EXPERT, K, N_EMBD = 4, 16, 3, 24


def routers(seed: int = 0, *, drift: bool = True) -> list[Router]:
    """Routers whose norms have gains between 0.2 and 5, each of either sign."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(N_LAYER):
        gain = (random.choice([-1.0, 1.0], N_EMBD) * np.exp(random.uniform(-1.6, 1.6, N_EMBD))).astype(np.float32)
        if not drift:
            gain = np.ones(N_EMBD, np.float32)
        weight = random.standard_normal((N_EXPERT, N_EMBD)).astype(np.float32)
        bias = (0.3 * random.standard_normal(N_EXPERT)).astype(np.float32)
        made.append(Router(weight, bias, gain, np.zeros(N_EMBD, np.float32), gain, None))
    return made


def trace(of: list[Router], n_token: int = 1200, change: float = 0.2, seed: int = 1, mix: bool = False) -> Trace:
    """Tokens of random residuals; each layer adds `change` times as much, or, with `mix`, what a fixed matrix makes of
    the residual, so that a router alone cannot foresee it."""
    random = np.random.default_rng(seed)
    residual = random.standard_normal((n_token, N_EMBD))
    inputs = np.zeros((n_token, N_LAYER, N_EMBD), np.float16)
    ids = np.zeros((n_token, N_LAYER, K), np.uint16)
    for layer, router in enumerate(of):
        normed = residual / np.sqrt((residual**2).mean(axis=1, keepdims=True))
        assert router.input_gain is not None
        inputs[:, layer] = normed * router.input_gain
        scores = inputs[:, layer].astype(np.float32) @ router.weight.T + router.bias
        ids[:, layer] = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        added = random.standard_normal((n_token, N_EMBD))
        if mix:
            added = 6 * residual @ random.standard_normal((N_EMBD, N_EMBD)) / np.sqrt(N_EMBD) + added
        residual = residual + change * added
    model = TracedModel("synthetic.gguf", "llama", N_LAYER, N_EXPERT, K)
    tokens = random.integers(0, 50, n_token).astype("<i4")
    return Trace(model, ids=ids, starts=np.arange(0, n_token, 60), tokens=tokens, inputs=inputs)
