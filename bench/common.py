"""What the exactness programs share: prompts, a stock reference that never meets pyengine, and the CSV's place."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

PROMPTS = (
    "What is the capital of France?",
    "Explain photosynthesis in simple terms.",
    "Give me three tips for staying healthy.",
    "Write a Python function that adds two numbers.",
    "Why is the sky blue?",
    "Tell me a short story about a lighthouse keeper.",
    "What is the difference between a virus and a bacterium?",
    "Translate 'good morning' into Spanish and German.",
    "List five animals that live in the desert.",
    "How do I make a cup of tea?",
    "Write a polite e-mail that declines an invitation.",
    "What causes the tides?",
    "Summarise the story of Romeo and Juliet.",
    "Who was Isaac Newton?",
    "Write a haiku about autumn leaves.",
    "How does a bicycle stay upright?",
    "Give an example of a metaphor and explain it.",
    "What should I pack for a week in the mountains?",
    "Count from one to twenty in words.",
    "Write a shell command that finds all text files larger than one megabyte.",
)


def in_stock_process(program: str, *arguments: str) -> Any:
    """Run a program of this folder as a child that imports llama_cpp only; its last line of output, as JSON."""
    command = [sys.executable, program, "--stock", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def write_csv(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)
