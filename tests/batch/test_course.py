"""The planner in a batch: when it is asked, what it is asked for, that it never ends a batch, what is said of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

if importlib.util.find_spec("pyengine._native") is None:
    pytest.skip("the native part is not built", allow_module_level=True)

from pyengine import Llama
from pyengine.batch import BatchSummary, course, run_batch
from pyengine.batch.course import set_course
from pyengine.batch.grouping import Prompt
from pyengine.cli.batch_progress import summary_lines
from pyengine.errors import PyengineError
from pyengine.planner import batch_plan
from pyengine.planner.batch_plan import known_costs, last_run
from pyengine.planning.shape import read_shape
from pyengine.sessions import Request, SamplingParams

ANSWER = 20


@pytest.fixture(scope="module")
def llm():
    model = Llama(n_ctx=512, n_threads=1, n_threads_batch=1, n_sequences=8, ram_budget="50%", policy="lfu")
    yield model
    model.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder in which nothing is known, and can be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def asked(monkeypatch):
    """What the planner is asked; three at once is its answer, and chunks of 32."""
    asks, real = [], batch_plan.plan_batch

    def fixed(llm, **work):
        asks.append(work)
        plan = real(llm, **work)
        three = next(one for one in plan.tried if one.n_sequences == 3)
        return replace(plan, chosen=replace(three, prompt_chunk=32))

    monkeypatch.setattr(batch_plan, "plan_batch", fixed)
    return asks


def prompts(n=6, length=12, shared=4):
    """Sorted lines of `length` tokens, of which the first `shared` are the same."""
    begin = [5] * shared
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
    return [
        Prompt(i, f"key{i}", f"{i}", False, Request([*begin, *([10 + i] * (length - shared))], sampling))
        for i in range(n)
    ]


def test_a_plan_decides_and_is_asked_for_what_is_computed(llm, cache, asked):
    found = set_course(llm, None, prompts(), are_all=False)
    assert (found.parallel, found.prompt_chunk) == (3, 32)
    assert asked == [{"prompt_tokens": 8, "answer_tokens": ANSWER, "most_sequences": 4}]
    summary = BatchSummary()
    found.enter(summary)
    assert (summary.parallel, summary.step_lines) == (3, 3) and summary.planned_step_s > 0
    found.finish(summary)  # nothing was run
    found.finish(summary)
    assert summary.actual_step_s is None and not llm.observers


@pytest.mark.parametrize(
    ("number", "are_all", "lines", "parallel"),
    [
        (2, False, prompts(), 2),  # who says how many has it so
        (None, True, prompts(), 4),  # a plan would take longer than it saves
        (None, False, prompts(1), 1),
        (None, True, [], 1),
    ],
)
def test_nobody_is_asked_where_there_is_nothing_to_plan(llm, asked, number, are_all, lines, parallel):
    found = set_course(llm, number, lines, are_all=are_all)
    assert (found.parallel, found.prompt_chunk) == (parallel, llm.n_batch)
    assert not asked and not llm.observers


@pytest.mark.parametrize("failure", [PyengineError("no"), OSError("no"), RuntimeError("llama_decode returned 1")])
def test_a_plan_that_fails_costs_only_the_plan(llm, monkeypatch, failure):
    def failing(*_, **__):
        raise failure

    monkeypatch.setattr(batch_plan, "plan_batch", failing)
    assert set_course(llm, None, prompts(), are_all=False).parallel == 4


def test_a_batch_follows_its_plan_and_the_next_one_knows(llm, cache, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "LEAST_TOKENS", 1)
    source, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"Number {n} is"}) + "\n" for n in range(6)))
    sampling = SamplingParams(max_tokens=ANSWER, temperature=1.0, seed=1)
    summary = run_batch(llm, source, answers, sampling=sampling)
    assert summary.done == 6 and summary.parallel == 3
    assert summary.step_lines == 3 and summary.actual_step_s > 0
    shape = read_shape(Path(llm.model_path))
    run = last_run(shape)
    assert (run.n_sequences, run.planned_step_s, run.actual_step_s) == (
        3,
        summary.planned_step_s,
        summary.actual_step_s,
    )
    assert known_costs(shape) is not None
    assert not llm.observers


def test_what_is_said_of_a_plan():
    summary = BatchSummary(lines=6, done=6, seconds=1.0, parallel=8, hits=3, misses=1, generated_tokens=8, bytes_read=8)
    planned = replace(summary, step_lines=8, planned_step_s=0.0521)
    compared = replace(planned, actual_step_s=1.25)
    last = [list(summary_lines(one))[-1] for one in (summary, planned, compared, replace(compared, step_lines=7))]
    assert last[0].endswith("8 lines at once")
    assert last[1:] == [
        "8 lines at once · planned 52.1 ms a step, too few of them to tell the actual time",
        "8 lines at once · planned 52.1 ms a step, actual 1.25 s",
        "8 lines at once · planned 52.1 ms a step of 7, actual 1.25 s",
    ]
    assert compared.as_json()["actual_step_s"] == 1.25
