"""LoRA adapters: attention ones work as ever; ones that change experts are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader

from pyengine.errors import ModelFileError, UnmanagedModelError


def refuse_expert_adapter(path: Path) -> None:
    """Raise UnmanagedModelError if the adapter has expert tensors: those live in our slots, where llama.cpp cannot add
    to them. Raises ModelFileError if the file cannot be read."""
    try:
        names = [tensor.name for tensor in GGUFReader(path).tensors]
    except (OSError, ValueError, IndexError, KeyError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelFileError(f"cannot read the LoRA adapter {path}: {why}") from error
    experts = [name for name in names if "_exps" in name]
    if experts:
        raise UnmanagedModelError(
            f"the LoRA adapter {path.name} changes experts ({experts[0]} and {len(experts) - 1} more), which pyengine "
            "keeps outside llama.cpp's buffers; adapters of attention work, or use llama_cpp.Llama for this one"
        )
