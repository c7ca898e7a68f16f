"""One contest: ways to run one model at one budget, alive at once, that take turns at decoding under one disk limit
after the other. In a cell all begin the same text, and a round gives each contender one turn with the same number of
steps, so that what they are compared by are the same tokens; every second round goes backwards.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyengine.bench import quiet
from pyengine.bench.cells import Disk, cell_of, contenders, left_behind, next_round
from pyengine.bench.cgroups import DiskLimit, block_device, groups
from pyengine.bench.players import GoneError, Player
from pyengine.bench.rows import AUTO, AUTO_MEMORY, MMAP_KINDS, OURS, Row, plan_rows
from pyengine.bench.samples import Sample, decode_figures, same_tokens
from pyengine.bench.sampling import BenchModel, obstacle, task_of
from pyengine.bench.settings import Settings

#: Tokens of a player's context: prompt and all its turns.
CONTEXT = 1024

#: After a turn, until the next player's: OpenMP's threads fall asleep.
_PAUSE_S = 0.1

#: Who has as much memory as auto took with its share of experts.
_SAME_MEMORY = (AUTO_MEMORY, *MMAP_KINDS)

#: A player that is so many times slower than auto has lost; nobody is given up within so many seconds.
_HOPELESS, _LEAST_PATIENCE_S = 10, 10.0

#: Steps of a turn at least; steps before the rounds of a cell, in which engines find their way: at the bare disk when
#: its text begins, then with its own disk.
_LEAST_STEPS, _BEGINNING, _SETTLING = 2, 8, 2
#: Texts of cells are so many numbers apart, which is no multiple of the number of prompts.
_APART = 101


@dataclass(frozen=True)
class Terms:
    """
    Attributes:
        rounds: of each cell, in all sittings together.
        turn_s: how long a turn of auto should last, and a third of the most that a slower player may take.
        most_steps: of a turn.
        warm_s: seconds of decoding at the bare disk before the first cell.
        patience_s: a player that gives not one token in so many seconds has lost; sooner where auto is fast.
        all_contend: slow baselines have as many turns as good ones.
    """

    rounds: int = 5
    turn_s: float = 8.0
    most_steps: int = 24
    warm_s: float = 6.0
    patience_s: float = 120.0
    all_contend: bool = False


@dataclass
class Contest:
    """
    Attributes:
        share: budget in percent of all experts; the memory that auto takes with it is the limit of who has no share
            of its own: memory-mapped stock, and auto-memory.
        known: samples of earlier sittings and of this one.
        probe_mb_per_s: of the bare disk, just before.
    """

    model: BenchModel
    share: float
    kinds: Sequence[str]
    settings: Settings
    terms: Terms
    known: list[Sample] = field(default_factory=list)
    probe_mb_per_s: float | None = None

    def cell(self, disk: Disk) -> list[Sample]:
        """What is known of a cell."""
        return cell_of(self.known, self.model.facts.path.name, self.share, disk)

    def open(self, disk: Disk) -> bool:
        """Whether a cell still lacks rounds."""
        return next_round(self.cell(disk)) < self.terms.rounds

    def contenders(self, disk: Disk) -> list[str]:
        """Kinds that deserve another turn in a cell."""
        return contenders(self.cell(disk), self.kinds, all_contend=self.terms.all_contend)

    def play(
        self, disks: Sequence[Disk], say: Callable[[str], None], late: Callable[[], bool] = lambda: False
    ) -> Iterator[Sample]:
        """Every sample as it is taken.

        Args:
            disks: the fastest first, so that a player that a slow disk ends is missed least.
            late: whether time is up: no further round is begun then.

        Raises:
            CgroupError: no control groups can be made.
        """
        disks = [disk for disk in disks if self.open(disk)]
        wanted = {kind for disk in disks for kind in self.contenders(disk)}
        rows = {
            row.kind: row
            for row in plan_rows(self.model.facts, self.kinds, [self.share], self.share)
            if row.kind in wanted
        }
        with contextlib.ExitStack() as stack:
            gone: dict[str, GoneError] = {}
            players: dict[str, Player] = {}
            limit: int | None = None
            # Auto first, because what it took is the limit of others; those last, so that auto has chosen its policy.
            for kind in sorted(rows, key=lambda kind: (kind in _SAME_MEMORY) - (kind == AUTO)):
                if late():
                    return
                try:
                    if kind in _SAME_MEMORY and AUTO in players:
                        limit = limit or players[AUTO].groups.memory_use().peak
                        rows[kind] = _with_at_most(rows[kind], limit)
                    players[kind] = self._enter(stack, rows[kind])
                except GoneError as error:
                    gone[kind] = error
                word = f"{gone[kind].status} ({gone[kind]})" if kind in gone else "is ready"
                say(f"{self}: {kind} {word}")
            for place, disk in enumerate(disks):
                if late():
                    return
                self._begin_text(_APART * (1 + place), disk, players, gone)
                yield from self._cell(disk, rows, players, gone, say, late)

    def _enter(self, stack: contextlib.ExitStack, row: Row) -> Player:
        """Load one player and let it decode a while. Raises GoneError."""
        missing = obstacle(self.model, row)
        if missing:
            raise GoneError("unsupported", missing)
        made = stack.enter_context(groups(row.limit, DiskLimit(block_device(self.model.facts.path), None)))
        quiet.drop_caches(self.model.files)
        settings = replace(self.settings, n_tokens=CONTEXT - 65, prefill_tokens=1)  # see child.n_ctx_of
        player = Player(task_of(self.model, row, settings), made, self.settings.sample_limit_s)
        stack.callback(player.end)
        player.turn(4 * self.terms.most_steps, self.terms.warm_s, self.terms.patience_s)
        return player

    def _cell(
        self,
        disk: Disk,
        rows: Mapping[str, Row],
        players: dict[str, Player],
        gone: dict[str, GoneError],
        say: Callable[[str], None],
        late: Callable[[], bool],
    ) -> Iterator[Sample]:
        for player in players.values():
            player.groups.limit_disk(DiskLimit(block_device(self.model.facts.path), disk.bytes_per_s))
        steps, patience = self._settle(disk, players, gone)
        for kind, error in gone.items():
            if kind in self.contenders(disk):
                yield self._note(
                    self._sample(
                        rows[kind], disk, next_round(self.cell(disk)), 0, status=error.status, reason=str(error)
                    )
                )
        while self.open(disk):
            number = next_round(self.cell(disk))
            order = [kind for kind in self.contenders(disk) if kind in players]
            for place, kind in enumerate(reversed(order) if number % 2 else order):
                sample = self._turn(rows[kind], disk, number, place, steps, patience, players, gone)
                say(f"{self}, {disk}, round {number + 1}, {kind}: {_told(sample)}")
                yield self._note(sample)
            if late() or not any(kind in players for kind in OURS):
                return

    def _begin_text(self, number: int, disk: Disk, players: dict[str, Player], gone: dict[str, GoneError]) -> None:
        for kind in self._fit(disk, players):
            players[kind].groups.limit_disk(DiskLimit(block_device(self.model.facts.path), None))
            self._ask(kind, _BEGINNING, self.terms.turn_s, self.terms.patience_s, players, gone, number)

    def _fit(self, disk: Disk, players: Mapping[str, Player]) -> list[str]:
        """Who contends in a cell, but for who is hopeless there by what it did on faster disks."""
        contenders = self.contenders(disk)
        where = (self.model.facts.path.name, self.share)
        idle = left_behind(self.known, *where, self.kinds, all_contend=self.terms.all_contend)
        return [kind for kind in players if kind in contenders and kind not in idle]

    def _ask(
        self,
        kind: str,
        steps: int,
        limit_s: float,
        patience: float,
        players: dict[str, Player],
        gone: dict[str, GoneError],
        text: int | None = None,
    ) -> Mapping[str, Any] | None:
        """A turn of a player; None if it has ended, and `gone` says why."""
        try:
            return players[kind].turn(steps, limit_s, patience, text)
        except GoneError as error:
            gone[kind] = error
            players.pop(kind).end()
            return None

    def _settle(self, disk: Disk, players: dict[str, Player], gone: dict[str, GoneError]) -> tuple[int, float]:
        """Let who contends get used to the disk.

        Returns:
            The steps of a turn, and the seconds that a player may take for a token.
        """
        seconds, patience = self.terms.turn_s, self.terms.patience_s
        for kind in self._fit(disk, players):
            phase = self._ask(kind, _SETTLING, self.terms.turn_s, patience, players, gone)
            if phase is not None and (kind == AUTO or AUTO not in players):
                seconds = phase["seconds"] / phase["tokens"]
                patience = min(self.terms.patience_s, max(_LEAST_PATIENCE_S, _HOPELESS * seconds))
        return max(_LEAST_STEPS, min(self.terms.most_steps, int(self.terms.turn_s / seconds))), patience

    def _turn(
        self,
        row: Row,
        disk: Disk,
        number: int,
        place: int,
        steps: int,
        patience: float,
        players: dict[str, Player],
        gone: dict[str, GoneError],
    ) -> Sample:
        time.sleep(_PAUSE_S)
        phase = self._ask(row.kind, steps, 3 * self.terms.turn_s, patience, players, gone)
        if phase is None:
            error = gone[row.kind]
            return self._sample(row, disk, number, place, status=error.status, reason=str(error))
        found = decode_figures(phase) | {"exact": self._exact(row, players)}
        if not row.stock:
            found["budget_bytes"] = players[row.kind].budget
        return self._sample(row, disk, number, place, **found)

    def _exact(self, row: Row, players: Mapping[str, Player]) -> str:
        """Against the first other player of pyengine's, in the texts that both have begun; stock is not judged here."""
        other = next((p for kind, p in players.items() if kind != row.kind and not kind.startswith("stock")), None)
        if row.stock or other is None:
            return ""
        mine, theirs = players[row.kind].transcript, other.transcript
        both = sorted(mine.keys() & theirs.keys())
        return "yes" if same_tokens([mine[n] for n in both], [theirs[n] for n in both]) else "no"

    def _note(self, sample: Sample) -> Sample:
        self.known.append(sample)
        return sample

    def _sample(self, row: Row, disk: Disk, number: int, place: int, **found: Any) -> Sample:
        where = str(disk) if disk.transfer_ratio is None else f"R = {disk.transfer_ratio:g}"
        known: dict[str, Any] = {
            "model": self.model.facts.path.name,
            "row": f"{row.kind} {self.share:g}%, {where}",
            "kind": row.kind,
            "share": self.share,
            "round": number,
            "order": place,
            "status": "ok",
            "reason": "",
            "budget_bytes": row.budget,
            "limit_bytes": row.limit,
            "disk_limit_mb_per_s": disk.bytes_per_s / 1e6 if disk.bytes_per_s else None,
            "probe_mb_per_s": self.probe_mb_per_s,
            "transfer_ratio": disk.transfer_ratio,
            "replay": self.settings.trace.name if self.settings.trace and not row.stock else "",
        }
        return Sample(**(known | found))

    def __str__(self) -> str:
        return f"{self.model.facts.path.name} {self.share:g}%"


def _with_at_most(row: Row, peak: int | None) -> Row:
    """A row with no more memory than auto took at its peak: the row's own limit, with room for any program, would hold
    all of a small model."""
    return replace(row, limit=min(peak, row.limit)) if peak and row.limit else row


def _told(sample: Sample) -> str:
    if sample.status != "ok":
        return f"{sample.status} ({sample.reason})"
    wrong = ", DIFFERENT TOKENS" if sample.exact == "no" else ""
    return f"{sample.decode_tokens} tokens, {sample.decode_tok_per_s or 0:.3g} tok/s{wrong}"
