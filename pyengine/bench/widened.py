"""The bundled model with experts of realistic size, made once and kept in the user's cache folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pyengine.bench.model_facts import read_facts
from pyengine.bundled import bundled_model
from pyengine.cache import cache_dir
from pyengine.errors import PyengineError, UsageError

#: Neurons of an expert's hidden layer in the bundled model.
_BUNDLED_FF = 64

#: Left free on the disk, bytes.
_SPARE = 1 << 30


def widened_model(n_ff: int, say: Callable[[str], None]) -> Path:
    """The bundled model with `n_ff` neurons per expert; makes it with gguf_tools if it is not there yet.

    Raises:
        UsageError: fewer neurons than the bundled model has, or no room on the disk.
        PyengineError: making it failed.
    """
    source = bundled_model()
    if n_ff < _BUNDLED_FF:
        raise UsageError(f"the bundled model has {_BUNDLED_FF} neurons per expert already; --widened takes more")
    target = cache_dir() / "models" / f"{source.name.partition('-')[0]}-ff{n_ff}.gguf"
    if target.is_file():
        return target
    facts = read_facts(source)
    require_space(target, facts.other_bytes + facts.expert_bytes * n_ff // _BUNDLED_FF)
    say(f"making {target.name} from the bundled model")
    run_gguf_tools("widen", str(source), str(target), "--ff", str(n_ff))
    return target


def require_space(target: Path, size: int) -> None:
    """Make the folder of `target` and check that a file of `size` bytes fits. Raises UsageError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size + _SPARE:
        raise UsageError(
            f"{target.name} needs {size / 1e9:.1f} GB and {_SPARE / 1e9:.1f} GB to spare, but {target.parent} has "
            f"{free / 1e9:.1f} GB free; make room, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def run_gguf_tools(*arguments: str) -> None:
    """Run a command of gguf_tools. Raises PyengineError with its last line if it fails."""
    command = [sys.executable, "-m", "gguf_tools", *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise PyengineError(
            f"gguf_tools {arguments[0]} failed: {lines[-1] if lines else f'exit code {done.returncode}'}"
        )
