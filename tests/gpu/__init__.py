"""Experts on a GPU, without one: the proxy wraps ggml's CPU device, which computes as well with slots in its "VRAM"."""
