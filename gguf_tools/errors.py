"""What can go wrong, one class per remedy. Messages are complete sentences for a user."""

from __future__ import annotations


class GgufToolsError(Exception):
    """Base of everything this package raises on purpose."""


class ModelFileError(GgufToolsError, ValueError):
    """The model file is missing, damaged, or of a kind we do not know."""


class RequestError(GgufToolsError, ValueError):
    """The file is sound, but what was asked for cannot be done with it, or not here."""


def one_line(text: str) -> str:
    """`text` from a file as part of a message: no line breaks and nothing that could steer a terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
