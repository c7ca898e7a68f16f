"""Advice and budgets that change at random, from another thread, while a model computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import numpy as np

from pyengine.native import NativeEngine

from .managed import bytes_for


class Agitation:
    """Repeats an action on its own thread while the with statement runs; fails there if the action has failed.

    times: how often the action has been done so far.
    """

    def __init__(self, action: Callable[[], None], pause: float = 0.0005) -> None:
        self.times = 0
        self._action = action
        self._pause = pause  # seconds
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Agitation:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._action()
            except Exception as error:
                self._failure = error
                return
            self.times += 1
            time.sleep(self._pause)


def random_priorities(engine: NativeEngine, seed: int = 0) -> Callable[[], None]:
    """An action that sets priorities of every kind a float can be: NaN, infinities, both zeros, subnormals, others."""
    rng, shape = np.random.default_rng(seed), (engine.info.n_layer, engine.info.n_expert)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38], dtype=np.float32)

    def act() -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        engine.set_priorities(np.where(rng.random(shape) < 0.5, values, rng.choice(odd, shape)))

    return act


def random_budgets(engine: NativeEngine, seed: int = 0) -> Callable[[], None]:
    """An action that sets any budget from the least to more than enough, the extremes often."""
    rng = np.random.default_rng(seed)

    def act() -> None:
        share = rng.choice([0.0, rng.random(), 1.5], p=[0.3, 0.5, 0.2])
        engine.set_ram_budget(bytes_for(engine, float(share)))

    return act
