"""Computing stops when it is asked to, soon, and goes on afterwards as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from models.fixtures import ModelFactory
from models.vocabulary import N_VOCAB

from pyengine import Llama

from .children import Child
from .decoding import DecodeError, random_script
from .managed import assert_as_stock, managed
from .reference import StockProcess, write

SCRIPT = random_script([1] * 4 + [150] + [1] * 4, N_VOCAB, seed=10)
PROMPT, N_NEW = SCRIPT[4][:40], 12
SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1}
ABORTED = 2  # llama_decode's answer


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("model_id", ["qwen2moe", "q4_k_m"])
def test_an_aborted_decode_leaves_the_context_usable(
    model_id: str, share: float, generated_model: ModelFactory, stock: StockProcess
) -> None:
    """Aborted at the first question, the second, and so on until it runs through; then the logits are stock's."""
    facts = generated_model(model_id)
    wanted = stock.run(facts.path, SCRIPT, n_ubatch=64).logits
    with managed(facts.path, share) as (engine, model), model.context(n_ubatch=64) as context:
        context.run(SCRIPT[:4])
        for chunk in SCRIPT[4:6]:
            aborted, patience = 0, 0
            while True:
                asked = 0

                def enough() -> bool:
                    nonlocal asked
                    asked += 1
                    return asked > patience  # noqa: B023  (asked for at once)

                context.set_abort(enough)
                try:
                    context.decode(chunk)
                    break
                except DecodeError as error:
                    assert error.status == ABORTED
                    aborted += 1
                    patience = aborted + aborted**2 // 4
            assert aborted > 5
            assert engine.take_failure() is None, "a wish is no failure"
        context.set_abort(None)
        context.clear()
        assert_as_stock(context.run(SCRIPT), wanted, SCRIPT, 64)


@pytest.mark.parametrize(("share", "layers_read"), [(0.0, 0.2), (0.5, 1.0)])
def test_prefill_stops_soon(share: float, layers_read: float, generated_model: ModelFactory, faulty_disk: Path) -> None:
    """On a disk so slow that the prompt takes seconds: no more is read than what one layer had asked for already."""
    facts = generated_model("many-experts")
    matrices = 3
    a_layer = matrices * facts.n_expert
    after = a_layer // 2
    task = Child("disk.abort", path=str(facts.path), tokens=SCRIPT[4], share=share, after=after)
    said = task.run({"LD_PRELOAD": str(faulty_disk), "FAULTY_DISK_DELAY_US": "4000"})
    assert said["status"] == ABORTED
    assert after <= said["reads"] <= after + layers_read * a_layer


def test_ctrl_c_between_computing_and_counting_leaves_no_stale_logits(generated_model: ModelFactory) -> None:
    """llama_cpp takes the logits at hand for the prompt's if it has counted as many tokens as the prompt has."""
    with contextlib.closing(Llama(generated_model("qwen2moe").path, ram_budget="25%", **SETTINGS)) as llama:
        wanted = list(write(llama, PROMPT, 8))
        llama.reset()
        answer = write(llama, PROMPT, 8)
        next(answer)
        decode = llama._ctx.decode

        def interrupted(batch: Any) -> Any:
            decode(batch)
            raise KeyboardInterrupt

        llama._ctx.decode = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            next(answer)
        llama._ctx.decode = decode  # type: ignore[method-assign]
        assert llama.n_tokens == len(PROMPT)
        assert list(write(llama, PROMPT, 8)) == wanted


@pytest.mark.alone
def test_ctrl_c_stops_the_answer_and_keeps_the_session(generated_model: ModelFactory, stock: StockProcess) -> None:
    facts = generated_model("qwen2moe")
    wanted = stock.write(facts.path, PROMPT, N_NEW, **SETTINGS)
    task = Child(
        "interrupts.interrupted", path=str(facts.path), ram_budget="25%", prompt=PROMPT, n_new=N_NEW, settings=SETTINGS
    )
    rng = random.Random(0)
    with task.start() as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line != "writing\n":
                break
            time.sleep(0.05 + rng.random() / 5)
            process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    said = json.loads(line)
    assert said == {"rounds": 5, "tokens": wanted}
    assert "Traceback" not in error


@pytest.mark.alone
@pytest.mark.parametrize("when", range(6))
def test_ctrl_c_at_any_moment(when: int, generated_model: ModelFactory) -> None:
    """At a random moment of loading, computing or freeing: the process ends by that signal, and by no other.

    One may be lost, with llama_cpp alone as well: llama.cpp calls a Python function to log, and what is raised in there
    goes no further. Hence once more if nothing happens.
    """
    facts = generated_model("qwen2moe")
    with Child("interrupts.load_over_and_over", path=str(facts.path)).start() as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        time.sleep(random.Random(when).random())
        error = ""
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            try:
                _, error = process.communicate(timeout=2)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            process.kill()
    assert process.returncode == -signal.SIGINT, error
