"""A model as its files describe it: one GGUF file, or the parts of a split one taken together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gguf import Keys

from gguf_tools.errors import ModelFileError, one_line
from gguf_tools.header import Header, KeyEntry, Number, TensorEntry, read_header, read_numbers, read_text

_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_MOST_FILES = 9999


@dataclass(frozen=True)
class Model:
    """Headers of all files in order, the first of which holds the metadata.

    architecture: GGUF key general.architecture. tensors: of all files, by name, in order.
    """

    headers: tuple[Header, ...]
    architecture: str
    tensors: dict[str, TensorEntry]

    @property
    def path(self) -> Path:
        return self.headers[0].path

    @property
    def file_bytes(self) -> int:
        return sum(header.file_bytes for header in self.headers)

    def key(self, name: str) -> KeyEntry | None:
        """The metadata key `<architecture>.<name>`."""
        return self.headers[0].keys.get(f"{self.architecture}.{name}")

    def numbers(self, name: str) -> tuple[Number, ...]:
        """The value of `<architecture>.<name>`: one number, or those of an array; none if the key is missing."""
        key = self.key(name)
        if key is None:
            return ()
        with self.path.open("rb") as file:
            return read_numbers(file, key)

    def count(self, name: str) -> int:
        """The largest value of `<architecture>.<name>`, which some models give per layer; 0 if it is missing."""
        return max((int(n) for n in self.numbers(name)), default=0)

    def text(self, key: str) -> str:
        """The value of a key by its full name if it is a string, else ""."""
        entry = self.headers[0].keys.get(key)
        if entry is None:
            return ""
        with self.path.open("rb") as file:
            return read_text(file, entry)


def open_model(path: Path) -> Model:
    """Read the headers of a model; of a split one give the first part.

    Raises:
        ModelFileError: as read_header, or a part is missing, or parts of different models.
        OSError: a file cannot be read.
    """
    first = read_header(path)
    architecture = _text(first, Keys.General.ARCHITECTURE)
    if not architecture:
        number = _number(first, Keys.Split.LLM_KV_SPLIT_NO)
        if number:
            raise ModelFileError(f"{path} is part {number + 1} of a split model; give the first part")
        raise ModelFileError(f"{path}: GGUF key {Keys.General.ARCHITECTURE} is missing")
    headers = [
        first,
        *(read_header(part) for part in _other_parts(path, _number(first, Keys.Split.LLM_KV_SPLIT_COUNT))),
    ]
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise ModelFileError(f"{header.path}: tensor {name} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    expected = _number(first, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    if len(headers) > 1 and expected not in (0, len(tensors)):
        raise ModelFileError(f"{path}: its parts hold {len(tensors)} tensors together instead of {expected}")
    return Model(tuple(headers), one_line(architecture), tensors)


def _text(header: Header, name: str) -> str:
    key = header.keys.get(name)
    if key is None:
        return ""
    with header.path.open("rb") as file:
        return read_text(file, key)


def _number(header: Header, name: str) -> int:
    key = header.keys.get(name)
    if key is None or key.item_type is not None:
        return 0
    with header.path.open("rb") as file:
        return int(next(iter(read_numbers(file, key)), 0))


def _other_parts(path: Path, count: int) -> list[Path]:
    """Paths of the second to last of `count` parts."""
    if count <= 1:
        return []
    named = _PART.fullmatch(path.name)
    if named is None or count > _MOST_FILES or int(named[3]) != count or int(named[2]) != 1:
        raise ModelFileError(
            f"{path} says it is part of {count} files, but is not named like the first of them "
            f"(-00001-of-{count:05}.gguf)"
        )
    return [path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)]
