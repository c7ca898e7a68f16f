"""Decoding over faulty_disk.c, which is preloaded."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..agitation import Agitation, random_budgets, random_priorities
from ..decoding import DecodeError
from ..managed import managed


def decode(path: str, script: list[list[int]], share: float, out: str, n_ubatch: int, agitate: bool) -> dict[str, Any]:
    """Decode with our engine; logits to `out`. With faulty_disk.c preloaded: how many reads and faults it saw."""
    with managed(Path(path), share) as (engine, model), model.context(n_ubatch=n_ubatch) as context:
        with contextlib.ExitStack() as stack:
            if agitate:
                stack.enter_context(Agitation(random_budgets(engine)))
                stack.enter_context(Agitation(random_priorities(engine)))
            np.save(out, context.run(script))
        stats = engine.stats()
    disk = ctypes.CDLL(None)
    return {"stats": stats, "reads": disk.faulty_disk_reads(), "faults": disk.faulty_disk_faults()}


def decode_over_errors(path: str, script: list[list[int]], share: float, out: str, after: int) -> dict[str, Any]:
    """The read number `after`, counted from the end of loading, fails. A chunk that fails is decoded again."""
    disk = ctypes.CDLL(None)
    got, errors = [], []
    with managed(Path(path), share) as (engine, model), model.context() as context:
        os.environ["FAULTY_DISK_EIO_AFTER"] = str(disk.faulty_disk_reads() + after)
        for chunk in script:
            try:
                got.append(context.decode(chunk))
            except DecodeError:
                errors.append(str(engine.take_failure()))
                got.append(context.decode(chunk))
    np.save(out, np.concatenate(got))
    return {"errors": errors, "faults": disk.faulty_disk_faults()}


def abort(path: str, tokens: list[int], share: float, after: int) -> dict[str, Any]:
    """Prefill with faulty_disk.c preloaded, and want to stop once `after` reads have begun: the reads at the end, and
    what llama_decode answers."""
    disk = ctypes.CDLL(None)
    with managed(Path(path), share) as (_, model), model.context() as context:
        start = disk.faulty_disk_reads()
        context.set_abort(lambda: disk.faulty_disk_reads() - start >= after)
        try:
            context.decode(tokens)
            status = 0
        except DecodeError as error:
            status = error.status
        return {"status": status, "reads": disk.faulty_disk_reads() - start}
