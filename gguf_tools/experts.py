"""The expert tensors of a model, by their names: which block, which projection, how wide.

Names are llama.cpp's (llama-arch.cpp): blk.N.ffn_gate_exps.weight and so on. `gate_up` holds the rows of gate and then
those of up, for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gguf_tools.errors import ModelFileError
from gguf_tools.header import TensorEntry

#: In the order in which they lie in a slot or a record.
PROJECTIONS = ("gate_up", "gate", "up", "down")

_EXPERT_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.ffn_(gate_up|gate|up|down)_exps\.(weight|bias)")

#: llama.cpp's own limit, LLAMA_MAX_EXPERTS.
_MOST_EXPERTS = 1024


@dataclass(frozen=True)
class ExpertTensor:
    """One projection of all experts of one block: the weights, or the bias that belongs to them."""

    tensor: TensorEntry
    block: int
    projection: str  # of PROJECTIONS
    bias: bool

    @property
    def n_expert(self) -> int:
        rank = 2 if self.bias else 3
        return self.tensor.shape[-1] if len(self.tensor.shape) == rank else 1  # ggml drops a last dimension of 1

    @property
    def n_ff(self) -> int:
        """Neurons of one expert's hidden layer; of the bias of down, which has none, n_embd."""
        inward = self.tensor.shape[0 if self.bias or self.projection == "down" else 1]
        return inward // 2 if self.projection == "gate_up" else inward

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in this tensor."""
        return self.tensor.n_bytes // self.n_expert


def find_experts(tensors: Iterable[TensorEntry]) -> dict[str, ExpertTensor]:
    """The expert tensors among these, by name. Raises ModelFileError for an impossible shape."""
    found = {}
    for tensor in tensors:
        named = _EXPERT_TENSOR.fullmatch(tensor.name)
        if named is None:
            continue
        expert = ExpertTensor(tensor, int(named[1]), named[2], named[3] == "bias")
        rank = len(tensor.shape) + expert.bias
        if rank not in (2, 3) or not 1 <= expert.n_expert <= _MOST_EXPERTS or expert.n_ff < 1 or tensor.n_bytes < 1:
            shape = "x".join(map(str, tensor.shape))
            raise ModelFileError(f"{tensor.path}: tensor {tensor.name} has the impossible shape {shape}")
        found[tensor.name] = expert
    return found
