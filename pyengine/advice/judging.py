"""Which cache policy suits a model's recent tokens: each candidate replayed over them. Runs as a program of its own
(`python -m pyengine.advice.judging`), a question on standard input and the answer on standard output, because decoding
wants every core: another process can have the lowest priority, and holds no lock that the engine waits for.

Replayed in the first quarter of the tokens slots only fill. The other three are two halves, and a policy must be better
in both: what one text has shown by chance does not come twice.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyengine.policies import Policy, candidates, make_policy
from pyengine.replay.hits import Replay
from pyengine.replay.layout import Layout, shared_slots
from pyengine.replay.slots import ReplayedSlots
from pyengine.replay.steps import Steps

#: Of the missing experts per token, the share that a change must save. Two halves of one text differ by more.
CLEARLY = 0.03
_WARM_UP = 0.25
#: Of tokens times layers times experts, as many as are replayed: some seconds for all candidates.
_MOST_CELLS = 5_000_000
#: Seconds of CPU after which the operating system ends this program.
_MOST_SECONDS = 60


@dataclass(frozen=True)
class Question:
    recent: npt.NDArray[np.uint16]
    """uint16 [n_token, n_layer, n_expert_used]"""
    n_expert: int
    slots: int
    """of all layers together; should layers differ in the size of their experts, as if they did not"""
    current: str
    """the policy in use"""
    seconds_per_miss: float
    """that decoding waits for a missing expert"""
    learned: str = ""
    """the file of what the policy "learned" knows about this model; empty: there is none"""

    def pack(self) -> bytes:
        numbers = {key: value for key, value in vars(self).items() if key != "recent"}
        out = io.BytesIO()
        np.savez(out, recent=self.recent, numbers=np.frombuffer(json.dumps(numbers).encode(), np.uint8))
        return out.getvalue()


def unpack(content: bytes) -> Question:
    """What Question.pack() made."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return Question(recent=archive["recent"], **json.loads(bytes(archive["numbers"])))


@dataclass(frozen=True)
class Cost:
    """Of one policy, per token."""

    missing: tuple[float, float]
    """experts, in each half"""
    seconds: float
    """of CPU that the policy itself takes"""


class _Clocked(Policy):
    """A policy, and the time that it takes."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.seconds = 0.0

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        start = time.process_time()
        self._policy.observe(ids, weights)
        self.seconds += time.process_time() - start

    def priorities(self) -> npt.NDArray[np.float32]:
        start = time.process_time()
        found = self._policy.priorities()
        self.seconds += time.process_time() - start
        return found


def cost(name: str, recent: npt.NDArray[np.uint16], layout: Layout, learned: Path | None = None) -> Cost:
    """Of the policy of this name; see make_policy, also for what it raises."""
    n = len(recent)
    first = int(_WARM_UP * n)
    middle = (first + n) // 2
    missing: list[int] = []

    def note(_: ReplayedSlots, token: int) -> None:
        if token in (first, middle):
            missing.append(int(replay.misses().missing.sum()))

    policy = _Clocked(make_policy(name, layout.cache_shape, learned))
    replay = Replay(Steps(recent, None, None, frozenset(), (), layout.n_expert), layout, policy, note)
    missing.append(int(replay.run().missing.sum()))
    at_first, at_middle, at_end = missing
    halves = (at_middle - at_first) / (middle - first), (at_end - at_middle) / (n - middle)
    return Cost(halves, policy.seconds / n)


def judge(question: Question, names: Sequence[str] = ()) -> dict[str, Cost]:
    """Each of these policies, every candidate by default, and the policy in use."""
    learned = Path(question.learned) if question.learned else None
    n_layer, n_used = question.recent.shape[1:]
    n_token = max(128, _MOST_CELLS // (n_layer * question.n_expert))
    layout = shared_slots(n_layer, question.n_expert, n_used, question.slots)
    wanted = dict.fromkeys((question.current, *(names or candidates(learned))))
    recent = question.recent[-n_token:]
    return {name: cost(name, recent, layout, learned) for name in wanted}


def choose(current: str, costs: Mapping[str, Cost], seconds_per_miss: float) -> str:
    """The policy to go on with: of those that miss clearly less than the current one in both halves, the one that costs
    the least time, if that is less than now."""

    def seconds(cost: Cost) -> float:
        return sum(cost.missing) / 2 * seconds_per_miss + cost.seconds

    now = costs[current]
    better = [
        name
        for name, cost in costs.items()
        if all(a < (1 - CLEARLY) * b for a, b in zip(cost.missing, now.missing, strict=True))
        and seconds(cost) < seconds(now)
    ]
    return min(better, key=lambda name: seconds(costs[name]), default=current)


def _limit() -> None:
    """Ctrl-C is for whoever asked; and should nobody end this, the system does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_MOST_SECONDS, _MOST_SECONDS))


def main() -> None:
    _limit()
    question = unpack(sys.stdin.buffer.read())
    costs = judge(question)
    chosen = choose(question.current, costs, question.seconds_per_miss)
    print(json.dumps({"policy": chosen, "costs": {name: asdict(cost) for name, cost in costs.items()}}))


if __name__ == "__main__":
    main()
