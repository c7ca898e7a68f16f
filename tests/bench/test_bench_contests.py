"""Contests: cells, verdicts, sittings and tables, with players that no machine has run."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_results import FACTS

from pyengine import bundled_model
from pyengine.bench import belady_misses as belady_room
from pyengine.bench import contest as contest_room
from pyengine.bench import experiments, quiet
from pyengine.bench.bounds import least_time
from pyengine.bench.cells import Cell, Disk, cell_of, contenders, next_round
from pyengine.bench.cgroups import Groups, MemoryUse
from pyengine.bench.contest import Contest, Terms
from pyengine.bench.experiments import CONTESTANTS, ratio_disks
from pyengine.bench.launch import Outcome
from pyengine.bench.players import GoneError
from pyengine.bench.report_contests import contests
from pyengine.bench.results import Run
from pyengine.bench.samples import CsvWriter
from pyengine.bench.sampling import BenchModel
from pyengine.bench.settings import Settings
from pyengine.bench.verdicts import paired, verdicts
from pyengine.errors import UsageError
from pyengine.traces import Trace, TracedModel, save_trace

KINDS = CONTESTANTS["never-slower"]

#: Tokens per second at the bare disk; a limit halves them.
SPEEDS = {
    "auto": 10.0,
    "auto-memory": 11.0,
    "lru-bundle": 8.0,
    "on-demand": 3.0,
    "stock-mmap-plain": 0.5,
    "stock-resident": 20.0,
    "activation-path": 5.0,
}


class ToyPlayer:
    """Decodes at SPEEDS; stock-mmap does not survive loading."""

    def __init__(self, task, groups, limit_s):
        self.kind, self.groups, self.transcript, self.alive = task.kind, groups, {}, True
        self.text, self.turns = 0, []
        self.budget = 60_000_000 if self.kind == "auto-memory" else task.budget
        if self.kind == "stock-mmap":
            raise GoneError("out of memory", "killed at the memory limit")

    def turn(self, steps, limit_s, patience_s, text=None):
        assert self.alive
        self.text = self.text if text is None else text
        speed = SPEEDS[self.kind] / (2 if self.groups.limits[-1] else 1)
        n = max(1, min(steps, int(limit_s * speed)))
        if n / speed > patience_s:
            raise GoneError("timed out", "not one token")
        start = len(self.transcript.setdefault(self.text, []))
        self.transcript[self.text] += range(start, start + n)
        self.turns.append((self.text, start, n))
        counts = dict.fromkeys(("cpu_s", "hits", "misses", "reads", "bytes_read", "stall_s"), 0)
        return {"tokens": n, "seconds": n / speed, "counts": counts, "step_seconds": [1 / speed] * n}

    def end(self):
        self.alive = False


class ToyGroups(Groups):
    def __init__(self):
        super().__init__()
        self.limits = [None]

    def limit_disk(self, limit):
        self.limits.append(limit.bytes_per_s)

    def memory_use(self):
        return MemoryUse(30_000_000, 0, 0)


@pytest.fixture(autouse=True)
def no_machine(monkeypatch):
    asked = []

    @contextlib.contextmanager
    def toy_groups(memory_limit, disk_limit):
        asked.append(memory_limit)
        yield ToyGroups()

    monkeypatch.setattr(contest_room, "groups", toy_groups)
    monkeypatch.setattr(contest_room, "block_device", lambda path: "8:0")
    monkeypatch.setattr(contest_room, "Player", ToyPlayer)
    monkeypatch.setattr(contest_room, "_PAUSE_S", 0)
    monkeypatch.setattr(quiet, "drop_caches", lambda files: "drop_caches")
    return asked


def new_contest(kinds=KINDS, **terms):
    model = BenchModel(FACTS, Path("toy.bundle"))
    known = {"rounds": 3, "turn_s": 1.0, "warm_s": 1.0}
    return Contest(model, 50.0, kinds, Settings(), Terms(**(known | terms)))


def play(contest, *disks):
    return list(contest.play(disks, lambda _: None))


def test_turns_go_forwards_and_backwards_with_equal_steps():
    found = [s for s in play(new_contest(), Disk(None)) if s.status == "ok"]
    assert [(s.round, s.kind) for s in found if s.kind in ("auto", "lru-bundle")] == [
        (0, "auto"),
        (0, "lru-bundle"),
        (1, "lru-bundle"),
        (1, "auto"),
        (2, "auto"),
        (2, "lru-bundle"),
    ]
    assert {s.decode_tokens for s in found if s.kind in ("auto", "lru-bundle")} == {10}  # a second of auto


def test_who_is_compared_decodes_the_same_tokens(monkeypatch):
    players = {}

    class Seen(ToyPlayer):
        def __init__(self, task, groups, limit_s):
            super().__init__(task, groups, limit_s)
            players[self.kind] = self

    monkeypatch.setattr(contest_room, "Player", Seen)
    play(new_contest(warm_s=0.5), Disk(None), Disk(10**6))
    auto, lru = (players[kind].turns for kind in ("auto", "lru-bundle"))
    assert auto[0] != lru[0], "who is slower warms up less"
    assert auto[1:] == lru[1:] and len({text for text, *_ in auto}) == 3


def test_slow_baselines_have_one_turn_and_dead_ones_are_recorded():
    found = play(new_contest(), Disk(None), Disk(10**6))
    for limit in (None, 1.0):
        cell = [s for s in found if s.disk_limit_mb_per_s == limit]
        count = {kind: sum(s.kind == kind for s in cell) for kind in KINDS}
        assert count == {
            "auto-memory": 3,
            "auto": 3,
            "lru-bundle": 3,
            "on-demand": 1,
            "stock-mmap-plain": 1,
            "stock-mmap": 1,
        }
        assert {s.status for s in cell if s.kind == "stock-mmap"} == {"out of memory"}
    assert [s.decode_tok_per_s for s in found if s.kind == "auto"] == pytest.approx([10.0] * 3 + [5.0] * 3)
    assert {s.exact for s in found if s.kind == "auto"} == {"yes"}


def test_the_papers_systems_all_go_on():
    found = play(new_contest(CONTESTANTS["papers"], all_contend=True), Disk(10**6, 4.0))
    assert {kind: sum(s.kind == kind for s in found) for kind in CONTESTANTS["papers"]} == dict.fromkeys(
        CONTESTANTS["papers"], 3
    )
    assert {(s.transfer_ratio, s.row) for s in found if s.kind == "auto"} == {(4.0, "auto 50%, R = 4")}


def test_a_player_that_gives_no_token_has_lost_and_is_missed():
    found = play(new_contest(patience_s=1.5), Disk(None), Disk(10**6))
    lost = [s for s in found if s.kind == "stock-mmap-plain"]
    assert [s.status for s in lost] == ["timed out", "timed out"]


def test_memory_mapped_stock_has_no_more_memory_than_auto_took(no_machine):
    found = play(new_contest(), Disk(None))
    limits = {s.kind: s.limit_bytes for s in found}
    assert limits["stock-mmap-plain"] == limits["auto-memory"] == 30_000_000 < limits["auto"]
    assert sorted(no_machine)[:3] == [30_000_000] * 3
    budgets = {s.kind: s.budget_bytes for s in found}
    assert (budgets["auto"], budgets["auto-memory"]) == (40_000_000, 60_000_000)


def test_a_second_sitting_goes_on_with_the_rounds():
    one = new_contest(rounds=2)
    play(one, Disk(None))
    again = new_contest(rounds=5)
    again.known.extend(one.known)
    found = play(again, Disk(None))
    assert {s.round for s in found} == {2, 3, 4}
    assert {s.kind for s in found} == {"auto-memory", "auto", "lru-bundle"}


def test_a_cell_that_has_its_rounds_is_not_played_again(no_machine):
    one = new_contest()
    play(one, Disk(None))
    no_machine.clear()
    assert not play(one, Disk(None))
    assert not no_machine  # nobody was loaded
    assert {s.disk_limit_mb_per_s for s in play(one, Disk(None), Disk(10**6))} == {1.0}


def test_no_round_is_begun_when_time_is_up():
    assert not list(new_contest().play([Disk(None)], lambda _: None, lambda: True))


def test_cells_of_a_ratio_are_one_whatever_their_limit(sample):
    samples = [sample(kind="auto", share=50.0, transfer_ratio=4.0, disk_limit_mb_per_s=x) for x in (300.0, 310.0)]
    assert len(cell_of(samples, "toy.gguf", 50.0, Disk(305_000_000, 4.0))) == 2
    assert not cell_of(samples, "toy.gguf", 50.0, Disk(300_000_000))
    assert Cell.of(samples[0]) == Cell.of(samples[1])
    assert next_round(samples) == 1 and next_round([]) == 0


def test_who_contends(sample):
    def turn(kind, speed, status="ok"):
        return sample(kind=kind, share=50.0, decode_tok_per_s=speed, status=status)

    cell = [turn("auto", 99.0), turn("lru-bundle", 8.0), turn("on-demand", 4.0), turn("stock-mmap-plain", 3.9)]
    ours = ["auto-memory", "auto"]
    assert contenders(cell, KINDS) == [*ours, "lru-bundle", "on-demand", "stock-mmap"]
    assert contenders([*cell, turn("on-demand", None, "timed out")], KINDS) == [*ours, "lru-bundle", "stock-mmap"]


def test_a_slower_baseline_that_is_never_as_fast_has_two_turns(sample):
    def cell(*others):
        speeds = [("lru-bundle", 8.0), ("lru-bundle", 9.0), *(("on-demand", speed) for speed in others)]
        return [sample(kind=kind, share=50.0, decode_tok_per_s=speed) for kind, speed in speeds]

    kinds = ("lru-bundle", "on-demand")
    assert contenders(cell(5.0), kinds) == ["lru-bundle", "on-demand"]  # one turn may be bad luck
    assert contenders(cell(5.0, 5.5), kinds) == ["lru-bundle"]
    assert contenders(cell(5.0, 8.1), kinds) == ["lru-bundle", "on-demand"]  # as fast as one of the best one's turns
    assert contenders(cell(5.0, 5.5), kinds, all_contend=True) == ["lru-bundle", "on-demand"]


def pairs_of(sample, ours, theirs):
    turns = [sample(kind="auto", share=50.0, round=n, decode_tok_per_s=v) for n, v in enumerate(ours)]
    return turns + [sample(kind="lru-bundle", share=50.0, round=n, decode_tok_per_s=v) for n, v in enumerate(theirs)]


def test_interval_of_paired_ratios(sample):
    found = pairs_of(sample, [2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
    ratio = paired(found[:3], found[3:])
    # logarithms 1, 2, 3 times ln 2: mean 2, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.303
    assert ratio.middle == pytest.approx(4.0)
    assert ratio.low == pytest.approx(2 ** (2 - 4.303 / 3**0.5))
    assert ratio.high == pytest.approx(2 ** (2 + 4.303 / 3**0.5))
    assert paired(found[:1], found[3:]).low is None
    assert paired(found[:1], []) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        ([1.0, 1.01, 1.0], [1.0, 1.0, 1.0], "holds"),
        ([0.9, 0.91, 0.9], [1.0, 1.0, 1.0], "LOSS"),
        ([0.5, 2.0, 1.0], [1.0, 1.0, 1.0], "open"),
        ([5.0], [1.0], "open"),
        ([5.0, 5.0], [1.0, 1.0], "open"),
    ],
)
def test_words_of_verdicts(sample, ours, theirs, word):
    [verdict] = verdicts(pairs_of(sample, ours, theirs))
    assert (verdict.word, verdict.best) == (word, "lru-bundle")


def test_losses_are_plain_in_the_table(sample):
    samples = [
        *pairs_of(sample, [0.9, 0.91, 0.9], [1.0, 1.0, 1.0]),
        sample(kind="stock-mmap", share=50.0, status="out of memory"),
    ]
    page = "\n".join(contests(Run(Path(), samples, {"experiment": "never-slower"})))
    row = "| toy | 50 % | bare |  |  | 0.9 | 1 |  |  | out of memory | 0.90 | 0.89 .. 0.92 | 3 | **LOSS** |  |"
    assert row in page
    verdict = "**Of 1 cells 0 hold, 0 are open, 1 are lost.** The smallest ratio is 0.90."
    assert page.index(verdict) < page.index(row)


def test_the_promise_is_judged_by_who_is_told_nothing(sample):
    samples = [replace(s, budget_bytes=40_000_000) for s in pairs_of(sample, [0.5, 0.5, 0.5], [1.0, 1.0, 1.0])]
    samples += [
        sample(kind="auto-memory", share=50.0, round=n, decode_tok_per_s=2.0, budget_bytes=80_000_000) for n in range(3)
    ]
    [verdict] = verdicts(samples)
    assert (verdict.judged, verdict.best, verdict.word, verdict.kept) == ("auto-memory", "lru-bundle", "holds", 100.0)
    assert verdict.of_share.middle == pytest.approx(0.5)
    page = "\n".join(contests(Run(Path(), samples, {"experiment": "never-slower"})))
    assert "| toy | 50 % | bare | 100 % | 2 | 0.5 | 1 |  |  |  | 2.00 | 2.00 .. 2.00 | 3 | holds | 0.50 (0.50" in page


def test_claims_stand_beside_the_sweep(sample):
    samples = [replace(s, transfer_ratio=4.0) for s in pairs_of(sample, [3.0, 3.0], [1.0, 1.0])]
    samples.append(sample(kind="on-demand", share=50.0, transfer_ratio=4.0, decode_tok_per_s=6.0, exact="no"))
    page = "\n".join(contests(Run(Path(), samples, {"experiment": "papers"})))
    assert "| toy | 50 % | 4 | 3 | 6 |  | 1 |  | 0.50 LOSS |  | **3.00** (3.00 .. 3.00) |" in page
    assert "ProMoE's 2.84 is reached in 1 of 1 cells, and in 0 auto is slower." in page
    assert "**Other tokens** in: toy 50 % 4" in page
    assert "ceiling" not in page  # nothing is known of Belady's misses


def test_no_scheme_exceeds_the_ceiling(sample):
    turns = pairs_of(sample, [3.0, 3.0], [1.0, 1.0])
    samples = [replace(s, transfer_ratio=4.0, disk_limit_mb_per_s=50.0, probe_mb_per_s=900.0) for s in turns]
    record = {
        "experiment": "papers",
        "models": [{"name": "toy.gguf", "record_bytes": 1_000_000}],
        "belady": [{"model": "toy.gguf", "share": 50.0, "misses_per_token": 20.0}],
    }
    resident = sample(decode_tok_per_s=10.0)
    bound = least_time(samples, [*samples, resident], record)
    assert (bound.compute_s, bound.read_s) == pytest.approx((0.1, 0.4))  # 20 MB at 50 MB/s
    assert bound.ceiling(1.0) == pytest.approx(2.5)
    assert least_time(samples, samples, record) is None
    page = "\n".join(contests(Run(Path(), [*samples, resident], record)))
    assert "| 4 | 3 |  |  | 1 | 2.5 |  |  | **3.00** (3.00 .. 3.00), ceiling 2.50: out of reach |" in page
    assert "It is out of reach for any scheme in 1 of 1 cells." in page
    assert "Auto decodes at 120% to 120% of what any scheme could." in page


def test_misses_are_counted_once_for_each_budget(tmp_path, monkeypatch):
    asked, said = [], []

    def run(module, task, groups, limit_s):
        asked.append(task["task"])
        return Outcome("ok" if len(asked) == 1 else "failed", "no room", {}, None)

    monkeypatch.setattr(belady_room, "belady_misses", lambda trace, model, shares: ((s, 100 - s) for s in shares))
    settings = Settings(shares=(25.0, 50.0))
    known = [{"model": "toy.gguf", "share": 25.0, "misses_per_token": 7.0}]
    models = [BenchModel(FACTS, Path("toy.bundle"))]
    found = belady_room.record_misses(models, settings, tmp_path, known, said.append, run)
    assert found == [*known, {"model": "toy.gguf", "share": 50.0, "misses_per_token": 50.0}]
    assert belady_room.record_misses(models, settings, tmp_path, found, said.append, run) == found
    assert len(asked) == 1 and asked[0]["budget"] <= FACTS.slot_bytes
    assert belady_room.record_misses(models, settings, tmp_path, known, said.append, run) == known
    assert "cannot be recorded: no room" in said[0]


def test_misses_of_a_recorded_trace(tmp_path):
    layers, experts, used = 30, 32, 8
    ids = (np.arange(40 * layers * used).reshape(40, layers, used) * 5 % experts).astype(np.uint16)
    traced = TracedModel(bundled_model().name, "llama", layers, experts, used)
    save_trace(tmp_path / "t.npz", Trace(traced, ids))
    found = dict(belady_room.belady_misses(tmp_path / "t.npz", bundled_model(), (25.0, 100.0)))
    different = sum(len(np.unique(ids[:, layer])) for layer in range(layers))
    assert found[100.0] == pytest.approx(different / 40)  # each once
    assert found[25.0] > found[100.0]


def test_disk_limits_of_ratios(sample):
    said = []
    resident = sample(decode_tok_per_s=10.0)  # 10 layers: 10 ms each
    disks = ratio_disks(BenchModel(FACTS, None), resident, (0.5, 1.0, 2.0), 150.0, said.append)
    assert disks == [Disk(100_352_000, 1.0), Disk(50_176_000, 2.0)]
    assert "R = 0.5 needs 201 MB/s, the disk gives 150: left out" in said[0]
    with pytest.raises(UsageError, match="no speed of stock-resident"):
        ratio_disks(BenchModel(FACTS, None), sample(status="failed", reason="x"), (1.0,), None, said.append)


def test_results_of_another_experiment_are_not_added_to(tmp_path, sample):
    path = tmp_path / "bench.csv"
    experiment = experiments.Experiment("papers", Terms(1))
    assert experiments._known(path, experiment) == []
    with path.open("w", newline="") as file:
        CsvWriter(file).add(sample(kind="auto", share=50.0))
    with path.open("a", newline="") as file:
        CsvWriter(file, goes_on=True).add(sample(kind="auto", share=50.0, round=1))
    (tmp_path / "machine.json").write_text(json.dumps({"experiment": "papers"}))
    assert [s.round for s in experiments._known(path, experiment)] == [0, 1]
    with pytest.raises(UsageError, match="holds other results"):
        experiments._known(path, replace(experiment, name="never-slower"))


def test_records_of_sittings_are_joined(tmp_path):
    path = tmp_path / "machine.json"
    first = experiments._continued(path, {"command": "a", "models": [{"name": "x"}]})
    path.write_text(json.dumps(first))
    both = experiments._continued(path, {"command": "b", "models": [{"name": "y"}]})
    assert both["commands"] == ["a", "b"]
    assert [model["name"] for model in both["models"]] == ["x", "y"]


def test_terms_of_a_contest_have_defaults():
    assert Terms().rounds >= 5  # an interval of few pairs says nothing
