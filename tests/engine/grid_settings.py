"""How a context must be set up for a model of the grid."""

from __future__ import annotations

from typing import TypedDict

from models.architectures import architecture
from models.facts import ModelFacts

from .decoding import Script


class Settings(TypedDict):
    """Arguments of Model.context and StockProcess.run."""

    n_ubatch: int
    embeddings: bool


def settings(facts: ModelFacts, script: Script, n_ubatch: int = 512) -> Settings:
    """For decoding the script in micro-batches of n_ubatch tokens, if the architecture allows: one that looks at all
    tokens of a batch at once cannot have it cut."""
    arch = architecture(facts.arch)
    whole = max(len(chunk) for chunk in script)
    return {"n_ubatch": n_ubatch if arch.causal else max(n_ubatch, whole), "embeddings": arch.embeds}
