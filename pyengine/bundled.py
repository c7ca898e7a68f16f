"""The demonstration model that comes with the package."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from pyengine.errors import ModelFileError

_NAME = "smolmoe-32x8-q4_0.gguf"
_SIZE = 99_084_800
"""bytes"""
_SHA256 = "35987252b2f083eb23c7e700603543384fee9b11c41d12796c62cfc4cbc7a31c"
_LFS_POINTER_START = b"version https://git-lfs.github.com/"
_REMEDY = "Reinstall pyengine, or name a model of your own with -m."


def bundled_model() -> Path:
    """The path of the bundled model's GGUF file. Its licence and its model card lie beside it.

    Only the file's size is checked: loading must not read the experts. `verify` checks every byte.

    Raises:
        ModelFileError: the file is absent, incomplete, or stands for a file that was not fetched.
    """
    resource = resources.files("pyengine").joinpath("data", _NAME)
    if not isinstance(resource, Path):
        # a zip archive, say: llama.cpp needs a file of its own
        raise ModelFileError("pyengine's bundled model can only be used where pyengine is installed unpacked.")
    try:
        size = resource.stat().st_size
        if size == _SIZE:
            return resource
        with resource.open("rb") as file:
            start = file.read(len(_LFS_POINTER_START))
    except OSError as error:
        raise _unreadable(resource, error) from error
    if start == _LFS_POINTER_START:
        raise ModelFileError(f"The bundled model {resource} was not fetched; run 'git lfs pull' in the source tree.")
    raise ModelFileError(
        f"The bundled model {resource} has {size} bytes instead of {_SIZE}: it is incomplete. {_REMEDY}"
    )


def verify() -> None:
    """Read the whole bundled model and compare its checksum.

    Raises:
        ModelFileError: as for `bundled_model`, or the file's content differs from what was published.
    """
    path = bundled_model()
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise _unreadable(path, error) from error
    if digest.hexdigest() != _SHA256:
        raise ModelFileError(f"The bundled model {path} is damaged: its checksum is wrong. {_REMEDY}")


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"The bundled model {path} cannot be read: {error.strerror}. {_REMEDY}")
