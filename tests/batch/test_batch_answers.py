"""The answers file: torn ends, other people's files, two writers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pyengine.batch.answers import AnswersError, AnswersFile, open_answers
from pyengine.batch.files import open_batch
from pyengine.batch.lines import Line
from pyengine.errors import UsageError


def entry(number, digest="0" * 16, error=None, model="m"):
    response = None if error else {"status_code": 200, "request_id": "r", "body": {"model": model}}
    return {"id": Line(number, b"", digest).key, "custom_id": "ä", "response": response, "error": error}


FAILED = {"code": "invalid_json_line", "message": "no"}


def keys(path):
    return [json.loads(data)["id"] for data in path.read_bytes().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def write(path, *entries):
    with AnswersFile(path) as answers:
        for one in entries:
            answers.add(one)


def test_what_was_written_is_found_again(path):
    write(path, entry(3), entry(1, "a" * 16, FAILED))
    with AnswersFile(path) as answers:
        assert answers.answered.digests == {3: "0" * 16, 1: "a" * 16}
        assert answers.answered.failed == {1}
        assert answers.answered.models == {"m"}


@pytest.mark.parametrize("left", [1, 8, 30, -1])
def test_a_torn_last_line_is_cut_off(path, left):
    write(path, entry(1), entry(2))
    whole = path.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    path.write_bytes(whole[: len(first) + left] if left > 0 else whole[:left])
    with AnswersFile(path) as answers:
        assert list(answers.answered.digests) == [1]
        answers.add(entry(2))
    assert path.read_bytes() == whole


def test_zeros_that_a_power_failure_left_are_cut_off(path):
    write(path, entry(1))
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100))
    with AnswersFile(path) as answers:
        answers.begin()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "data",
    [
        b"my notes",
        b"my notes\n",
        b'{"id": "batch_req_abc", "error": null}\n',
        b'{"id": 5}\n',
        b"[1]\n",
        b'{"id": "batch_req_\n',
    ],
)
def test_a_file_of_another_program_is_left_alone(path, data):
    path.write_bytes(data)
    with pytest.raises(AnswersError, match="line 1 was not written by pyengine batch"):
        AnswersFile(path)
    assert path.read_bytes() == data
    with AnswersFile(path, overwrite=True) as answers:
        answers.add(entry(1))
    assert len(keys(path)) == 1


def test_a_damaged_line_in_the_middle_is_no_torn_end(path):
    write(path, entry(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + b"\n" + whole)
    with pytest.raises(AnswersError, match="line 1 was not written"):
        AnswersFile(path)


def test_two_answers_to_one_line_are_refused(path):
    write(path, entry(1), entry(1))
    with pytest.raises(AnswersError, match="line 2 answers a prompt that was answered before"):
        AnswersFile(path)


def test_a_second_writer_is_refused_even_in_another_process(path):
    script = (
        "import sys, pathlib; from pyengine.batch.answers import AnswersFile; AnswersFile(pathlib.Path(sys.argv[1]))"
    )
    with AnswersFile(path) as answers:
        answers.add(entry(1))
        with pytest.raises(AnswersError, match="in use"):
            AnswersFile(path)
        child = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
        assert "AnswersError" in child.stderr
        answers.add(entry(2))
    assert len(keys(path)) == 2


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"retry_failed": True}])
def test_nothing_is_cut_before_there_is_an_answer(path, options):
    write(path, entry(1), entry(2, error=FAILED), entry(3))
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    with AnswersFile(path, **options) as answers:
        assert path.read_bytes() == before
    assert path.read_bytes() == before
    with AnswersFile(path, **options) as answers:
        kept = list(answers.answered.digests)
        answers.add(entry(4))
    assert keys(path) == [entry(number)["id"] for number in (*kept, 4)]
    assert kept == {"overwrite": [], "retry_failed": [1]}.get(next(iter(options), ""), [1, 2])


def test_the_file_that_retrying_puts_in_place_is_locked_too(path):
    write(path, entry(1), entry(2, error=FAILED), entry(3))
    with AnswersFile(path, retry_failed=True) as answers:
        assert list(answers.answered.digests) == [1, 3]
        answers.begin()
        with pytest.raises(AnswersError, match="in use"):
            AnswersFile(path)
        answers.add(entry(2))
    assert keys(path) == [entry(number)["id"] for number in (1, 3, 2)]
    assert os.listdir(path.parent) == [path.name]


def test_retrying_rewrites_the_file_behind_a_link(path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "file"
    write(file, entry(1), entry(2, error=FAILED), entry(3))
    file.chmod(0o600)
    path.symlink_to(file)
    with AnswersFile(path, retry_failed=True) as answers:
        answers.begin()
        for name in (path, file):
            with pytest.raises(AnswersError, match="in use"):
                AnswersFile(name)
        answers.add(entry(2))
    assert path.is_symlink() and keys(file) == [entry(number)["id"] for number in (1, 3, 2)]
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(file.parent) == ["file"]


def test_a_disk_that_is_full_leaves_whole_lines(path, monkeypatch):
    write(path, entry(1))
    whole = path.read_bytes()
    with AnswersFile(path) as answers:
        real = os.write
        written = []

        def full(descriptor, data):
            if written:
                raise OSError(28, "No space left on device")
            written.append(real(descriptor, data[:10]))
            return written[0]

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            answers.add(entry(2))
    assert path.read_bytes() == whole


def test_a_batch_without_an_answer_leaves_no_file(path):
    write(path)
    assert not path.exists()
    path.touch()
    write(path)
    assert path.exists()


def test_a_batch_without_an_answer_leaves_a_link_as_it_was(path, tmp_path):
    path.symlink_to("later")
    write(path)
    assert path.is_symlink() and not path.exists()
    assert os.listdir(tmp_path) == [path.name]


def test_a_device_is_only_written_to():
    from pathlib import Path

    with open_answers(Path(os.devnull)) as answers:
        answers.add(entry(1))
        assert answers.answered.digests == {}


# ---- with the prompts


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n{"prompt": "b"}\n')
    return path


def answer_all(prompts, path):
    with open_batch(prompts, path) as files:
        for line, answered in files.lines():
            if not answered:
                files.add(entry(line.number, line.digest))


def test_lines_that_are_answered_are_told(prompts, path):
    answer_all(prompts, path)
    prompts.write_bytes(prompts.read_bytes() + b'{"prompt": "c"}')
    with open_batch(prompts, path) as files:
        assert (files.total, files.resumed, files.complete) == (3, 2, False)
        assert [(line.number, answered) for line, answered in files.lines()] == [(1, True), (3, True), (4, False)]


@pytest.mark.parametrize("changed", [b'{"prompt": "x"}\n\n{"prompt": "b"}\n', b'{"prompt": "a"}\n', b""])
def test_answers_to_other_prompts_are_refused(prompts, path, changed):
    answer_all(prompts, path)
    before = path.read_bytes()
    prompts.write_bytes(changed)
    with (
        pytest.raises(AnswersError, match=r"answers.jsonl does not belong to .*prompts.jsonl"),
        open_batch(prompts, path),
    ):
        pass
    assert path.read_bytes() == before
    with open_batch(prompts, path, overwrite=True) as files:
        assert files.resumed == 0


def test_prompts_are_not_overwritten(prompts):
    before = prompts.read_bytes()
    with pytest.raises(UsageError, match="a file of their own"), open_batch(prompts, prompts, overwrite=True):
        pass
    assert prompts.read_bytes() == before


def test_prompts_from_a_pipe_begin_a_batch_and_continue_none(prompts, path):
    with prompts.open("rb") as pipe, open_batch(pipe, path) as files:
        assert files.total is None and not files.complete
        for line, _ in files.lines():
            files.add(entry(line.number, line.digest))
    with prompts.open("rb") as pipe, pytest.raises(AnswersError, match="from a pipe"), open_batch(pipe, path):
        pass


def test_a_missing_prompts_file_costs_no_answers(prompts, path):
    answer_all(prompts, path)
    before = path.read_bytes()
    prompts.unlink()
    with pytest.raises(FileNotFoundError), open_batch(prompts, path, overwrite=True):
        pass
    assert path.read_bytes() == before


def test_answers_of_another_model_are_refused(prompts, path):
    answer_all(prompts, path)
    with open_batch(prompts, path) as files:
        files.require_model("m")
        with pytest.raises(AnswersError, match="those of m, and this model is other"):
            files.require_model("other")
