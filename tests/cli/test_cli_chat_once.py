"""`pyengine chat` without a terminal: one question, one answer."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pseudo_terminal import FAKE_MAIN

from pyengine.cli.chat import DEFAULT_QUESTION


def asked(fake):
    (chat,) = fake.made[0].chats
    return chat["messages"]


def test_prompt_option(invoke, fake):
    done = invoke("chat", "--prompt", "hello", "--ram-budget", "50%")
    assert done.exit_code == 0
    assert done.stdout == "You said: hello\n"
    engaged, status = done.stderr.splitlines()
    assert engaged == "30 layers x 16 of 32 experts in RAM over disk, fake"
    assert status.startswith("3 tokens · ")
    assert "tok/s · first token " in status
    assert status.endswith(" · hit rate 75 % · resident 50 %")
    assert asked(fake) == [{"role": "user", "content": "hello"}]
    assert fake.made[0].closed


def test_the_prompt_is_read_from_a_pipe(invoke):
    assert invoke("chat", stdin="from a pipe\n").stdout == "You said: from a pipe\n"
    assert invoke("chat", "-p", "-", stdin="explicit\n").stdout == "You said: explicit\n"


def test_the_option_wins_over_the_pipe(invoke):
    assert invoke("chat", "-p", "option", stdin="pipe").stdout == "You said: option\n"


@pytest.mark.parametrize(("arguments", "stdin"), [([], ""), ([], " \n\n"), (["-p", ""], "")])
def test_with_nothing_to_answer_a_greeting_is_asked(invoke, fake, arguments, stdin):
    assert invoke("chat", *arguments, stdin=stdin).exit_code == 0
    assert asked(fake) == [{"role": "user", "content": DEFAULT_QUESTION}]


def test_a_silent_open_pipe_does_not_hang(environment, tmp_path):
    script = (
        "import runpy, pyengine.cli.inputs as inputs; inputs.PIPE_PATIENCE_S = 0.2; "
        f"runpy.run_path({str(FAKE_MAIN)!r}, run_name='__main__')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, "chat"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert child.wait(timeout=30) == 0
        assert child.stdout.read().decode() == f"You said: {DEFAULT_QUESTION}\n"
    finally:
        child.kill()
        child.communicate()


def test_a_pipe_that_is_not_utf8_is_a_clear_error(invoke, fake):
    done = invoke("chat", stdin=b"\xc3(")
    assert done.exit_code == 1
    assert done.stderr == "pyengine: error: standard input is not valid UTF-8 (byte 0xc3 at offset 0)\n"
    assert fake.made == []


def test_utf8_arguments_work_in_the_c_locale(environment):
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python takes arguments for ASCII
    done = subprocess.run(
        [sys.executable, str(FAKE_MAIN), "chat", "-p", "日本"], env=environment, capture_output=True, check=True
    )
    assert done.stdout.decode() == "You said: 日本\n"


def test_system_prompt_limit_and_sampling_reach_the_engine(invoke, fake):
    done = invoke("chat", "-p", "a b c", "-sys", "be brief", "-n", "2", "--temp", "0", "-s", "5")
    assert done.stdout == "You said:\n"
    assert done.stderr.splitlines()[-1].startswith("2 tokens · ")
    (chat,) = fake.made[0].chats
    assert [message["role"] for message in chat["messages"]] == ["system", "user"]
    assert (chat["seed"], chat["max_tokens"]) == (5, 2)
    assert chat["sampling"]["temperature"] == 0.0
    assert chat["sampling"]["min_p"] == 0.05


def test_a_message_longer_than_the_context_is_a_clear_error(invoke):
    done = invoke("chat", "-p", "word " * 256, "-c", "256")
    assert done.exit_code == 1
    assert done.stderr.endswith(
        "error: the message does not fit the context of 256 tokens; start with a larger -c/--ctx-size\n"
    )


def test_a_read_error_in_mid_answer_is_a_clear_error(invoke, fake):
    fake.fail_at_token = 4
    done = invoke("chat", "-p", "hello")
    assert done.exit_code == 1
    assert done.stdout == "You said:\n"
    assert done.stderr.endswith("error: layer 3, expert 7: cannot read 62208 bytes: Input/output error\n")
    assert fake.made[0].closed


def test_dense_models_have_no_expert_figures(invoke, fake, monkeypatch):
    monkeypatch.setattr(fake, "expert_stats", lambda self: {"managed": False})
    monkeypatch.setattr(fake, "engaged", "no experts to manage: stock llama.cpp")
    engaged, status = invoke("chat", "-p", "hello").stderr.splitlines()
    assert engaged == "no experts to manage: stock llama.cpp"
    assert "hit rate" not in status
    assert "resident" not in status


def test_what_the_package_warns_of_is_a_plain_line_and_said_once(invoke, fake):
    fake.warnings_at_load = ("experts stay in RAM slots", "30 layers x 32 of 32 experts in RAM over disk, fake")
    lines = invoke("chat", "-p", "hello").stderr.splitlines()
    assert lines[:2] == ["experts stay in RAM slots", "30 layers x 32 of 32 experts in RAM over disk, fake"]
    assert len(lines) == 3


def test_control_characters_reach_a_file_as_they_are(invoke, fake):
    fake.answers = ("a\x1b[31mred",)
    assert invoke("chat", "-p", "x").stdout == "a\x1b[31mred\n"
