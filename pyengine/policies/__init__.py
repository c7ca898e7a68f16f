"""Cache policies: how much each expert is worth keeping. A new one is a file here and a line in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pyengine.errors import UsageError
from pyengine.policies.activation_path import ActivationPathPolicy
from pyengine.policies.arc import ArcPolicy
from pyengine.policies.expert_map import ExpertMapPolicy
from pyengine.policies.kept import LEARNED, learned_for, load_policy, policy_file
from pyengine.policies.lfu import LfuPolicy
from pyengine.policies.lrfu import LrfuPolicy
from pyengine.policies.lru import LruPolicy
from pyengine.policies.mrs import MrsPolicy
from pyengine.policies.next_use import NextUsePolicy
from pyengine.policies.policy import CacheShape, Policy, as_one_text
from pyengine.policies.shallow import ShallowPolicy

#: Name -> what makes a policy for a cache. LEARNED is not among them: it is nothing without a file.
POLICIES: Mapping[str, Callable[[CacheShape], Policy]] = {
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "lrfu": LrfuPolicy,
    "arc": ArcPolicy,
    "shallow": ShallowPolicy,
    "mrs": MrsPolicy,
    "activation-path": ActivationPathPolicy,
    "expert-map": ExpertMapPolicy,
    "next-use": NextUsePolicy,
}


#: What "auto" begins with.
DEFAULT_POLICY = "lrfu"

#: What "auto" chooses among, by replaying the model's recent tokens. LRFU is near the best everywhere (see lrfu.py). On
#: gpt-oss-20b expert-map misses 2 to 8 % fewer than LFU at 12 and 16 slots per layer, on the bundled model between 18 %
#: more and 8 % fewer; LRU is best with few slots and balanced routing. ARC, shallow and activation-path were never the
#: best, MRS and next-use never by 3 %.
CANDIDATES = ("lrfu", "expert-map", "lru")


def candidates(learned: Path | None) -> tuple[str, ...]:
    """CANDIDATES, and LEARNED if there is a file of what was learned for the model."""
    return CANDIDATES if learned is None else (*CANDIDATES, LEARNED)


def is_policy(name: str) -> bool:
    """Whether it is a name in the table, "learned" or "learned:FILE"."""
    kind, colon, file = name.partition(":")
    return name in POLICIES or (kind == LEARNED and bool(file) == bool(colon))


def check_wording(name: str) -> None:
    """Raise UsageError unless it is "auto" or names a policy."""
    if name != "auto" and not is_policy(name):
        raise UsageError(f"there is no cache policy {name!r:.40}; there are auto, {', '.join([*POLICIES, LEARNED])}")


def make_policy(name: str, shape: CacheShape, learned: Path | None = None) -> Policy:
    """A fresh policy.

    Args:
        name: in the table; or "learned", of which `learned` is the file, or "learned:FILE".

    Raises:
        UsageError: there is none of that name, or no file of what was learned.
        OSError, LearnedPolicyError: that file cannot be used.
    """
    if not is_policy(name):
        raise UsageError(f"there is no cache policy {name!r:.40}; there are {', '.join([*POLICIES, LEARNED])}")
    kind, _, file = name.partition(":")
    if kind != LEARNED:
        return POLICIES[name](shape)
    path = Path(file) if file else learned
    if path is None:
        raise UsageError("no file says what the policy learned; `pyengine learn-policy` makes one: learned:FILE")
    return load_policy(path, shape)


__all__ = [
    "CANDIDATES",
    "LEARNED",
    "POLICIES",
    "CacheShape",
    "Policy",
    "as_one_text",
    "candidates",
    "learned_for",
    "make_policy",
    "policy_file",
]
