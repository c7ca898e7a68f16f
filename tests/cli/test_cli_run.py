"""`pyengine run`: text, JSON, limits, prompts from files."""

from __future__ import annotations

import json

import pytest


def report(done):
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_text_goes_to_stdout_and_the_rest_to_stderr(invoke):
    done = invoke("run", "-p", "count", "--ram-budget", "50%")
    assert done.exit_code == 0
    assert done.stdout == " one two three\n"
    engaged, status = done.stderr.splitlines()
    assert engaged == "30 layers x 16 of 32 experts in RAM over disk, fake"
    assert status.startswith("3 tokens · ")
    assert status.endswith(" · hit rate 75 % · resident 50 %")


def test_json_holds_the_generated_ids_and_timings(invoke, fake):
    fake.token_delay_s, fake.prompt_delay_s = 0.02, 0.05
    answer = report(invoke("run", "-p", "count to three", "--json", "-s", "7", "-t", "3"))
    (llm,) = fake.made
    assert llm.detokenize(answer["token_ids"]).decode() == answer["text"] == " one two three"
    assert answer["finish_reason"] == "stop"
    assert answer["seed"] == 7
    assert llm.seeds == [7]
    assert answer["engaged"] == llm.engaged
    assert answer["expert_stats"] == llm.expert_stats()
    timings = answer["timings"]
    assert timings["prompt_tokens"] == 3
    assert timings["generated_tokens"] == 3
    assert timings["n_threads"] == timings["n_threads_batch"] == 3
    assert 0.05 <= timings["prompt_s"] <= timings["ttft_s"]
    assert timings["prompt_tokens_per_s"] == pytest.approx(3 / timings["prompt_s"])
    assert timings["decode_s"] >= 0.04  # two steps lie between the first token and the third
    assert timings["decode_tokens_per_s"] == pytest.approx(2 / timings["decode_s"])
    assert timings["load_s"] >= 0
    assert llm.closed


def test_n_limits_the_tokens_and_computes_no_further(invoke, fake):
    answer = report(invoke("run", "-p", "count", "-n", "2", "--json"))
    assert answer["text"] == " one two"
    assert answer["finish_reason"] == "length"
    assert fake.made[0].n_tokens == 2  # the prompt and " one"; " two" was sampled, not evaluated


def test_n_0_computes_the_prompt_alone(invoke, fake):
    answer = report(invoke("run", "-p", "count to three", "-n", "0", "--json"))
    assert answer["token_ids"] == []
    assert answer["timings"]["prompt_tokens"] == fake.made[0].n_tokens == 3
    assert answer["timings"]["prompt_s"] > 0
    assert answer["timings"]["ttft_s"] is answer["timings"]["decode_tokens_per_s"] is None


def words(count):
    """A prompt of so many tokens."""
    return " ".join(["a"] * count)


def test_the_context_limits_the_text(invoke):
    answer = report(invoke("run", "-p", words(254), "-c", "256", "--json"))
    assert answer["text"] == " one two"
    assert answer["finish_reason"] == "length"


def test_a_prompt_longer_than_the_context_is_an_error(invoke):
    done = invoke("run", "-p", words(256), "-c", "256")
    assert done.exit_code == 1
    assert done.stderr.endswith(
        "error: the prompt has 256 tokens and the context 256; start with a larger -c/--ctx-size\n"
    )


@pytest.mark.parametrize(("asked", "given"), [("0", 0), ("1", 256), ("256", 256), ("257", 512), ("4096", 4096)])
def test_the_context_is_rounded_as_llama_cpp_rounds_it(invoke, fake, asked, given):
    invoke("run", "-p", "x", "-n", "0", "-c", asked)
    assert fake.made[0].n_ctx() == given


def test_an_empty_prompt_without_a_beginning_token_is_an_error(invoke):
    done = invoke("run", "-p", "")
    assert done.exit_code == 1
    assert "the prompt is empty" in done.stderr


def test_a_character_spread_over_tokens_comes_out_whole(invoke, fake):
    fake.completion = (b" \xf0\x9f", b"\x8e\x89", b" ok", b"\xf0\x9f")
    assert invoke("run", "-p", "party").stdout == " \N{PARTY POPPER} ok\N{REPLACEMENT CHARACTER}\n"
    assert report(invoke("run", "-p", "party", "--json"))["text"] == " \N{PARTY POPPER} ok\N{REPLACEMENT CHARACTER}"


def test_sampling_reaches_the_engine(invoke, fake):
    flags = "--temp 0 --top-k 1 --top-p 0.5 --min-p 0.1 --typical 0.9 --repeat-penalty 1.1 --presence-penalty 0.2"
    more = "--frequency-penalty 0.3 --mirostat 2 --mirostat-lr 0.4 --mirostat-ent 6 --repeat-last-n 32"
    invoke("run", "-p", "x", *flags.split(), *more.split())
    assert fake.made[0].sampling == {
        "temp": 0.0,
        "top_k": 1,
        "top_p": 0.5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "mirostat_mode": 2,
        "mirostat_eta": 0.4,
        "mirostat_tau": 6.0,
    }
    assert fake.made[0].arguments["last_n_tokens_size"] == 32


def test_a_random_seed_differs_from_run_to_run(invoke):
    seeds = {report(invoke("run", "-p", "x", "--json"))["seed"] for _ in range(4)}
    assert len(seeds) > 1


def test_model_options_reach_the_engine_and_others_stay_its_own(invoke, fake, tmp_path):
    model = tmp_path / "m.gguf"
    model.touch()
    invoke("run", "-p", "x", "-m", str(model), "-c", "512", "-b", "64", "-ub", "32", "-t", "5", "-tb", "6", "-fa")
    invoke("run", "-p", "x")
    invoke("run", "-p", "x", "--policy", "lfu", "--look-ahead", "off")
    given, default, advised = fake.made
    assert given.model_path == str(model)
    assert given.arguments == {
        "n_ctx": 512,
        "n_batch": 64,
        "n_ubatch": 32,
        "n_threads": 5,
        "n_threads_batch": 6,
        "flash_attn": True,
        "last_n_tokens_size": 64,
        "verbose": False,
    }
    assert default.arguments == {"n_ctx": 4096, "last_n_tokens_size": 64, "verbose": False}
    assert advised.arguments == default.arguments | {"policy": "lfu", "look_ahead": "off"}


def test_environment_variables_set_options_and_the_command_line_wins(invoke, fake):
    env = {"PYENGINE_RAM_BUDGET": "25%", "PYENGINE_CTX_SIZE": "512", "PYENGINE_N_PREDICT": "1"}
    assert invoke("run", "-p", "x", env=env).stdout == " one\n"
    assert fake.made[0].expert_stats()["slots"] == 240
    invoke("run", "-p", "x", "-c", "768", env=env)
    assert [llm.n_ctx() for llm in fake.made] == [512, 768]


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_prompt_from_a_file_loses_one_last_newline(invoke, fake, tmp_path, source):
    path = tmp_path / "prompt.txt"
    path.write_bytes("naïve\n\n".encode())
    name, stdin = (str(path), "") if source == "file" else ("-", path.read_bytes())
    assert report(invoke("run", "-f", name, "--json", stdin=stdin))["timings"]["prompt_tokens"] == 2
    assert fake.made[0].detokenize([1, 2]).decode() == "naïve\n"


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_prompt_that_is_not_utf8_is_a_clear_error(invoke, fake, tmp_path, source):
    path = tmp_path / "prompt.bin"
    path.write_bytes(b"abc\xffdef")
    name, stdin = (str(path), b"") if source == "file" else ("-", path.read_bytes())
    done = invoke("run", "-f", name, stdin=stdin)
    assert done.exit_code == 1
    shown = "standard input" if source == "stdin" else str(path)
    assert done.stderr == f"pyengine: error: {shown} is not valid UTF-8 (byte 0xff at offset 3)\n"
    assert fake.made == []


def test_a_prompt_argument_that_is_not_utf8_is_a_clear_error(invoke):
    done = invoke("run", "-p", "abc\udcff")  # how Python shows the byte 0xff in an argument
    assert done.exit_code == 1
    assert done.stderr == "pyengine: error: the text given with --prompt is not valid UTF-8\n"


def test_a_missing_file_is_a_clear_error(invoke):
    done = invoke("run", "-f", "none.txt")
    assert done.exit_code == 1
    assert done.stderr == "pyengine: error: none.txt: No such file or directory\n"


def test_a_read_error_while_decoding_is_a_clear_error(invoke, fake):
    fake.fail_at_token = 2
    done = invoke("run", "-p", "count", "--json")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.endswith("pyengine: error: layer 3, expert 7: cannot read 62208 bytes: Input/output error\n")
    assert fake.made[0].closed


def test_gate_inputs_go_into_a_trace(invoke):
    done = invoke("run", "-p", "Hi", "--trace-inputs")
    assert done.exit_code == 2 and "--trace-inputs needs --trace" in done.stderr


@pytest.mark.parametrize("name", [".", "file/trace.npz", "auto/auto"])
def test_a_trace_that_cannot_be_written_is_said_before_anything_is_loaded(invoke, fake, tmp_path, name):
    for file in ("file", "auto"):
        (tmp_path / file).touch()
    done = invoke("run", "-p", "Hi", "--trace", str(tmp_path / name))
    assert done.exit_code == 1 and str(tmp_path / name.split("/")[0]).rstrip("/.") in done.stderr
    assert not fake.made and not done.stdout
