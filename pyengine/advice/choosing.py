"""Chooses the cache policy of a running model by replaying its recent tokens, now and then, in a process that only runs
when a core has nothing else to do (see judging.py)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyengine.advice.judging import Question
from pyengine.advice.keeper import Keeper
from pyengine.advice.profile import RECENT, Profile
from pyengine.errors import PyengineError
from pyengine.native import ModelInfo, NativeEngine
from pyengine.policies import is_policy
from pyengine.traces.routing_log import Prompt, Token

_log = logging.getLogger("pyengine")

#: Tokens to judge by, at least.
WINDOW = 512
#: Tokens from one judgement to the next, once there was one.
INTERVAL = 4096
#: Seconds without a token after which the user is taken to read or type, and tokens after which that is not waited for.
_QUIET, _PATIENCE = 1.0, 2048
#: Seconds after which a judgement is given up: with all cores busy it hardly runs at all.
_LATE = 900.0
#: Misses from which on their average cost is known; until then they cost what a fast disk takes, bytes per second.
_ENOUGH, _FAST = 1000, 3e9


def seconds_per_miss(stats: Mapping[str, int], info: ModelInfo) -> float:
    """That decoding waits for a missing expert, of the engine with these `stats`."""
    if stats["misses"] >= _ENOUGH:
        return stats["stall_ns"] / 1e9 / stats["misses"]
    return info.expert_bytes / info.n_experts_total / _FAST


class Chooser:
    """Listens to a routing log, which calls it on the computing thread: only there it asks something of the engine.

    Args:
        profile: what earlier runs left, or None.

    Attributes:
        n_token: seen in this run; judged: whether there was ever a judgement.
    """

    def __init__(self, native: NativeEngine, info: ModelInfo, keeper: Keeper, profile: Profile | None) -> None:
        self._native, self._info, self._keeper = native, info, keeper
        self._ring = np.zeros((RECENT, info.n_layer, info.n_expert_used), np.uint16)
        self._counts = np.zeros((info.n_layer, info.n_expert), np.int64)
        self._rows = np.arange(info.n_layer)[:, None]
        self._n_kept = 0  # tokens that were ever in the ring
        self.n_token = 0
        self._unjudged = 0
        self.judged = False
        if profile is not None:
            n = len(profile.recent)
            self._ring[:n] = profile.recent
            self._n_kept = n
            self._unjudged, self.judged = profile.unjudged, bool(profile.policy)
        self._asked = 0  # tokens that the judgement under way is about
        self._judging: _Judging | None = None

    def begin(self) -> None:
        """Judge what earlier runs left, if it is time. Quiet is not waited for: a run of one short answer has none."""
        if self._due:
            self._judge(quiet=0.0)

    def token(self, token: Token) -> None:
        self._ring[self._n_kept % RECENT] = token.ids
        self._counts[self._rows, token.ids] += 1
        self._n_kept += 1
        self.n_token += 1
        self._unjudged += 1
        judging = self._judging
        if judging is None:
            if self._due:
                self._judge(quiet=_QUIET)
            return
        judging.tokens += 1
        if judging.ended:
            self._judging = None
            self._take(judging.answer)

    def prompt(self, prompt: Prompt) -> None:
        if self._judging is not None:
            self._judging.tokens += 1

    def recent(self) -> npt.NDArray[np.uint16]:
        """uint16 [n, n_layer, n_expert_used]: the last tokens, at most RECENT."""
        if self._n_kept <= RECENT:
            return self._ring[: self._n_kept].copy()
        return np.roll(self._ring, -(self._n_kept % RECENT), axis=0)

    def learned(self) -> Profile:
        """What this run has shown."""
        uses = self._counts / np.maximum(1, self._counts.sum(axis=1, keepdims=True))
        policy, unjudged = self._keeper.policy if self.judged else "", self._unjudged
        if self._judging is not None and self._judging.answer is not None:
            policy = self._judging.answer
        elif self._judging is not None:
            unjudged += self._asked
        return Profile(uses.astype(np.float32), self.recent(), self.n_token, policy, unjudged)

    def stop(self) -> None:
        """End a judgement that is under way; does not wait for it."""
        if self._judging is not None:
            self._judging.stop()

    @property
    def _due(self) -> bool:
        return self._unjudged >= (INTERVAL if self.judged else WINDOW) and self._n_kept >= WINDOW

    def _judge(self, quiet: float) -> None:
        stats = self._native.stats()
        wait = seconds_per_miss(stats, self._info)
        learned = self._keeper.learned
        question = Question(
            self.recent(), self._info.n_expert, stats["slots"], self._keeper.policy, wait, str(learned or "")
        )
        self._asked, self._unjudged = self._unjudged, 0
        self._judging = _Judging(question, quiet)

    def _take(self, answer: str | None) -> None:
        if answer is None:
            return
        self.judged = True
        if answer != self._keeper.policy:
            before = self._keeper.policy
            try:
                self._keeper.switch(answer, self.recent())
            except (OSError, PyengineError) as reason:  # the file of what was learned is gone
                _log.debug("no cache policy was changed: %s", reason)
                return
            _log.info("cache policy: %s instead of %s", answer, before)


class _Judging:
    """One judgement: a thread that sleeps, and the process it waits for. Whatever goes wrong there, there is no answer.

    Attributes:
        tokens: computed since it began; whoever computes counts.
        ended: whether it is over; answer: the policy to go on with, None if that is not known.
    """

    def __init__(self, question: Question, quiet: float) -> None:
        self._question, self._quiet = question, quiet
        self.tokens = 0
        self.ended = False
        self.answer: str | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._run, name="pyengine-judging", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        with self._lock:
            if self._process is not None:
                self._process.kill()  # the thread collects it

    def _run(self) -> None:
        try:
            if self._wait_for_quiet():
                self.answer = self._ask()
        except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError) as reason:
            _log.debug("no cache policy was chosen: %s", reason)
        finally:
            self.ended = True

    def _wait_for_quiet(self) -> bool:
        """Until nobody computes. False: stopped."""
        before = -1
        while self._quiet and before != self.tokens < _PATIENCE:
            before = self.tokens
            if self._stopped.wait(self._quiet):
                return False
        return not self._stopped.is_set()

    def _ask(self) -> str | None:
        content = self._question.pack()
        with self._lock:
            if self._stopped.is_set():
                return None
            process = self._process = _start()
        try:
            out, _ = process.communicate(content, _LATE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, "judging")
        answer = json.loads(out)
        _log.debug("cache policies judged: %s", answer)
        policy: str = answer["policy"]
        return policy if is_policy(policy) else None


def _start() -> subprocess.Popen[bytes]:
    # In our session: one of its own would be scheduled as if it were not idle (autogroup, see sched(7)).
    process = subprocess.Popen(
        [sys.executable, "-m", "pyengine.advice.judging"],
        # Not a pyengine of the folder we happen to be in; and one thread.
        env=os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    # From here, not by the process itself or between fork and exec: the first would be late, the second unsafe in a
    # program of many threads.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    with contextlib.suppress(OSError):  # where memory ends, this process goes and not the model's
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    return process
