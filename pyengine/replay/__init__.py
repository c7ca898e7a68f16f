"""Replay of routing traces: what a cache policy, a predictor and a size of cache would have done, before anything is
built or bought. Pure Python; the rules are the native engine's."""
