"""Reads what planning must know from a model's metadata. Runs in the parent only, which loads no model."""

from __future__ import annotations

import re
from pathlib import Path

from pyengine.bench.rows import ModelFacts
from pyengine.errors import ModelFileError

_EXPERT_WEIGHT = re.compile(r"blk\.\d+\.ffn_(gate_up|gate|up|down)_exps\.weight")


def read_facts(path: Path) -> ModelFacts:
    """Facts about a GGUF model.

    Raises:
        ModelFileError: missing, damaged, or not GGUF.
        UnmanagedModelError: it has no experts that pyengine manages.
        StartupError: llama.cpp or the native part does not fit.
    """
    from pyengine import startup
    from pyengine.native import NativeEngine
    from pyengine.planning.gguf_header import read_header, split_files

    startup.check()
    native = NativeEngine(path)  # refuses what read_header could not survive
    try:
        info = native.info
    finally:
        native.close()
    files = split_files(path, read_header(path))
    for file in files:
        if not file.is_file():
            raise ModelFileError(f"{file}: no such file")
    tensors = [tensor for file in files for tensor in read_header(file).tensors]
    experts = [tensor for tensor in tensors if _EXPERT_WEIGHT.fullmatch(tensor.name)]
    others = [tensor.n_bytes for tensor in tensors if tensor not in experts]
    return ModelFacts(
        path=path,
        files=tuple(files),
        architecture=info.architecture,
        kernels=info.kernels,
        file_bytes=info.file_bytes,
        expert_bytes=info.expert_bytes,
        slot_bytes=info.slot_bytes,
        least_budget=info.least_budget,
        largest_other=max(others, default=0),
        n_layer=info.n_layer,
        n_expert=info.n_expert,
        n_expert_used=info.n_expert_used,
        n_experts=info.n_experts_total,
        n_matrix=max(1, round(len(experts) / info.n_layer)),
    )
