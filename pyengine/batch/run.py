"""Answers the lines of a batch: reads ahead, keeps the scheduler busy, writes each answer as it is finished."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import llama_cpp

import pyengine
from pyengine.batch.course import set_course
from pyengine.batch.errors import LineError, invalid_body
from pyengine.batch.files import BatchFiles, open_batch
from pyengine.batch.grouping import WINDOW, Prompt, Window, choose_parallel
from pyengine.batch.lines import Line
from pyengine.batch.prompts import PromptReader
from pyengine.batch.requests import read_envelope, read_request
from pyengine.batch.responses import answer, error_answer
from pyengine.batch.summary import BatchSummary, ExpertAccounts
from pyengine.errors import UsageError, one_line
from pyengine.sessions import PrefixCache, PromptTooLongError, Request, SamplingParams, Scheduler, Session

if TYPE_CHECKING:
    from pyengine import Llama

#: Lines under way at the scheduler, as a multiple of those computed at once: it always knows who comes next.
_AHEAD = 2

#: Lines prepared for the next window in each step.
_PREPARED_PER_STEP = 8


def run_batch(
    llm: Llama,
    prompts: str | os.PathLike[str] | BinaryIO,
    answers: str | os.PathLike[str] | BinaryIO,
    *,
    parallel: int | None = None,
    sampling: SamplingParams | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    window: int = WINDOW,
    progress: Callable[[BatchSummary], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> BatchSummary:
    """Answer every line of a prompts file, many at a time; a call that was interrupted is continued by the same call.

    Input and output are lines as in OpenAI's Batch API, or bare {"prompt": ...} and {"messages": ...}, whose custom_id
    is their line number. Answers are in the order in which they are finished. A line that cannot be answered becomes an
    error line. Lines that begin alike are computed together, whatever their order.

    Args:
        llm: opened with n_sequences for as many texts as shall be computed at once, and as many again for beginnings
            that are kept; n_ctx is what all of them share.
        prompts: JSON lines: a file, or something to read from. A file is read twice, and never whole.
        answers: the file to write, or something to write to. A file that exists is continued: lines that it answers are
            not computed again, and what a crash left of a last line is cut off. It is appended to line by line; a
            killed process loses none that was written, a power failure those of the last second.
        parallel: lines computed at once, at most; None: as many as the context has room for, or as the planner
            chooses, where a plan is worth its time (see pyengine.batch.course).
        sampling: for what a line leaves open. Without a seed, one is drawn; each line has its own, from it and its line
            number.
        overwrite: begin anew. What the file held is kept until there is a first answer to write.
        retry_failed: forget error lines, and try their lines again; they are kept as long, too.
        window: lines that are in memory and grouped by how they begin.
        progress: called after each step, from this thread, with the figures so far.
        stop: asked after each step; True ends the batch, with what is finished in the answers.

    Returns:
        The figures; `interrupted` says that `stop` ended it.

    Raises:
        AnswersError: the answers are of other prompts, of another model or program, or another process writes them.
        UsageError: an argument is none of those above, e.g. `parallel` more than the model was opened for; prompts and
            answers are one file; the model is closed, or another scheduler or thread has it. The answers are as before.
        ExpertReadError: experts could not be read. The answers so far are kept.
        RuntimeError: the computation failed. The answers so far are kept.
        OSError: a file cannot be opened, read or written.
    """
    for name, given in {"overwrite": overwrite, "retry_failed": retry_failed}.items():
        if not isinstance(given, bool):
            raise UsageError(f"{name} must be True or False, and is {given!r:.40}")
    source, target = _file("prompts", prompts, "read"), _file("answers", answers, "writ")
    with open_batch(source, target, overwrite=overwrite, retry_failed=retry_failed) as files:
        return answer_files(
            llm, files, parallel=parallel, sampling=sampling, window=window, progress=progress, stop=stop
        )


def answer_files(
    llm: Llama,
    files: BatchFiles,
    *,
    parallel: int | None = None,
    sampling: SamplingParams | None = None,
    window: int = WINDOW,
    progress: Callable[[BatchSummary], None] | None = None,
    stop: Callable[[], bool] | None = None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> BatchSummary:
    """run_batch for files that are open already, so that mistakes about them show before a model is loaded.

    Args:
        waiting: entered while a line of the prompts is read, which may take for ever where they come from a pipe. A
            KeyboardInterrupt raised there ends the batch as `stop` does, if `stop` says True then.
    """
    _check(llm, sampling, {"parallel": parallel, "window": window}, {"progress": progress, "stop": stop})
    batch = _Batch(llm, files, sampling or SamplingParams(), waiting)
    batch.run(parallel, window, progress or (lambda _: None), stop or (lambda: False))
    return batch.summary


class _Batch:
    def __init__(
        self,
        llm: Llama,
        files: BatchFiles,
        sampling: SamplingParams,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model = Path(llm.model_path).name.removesuffix(".gguf")
        files.require_model(self._model)
        self._llm = llm
        self._files = files
        self._waiting = waiting
        self._sampling = sampling
        self._seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._reader = PromptReader(llm)
        self._ids: dict[bytes, int] = {}  # digest of a custom_id -> the first line that has it
        self._under_way: dict[Session, Prompt] = {}
        self.summary = BatchSummary(lines=files.total, resumed=files.resumed)

    def run(
        self, parallel: int | None, window_size: int, progress: Callable[[BatchSummary], None], stop: Callable[[], bool]
    ) -> None:
        try:
            self._run(parallel, window_size, progress, stop)
        except KeyboardInterrupt:
            if not stop():
                raise
            self.summary.interrupted = True

    def _run(
        self, parallel: int | None, window_size: int, progress: Callable[[BatchSummary], None], stop: Callable[[], bool]
    ) -> None:
        llm, summary = self._llm, self.summary
        started = time.monotonic()
        window = Window(self._prompts(), window_size)
        self._check_possible(parallel)
        prompts = window.look()
        course = set_course(llm, parallel, prompts, are_all=window.exhausted)
        course.enter(summary)
        accounts = ExpertAccounts(llm.expert_stats())  # of answers, not of what planning computes
        with Scheduler(
            llm,
            max_sequences=course.parallel,
            prompt_chunk=course.prompt_chunk,
            prefixes=PrefixCache(),
        ) as scheduler:
            try:
                while not summary.interrupted:
                    while len(self._under_way) < _AHEAD * course.parallel and window.look():
                        self._submit(scheduler, window.take())
                    if not self._under_way:
                        break
                    course.next_step(self._under_way)
                    summary.interrupted = self._record(scheduler.step(), stop)
                    window.prepare(_PREPARED_PER_STEP)
                    self._files.sync_if_due()
                    summary.seconds = time.monotonic() - started
                    summary.running_tokens = sum(len(session.tokens) for session in self._under_way)
                    progress(summary)
                    summary.interrupted = summary.interrupted or stop()
                if not summary.interrupted:
                    self._files.begin()  # no line may have been left to answer
            finally:
                summary.seconds = time.monotonic() - started
                summary.running_tokens = 0
                accounts.enter(summary, llm.expert_stats())
                course.finish(summary)

    def _check_possible(self, parallel: int | None) -> None:
        """Whether lines could be computed at all, before the first error line takes the place of what is overwritten.
        Raises UsageError."""
        llm = self._llm
        n_sequences = int(llama_cpp.llama_n_seq_max(llm.ctx))
        with Scheduler(llm, max_sequences=choose_parallel(parallel, n_sequences, llm.n_ctx(), ())):
            pass

    def _submit(self, scheduler: Scheduler, prompt: Prompt) -> None:
        try:
            self._under_way[scheduler.submit(prompt.request)] = prompt
        except PromptTooLongError as error:
            param = "messages" if prompt.is_chat else "prompt"
            refused = invalid_body("context_length_exceeded", one_line(str(error)), param)
            self._fail(prompt.key, prompt.custom_id, refused)

    def _record(self, sessions: list[Session], stop: Callable[[], bool]) -> bool:
        """Write the answers of those that are finished. Returns whether a computation was given up because of `stop`;
        raises the error of one that failed."""
        failure: Exception | None = None
        for session in sessions:
            if not session.finished:
                continue
            prompt = self._under_way.pop(session)
            if session.error is not None:
                failure = failure or session.error
                continue
            self._files.add(answer(prompt, session, self._model, self._token_bytes))
            self.summary.done += 1
            self.summary.prompt_tokens += session.prompt_tokens
            self.summary.cached_tokens += session.cached_tokens
            self.summary.generated_tokens += len(session.tokens)
        if failure is None:
            return False
        if isinstance(failure, RuntimeError) and stop():  # llama.cpp was told to abort
            return True
        raise failure

    def _prompts(self) -> Iterator[Prompt]:
        """The lines that are left, ready to be computed; of those that cannot be, the error lines are written."""
        lines = self._files.lines()
        while True:
            with self._waiting():
                line, answered = next(lines, (None, False))
            if line is None:
                return
            custom_id: str | None = None
            try:
                name, envelope = read_envelope(line)
                custom_id = name
                self._claim(name, line.number)
                if not answered:
                    yield self._prompt(line, name, envelope)
            except LineError as error:
                if not answered:
                    self._fail(line.key, custom_id, error)

    def _claim(self, custom_id: str, number: int) -> None:
        """The first line that has a custom_id keeps it, whatever becomes of that line."""
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        first = self._ids.setdefault(digest, number)
        if first != number:
            raise LineError("duplicate_custom_id", f"line {number} has the custom_id of line {first}")

    def _prompt(self, line: Line, custom_id: str, envelope: dict[str, object]) -> Prompt:
        request = read_request(custom_id, envelope, self._sampling)
        if request.messages is not None:
            tokens, stop = self._reader.chat(request.messages)
        else:
            assert request.prompt is not None
            tokens, stop = self._reader.text(request.prompt), ()
        sampling = replace(request.sampling, stop=tuple(dict.fromkeys((*request.sampling.stop, *stop))))
        if not request.has_seed:
            sampling = replace(sampling, seed=(self._seed + line.number) % 2**32)
        asked = Request(tokens, sampling, custom_id)
        return Prompt(line.number, line.key, custom_id, request.messages is not None, asked)

    def _fail(self, key: str, custom_id: str | None, error: LineError) -> None:
        self._files.add(error_answer(key, custom_id, error))
        self.summary.failed += 1

    def _token_bytes(self, token: int) -> bytes:
        data: bytes = self._llm.detokenize([token], special=True)
        return data


def _file(name: str, given: str | os.PathLike[str] | BinaryIO, does: Literal["read", "writ"]) -> Path | BinaryIO:
    """Raises UsageError unless it is a path, or can do that with bytes."""
    if isinstance(given, str | os.PathLike):
        return Path(given)
    something: object = given
    can = getattr(something, f"{does}able", None)
    if can is None or isinstance(something, io.TextIOBase) or not can():
        raise UsageError(f"{name} must be a path, or a binary file open for {does}ing, and is {given!r:.80}")
    return given


def _check(llm: Llama, sampling: object, numbers: Mapping[str, object], calls: Mapping[str, object]) -> None:
    """Raise UsageError for what would otherwise show only when answers are written."""
    if not isinstance(llm, pyengine.Llama):
        raise UsageError(f"llm must be a pyengine.Llama, and is {llm!r:.80}")
    if not isinstance(sampling, SamplingParams | None):
        raise UsageError(f"sampling must be a pyengine.sessions.SamplingParams, and is {sampling!r:.80}")
    for name, number in numbers.items():
        if number is not None and type(number) is not int:
            raise UsageError(f"{name} must be an integer, and is {number!r:.40}")
    for name, call in calls.items():
        if call is not None and not callable(call):
            raise UsageError(f"{name} must be something to call, and is {call!r:.40}")
