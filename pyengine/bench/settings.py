"""What a benchmark is asked to do, apart from its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyengine.bench.rows import DEFAULT_BUDGETS, KINDS


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        kinds, shares: see rows.plan_rows.
        n_tokens: tokens decoded after each prompt.
        n_prompts: prompts decoded; the first one in cold state, the others for the steady figures.
        prefill_tokens: tokens of the prefill text.
        rounds: samples of each row.
        decode_limit_s: seconds after which the decoding of one prompt ends early.
        sample_limit_s: seconds after which a sample is given up.
        disk_limit: bytes per second that may be read from the models' disk, or None.
        trace: routing trace to take expert ids from, or None.
        recall: with a trace: of each guess about the layer after the next, how likely it is right; None: no guesses.
        n_threads: for the kernels.
        probe_s: seconds of each disk probe.
        gpu: ggml's name of a device for the rows of rows.GPU, or None.
        check_plan: also predict each row of ours, as `pyengine plan` does, right before it is measured.
    """

    kinds: Sequence[str] = tuple(KINDS)
    shares: Sequence[float] = DEFAULT_BUDGETS
    n_tokens: int = 48
    n_prompts: int = 3
    prefill_tokens: int = 512
    rounds: int = 3
    decode_limit_s: float = 60.0
    sample_limit_s: float = 1800.0
    disk_limit: int | None = None
    trace: Path | None = None
    recall: float | None = None
    n_threads: int = 1
    probe_s: float = 1.0
    check_plan: bool = False
    gpu: str | None = None


#: Changes for the bundled model, which is small: two minutes in all.
QUICK = {
    "shares": (25.0, 50.0, 100.0),
    "n_tokens": 32,
    "n_prompts": 2,
    "prefill_tokens": 256,
    "rounds": 2,
    "probe_s": 0.3,
}
