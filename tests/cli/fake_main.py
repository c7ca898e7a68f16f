"""The command line over FakeLlama, as a program of its own: for tests that need a real terminal or real signals.

The environment variable FAKE_LLAMA holds FakeLlama's class attributes as JSON.
"""

from __future__ import annotations

import json
import os

from fake_engine import END, FakeLlama

import pyengine
from pyengine.__main__ import entry
from pyengine.cli import completion


def main() -> None:
    scripted = type("Scripted", (FakeLlama,), json.loads(os.environ.get("FAKE_LLAMA", "{}")))
    pyengine.Llama = scripted  # type: ignore[misc, assignment]
    completion.end_of_generation = lambda _: lambda token: token == END
    entry()


if __name__ == "__main__":
    main()
