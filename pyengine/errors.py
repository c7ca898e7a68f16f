"""What can go wrong, one class per remedy. Messages are complete sentences for a user."""

from __future__ import annotations


class PyengineError(Exception):
    """Base of everything this package raises on purpose."""


class StartupError(PyengineError):
    """The installed llama.cpp does not fit: another version, or built for instructions this machine cannot run."""


class ModelFileError(PyengineError, ValueError):
    """The model file is missing, unreadable, damaged, or of a kind llama.cpp does not know."""


class StaleBundleError(PyengineError):
    """A bundle that does not belong to this model file, this ggml or this CPU."""


class BudgetError(PyengineError, ValueError):
    """The expert budget is too small or not understood."""


class ExpertReadError(PyengineError, RuntimeError):
    """An expert could not be read while computing. The token was not computed; the conversation so far is intact."""


class UsageError(PyengineError, RuntimeError):
    """A call that the rules for threads, processes or life time forbid."""


class UnmanagedModelError(PyengineError):
    """A valid model whose experts this engine does not manage; stock llama.cpp runs it."""


def one_line(text: str) -> str:
    """`text` from a file or a library as part of a message: no line breaks and nothing that could steer a terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
