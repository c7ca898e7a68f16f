"""Writing GGUF files: one or several parts, any alignment, padding that is not zero."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gguf
import numpy as np
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

MetadataValue = bool | int | float | str | list[int] | list[bool] | list[float]


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor to write: name, shape in numpy's order (`ne[0]` last), ggml type and bytes of all its rows."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    n_bytes: int


class PartWriter(gguf.GGUFWriter):  # type: ignore[misc, unused-ignore]
    """gguf's writer with chosen parts, an alignment that holds in every part, and noise in the padding.

    Padding is the only gap GGUF allows: ggml refuses a tensor that does not start where the one before ends, rounded up
    to general.alignment. Noise there makes reading a byte too far visible.
    """

    def __init__(self, path: Path, arch: str, alignment: int) -> None:
        super().__init__(path, arch)
        self._noise = np.random.default_rng(alignment)
        if alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
            self.add_custom_alignment(alignment)

    def start_part(self) -> None:
        """The tensors added from now on belong to the next part."""
        self.tensors.append({})

    def add_shard_kv_data(self) -> None:
        super().add_shard_kv_data()
        key = gguf.Keys.General.ALIGNMENT
        for part in self.kv_data[1:]:
            if key in self.kv_data[0]:
                part[key] = GGUFValue(self.data_alignment, gguf.GGUFValueType.UINT32)

    def write_padding(self, fp: IO[bytes], n: int, align: int | None = None) -> None:
        missing = -n % (self.data_alignment if align is None else align)
        fp.write(self._noise.bytes(missing))


def add_metadata(writer: gguf.GGUFWriter, values: Mapping[str, MetadataValue]) -> None:
    """Add keys with the GGUF types llama.cpp expects: whole numbers as uint32, others as float32."""
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def write_tensors(
    writer: PartWriter,
    tensors: Sequence[EncodedTensor],
    data: Callable[[EncodedTensor], NDArray[np.uint8]],
    n_parts: int = 1,
) -> list[Path]:
    """Write the file or its parts, one tensor in memory at a time; returns their paths in order.

    data: called once for each tensor, in order, for its bytes. Raises ValueError when there are fewer tensors than
    parts. The writer is closed.
    """
    if not 1 <= n_parts <= len(tensors):
        raise ValueError(f"cannot write {len(tensors)} tensors to {n_parts} parts")
    for part, group in enumerate(_even_groups(tensors, n_parts)):
        if part > 0:
            writer.start_part()
        for t in group:
            # The numpy dtype given here is not used, since the ggml type is given as well.
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.n_bytes, raw_dtype=t.type)
    assert writer.path is not None
    paths = writer.format_shard_names(writer.path)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            encoded = data(t)
            if encoded.nbytes != t.n_bytes:
                raise ValueError(f"{t.name}: {encoded.nbytes} bytes instead of {t.n_bytes}")
            writer.write_tensor_data(encoded)
    finally:
        writer.close()
    return paths


def _even_groups(tensors: Sequence[EncodedTensor], n: int) -> Iterable[Sequence[EncodedTensor]]:
    bounds = [len(tensors) * i // n for i in range(n + 1)]
    return (tensors[a:b] for a, b in itertools.pairwise(bounds))
