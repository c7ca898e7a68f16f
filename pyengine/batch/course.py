"""How many lines are computed at once, and what the planner says and learns about it."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

from pyengine.batch.grouping import Prompt, choose_parallel
from pyengine.batch.summary import BatchSummary
from pyengine.errors import PyengineError, one_line
from pyengine.sessions import Session, SessionState
from pyengine.sessions.prefixes import common

if TYPE_CHECKING:
    from pyengine import Llama
    from pyengine.planner import BatchPlan
    from pyengine.planner.batch_plan import Refining

_log = logging.getLogger("pyengine")

#: Fewer tokens in all, prompts and answers, are not worth a plan. It takes a second or two: the routing is replayed for
#: each number of lines, and a machine that was never measured with this model first computes some 70 tokens and reads a
#: few experts. A batch of so many tokens takes half a minute even if the model is small.
LEAST_TOKENS = 8192


class Course:
    """How a batch is run.

    Attributes:
        parallel: lines computed at once, at most.
        prompt_chunk: tokens of prompts in a step in which somebody decodes.
    """

    def __init__(self, parallel: int, prompt_chunk: int, refining: Refining | None = None) -> None:
        self.parallel, self.prompt_chunk = parallel, prompt_chunk
        self._refining = refining

    def next_step(self, under_way: Iterable[Session]) -> None:
        """The next step is one of the scheduler that has these."""
        if self._refining is None:
            return
        sessions = list(under_way)
        decoding = sum(one.state is SessionState.DECODING for one in sessions)
        running = (one for one in sessions if one.state is not SessionState.WAITING)
        cells = sum(one.prompt_tokens + len(one.tokens) for one in running)
        self._refining.watch.next_step(decoding, None, cells)

    def enter(self, summary: BatchSummary) -> None:
        """Write what is planned."""
        summary.parallel = self.parallel
        if self._refining is not None:
            summary.step_lines = self.parallel
            summary.planned_step_s = self._refining.plan.chosen.step.total

    def finish(self, summary: BatchSummary) -> None:
        """The batch has ended, in whatever way: write how it was, and let the next plan know."""
        if self._refining is None:
            return
        refining, self._refining = self._refining, None
        try:
            run = refining.finish()
        except (PyengineError, OSError) as error:  # the model's file is gone, say
            _log.info("what this batch showed is not kept: %s", one_line(str(error)))
            return
        if run is not None:
            summary.step_lines = run.n_sequences
            summary.planned_step_s, summary.actual_step_s = run.planned_step_s, run.actual_step_s


def set_course(llm: Llama, asked: int | None, prompts: Sequence[Prompt], *, are_all: bool) -> Course:
    """Choose how many lines to compute at once, with a plan if that was left open and a plan is worth its time. The
    model's context is empty afterwards.

    Args:
        asked: what the user wants; None: choose.
        prompts: the first lines in the order in which they are computed; are_all: there are no others.

    Raises:
        UsageError: the model was opened for fewer sequences than asked for.
    """
    n_sequences = int(llama_cpp.llama_n_seq_max(llm.ctx))
    most = choose_parallel(asked, n_sequences, llm.n_ctx(), prompts)
    as_it_is = Course(most, llm.n_batch)  # whole prompts: nobody waits for the next token of one line
    if asked is not None or most < 2 or llm.engine is None:
        return as_it_is
    if are_all and sum(prompt.cells for prompt in prompts) < LEAST_TOKENS:
        return as_it_is
    from pyengine.planner import batch_plan  # not above: it loads the native part

    try:
        plan = _plan(llm, prompts, most)
        return Course(plan.n_sequences, plan.chosen.prompt_chunk, batch_plan.Refining.begin(llm, plan))
    except (PyengineError, OSError, RuntimeError) as error:
        # A batch needs no plan. What is wrong with the model or the disk shows in its first step.
        _log.info("how many lines to compute at once is not planned: %s", one_line(str(error)))
        return as_it_is


def _plan(llm: Llama, prompts: Sequence[Prompt], most: int) -> BatchPlan:
    """Of a usual line: medians. What a prompt begins with alike the one before it is not computed again."""
    from pyengine.planner import batch_plan

    ids = [np.asarray(prompt.request.tokens, np.int32) for prompt in prompts]
    shared = [0, *(common(before, after) for before, after in pairwise(ids))]
    computed = statistics.median(len(tokens) - known for tokens, known in zip(ids, shared, strict=True))
    answers = statistics.median(prompt.cells - len(prompt.request.tokens) for prompt in prompts)
    return batch_plan.plan_batch(
        llm, prompt_tokens=max(1, round(computed)), answer_tokens=max(1, round(answers)), most_sequences=most
    )
