"""The interactive chat in a real (pseudo-)terminal."""

from __future__ import annotations

import re
import time

import pytest

LEAVE = "\x04"  # Ctrl-D
STOP = "\x03"  # Ctrl-C

# Keys come at moments at which the program must be ready for them.
pytestmark = pytest.mark.alone


def leave(session):
    session.wait_for_prompt()
    session.type(LEAVE)
    return session.finish()


def test_a_conversation(terminal):
    session = terminal("chat", "--ram-budget", "50%")
    session.enter("hello there")
    session.wait_for("tok/s")
    session.wait_for_prompt()
    *_, status, blank, prompt = session.lines
    title, engaged, hint = session.lines[:3]
    assert re.fullmatch(r"pyengine \S.* · smolmoe-32x8-q4_0", title)
    assert engaged == "30 layers x 16 of 32 experts in RAM over disk, fake"
    assert hint == "/help lists commands · Ctrl-C stops an answer · Ctrl-D leaves"
    assert session.lines[3:-3] == ["", "> hello there", "", "You said: hello there", ""]
    assert re.fullmatch(r"4 tokens · [0-9.]+ tok/s · first token [0-9.]+ s · hit rate 75 % · resident 50 %", status)
    assert (blank, prompt) == ("", ">")
    assert leave(session) == 0


def test_the_answer_streams(terminal):
    session = terminal("chat", answers=["alpha beta gamma delta " * 4], token_delay_s=0.2)
    session.enter("go")
    session.wait_for("alpha beta")
    assert "delta alpha" not in str(session)
    first = time.monotonic()
    session.wait_for("tok/s")
    assert time.monotonic() - first > 1.0  # ten and more tokens came after the first ones were shown


def test_ctrl_c_stops_the_answer_and_keeps_the_session(terminal):
    session = terminal("chat", answers=["word " * 500, "second answer to {text}"], token_delay_s=0.05)
    session.enter("begin")
    session.wait_for("word word word")
    session.type(STOP)
    session.wait_for("(stopped)")
    session.enter("again")
    session.wait_for("second answer to again")
    assert "^C" not in str(session)
    assert str(session).count("word") < 100
    assert leave(session) == 0


def test_ctrl_c_before_the_first_token(terminal):
    session = terminal("chat", prompt_delay_s=1.0)
    session.enter("hello")
    session.wait_for("Reading the prompt")
    session.type(STOP)
    session.wait_for("(stopped")
    session.wait_for_prompt()
    assert "Reading the prompt" not in str(session)
    assert not session.cursor_hidden
    assert leave(session) == 0


def test_ctrl_c_at_the_prompt_clears_it_or_gives_a_hint(terminal):
    session = terminal("chat")
    session.wait_for_prompt()
    session.type("half a mess")
    session.wait_for("half a mess")
    session.type(STOP)
    session.enter("whole")
    session.wait_for("You said: whole")
    assert "Ctrl-D or /quit leaves." not in str(session)
    session.wait_for_prompt()
    session.type(STOP)
    session.wait_for("Ctrl-D or /quit leaves.")
    assert leave(session) == 0


def test_ctrl_d_leaves_only_from_an_empty_prompt(terminal):
    session = terminal("chat")
    session.wait_for_prompt()
    session.type("abc" + LEAVE + "d\r")
    session.wait_for("You said: abcd")
    assert leave(session) == 0


def test_quit(terminal):
    session = terminal("chat")
    session.enter("/quit")
    assert session.finish() == 0


def test_help_names_every_command(terminal):
    session = terminal("chat")
    session.enter("/help")
    session.wait_for("/quit")
    session.wait_for_prompt()
    named = {line.split()[0] for line in session.lines_since if line.startswith("/")}
    assert named == {"/help", "/stats", "/reset", "/budget", "/system", "/save", "/quit"}


def test_tab_completes_a_command(terminal):
    session = terminal("chat")
    session.wait_for_prompt()
    session.type("/bu\t25%\r")
    session.wait_for("30 layers x 8 of 32 experts")


def test_stats(terminal):
    session = terminal("chat", "--ram-budget", "25%")
    session.enter("one two")
    session.wait_for("tok/s")
    session.enter("/stats")
    session.wait_for("waited for disk")
    rows = [" ".join(line.split()) for line in session.lines_since]
    assert "resident 240 of 960 experts (25 %), 14.2 MiB" in rows
    assert "hit rate 75 % (1260 hits, 420 misses)" in rows  # three tokens of prompt, four of answer


def test_budget_changes_and_errors_keep_the_session(terminal):
    session = terminal("chat")
    for line, answer in [
        ("/budget 25%", "30 layers x 8 of 32 experts"),
        ("/budget 1", "error: ram_budget 1 is below the least budget of 497664 bytes"),
        ("/budget", "error: /budget needs a size"),
        ("/nonsense x", "no command /nonsense; /help lists them"),
        (" /etc is a directory", "You said: /etc is a directory"),
    ]:
        session.enter(line)
        session.wait_for(answer)
    assert leave(session) == 0


def test_reset_system_and_save(terminal, tmp_path):
    session = terminal("chat")
    for line, answer in [
        ("/save", "error: there is nothing to save yet"),
        ("first", "tok/s"),
        ("/system", "no system prompt is set"),
        ("/system speak like a pirate", "the system prompt is set"),
        ("/system", "\nspeak like a pirate"),
        ("/reset", "the conversation is empty"),
        ("second", "tok/s"),
        ("/save talk.md", "saved to talk.md"),
        ("/save talk.md", "error: talk.md exists already"),
        ("/save talk.json", "saved to talk.json"),
        ("/save nowhere/talk.md", "error: nowhere/talk.md: No such file or directory"),
    ]:
        session.enter(line)
        session.wait_for(answer)
    expected = "## System\n\nspeak like a pirate\n\n## You\n\nsecond\n\n## Model\n\nYou said: second\n"
    assert (tmp_path / "talk.md").read_text() == expected
    assert '"role": "assistant"' in (tmp_path / "talk.json").read_text()


def test_pasted_lines_are_one_message(terminal):
    session = terminal("chat")
    session.wait_for_prompt()
    session.type("\x1b[200~line one\nline two\x1b[201~")
    session.wait_for("> line one\n  line two")
    session.type("\r")
    session.wait_for("You said: line one\nline two")


def test_alt_enter_starts_a_new_line(terminal):
    session = terminal("chat")
    session.wait_for_prompt()
    session.type("upper\x1b\rlower\r")
    session.wait_for("You said: upper\nlower")


def test_keys_typed_during_an_answer_wait_for_the_prompt(terminal):
    session = terminal("chat", token_delay_s=0.1)
    session.enter("one two three four")
    session.wait_for("You said:")
    session.type("next\r")
    session.wait_for("You said: next")
    assert "You said: one two three four" in session.lines  # the keys did not show up in it
    assert [line for line in session.lines if line.startswith("> ")] == ["> one two three four", "> next"]


def test_history_is_private_and_comes_back(terminal, tmp_path):
    session = terminal("chat")
    session.enter("remember me")
    session.wait_for("tok/s")
    assert leave(session) == 0
    history = tmp_path / "state" / "pyengine" / "chat_history"
    assert history.stat().st_mode & 0o077 == 0
    session = terminal("chat")
    session.wait_for_prompt()
    session.type("\x1b[A\r")  # the Up key
    session.wait_for("You said: remember me")


def test_an_unwritable_state_directory_costs_only_the_history(terminal, tmp_path):
    (tmp_path / "state").write_text("a file where a directory should be")
    session = terminal("chat")
    session.enter("hello")
    session.wait_for("You said: hello")


def test_a_full_context_drops_oldest_turns_with_one_line(terminal):
    session = terminal("chat", "-c", "256", answers=["the answer"])
    for number in range(6):
        session.enter(f"message number {number} " + "word " * 40)
        session.wait_for("the answer")
    session.wait_for_prompt()
    said = [line for line in session.lines if "forgotten to make room in the context" in line]
    assert 1 <= len(said) < 5


def test_an_answer_cut_by_the_context_says_so(terminal):
    session = terminal("chat", "-c", "256", answers=["word " * 300])
    session.enter("go")
    session.wait_for("(cut off: the context of 256 tokens is full; -c sets its size)")


def test_a_read_error_in_mid_answer_keeps_the_session(terminal):
    session = terminal("chat", fail_at_token=4)
    session.enter("hello")
    session.wait_for("\n\nYou said:\nerror: layer 3, expert 7: cannot read 62208 bytes: Input/output error")
    assert leave(session) == 0


def test_no_color(terminal):
    def seen(**env):
        session = terminal("chat", env=env, prompt_delay_s=0.3, load_delay_s=0.3)
        session.wait_for("Loading")
        styles = session.styled()
        session.enter("hello")
        session.wait_for("Reading the prompt")
        styles |= session.styled()
        session.enter("/help")
        session.wait_for("/quit")
        session.enter("/budget 1")
        session.wait_for("error: ")
        return styles | session.styled(), session.raw

    styles, raw = seen(NO_COLOR="1")
    assert styles == set()
    assert "\x1b[2m" not in raw  # dim, which the emulator does not know
    styles, raw = seen()
    assert {"cyan", "bold", "red"} <= styles
    assert "\x1b[2m" in raw


def test_a_dumb_terminal(terminal):
    session = terminal("chat", env={"TERM": "dumb"})
    session.enter("hello")
    session.wait_for("You said: hello")
    assert leave(session) == 0


def test_a_prompt_in_a_terminal_answers_once_with_whole_words(terminal):
    session = terminal("chat", "-p", "wrap " * 40)
    assert session.finish() == 0
    answer = [line for line in session.lines if "wrap" in line]
    assert answer[0] == "You said: " + "wrap " * 17 + "wrap"  # 99 of 100 columns
    assert session.lines[-1].startswith("43 tokens · ")


def test_the_loading_spinner_goes_away(terminal):
    session = terminal("chat", "-p", "x", load_delay_s=0.5)
    session.wait_for("Loading the bundled model")
    assert session.finish() == 0
    assert "Loading" not in str(session)
    assert not session.cursor_hidden


def test_ctrl_c_while_loading_restores_the_terminal(terminal):
    session = terminal("chat", load_delay_s=20)
    session.wait_for("Loading the bundled model")
    session.type(STOP)
    assert session.finish() == 130
    assert "Loading" not in str(session)
    assert "Traceback" not in str(session)
    assert not session.cursor_hidden
