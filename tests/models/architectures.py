"""The architectures the generator knows: one table entry each, by id.

An entry says which tensors and metadata keys llama.cpp demands beyond what all architectures share. Entries whose id
has a suffix after a slash are layouts of the same architecture.
"""

from __future__ import annotations

from .arch_common import COMMON
from .arch_further import FURTHER
from .arch_recurrent import RECURRENT
from .arch_sparse import SPARSE
from .arch_streams import STREAMED
from .architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {**COMMON, **FURTHER, **RECURRENT, **SPARSE, **STREAMED}


def architecture(name: str) -> Architecture:
    """The first entry of that name (GGUF key general.architecture): what holds for all its layouts. Raises KeyError."""
    for entry in ARCHITECTURES.values():
        if entry.name == name:
            return entry
    raise KeyError(name)
