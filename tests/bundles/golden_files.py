"""The golden files: a tiny model and its bundle, byte by byte. Run as a module, this writes them anew:

    cd tests && python -m bundles.golden_files

which is right only together with a new format version, or for a ggml that changes what the header says.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from bad_input.gguf_bytes import STRING, UINT32, Gguf, Key, Tensor, scalar, text

from .making import make

FOLDER = Path(__file__).parent / "golden"
BUNDLE = FOLDER / "tiny.bundle"

#: Of the model, nanoseconds since 1970.
MTIME_NS = 1_700_000_000_123_456_789

N_EMBD, N_FF, N_EXPERT = 32, 32, 2
BLOCKS = (0, 2)  # block 1 is dense
_F16, _Q4_0 = 1, 2
_BYTES = {_F16: N_EMBD * N_FF * 2, _Q4_0: N_EMBD * N_FF // 32 * 18}
_TYPES = {"gate": _Q4_0, "up": _Q4_0, "down": _F16}


def write_model(path: Path) -> Path:
    """Write the model: metadata and expert tensors only, every byte by rule."""
    keys = [Key("general.architecture", STRING, text("llama"))]
    for name, value in (("block_count", 3), ("expert_count", N_EXPERT), ("expert_used_count", 1)):
        keys.append(Key(f"llama.{name}", UINT32, scalar(UINT32, value)))
    tensors, data = [], b""
    for block in BLOCKS:
        for role, kind in _TYPES.items():
            shape = (N_FF, N_EMBD, N_EXPERT) if role == "down" else (N_EMBD, N_FF, N_EXPERT)
            tensors.append(Tensor(f"blk.{block}.ffn_{role}_exps.weight", shape, kind, len(data)))
            for expert in range(N_EXPERT):
                data += content(block, role, expert)
    Gguf(keys, tensors, data).write(path)
    os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return path


def content(block: int, role: str, expert: int) -> bytes:
    """The bytes of one matrix of one expert."""
    start = block * 101 + list(_TYPES).index(role) * 31 + expert * 7
    return bytes((start + i * i // 3) % 251 for i in range(_BYTES[_TYPES[role]]))


def write_bundle(folder: Path) -> Path:
    """Write the model into a folder and its bundle beside it, raw: that is the same on every CPU."""
    model, bundle = write_model(folder / "tiny.gguf"), folder / "tiny.bundle"
    make(model, bundle, raw=True)
    return bundle


def unpack(form: str, raw: bytes, at: int) -> tuple[int | bytes, ...]:
    """Little-endian values at an offset."""
    return struct.unpack_from(f"<{form}", raw, at)


if __name__ == "__main__":
    write_bundle(FOLDER)
    (FOLDER / "tiny.gguf").unlink()
