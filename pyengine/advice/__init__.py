"""Advice to a running engine: what to keep (a cache policy) and what to fetch ahead (predictors)."""
