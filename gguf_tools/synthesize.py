"""Models of a real shape with random weights: as large as the real one, read and computed as it is, saying nothing.

For measuring how experts move and how fast kernels are, with expert ids from a routing trace. The vocabulary has the
real number of tokens, because the output matrix is part of every step, but means nothing either.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from gguf_tools.errors import RequestError
from gguf_tools.header import tensor_bytes
from gguf_tools.layouts import TensorSpec, model_keys, model_tensors
from gguf_tools.new_file import new_file
from gguf_tools.placeholder_vocabulary import UNWRITABLE, add_vocabulary
from gguf_tools.random_weights import ByteArray, RandomWeights
from gguf_tools.shapes import SHAPES, KeyValue, Shape

#: Values in a block of each type of quantised weights that shapes have (ggml's QK4_0, QK8_0 and QK_MXFP4).
_BLOCK = 32


@dataclass(frozen=True)
class Synthesis:
    """A model about to be written. tensor_bytes: of all tensors, without metadata and padding."""

    shape: Shape
    seed: int
    tensors: tuple[tuple[TensorSpec, GGMLQuantizationType], ...]
    header: bytes

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor_bytes(spec.shape, type_) for spec, type_ in self.tensors)

    @property
    def file_bytes(self) -> int:
        sizes = (tensor_bytes(spec.shape, type_) for spec, type_ in self.tensors)
        return len(self.header) + sum(map(_padded, sizes))

    def write(self, path: Path, advance: Callable[[int], None], *, force: bool = False) -> None:
        """Write the model; its bytes are always the same for a shape and a seed.

        Args:
            path: the new file; it appears when it is complete.
            advance: called with the bytes of tensor data written since the last call, `tensor_bytes` in the end.
            force: replace a file of that name.

        Raises:
            RequestError: the name is taken or the disk is too full.
            OSError: writing failed.
        """
        weights = RandomWeights(self.seed)
        with new_file(path, self.file_bytes, force=force) as out:
            out.write(self.header)
            for spec, type_ in self.tensors:
                if type_ == GGMLQuantizationType.F32:
                    pieces: Iterable[ByteArray] = [weights.floats(spec)]
                else:
                    # Without weights for them, tokens that would end a greedy text are never the likeliest.
                    pieces = weights.quantised(spec, type_, zero_rows=UNWRITABLE if spec.role == "output" else 0)
                n = 0
                for piece in pieces:
                    n += out.write(piece.data)
                    advance(piece.nbytes)
                out.write(bytes(_padded(n) - n))


def plan_synthesis(name: str, *, layers: int | None = None, divisor: int = 1, seed: int = 0) -> Synthesis:
    """Prepare a model of a shape by its name.

    Args:
        name: of SHAPES.
        layers: blocks, if not as many as the real model has.
        divisor: what all widths are divided by, see narrowed().
        seed: decides the weights.

    Raises RequestError for an unknown name, too few layers for any experts, or widths that cannot be divided so.
    """
    if name not in SHAPES:
        raise RequestError(f"no shape is called {name}; there are {', '.join(SHAPES)}")
    shape = narrowed(SHAPES[name], divisor, name)
    return plan_shape(shape if layers is None else replace(shape, n_layer=layers), name, seed)


def narrowed(shape: Shape, divisor: int, name: str) -> Shape:
    """A shape with 1 / divisor of the values in the residual, of the heads and of the neurons: experts are smaller by
    the square of the divisor, their number and the vocabulary stay. Raises RequestError where no whole number, or no
    whole blocks of quantised values, would come out."""
    heads = {"n_head": shape.n_head, "n_head_kv": shape.n_head_kv}
    if shape.n_head_kv == 1:
        del heads["n_head_kv"]  # one for all
    widths = {"n_embd": shape.n_embd, "n_ff": shape.n_ff, "n_ff_exp": shape.n_ff_exp}
    uneven = [key for key, n in heads.items() if n % divisor]
    uneven += [key for key, n in widths.items() if n % (divisor * _BLOCK)]
    if uneven:
        raise RequestError(f"{name} cannot be divided by {divisor}: its {uneven[0]} is {getattr(shape, uneven[0])}")
    return replace(
        shape,
        n_head=shape.n_head // divisor,
        n_head_kv=max(1, shape.n_head_kv // divisor),
        n_embd=shape.n_embd // divisor,
        n_ff=shape.n_ff // divisor,
        n_ff_exp=shape.n_ff_exp // divisor,
    )


def plan_shape(shape: Shape, name: str, seed: int) -> Synthesis:
    """The same for a shape of one's own; `name` goes into the metadata."""
    if shape.n_layer <= shape.n_dense_lead:
        raise RequestError(f"{name} has experts from layer {shape.n_dense_lead} on: make at least one layer more")
    tensors = tuple((spec, _type(spec, shape)) for spec in model_tensors(shape))
    return Synthesis(shape, seed, tensors, _header(shape, name, seed, tensors))


def _type(spec: TensorSpec, shape: Shape) -> GGMLQuantizationType:
    if spec.role == "expert":
        return GGMLQuantizationType[shape.expert_type]
    if spec.role == "matrix":
        return GGMLQuantizationType[shape.matrix_type]
    return GGMLQuantizationType.Q8_0 if spec.role in ("embedding", "output") else GGMLQuantizationType.F32


def _header(shape: Shape, name: str, seed: int, tensors: tuple[tuple[TensorSpec, GGMLQuantizationType], ...]) -> bytes:
    writer = GGUFWriter(None, shape.architecture)
    writer.add_name(f"{name} shape, random weights, text meaningless")
    writer.add_description(
        f"{shape.n_layer} layers in the shape of {name} with random weights (seed {seed}): text meaningless"
    )
    writer.add_quantization_version(2)
    for key, value in model_keys(shape).items():
        _add(writer, f"{shape.architecture}.{key}", value)
    add_vocabulary(writer, shape.n_vocab)
    for spec, type_ in tensors:
        # The numpy type is not looked at when there is a ggml type.
        n_bytes = tensor_bytes(spec.shape, type_)
        writer.add_tensor_info(spec.name, spec.shape[::-1], np.dtype(np.float32), n_bytes, raw_dtype=type_)
    out = io.BytesIO()
    writer.fout, writer.state = [out], WriterState.EMPTY  # type: ignore[list-item]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = out.getvalue()
    return header.ljust(_padded(len(header)), b"\0")


def _add(writer: GGUFWriter, key: str, value: KeyValue) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _padded(n: int) -> int:
    return GGUFWriter.ggml_pad(n, GGUF_DEFAULT_ALIGNMENT)
