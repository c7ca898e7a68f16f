"""Prompts and answers of a batch together: what is left to do, and that the two belong to each other."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pyengine.batch.answers import AnswersError, AnswersFile, AnswersStream, open_answers
from pyengine.batch.lines import Line, read_lines
from pyengine.errors import UsageError


class BatchFiles:
    """Open files of one batch; open_batch makes it.

    Attributes:
        total: lines of the input that are not blank; None: it is a pipe, so nobody knows.
        resumed: how many of them are answered already.
    """

    def __init__(self, prompts: BinaryIO, answers: AnswersFile | AnswersStream, total: int | None) -> None:
        self.total = total
        self.resumed = len(answers.answered.digests)
        self._prompts = prompts
        self._answers = answers

    @property
    def complete(self) -> bool:
        """Every line is answered."""
        return self.total == self.resumed

    def lines(self) -> Iterator[tuple[Line, bool]]:
        """All lines, and whether they are answered. Once only. Raises OSError."""
        done = self._answers.answered.digests
        for line in read_lines(self._prompts):
            yield line, line.number in done

    def begin(self) -> None:
        """Cut off what overwrite or retry_failed is to forget; the first answer does it, too. Raises OSError."""
        self._answers.begin()

    def add(self, answer: dict[str, Any]) -> None:
        """Append an answer. Raises OSError."""
        self._answers.add(answer)

    def sync_if_due(self) -> None:
        """See AnswersFile.sync_if_due."""
        self._answers.sync_if_due()

    def require_model(self, model: str) -> None:
        """Raises AnswersError if another model has given some of the answers."""
        others = sorted(self._answers.answered.models - {model})
        if others:
            raise AnswersError(
                f"the answers so far are those of {others[0]}, and this model is {model}; name another file, or "
                "--overwrite this one"
            )


@contextlib.contextmanager
def open_batch(
    prompts: Path | BinaryIO, answers: Path | BinaryIO, *, overwrite: bool = False, retry_failed: bool = False
) -> Iterator[BatchFiles]:
    """Open prompts and answers, before any model is loaded. See run_batch for the arguments.

    Raises:
        AnswersError: the answers are of other prompts, of another program, or being written by another process.
        UsageError: prompts and answers are one file.
        OSError: a file cannot be opened, read or written.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(prompts.open("rb")) if isinstance(prompts, Path) else prompts
        regular = isinstance(prompts, Path) and prompts.is_file()
        if _one_file(prompts, answers):
            name = answers if isinstance(answers, Path) else getattr(answers, "name", answers)
            raise UsageError(f"{name} holds the prompts; the answers need a file of their own")
        written = stack.enter_context(open_answers(answers, overwrite=overwrite, retry_failed=retry_failed))
        if regular:
            total = _survey(file, written.answered.digests, f"{prompts}", f"{answers}")
            file.seek(0)
        elif written.answered.digests:
            raise AnswersError(
                f"{answers} holds answers, and prompts from a pipe cannot be compared with them; keep the prompts in a "
                "file, or --overwrite the answers"
            )
        else:
            total = None
        yield BatchFiles(file, written, total)


def _one_file(*names: Path | BinaryIO) -> bool:
    """Whether two are one regular file, whatever links lead to it, open or not."""
    found = []
    for name in names:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not there yet, or none of the system's
            found.append(name.stat() if isinstance(name, Path) else os.fstat(name.fileno()))
    return len(found) == 2 and stat.S_ISREG(found[0].st_mode) and os.path.samestat(*found)


def _survey(file: BinaryIO, answered: dict[int, str], prompts_name: str, answers_name: str) -> int:
    """Count the lines that are not blank, and see that every answer is to one of them, as it is now."""

    def foreign(number: int) -> AnswersError:
        return AnswersError(
            f"{answers_name} does not belong to {prompts_name} as it is now: line {number} is not the one it answers; "
            "name another file, or --overwrite it (--retry-failed forgets error lines only)"
        )

    total, met = 0, 0
    for line in read_lines(file):
        total += 1
        digest = answered.get(line.number)
        if digest is not None:
            met += 1
            if digest != line.digest:
                raise foreign(line.number)
    if met < len(answered):
        raise foreign(max(answered))
    return total
