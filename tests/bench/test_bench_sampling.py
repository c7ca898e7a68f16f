"""Rounds and samples with a fake child: order, limits, exactness, and every way in which a sample can fail."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from toy_results import child_result

from pyengine.bench import quiet, rounds, sampling
from pyengine.bench.cgroups import CgroupError, Groups, MemoryUse
from pyengine.bench.launch import Outcome
from pyengine.bench.rows import plan_rows
from pyengine.bench.sampling import BenchModel, Sampler
from pyengine.bench.settings import Settings
from pyengine.errors import PyengineError

TOKENS = [[1, 2, 3], [4, 5]]
USE = MemoryUse(peak=77, kills=0, at_limit=2)


class FakeChildren:
    """Answers as launch() does; `answers` maps a row's kind to the tokens or the Outcome it gives."""

    def __init__(self):
        self.tasks = []
        self.answers = {}

    def __call__(self, module, task, groups, timeout_s):
        if module.endswith("disk_probe"):
            return Outcome("ok", "", {"bytes_per_s": 5e8, "size": task["size"], "direct": True, "threads": 4}, USE)
        self.tasks.append(task)
        answer = self.answers.get(task["kind"], TOKENS)
        return answer if isinstance(answer, Outcome) else Outcome("ok", "", child_result(answer), USE)


@pytest.fixture
def children():
    return FakeChildren()


@pytest.fixture
def model(facts, tmp_path):
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"x")
    return BenchModel(replace(facts, path=path, files=(path,)), None)


@pytest.fixture(autouse=True)
def no_machine(monkeypatch):
    """No control groups, no caches, no waiting."""
    made = []

    @contextlib.contextmanager
    def fake_groups(memory_limit, disk_limit):
        made.append((memory_limit, disk_limit))
        yield Groups()

    monkeypatch.setattr(sampling, "groups", fake_groups)
    monkeypatch.setattr(rounds, "remove_leftovers", lambda: None)
    monkeypatch.setattr(quiet, "drop_caches", lambda files: "drop_caches")
    monkeypatch.setattr(quiet, "fixed_work", lambda n: 0.2)
    monkeypatch.setattr(quiet, "touch_memory", lambda n: 0)
    return made


def take_all(models, settings, children):
    said = []
    found = list(
        rounds.take_samples(models, settings, Sampler(settings, models[0].facts.path.parent, children), said.append)
    )
    assert len(said) == len(found)
    return found


def test_rounds_are_interleaved_over_rows_and_models(model, children):
    other = BenchModel(replace(model.facts, path=model.facts.path.with_name("other.gguf")), None)
    settings = Settings(kinds=["stock-resident", "lru"], shares=[50.0], rounds=2)
    found = take_all([model, other], settings, children)
    one_round = [(name, row) for name in ("toy.gguf", "other.gguf") for row in ("stock-resident", "lru 50%")]
    assert [(s.round, s.model, s.row) for s in found] == [(n, *rest) for n in (0, 1) for rest in one_round]
    assert [s.order for s in found[:2]] == [0, 1]


def test_a_sample_says_what_it_is(model, children, no_machine):
    settings = Settings(kinds=["stock-resident", "stock-mmap", "lru"], shares=[50.0], rounds=1, n_tokens=5, n_threads=3)
    resident, mapped, ours = take_all([model], settings, children)
    limit = plan_rows(model.facts, ["lru"], [50.0])[0].limit
    assert (resident.limit_bytes, mapped.limit_bytes, ours.limit_bytes) == (None, limit, limit)
    assert (limit, None) in no_machine
    assert (ours.budget_bytes, ours.decode_tok_per_s, ours.hit_rate, ours.peak_group_bytes) == (
        40_000_000,
        5.0,
        0.7,
        77,
    )
    assert (resident.probe_mb_per_s, ours.probe_mb_per_s) == (None, 500.0)
    assert (resident.limit_reached, ours.limit_reached) == (None, 2)
    task = children.tasks[-1]
    assert (task["kind"], task["budget"], task["bundle"], task["n_tokens"], task["n_threads"]) == (
        "lru",
        40_000_000,
        "off",
        5,
        3,
    )


def test_other_tokens_than_stock_are_marked(model, children):
    children.answers["lru"] = [[1, 2, 9], [4, 5]]
    settings = Settings(kinds=["stock-resident", "on-demand", "lru"], shares=[50.0], rounds=1)
    assert [s.exact for s in take_all([model], settings, children)] == ["yes", "yes", "no"]


def test_without_stock_resident_there_is_nothing_to_compare_with(model, children):
    settings = Settings(kinds=["stock-mmap", "lru"], shares=[50.0], rounds=1)
    assert [s.exact for s in take_all([model], settings, children)] == ["", ""]


def test_replayed_rows_are_compared_among_themselves(model, children):
    children.answers |= {"stock-resident": [[7], [7]], "on-demand": [[1, 2, 9], [4, 5]]}
    settings = Settings(
        kinds=["stock-resident", "on-demand", "lru"], shares=[50.0], rounds=1, trace=Path("somewhere/t.npz")
    )
    found = take_all([model], settings, children)
    assert [s.exact for s in found] == ["", "yes", "no"]
    assert [s.replay for s in found] == ["", "t.npz", "t.npz"]


@pytest.mark.parametrize("status", ["out of memory", "timed out", "failed", "unsupported"])
def test_a_failed_sample_is_recorded_and_the_rest_goes_on(model, children, status):
    children.answers["stock-mmap"] = Outcome(status, "because", {}, MemoryUse(5, 1, 0))
    settings = Settings(kinds=["stock-mmap", "lru"], shares=[50.0], rounds=1)
    failed, ours = take_all([model], settings, children)
    assert (failed.status, failed.reason, failed.peak_group_bytes, failed.decode_tok_per_s) == (
        status,
        "because",
        5,
        None,
    )
    assert ours.status == "ok"
    assert f"stock-mmap: {status} (because)" in rounds.describe(failed)


def test_a_bundle_that_is_not_there_is_recorded(model, children):
    settings = Settings(kinds=["lru-bundle"], shares=[50.0], rounds=1)
    [found] = take_all([model], settings, children)
    assert (found.status, children.tasks) == ("unsupported", [])
    assert "no bundle" in found.reason


def test_a_bundle_is_used_by_its_own_rows_only(model, children, tmp_path):
    bundle = tmp_path / "toy.bundle"
    settings = Settings(kinds=["lru", "lru-bundle"], shares=[50.0], rounds=1)
    take_all([BenchModel(model.facts, bundle)], settings, children)
    assert [task["bundle"] for task in children.tasks] == ["off", str(bundle)]


def test_a_row_that_would_not_fit_into_memory_is_not_run(model, children):
    huge = BenchModel(replace(model.facts, file_bytes=10**15), None)
    settings = Settings(kinds=["stock-resident"], rounds=1)
    [found] = take_all([huge], settings, children)
    assert (found.status, children.tasks) == ("unsupported", [])
    assert "1000000.4 GB of memory" in found.reason


def test_without_control_groups_nothing_is_silently_unlimited(model, children, monkeypatch):
    @contextlib.contextmanager
    def no_memory_groups(memory_limit, disk_limit):
        if memory_limit is not None:
            raise CgroupError("not permitted")
        yield Groups()

    monkeypatch.setattr(sampling, "groups", no_memory_groups)
    settings = Settings(kinds=["stock-mmap-plain", "lru"], shares=[50.0], rounds=1)
    mapped, ours = take_all([model], settings, children)
    assert (mapped.status, mapped.limit_bytes) == ("not limited", None)
    assert (ours.status, ours.limit_bytes, ours.reason) == ("ok", None, "no cgroup: not permitted")
    assert [task["kind"] for task in children.tasks] == ["lru"]
    assert "no cgroup" in rounds.describe(ours)


def test_a_stock_row_that_met_our_library_is_no_result(model, children):
    touched = child_result(TOKENS, libraries=["libpyengine.so"])
    children.answers["stock-resident"] = Outcome("ok", "", touched, USE)
    with pytest.raises(PyengineError, match="stock row has loaded"):
        take_all([model], Settings(kinds=["stock-resident"], rounds=1), children)


def test_a_disk_that_cannot_be_limited_is_said_before_anything_runs(model, children, monkeypatch):
    def no_disk(path):
        raise CgroupError("not on a block device")

    monkeypatch.setattr(sampling, "block_device", no_disk)
    with pytest.raises(CgroupError, match="block device"):
        take_all([model], Settings(kinds=["stock-resident"], rounds=1, disk_limit=10**6), children)
    assert children.tasks == []


def test_a_polite_kill_is_an_interrupt(model):
    def killed(module, task, groups, timeout_s):
        os.kill(os.getpid(), signal.SIGTERM)
        return Outcome("ok", "", child_result(TOKENS), USE)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        take_all([model], Settings(kinds=["stock-resident"], rounds=1), killed)
    assert signal.getsignal(signal.SIGTERM) is before


class PlanningChildren(FakeChildren):
    """Also records and foretells; `failing` modules fail."""

    def __init__(self, failing=""):
        super().__init__()
        self.failing, self.asked = failing, []

    def __call__(self, module, task, groups, timeout_s):
        name = module.rsplit(".", 1)[1]
        if name not in ("recording", "forecast"):
            return super().__call__(module, task, groups, timeout_s)
        self.asked.append((name, task))
        if name == self.failing:
            return Outcome("failed", "because", {}, USE)
        return Outcome("ok", "", {"plan_decode_tok_per_s": 4.5} if name == "forecast" else {"n_token": 9}, USE)


CHECKED = Settings(kinds=["stock-resident", "lru"], shares=[25.0, 50.0], rounds=2, check_plan=True)


def test_the_plan_is_asked_right_before_each_row_of_ours(model):
    children = PlanningChildren()
    found = take_all([model], CHECKED, children)
    assert [s.plan_decode_tok_per_s for s in found] == [None, 4.5, 4.5] * 2
    assert [name for name, _ in children.asked] == ["recording", *["forecast"] * 4]
    asked = [task for name, task in children.asked if name == "forecast"]
    assert [task["budget"] for task in asked] == [20_000_000, 40_000_000] * 2
    assert {task["trace"] for task in asked} == {children.asked[0][1]["out"]}


@pytest.mark.parametrize("failing", ["recording", "forecast"])
def test_a_plan_that_fails_is_noted_and_the_row_is_measured(model, failing):
    sampler = Sampler(CHECKED, model.facts.path.parent, PlanningChildren(failing))
    found = list(rounds.take_samples([model], CHECKED, sampler, lambda _: None))
    assert {s.status for s in found} == {"ok"} and {s.plan_decode_tok_per_s for s in found} == {None}
    assert sampler.notes and "because" in sampler.notes[0]
