"""run_batch() told nonsense together with overwrite=True: a clear error, and the answers that are there stay."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("pyengine._native") is None:
    pytest.skip("the native part is not built", allow_module_level=True)

from pyengine import Llama, bundled_model
from pyengine.batch import run_batch
from pyengine.errors import UsageError
from pyengine.sessions import Scheduler

BEFORE = b"answers of another day\n"


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    llm = Llama(n_ctx=128, n_threads=1, n_threads_batch=1, n_sequences=2, ram_budget="100%")
    yield llm
    llm.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    # The first line is answered by an error, which needs no computing.
    prompts.write_text("{oops\n" + json.dumps({"prompt": "a", "max_tokens": 1}) + "\n")
    answers.write_bytes(BEFORE)
    asked = prompts.read_bytes()
    yield prompts, answers
    assert answers.read_bytes() == BEFORE
    assert prompts.read_bytes() == asked


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"parallel": 9}, "n_sequences=9"),
        ({"parallel": 0}, "at least 1"),
        ({"parallel": "2"}, "parallel must be an integer"),
        ({"parallel": True}, "parallel must be an integer"),
        ({"window": 0}, "at least 1"),
        ({"window": 2.5}, "window must be an integer"),
        ({"sampling": {"max_tokens": 1}}, "SamplingParams"),
        ({"progress": 3}, "something to call"),
        ({"stop": 3}, "something to call"),
        ({"overwrite": "no"}, "True or False"),
    ],
    ids=str,
)
def test_options(llm: Llama, files: tuple[Path, Path], how: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run_batch(llm, *files, **({"overwrite": True} | how))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda prompts, answers: (3, answers), "prompts must be a path"),
        (lambda prompts, answers: (io.StringIO("{}"), answers), "prompts must be a path"),
        (lambda prompts, answers: (prompts, None), "answers must be a path"),
        (lambda prompts, answers: (prompts, answers.open("rb")), "open for writing"),
        (lambda prompts, answers: (prompts, prompts), "a file of their own"),
        (lambda prompts, answers: (prompts.open("rb"), prompts), "a file of their own"),
        (lambda prompts, answers: (prompts, prompts.open("r+b")), "a file of their own"),
    ],
)
def test_files(llm: Llama, files: tuple[Path, Path], wrong: Callable[..., tuple[Any, Any]], said: str) -> None:
    prompts, answers = wrong(*files)
    with pytest.raises(UsageError, match=said):
        run_batch(llm, prompts, answers, overwrite=True)
    for file in (prompts, answers):
        if isinstance(file, io.IOBase):
            file.close()


def test_a_link_to_the_prompts_is_them(llm: Llama, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(files[0])
    with pytest.raises(UsageError, match="a file of their own"):
        run_batch(llm, files[0], tmp_path / "link", overwrite=True)


def test_models_that_cannot(llm: Llama, files: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"pyengine\.Llama"):
        run_batch("model.gguf", *files, overwrite=True)  # type: ignore[arg-type]
    with Scheduler(llm), pytest.raises(UsageError, match="another Scheduler"):
        run_batch(llm, *files, overwrite=True)
    vocabulary = Llama(bundled_model(), vocab_only=True)
    with pytest.raises(UsageError, match="vocab_only"):
        run_batch(vocabulary, *files, overwrite=True)
    vocabulary.close()
    with pytest.raises(UsageError, match="closed"):
        run_batch(vocabulary, *files, overwrite=True)
