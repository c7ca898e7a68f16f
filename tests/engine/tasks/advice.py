"""Decoding with advice of all kinds, over faulty_disk.c, which is preloaded."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pyengine.engine import ExpertEngine
from pyengine.native import NativeEngine

from ..advice_settings import Setting
from ..agitation import Agitation, random_priorities
from ..decoding import DecodeError, Model
from ..managed import bytes_for
from ..random_predictors import native_predictors

#: Decoding a few tokens of a small model takes seconds; a process that has run so many is stuck.
_STUCK_AFTER = 100


def decode(
    path: str,
    bundle: str,
    script: list[list[int]],
    settings: list[dict[str, Any]],
    out: str,
    errors_one_in: int = 0,
    lies_one_in: int = 0,
) -> list[dict[str, Any]]:
    """Decode the script once with each setting. Logits to `out`, an .npz file, in the settings' order.

    errors_one_in, lies_one_in: once the model is loaded, one read in so many fails, or brings wrong bytes; 0: none. A
    chunk that fails is decoded again, without errors.

    Returns:
        For each setting: stats, faults (of the disk, while decoding), errors (what failed), set (how often priorities
        and expectations were set from other threads), repacked (whether the bundle is in the kernels' layout).
    """
    logging.getLogger("pyengine").setLevel(logging.ERROR)  # failures are expected
    disk = ctypes.CDLL(None)
    answers, logits = [], []
    for number, fields in enumerate(settings):
        setting = Setting(**fields)
        print(f"{number}: {setting.name}", file=sys.stderr, flush=True)  # seen if this process does not survive it
        with (
            _end_if_stuck(),
            _advised(Path(path), Path(bundle), setting, seed=number) as (engine, model, agitations),
            model.context() as context,
        ):
            before, errors, got = disk.faulty_disk_faults(), [], []
            for chunk in script:
                try:
                    with _trouble(EIO=errors_one_in, LIE=lies_one_in):
                        got.append(context.decode(chunk))
                except DecodeError:
                    reason = engine.native.take_failure()
                    errors.append(f"{type(reason).__name__}: {reason}")
                    got.append(context.decode(chunk))
                assert engine.native.take_failure() is None
                engine.routing_log.drain()
            logits.append(np.concatenate(got))
            answers.append(
                {
                    "stats": engine.stats(),
                    "faults": disk.faulty_disk_faults() - before,
                    "errors": errors,
                    "set": sum(a.times for a in agitations),
                    "repacked": engine.info.bundle_repacked,
                }
            )
    np.savez(out, *logits)
    return answers


@contextlib.contextmanager
def _end_if_stuck() -> Iterator[None]:
    """End the process, and say what its threads do, if what is inside takes too long. Time in which the process was
    stopped hardly counts."""
    done = threading.Event()

    def watch() -> None:
        for _ in range(_STUCK_AFTER):
            if done.wait(1.0):
                return
        faulthandler.dump_traceback()
        os._exit(1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def _trouble(**one_in: int) -> Iterator[None]:
    """The disk makes trouble of these kinds inside, and none outside."""
    wanted = {f"FAULTY_DISK_{kind}_ONE_IN": str(n) for kind, n in one_in.items() if n}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ[name] = "0"


@contextlib.contextmanager
def _advised(
    path: Path, bundle: Path, setting: Setting, seed: int
) -> Iterator[tuple[ExpertEngine, Model, list[Agitation]]]:
    """A loaded model whose engine is told what the setting says."""
    asked = NativeEngine(path)
    budget = bytes_for(asked, setting.share)
    asked.close()
    look = {"off": "off", "fate": "fate", "learned": "auto"}.get(setting.look)
    engine = ExpertEngine(path, budget, bundle if setting.bundle else "off", setting.policy, look or "off")
    try:
        with Model(path, engine) as model, contextlib.ExitStack() as stack:
            engine.settle()
            if look is None:
                engine.native.set_predictors(native_predictors(engine.info, setting.look, seed))
            engine.native.set_prefetch_rules(least_chance=0.0)  # also what is hardly ever right
            actions = [_expectations(engine, seed)] if setting.expecting else []
            if setting.priorities != "policy":
                actions.append(_priorities(engine, setting.priorities, seed))
            yield engine, model, [stack.enter_context(Agitation(action)) for action in actions]
    finally:
        engine.close()


def _priorities(engine: ExpertEngine, kind: str, seed: int) -> Callable[[], None]:
    if kind == "random":
        return random_priorities(engine.native, seed)
    rng, shape = np.random.default_rng(seed), (engine.info.n_layer, engine.info.n_expert)
    values = [np.nan] if kind == "nan" else [np.inf, -np.inf]
    return lambda: engine.native.set_priorities(rng.choice(np.array(values, np.float32), shape))


def _expectations(engine: ExpertEngine, seed: int) -> Callable[[], None]:
    rng, info = np.random.default_rng(seed), engine.info

    def act() -> None:
        experts = rng.permutation(info.n_expert)[: rng.integers(1, 1 + info.n_expert_used)]
        engine.native.expect(int(rng.integers(info.n_layer)), experts.tolist(), keep=bool(rng.random() < 0.3))

    return act
