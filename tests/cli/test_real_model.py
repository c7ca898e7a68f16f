"""The command line end to end: the built package, the bundled model, real processes."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from pseudo_terminal import Terminal

if importlib.util.find_spec("pyengine._native") is None:
    pytest.skip("the native part is not built", allow_module_level=True)

PYENGINE = [sys.executable, "-m", "pyengine"]
PROMPT = "The capital of France is"
LONG_PROMPT = "Once upon a time there was a fox who lived near the river. " * 200

STOCK = """
import itertools, json, sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
tokens = llm.generate(llm.tokenize(sys.argv[2].encode(), add_bos=True, special=True), temp=0.0)
print(json.dumps(list(itertools.islice(tokens, int(sys.argv[3])))))
"""


@pytest.fixture
def real(environment):
    """Runs the command in a process of its own, on one thread: two would wait for each other on a busy machine."""
    environment = environment | {"PYENGINE_THREADS": "1"}

    def run(*arguments, stdin=""):
        return subprocess.run(
            [*PYENGINE, *arguments], env=environment, input=stdin, capture_output=True, text=True, check=False
        )

    run.environment = environment
    return run


def report(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_gives_the_tokens_of_stock_llama_cpp_at_any_budget(real):
    from pyengine import bundled_model

    arguments = ["run", "-p", PROMPT, "-n", "10", "--temp", "0", "-c", "512", "--json"]
    small, whole = (report(real(*arguments, "--ram-budget", budget)) for budget in ("25%", "100%"))
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, str(bundled_model()), PROMPT, "10"], capture_output=True, text=True, check=True
    )
    assert small["token_ids"] == whole["token_ids"] == json.loads(stock.stdout)
    assert small["text"] == whole["text"]
    assert small["text"].startswith(" Paris")
    for answer, share in ((small, 0.25), (whole, 1.0)):
        stats = answer["expert_stats"]
        assert stats["managed"]
        assert stats["slots"] == pytest.approx(share * stats["experts"], rel=0.05)
        assert stats["hits"] + stats["misses"] > 0
        timings = answer["timings"]
        assert timings["prompt_tokens"] == 5
        assert timings["generated_tokens"] == 10
        assert timings["n_threads"] == timings["n_threads_batch"] == 1
        assert timings["decode_tokens_per_s"] == pytest.approx(9 / timings["decode_s"])
    assert small["expert_stats"]["misses"] > whole["expert_stats"]["misses"]


def test_run_stops_where_the_text_ends(real):
    prompt = "<|im_start|>user\nSay only: yes<|im_end|>\n<|im_start|>assistant\n"
    answer = report(real("run", "-p", prompt, "--temp", "0", "-n", "200", "--json"))
    assert answer["finish_reason"] == "stop"
    assert "<|im_end|>" not in answer["text"]
    assert 0 < len(answer["token_ids"]) < 200


def test_the_same_seed_gives_the_same_text(real):
    arguments = ["run", "-p", "My favourite colour", "-n", "12", "--temp", "1.5"]
    one, again, other = (real(*arguments, "-s", seed).stdout for seed in ("1", "1", "2"))
    assert one == again
    assert one != other


def test_chat_without_a_terminal_answers_once(real):
    done = real("chat", "--temp", "0", "--ram-budget", "50%", stdin="What is the capital of France?\n")
    assert done.returncode == 0
    assert done.stdout == "The capital of France is Paris.\n"
    engaged, status = done.stderr.splitlines()
    assert re.match(r"30 layers x 16 of 32 experts .* in RAM over disk, ", engaged)
    assert re.fullmatch(r"7 tokens · .* tok/s · first token .* s · hit rate .* % · resident .* %", status)


def test_a_broken_model_file_is_one_line_and_exit_1(real, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model at all" * 100)
    for model in (broken, tmp_path / "missing.gguf"):
        done = real("run", "-p", "x", "-m", str(model))
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(rf"pyengine: error: .*{model.name}.*\n", done.stderr)


def test_a_budget_too_small_names_the_least(real):
    done = real("run", "-p", "x", "--ram-budget", "1000")
    assert done.returncode == 1
    assert re.fullmatch(r"pyengine: error: .*\b\d{4,}\b.*\n", done.stderr)


@pytest.mark.alone
def test_ctrl_c_inside_a_long_prompt(real):
    child = subprocess.Popen(
        [*PYENGINE, "run", "-p", LONG_PROMPT, "--ram-budget", "25%", "-b", "4096", "-ub", "4096", "-c", "8192"],
        env=real.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr.readline().startswith("30 layers")
        time.sleep(0.5)
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out, err) == (130, "", "")
    assert time.monotonic() - started < 10  # all of it at once would take far longer


def shown_answer(session):
    """What stands below the question that was typed last."""
    text = " ".join(session.lines_since[2:])
    return "" if "Reading the prompt" in text else text


@pytest.mark.alone
def test_a_session(real, tmp_path):
    command = [*PYENGINE, "chat", "--temp", "0", "--ram-budget", "50%", "-c", "256"]
    session = Terminal(command, real.environment, str(tmp_path))
    try:
        session.enter("What is the capital of France?")
        session.wait_for("The capital of France is Paris.")
        session.enter("Write a very long story about a fox and a hound.")
        session.wait_until(lambda: len(shown_answer(session).split()) > 10, "some words of the story")
        session.type("\x03")
        session.wait_for("(stopped)")
        session.enter("/stats")
        session.wait_for("hit rate")
        session.enter("/budget 25%")
        session.wait_for("30 layers x 8 of 32 experts")
        session.enter("Thanks a lot. " * 38)  # with what was said before more than the context holds
        session.wait_for("forgotten to make room in the context")
        session.wait_for("tok/s")
        session.enter("What is the capital of Italy?")
        session.wait_for("Rome")
        session.wait_for_prompt()
        session.type("\x04")
        assert session.finish() == 0
    finally:
        session.kill()


def test_ctrl_c_keeps_the_trace(real, tmp_path):
    from pyengine.traces import load_trace

    trace = tmp_path / "trace.npz"
    child = subprocess.Popen(
        [*PYENGINE, "run", "-p", PROMPT, "-n", "4000", "--temp", "1", "--trace", str(trace)],
        env=real.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert child.stdout.read(20)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert len(load_trace(trace).ids) > 0
