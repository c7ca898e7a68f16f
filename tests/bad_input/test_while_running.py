"""Reads that fail after all went well: the token is not computed, the reason is said, and the model goes on."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyengine import Llama, bundled_model

from .victim import PROMPT, in_process, options_for

N = 10  # tokens of an answer
LEAST = {"ram_budget": "12.5%"}  # one slot, shared by all layers: every access but a repeated one reads


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Llama]:
    with contextlib.closing(Llama(path, **options_for(LEAST))) as llm:
        yield llm


def tokens_after(llm: Llama, tokens: list[int], n: int = N) -> list[int]:
    llm.reset()
    return [int(token) for token in itertools.islice(llm.generate(tokens, temp=0.0), n)]


def error_of(function: Any, *arguments: Any) -> tuple[tuple[str, ...], str]:
    """Classes and message of the exception that the call ends with."""
    try:
        function(*arguments)
    except Exception as error:
        return tuple(kind.__name__ for kind in type(error).__mro__), str(error)
    return (), ""


def one_failed_read(path: Path, after: int) -> dict[str, Any]:
    with opened(path) as llm:
        assert llm.engine is not None
        prompt = llm.tokenize(PROMPT.encode())
        expected = tokens_after(llm, prompt)
        reads = llm.expert_stats()["misses"]
        llm.engine.native.inject_read_errors(after, 1)
        error = error_of(tokens_after, llm, prompt)
        return {
            "error": error,
            "reads": reads,
            "same": tokens_after(llm, prompt) == expected,
            "read_errors": llm.expert_stats()["read_errors"],
        }


@pytest.mark.parametrize("after", [0, 1, 5, 30])
def test_one_failed_read(sound_path: Path, after: int) -> None:
    outcome = in_process(one_failed_read, sound_path, after)
    assert outcome.exit_code == 0, outcome
    facts = outcome.result
    assert facts["reads"] > after, "the failure would never come"
    kinds, message = facts["error"]
    assert kinds[0] == "ExpertReadError"
    assert "RuntimeError" in kinds  # what llama_cpp's users catch
    assert re.fullmatch(
        rf"expert load failed: reading {re.escape(str(sound_path))} at byte \d+: injected error", message
    )
    assert facts["same"], "the model computes something else afterwards"
    assert facts["read_errors"] > 0
    assert (outcome.output, outcome.litter) == ("", ())


def failure_in_a_stream(path: Path) -> dict[str, Any]:
    with opened(path) as llm:
        assert llm.engine is not None
        prompt = llm.tokenize(PROMPT.encode())
        expected = tokens_after(llm, prompt)
        llm.reset()
        stream = llm.generate(prompt, temp=0.0)
        before = [int(next(stream)) for _ in range(4)]
        n_tokens = llm.n_tokens
        llm.engine.native.inject_read_errors(0, 1)
        error = error_of(next, stream)
        kept = llm.n_tokens == n_tokens
        rest = [int(token) for token in itertools.islice(llm.generate([*prompt, *before], temp=0.0), N - 4)]
        return {"error": error, "kept": kept, "same": before + rest == expected}


def test_a_failure_in_a_stream_keeps_the_conversation(sound_path: Path) -> None:
    outcome = in_process(failure_in_a_stream, sound_path)
    assert outcome.exit_code == 0, outcome
    assert outcome.result["error"][0][0] == "ExpertReadError", outcome
    assert outcome.result["kept"], "tokens were lost"
    assert outcome.result["same"], "the answer goes on differently"


def disk_that_stays_broken(path: Path) -> dict[str, Any]:
    with opened(path) as llm:
        assert llm.engine is not None
        prompt = llm.tokenize(PROMPT.encode())
        expected = tokens_after(llm, prompt)
        llm.engine.native.inject_read_errors(0, 1 << 40)
        errors = [error_of(tokens_after, llm, prompt)[0][:1] for _ in range(5)]
        llm.set_ram_budget("100%")
        errors.append(error_of(tokens_after, llm, prompt)[0][:1])
        llm.engine.native.inject_read_errors(0, 0)
        return {"errors": errors, "same": tokens_after(llm, prompt) == expected}


def test_a_disk_that_stays_broken_and_recovers(sound_path: Path) -> None:
    outcome = in_process(disk_that_stays_broken, sound_path)
    assert outcome.exit_code == 0, outcome
    assert outcome.result == {"errors": [("ExpertReadError",)] * 6, "same": True}


def file_cut_and_restored(path: Path) -> dict[str, Any]:
    whole, before = path.read_bytes(), path.stat()
    with opened(path) as llm:
        prompt = llm.tokenize(PROMPT.encode())
        expected = tokens_after(llm, prompt)
        os.truncate(path, len(whole) // 20)
        error = error_of(tokens_after, llm, prompt)
        path.write_bytes(whole)
        changed = error_of(tokens_after, llm, prompt)  # whole again, but nobody can know that
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return {"error": error, "changed": changed, "same": tokens_after(llm, prompt) == expected}


def test_a_file_that_is_cut_while_running(sound_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(sound_path, tmp_path))
    outcome = in_process(file_cut_and_restored, path)
    assert outcome.exit_code == 0, outcome
    kinds, message = outcome.result["error"]
    assert kinds[0] == "ExpertReadError"
    assert message.startswith(f"expert load failed: reading {path} at byte ")
    assert message.endswith("the file ends too early (was it truncated or replaced?)")
    kinds, message = outcome.result["changed"]
    assert kinds[0] == "ExpertReadError"
    assert message == f"expert load failed: {path} was changed while it was in use; load the model again"
    assert outcome.result["same"]


def file_deleted(path: Path) -> bool:
    with opened(path) as llm:
        prompt = llm.tokenize(PROMPT.encode())
        expected = tokens_after(llm, prompt)
        path.unlink()
        return tokens_after(llm, prompt) == expected


def test_a_file_that_is_deleted_while_running_is_still_there(sound_path: Path, tmp_path: Path) -> None:
    outcome = in_process(file_deleted, Path(shutil.copy(sound_path, tmp_path)))
    assert (outcome.exit_code, outcome.result) == (0, True), outcome


def test_the_command_line_ends_with_one_line_when_its_file_is_cut(tmp_path: Path) -> None:
    path = Path(shutil.copy(bundled_model(), tmp_path))
    command = [sys.executable, "-m", "pyengine", "run", "-m", str(path), "-p", "Once upon a time", "-n", "400"]
    with subprocess.Popen(
        [*command, "-t", "1", "-c", "512", "--ram-budget", "12.5%"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        os.truncate(path, 1_000_000)
        _, err = process.communicate(timeout=120)
    engaged, failure = err.decode().splitlines()
    assert engaged.startswith("30 layers x 4 of 32 experts")
    assert failure.startswith(f"pyengine: error: expert load failed: reading {path} at byte ")
    assert process.returncode == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
