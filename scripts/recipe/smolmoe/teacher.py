"""The dense model as the teacher: bfloat16, no gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .dense import DenseBlockOutput, DenseLayer, DenseModel, dense_block, rms_norm, rotation


class Teacher:
    """Runs the dense model on rows of a fixed length."""

    def __init__(self, dense: DenseModel, length: int, compiled: bool) -> None:
        self.dense = dense
        self.rope = rotation(dense.shape, length, dense.embedding.device)
        self.embedding = dense.embedding.to(torch.bfloat16)
        self.layers: list[DenseLayer] = [layer.matrices_to(torch.bfloat16) for layer in dense.layers]
        self._block = torch.compile(dense_block) if compiled else dense_block

    def embed(self, tokens: Tensor) -> Tensor:
        """The first residual, float32 [b, l, width], of int64 tokens [b, l]."""
        return functional.embedding(tokens, self.embedding).float()

    def block(self, residual: Tensor, layer: int, eager: bool = False) -> DenseBlockOutput:
        """One layer, compiled unless `eager`: pieces of other shapes are not worth a compilation."""
        run = dense_block if eager else self._block
        with torch.no_grad():
            return run(residual, self.layers[layer], self.rope, self.dense.shape)

    def hidden(self, tokens: Tensor, eager: bool = False) -> Tensor:
        """What the output head multiplies, bfloat16 [b, l, width]."""
        residual = self.embed(tokens)
        for layer in range(len(self.layers)):
            residual = self.block(residual, layer, eager).residual
        return rms_norm(residual, self.dense.output_norm, self.dense.shape.rms_eps).to(torch.bfloat16)
