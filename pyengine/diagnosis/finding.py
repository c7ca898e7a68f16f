"""What a check says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum


class Level(Enum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """worth knowing; nothing has to be done"""
    SLOW = "slow"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    level: Level
    found: str
    remedy: str = ""
    """what to do about it; empty if there is nothing to do"""

    def as_json(self) -> dict[str, str]:
        return asdict(self) | {"level": self.level.value}


def ok(found: str) -> Finding:
    return Finding(Level.OK, found)


def note(found: str, remedy: str = "") -> Finding:
    return Finding(Level.NOTE, found, remedy)


def slow(found: str, remedy: str) -> Finding:
    return Finding(Level.SLOW, found, remedy)


def fail(found: str, remedy: str) -> Finding:
    return Finding(Level.FAIL, found, remedy)
