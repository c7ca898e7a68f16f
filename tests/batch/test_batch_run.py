"""Whole batches with the bundled model: many lines at once, wrong ones among them, interrupted and continued."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

if importlib.util.find_spec("pyengine._native") is None:
    pytest.skip("the native part is not built", allow_module_level=True)

from pyengine import Llama
from pyengine.batch import run_batch
from pyengine.cli import loading, main
from pyengine.errors import ExpertReadError, UsageError
from pyengine.sessions import SamplingParams

N_CTX = 512
LONG = "word " * 2 * N_CTX
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm():
    llm = Llama(n_ctx=N_CTX, n_threads=1, n_threads_batch=1, n_sequences=8, ram_budget="100%")
    yield llm
    llm.close()


def chat(custom_id, text, **body):
    body = {"messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path):
    return [json.loads(data) for data in path.read_bytes().splitlines()]


@pytest.fixture
def files(tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": f"{n} and"} for n in ("One", "Two", "Three", "Four")))
    return prompts, tmp_path / "answers.jsonl"


def test_good_lines_are_answered_and_wrong_ones_named(llm, tmp_path):
    prompts = write(
        tmp_path / "prompts.jsonl",
        chat("paris", "What is the capital of France?"),
        {"prompt": "Once upon a time", "logprobs": 2},
        "{oops",
        chat("paris", "once more"),
        chat("long", LONG),
        chat("two", "Two answers, please.", n=2),
        chat("colour", "Name a colour.", max_tokens=3, logprobs=True),
    )
    seen = []
    summary = run_batch(
        llm,
        prompts,
        tmp_path / "answers.jsonl",
        sampling=GREEDY,
        progress=lambda so_far: seen.append((so_far.lines, so_far.finished)),
    )
    answers = read(tmp_path / "answers.jsonl")
    assert sorted(answer["id"].split("_")[2] for answer in answers) == [f"{number:07}" for number in range(1, 8)]
    by_line = {int(answer["id"].split("_")[2]): answer for answer in answers}

    assert [(by_line[n]["custom_id"], by_line[n]["error"]["code"]) for n in (3, 4, 5, 6)] == [
        (None, "invalid_json_line"),
        ("paris", "duplicate_custom_id"),
        ("long", "context_length_exceeded"),
        ("two", "unsupported_parameter"),
    ]
    assert by_line[3]["response"] is by_line[4]["response"] is None
    assert by_line[5]["response"]["status_code"] == 400
    assert by_line[5]["response"]["body"]["error"]["param"] == "messages"

    paris, story, colour = (by_line[n]["response"]["body"] for n in (1, 2, 7))
    assert [by_line[n]["custom_id"] for n in (1, 2, 7)] == ["paris", "2", "colour"]
    assert all(by_line[n]["error"] is None and by_line[n]["response"]["status_code"] == 200 for n in (1, 2, 7))
    assert paris["object"] == "chat.completion"
    # What llama_cpp answers to it alone.
    expected = llm.create_chat_completion(
        [{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=8, repeat_penalty=1
    )
    assert paris["choices"][0]["message"] == expected["choices"][0]["message"]
    assert paris["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
    assert {name: paris["usage"][name] for name in expected["usage"]} == expected["usage"]
    assert story["object"] == "text_completion"
    logprobs = story["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == story["choices"][0]["text"]
    assert all(len(likeliest) == 2 for likeliest in logprobs["top_logprobs"])
    assert colour["usage"]["completion_tokens"] == 3 == len(colour["choices"][0]["logprobs"]["content"])

    assert (summary.lines, summary.resumed, summary.done, summary.failed) == (7, 0, 3, 4)
    assert summary.generated_tokens == sum(body["usage"]["completion_tokens"] for body in (paris, story, colour))
    assert summary.hits > 0 and not summary.interrupted
    assert seen[-1] == (7, 7)


def test_a_batch_that_was_stopped_goes_on_with_the_rest(llm, files):
    prompts, path = files
    first = run_batch(llm, prompts, path, sampling=GREEDY, parallel=1, stop=lambda: path.stat().st_size > 0)
    assert first.interrupted and first.done == 1
    kept = path.read_bytes()
    second = run_batch(llm, prompts, path, sampling=GREEDY, parallel=1)
    assert (second.resumed, second.done, second.interrupted) == (1, 3, False)
    assert path.read_bytes().startswith(kept)
    assert sorted(answer["custom_id"] for answer in read(path)) == ["1", "2", "3", "4"]
    whole = path.read_bytes()
    third = run_batch(llm, prompts, path, sampling=GREEDY)
    assert (third.resumed, third.done, third.failed) == (4, 0, 0)
    assert path.read_bytes() == whole


def test_an_answer_does_not_depend_on_where_its_batch_was_interrupted(llm, files):
    prompts, path = files
    sampling = SamplingParams(temperature=1, max_tokens=4, seed=5)
    run_batch(llm, prompts, path, sampling=sampling, parallel=1, stop=lambda: path.stat().st_size > 0)
    run_batch(llm, prompts, path, sampling=sampling, parallel=1)
    other = path.with_name("other.jsonl")
    run_batch(llm, prompts, other, sampling=sampling, parallel=1)
    texts = [
        {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in read(each)}
        for each in (path, other)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 1  # each line has a seed of its own


def test_an_id_stays_taken_by_the_line_that_was_answered(llm, files):
    prompts, path = files
    write(prompts, chat("a", "Hello", max_tokens=1))
    run_batch(llm, prompts, path, sampling=GREEDY)
    write(prompts, chat("a", "Hello", max_tokens=1), chat("a", "Bye", max_tokens=1))
    summary = run_batch(llm, prompts, path, sampling=GREEDY)
    assert (summary.resumed, summary.done, summary.failed) == (1, 0, 1)
    assert read(path)[1]["error"]["code"] == "duplicate_custom_id"


def test_a_line_that_is_mended_is_answered_when_failed_ones_are_retried(llm, files):
    prompts, path = files
    write(prompts, {"prompt": "One", "max_tokens": 1}, {"prompt": "Two", "max_tokens": 0})
    run_batch(llm, prompts, path, sampling=GREEDY)
    write(prompts, {"prompt": "One", "max_tokens": 1}, {"prompt": "Two", "max_tokens": 1})
    summary = run_batch(llm, prompts, path, sampling=GREEDY, retry_failed=True)
    assert (summary.resumed, summary.done, summary.failed) == (1, 1, 0)
    assert [answer["error"] for answer in read(path)] == [None, None]


def test_lines_that_begin_alike_share_what_was_computed(llm, tmp_path):
    system = {"role": "system", "content": "Answer in the style of a sea captain who has seen too many storms."}
    questions = [{"messages": [system, {"role": "user", "content": text}]} for text in ("Rain?", "Wind?", "Waves?")]
    unlike = [{"prompt": f"{n} is a number"} for n in range(3)]
    lines = [line for pair in zip(questions, unlike, strict=True) for line in pair]
    prompts = write(tmp_path / "prompts.jsonl", *lines)
    summary = run_batch(llm, prompts, tmp_path / "answers.jsonl", sampling=SamplingParams(max_tokens=1), parallel=1)
    assert summary.done == 6
    cached = [
        answer["response"]["body"]["usage"]["prompt_tokens_details"] for answer in read(tmp_path / "answers.jsonl")
    ]
    assert sum(details["cached_tokens"] > 0 for details in cached) == 2
    assert summary.cached_tokens == sum(details["cached_tokens"] for details in cached)


def test_prompts_and_answers_may_be_streams(llm):
    answers = io.BytesIO()
    summary = run_batch(llm, io.BytesIO(b'{"prompt": "One", "max_tokens": 1}\nno\n'), answers, sampling=GREEDY)
    assert (summary.lines, summary.done, summary.failed) == (None, 1, 1)
    assert len(answers.getvalue().splitlines()) == 2


def test_a_computation_that_fails_ends_the_batch_and_costs_no_answer(llm, files, monkeypatch):
    prompts, path = files
    real = llm._ctx.decode

    def failing(batch):
        if path.stat().st_size > 0:
            raise ExpertReadError("the disk is gone")
        return real(batch)

    monkeypatch.setattr(llm._ctx, "decode", failing)
    with pytest.raises(ExpertReadError, match="the disk is gone"):
        run_batch(llm, prompts, path, sampling=GREEDY, parallel=2)
    kept = read(path)
    assert 1 <= len(kept) < 4 and all(answer["error"] is None for answer in kept)
    monkeypatch.undo()
    run_batch(llm, prompts, path, sampling=GREEDY)
    assert sorted(answer["custom_id"] for answer in read(path)) == ["1", "2", "3", "4"]


def test_more_at_once_than_the_model_was_opened_for(llm, files):
    with pytest.raises(UsageError, match="n_sequences=9 or more"):
        run_batch(llm, *files, parallel=9)


@pytest.mark.parametrize("options", [["-b", "8"], ["-b", "1"], ["-b", "6", "-np", "4"]])
def test_fewer_tokens_in_a_call_than_lines_are_fewer_lines_at_once(files, options):
    prompts, path = files
    command = [sys.executable, "-m", "pyengine", "batch", str(prompts), "-o", str(path), "-n", "2", "-t", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYENGINE_")}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [answer["error"] for answer in read(path)] == [None] * 4


def test_a_killed_batch_is_completed_with_every_line_once(llm, files):
    prompts, path = files
    write(prompts, *({"prompt": f"Chapter {n}:", "max_tokens": 16} for n in range(8)), "{oops", {"prompt": LONG})
    command = [sys.executable, "-m", "pyengine", "batch", str(prompts), "-o", str(path), "-np", "1", "-t", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYENGINE_")}
    child = subprocess.Popen([*command, "-c", str(N_CTX), "--temp", "0"], env=environment, stderr=subprocess.DEVNULL)
    try:
        answered = 0
        while answered < 1 and child.poll() is None:
            time.sleep(0.01)
            answers = read_whole(path)
            answered = sum(answer["error"] is None for answer in answers)
        assert child.poll() is None, "it ended before it could be killed"
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    kept = read_whole(path)
    assert len(kept) < 10
    with path.open("ab") as file:
        file.write(b'{"id": "batch_req_00000')  # as if it had been killed while writing
    summary = run_batch(llm, prompts, path, sampling=GREEDY)
    answers = read(path)
    assert answers[: len(kept)] == kept
    assert sorted(answer["id"].split("_")[2] for answer in answers) == [f"{number:07}" for number in range(1, 11)]
    assert summary.resumed == len(kept) and summary.finished == 10
    codes = {answer["error"]["code"] for answer in answers if answer["error"]}
    assert codes == {"invalid_json_line", "context_length_exceeded"}


def read_whole(path):
    """The lines that are whole so far."""
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def test_ctrl_c_ends_the_command_in_order_and_the_same_command_goes_on(llm, files, monkeypatch):
    prompts, path = files
    real = llm._ctx.decode
    monkeypatch.setattr(loading, "opened", lambda _: contextlib.nullcontext((llm, 0.0)))

    def interrupting(batch):
        if path.stat().st_size > 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(batch)

    monkeypatch.setattr(llm._ctx, "decode", interrupting)
    command = ["batch", str(prompts), "-o", str(path), "-np", "1", "-n", "4"]
    stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 130
    assert f"what is finished is in {path}, and the same command goes on from there" in stopped.stderr
    assert len(read(path)) == 1
    monkeypatch.setattr(llm._ctx, "decode", real)
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert (report["resumed"], report["done"], report["interrupted"]) == (1, 3, False)
    assert report["generated_tokens_per_s"] > 0 and report["hit_rate"] > 0
    assert sorted(answer["custom_id"] for answer in read(path)) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("first", ["", '{"prompt": "One and", "max_tokens": 1}\n{oops\n'])
def test_ctrl_c_ends_a_batch_that_waits_for_prompts(llm, tmp_path, first):
    """The pipe stays open: it would wait for ever."""
    path = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "pyengine", "batch", "-", "-o", str(path), "-np", "1", "-t", "1", "-c", str(N_CTX)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYENGINE_")}
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        child.stdin.write(first)
        child.stdin.flush()
        while "experts" not in (said := child.stderr.readline()):
            assert said, "it ended by itself"
        time.sleep(1.5)  # it reads by now
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert len(read_whole(path)) == first.count("oops")
        assert "stopped; what is finished is in" in child.stderr.read()
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stderr.close()
