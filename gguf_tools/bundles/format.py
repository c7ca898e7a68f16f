"""The head of a bundle file: its header and tables as bytes, and as arrays that look into them.

The format is specified in the native part's public header, pyengine.h; the layouts here are read from it. Knows nothing
of models and of how records are made.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import GgufToolsError
from pyengine.native import BUNDLE_VERSION, checksum, struct_dtype

#: Of records and of data_offset, bytes.
ALIGNMENT = 4096
MAGIC = b"pyebndl"  # and a zero

_MOST_TABLE_BYTES = 256 << 20


class BundleError(GgufToolsError, ValueError):
    """A bundle file that is none, damaged, or of another format version."""


HEADER = struct_dtype("pye_bundle_header")
SOURCE = struct_dtype("pye_bundle_source")
LAYER = struct_dtype("pye_bundle_layer")
PLACE = struct_dtype("pye_bundle_place")
FORMAT_VERSION = BUNDLE_VERSION

#: Where the part begins that the header's checksum covers.
_CHECKED_FROM = int(HEADER.fields["checksum"][1]) + 8 if HEADER.fields else 0

#: One record, by its place in the file. `number` is its row in Tables.places, flattened.
RECORD = np.dtype(
    [("offset", "<u8"), ("bytes", "<u8"), ("variant", "<u4"), ("layer", "<u4"), ("expert", "<u4"), ("number", "<u8")]
)


class Tables:
    """All of a bundle before its first record.

    Changing an element of an array changes `content`; seal() makes its checksum right again.

    Attributes:
        content: data_offset bytes.
        header: one pye_bundle_header.
        sources: pye_bundle_source [n_source].
        layers: pye_bundle_layer [n_variant, n_layer].
        places: pye_bundle_place [n_variant, n_record].

    Raises:
        BundleError: too short, of another format, or with numbers that contradict each other.
    """

    def __init__(self, content: bytearray) -> None:
        self.content = content
        self.header = _header(content)
        h = self.header
        shapes = (
            (SOURCE, (int(h["n_source"]),)),
            (LAYER, (int(h["n_variant"]), int(h["n_layer"]))),
            (PLACE, (int(h["n_variant"]), int(h["n_record"]))),
        )
        at = HEADER.itemsize
        arrays = []
        for dtype, shape in shapes:
            count = int(np.prod(shape, dtype=np.uint64)) if max(shape) <= len(content) else len(content)
            if at + count * dtype.itemsize > len(content):
                raise BundleError("its tables do not fit before its data")
            arrays.append(np.frombuffer(content, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize
        self.sources, self.layers, self.places = arrays

    @property
    def file_bytes(self) -> int:
        return int(self.header["file_bytes"])

    @property
    def n_done(self) -> int:
        """Records written, in the order of records()."""
        return int(self.header["n_done"])

    @n_done.setter
    def n_done(self, value: int) -> None:
        self.header["n_done"] = value

    @property
    def n_total(self) -> int:
        """Records of all variants."""
        return self.places.size

    @property
    def raw(self) -> bool:
        """Whether every matrix lies as in the GGUF file."""
        return not self.layers["matrix"]["repacked"].any()

    def text(self, field: str) -> str:
        """A text of the header."""
        return bytes(self.header[field]).decode("utf-8", "replace")

    def set_order(self, name: str) -> None:
        """Say what the order of the records follows."""
        self.header["order"] = name.encode()[: HEADER["order"].itemsize - 1]

    def records(self) -> npt.NDArray[Any]:
        """All records, RECORD [n_total], in the order of their places in the file.

        Raises:
            BundleError: the tables of layers and of places contradict each other, or a record lies outside the file.
        """
        out = np.zeros(self.n_total, RECORD)
        n_record = int(self.header["n_record"])
        for variant, layers in enumerate(self.layers):
            seen = np.zeros(n_record, bool)
            for i, layer in enumerate(layers):
                first, n = int(layer["first"]), int(layer["n_expert"])
                if first + n > n_record or seen[first : first + n].any():
                    raise BundleError("its layers contradict its number of records")
                seen[first : first + n] = True
                rows = out[variant * n_record + first :][:n]
                rows["layer"], rows["bytes"], rows["expert"] = i, layer["record_bytes"], np.arange(n)
            if not seen.all():
                raise BundleError("its layers contradict its number of records")
            out["variant"][variant * n_record :][:n_record] = variant
        out["number"] = np.arange(self.n_total)
        out["offset"] = self.places["offset"].ravel()
        out.sort(order="offset")
        ends = out["offset"] + out["bytes"]
        sound = (out["offset"] % ALIGNMENT == 0) & (out["bytes"] % ALIGNMENT == 0) & (out["bytes"] > 0)
        inside = (out["offset"] >= len(self.content)) & (ends <= self.file_bytes) & (out["bytes"] <= self.file_bytes)
        if not (sound & inside).all() or (ends[:-1] > out["offset"][1:]).any():
            raise BundleError("its records lie outside it or over each other")
        return out

    def seal(self) -> None:
        """Make the checksum right."""
        self.header["checksum"] = self._sum()

    def check_sum(self) -> None:
        """Raise BundleError if a byte is not as it was sealed."""
        if int(self.header["checksum"]) != self._sum():
            raise BundleError("the checksum of its tables is wrong")

    def _sum(self) -> int:
        return checksum(memoryview(self.content)[_CHECKED_FROM:])


def _header(content: bytearray) -> Any:
    if len(content) < HEADER.itemsize:
        raise BundleError("it is too short for a bundle")
    header = np.frombuffer(content, HEADER, 1)[0]
    if bytes(content[: len(MAGIC) + 1]) != MAGIC + b"\0":
        raise BundleError("it is not a bundle")
    if header["format_version"] != FORMAT_VERSION or header["header_bytes"] != HEADER.itemsize:
        raise BundleError(f"it has format version {header['format_version']}, this is version {FORMAT_VERSION}")
    offset = int(header["data_offset"])
    if offset % ALIGNMENT or not HEADER.itemsize <= offset <= _MOST_TABLE_BYTES:
        raise BundleError("the place of its data is impossible")
    if not header["n_source"] or not header["n_variant"] or not header["n_layer"] or not header["n_record"]:
        raise BundleError("it says that it holds nothing")
    return header


def read_tables(descriptor: int) -> Tables:
    """The head of an open bundle, complete or not; its checksum is right.

    Raises:
        BundleError: it is none, or damaged.
        OSError: it cannot be read.
    """
    head = bytearray(os.pread(descriptor, HEADER.itemsize, 0))
    n_bytes = int(_header(head)["data_offset"])
    if n_bytes > os.fstat(descriptor).st_size:
        raise BundleError("its tables lie past its end")
    content = bytearray(n_bytes)
    got = os.preadv(descriptor, [content], 0)
    if got != n_bytes:
        raise BundleError("its tables could not be read whole")
    tables = Tables(content)
    tables.check_sum()
    return tables
