"""`pyengine batch` as far as it needs no model."""

from __future__ import annotations

import json

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from pyengine.batch import BatchSummary
from pyengine.batch.files import open_batch
from pyengine.cli import main
from pyengine.cli.batch_progress import summary_lines


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["batch", *arguments], prog_name="pyengine")


@pytest.fixture
def answered(tmp_path):
    """A batch in which every line is answered: no model is loaded for it."""
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with open_batch(prompts, answers) as files:
        for line, _ in files.lines():
            files.add({"id": line.key, "custom_id": "a", "response": None, "error": {"code": "c", "message": "m"}})
    return prompts, answers


def test_a_batch_that_is_complete_loads_no_model(invoke, answered):
    done = invoke("prompts.jsonl", "-o", "answers.jsonl", "-m", "no-such-model.gguf")
    assert done.exit_code == 0
    assert done.stderr == "2 lines: 0 answered, 0 failed, 2 before this run\n"
    report = json.loads(invoke("prompts.jsonl", "-o", "answers.jsonl", "--json").stdout)
    assert (report["lines"], report["resumed"], report["done"]) == (2, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl", "-o", "answers.jsonl"], "missing.jsonl: No such file or directory"),
        (["prompts.jsonl", "-o", "prompts.jsonl"], "prompts.jsonl holds the prompts"),
        (["answers.jsonl", "-o", "other.jsonl", "-m", "no-such-model.gguf"], "no-such-model.gguf"),
        (["prompts.jsonl", "-o", "no/answers.jsonl"], "no/answers.jsonl: No such file or directory"),
    ],
)
def test_mistakes_about_files_are_one_line(invoke, answered, arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("pyengine: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_answers_to_other_prompts_are_an_error(invoke, answered):
    answered[0].write_text('{"prompt": "changed"}\n{"prompt": "b"}\n')
    done = invoke("prompts.jsonl", "-o", "answers.jsonl")
    assert done.exit_code == 1
    assert "answers.jsonl does not belong to prompts.jsonl as it is now: line 1" in done.stderr


@pytest.mark.parametrize("option", ["--overwrite", "--retry-failed"])
def test_a_run_that_is_impossible_costs_no_answer(invoke, answered, option):
    """Both lines of the file are error lines."""
    before = answered[1].read_bytes()
    done = invoke("prompts.jsonl", "-o", "answers.jsonl", option, "-m", "no-such-model.gguf")
    assert done.exit_code == 1 and "no-such-model.gguf" in done.stderr
    assert answered[1].read_bytes() == before


def test_retrying_the_lines_of_another_prompts_file_costs_no_answer(invoke, answered, tmp_path):
    with open_batch(*answered, overwrite=True) as files:
        lines = [line for line, _ in files.lines()]
        files.add({"id": lines[0].key, "custom_id": "a", "response": None, "error": None})
        files.add({"id": lines[1].key, "custom_id": "b", "response": None, "error": {"code": "c", "message": "m"}})
    before = answered[1].read_bytes()
    (tmp_path / "others.jsonl").write_text('{"prompt": "x"}\n{"prompt": "b"}\n')
    done = invoke("others.jsonl", "-o", "answers.jsonl", "--retry-failed")
    assert done.exit_code == 1 and "does not belong to others.jsonl" in done.stderr
    assert answered[1].read_bytes() == before


def test_beginning_anew_without_prompts_leaves_no_answers(invoke, answered):
    answered[0].write_text("")
    done = invoke("prompts.jsonl", "-o", "answers.jsonl", "--overwrite", "-m", "no-such-model.gguf")
    assert done.exit_code == 0
    assert answered[1].read_bytes() == b""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prompts.jsonl"],
        ["prompts.jsonl", "-o", "a", "-np", "0"],
        ["prompts.jsonl", "-o", "a", "-np", "many"],
        ["prompts.jsonl", "-o", "a", "-np", "257"],
        ["prompts.jsonl", "-o", "a", "-np", "9", "-b", "8"],
        ["prompts.jsonl", "-o", "a", "-n", "0"],
        ["prompts.jsonl", "-o", "-", "--json"],
        ["prompts.jsonl", "-o", "a", "--overwrite", "--retry-failed"],
        ["prompts.jsonl", "-o", "a", "--mirostat", "1"],
    ],
)
def test_usage_errors(invoke, answered, tmp_path, arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert not (tmp_path / "a").exists()


def test_help_names_what_is_there_and_nothing_else(invoke):
    shown = invoke("--help").stdout
    for option in ("--output", "--parallel", "--ram-budget", "--policy", "--temp", "--retry-failed", "--json"):
        assert option in shown
    assert "--mirostat" not in shown and "--typical" not in shown


def test_the_shell_completes_it(invoke):
    complete = ShellComplete(main, {}, "pyengine", "_PYENGINE_COMPLETE")
    assert [item.value for item in complete.get_completions([], "ba")] == ["batch"]
    assert "--retry-failed" in [item.value for item in complete.get_completions(["batch"], "--re")]


def test_summary_in_words():
    summary = BatchSummary(
        lines=10, resumed=2, done=5, failed=1, prompt_tokens=100, cached_tokens=60, generated_tokens=60, seconds=4.0,
        parallel=3, hits=30, misses=10, bytes_read=1024 * 1000,
    )  # fmt: skip
    assert list(summary_lines(summary)) == [
        "10 lines: 5 answered, 1 failed, 2 before this run, 2 left",
        "100 prompt tokens (60 % cached), 60 generated in 4.0 s · 15.0 tok/s",
        "hit rate 75 % · 10 KiB read per token · 3 lines at once",
    ]
    assert summary.as_json()["bytes_read_per_token"] == 10240
