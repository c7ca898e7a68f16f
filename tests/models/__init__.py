"""Tiny random mixture-of-experts models for tests, and the stock llama.cpp they are compared with.

`stock` imports llama_cpp and is therefore not imported here.
"""

from .adapters import write_adapter
from .architectures import ARCHITECTURES
from .big import write_big_model
from .facts import ExpertTensor, ModelFacts, read_facts
from .generator import write_model
from .grid import FULL, MORE_TYPES, SMALL, TYPES
from .mutation import Mutation, mutate

__all__ = [
    "ARCHITECTURES",
    "FULL",
    "MORE_TYPES",
    "SMALL",
    "TYPES",
    "ExpertTensor",
    "ModelFacts",
    "Mutation",
    "mutate",
    "read_facts",
    "write_adapter",
    "write_big_model",
    "write_model",
]
