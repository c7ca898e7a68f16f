"""What a policy learned, as a file: it comes back as it was, and what does not fit is as good as none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyengine.advice.judging import Question, judge, unpack
from pyengine.errors import UsageError
from pyengine.policies import CANDIDATES, LEARNED, CacheShape, candidates, check_wording, learned_for, make_policy
from pyengine.policies.kept import load_policy, policy_file, save_policy
from pyengine.policies.learned import LearnedPolicy, LearnedPolicyError, blank
from pyengine.traces import TracedModel

SHAPE = CacheShape(n_layer=2, n_expert=12, n_expert_used=2, slots=10)
MODEL = TracedModel("some.gguf", "test", 2, 12, 2)
INFO: Any = SimpleNamespace(n_layer=2, n_expert=12, n_expert_used=2)


def knowing(seed: int = 0) -> LearnedPolicy:
    """As if it had learned something."""
    policy = LearnedPolicy(SHAPE)
    parameters, random = blank(24, seed), np.random.default_rng(seed)
    parameters["out"] += random.standard_normal(parameters["out"].shape, np.float32)
    policy.take(parameters)
    return policy


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF of some kind")
    return path


@pytest.fixture
def file(model: Path) -> Path:
    """Of that model, kept."""
    path = policy_file(model)
    save_policy(path, MODEL, knowing().save())
    return path


def test_it_comes_back_as_it_was(file: Path) -> None:
    before, after = LearnedPolicy(SHAPE, knowing().save()), load_policy(file, SHAPE)
    for policy in (before, after):
        policy.observe(np.array([[1, 4], [2, 7]], np.uint16), None)
    np.testing.assert_array_equal(before.priorities(), after.priorities())
    assert not np.array_equal(after.priorities(), LearnedPolicy(SHAPE).priorities())


def test_models_of_the_same_name_and_size_have_files_of_their_own(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / model.name
    other.parent.mkdir()
    other.write_bytes(model.read_bytes()[::-1])
    assert policy_file(other) != policy_file(model) and policy_file(other).parent == policy_file(model).parent


def test_a_policy_by_its_name_and_file(file: Path) -> None:
    wanted = load_policy(file, SHAPE).priorities()
    for made in (make_policy(LEARNED, SHAPE, file), make_policy(f"learned:{file}", SHAPE)):
        np.testing.assert_array_equal(made.priorities(), wanted)
    with pytest.raises(UsageError, match="learn-policy"):
        make_policy(LEARNED, SHAPE)
    with pytest.raises(OSError, match="absent"):
        make_policy("learned:absent", SHAPE)
    for name in ("auto", "lfu", "learned", "learned:any"):
        check_wording(name)
    for name in ("learned:", "learner", "lfu:any"):
        with pytest.raises(UsageError, match="no cache policy"):
            check_wording(name)


def test_who_finds_it(model: Path, file: Path) -> None:
    assert learned_for("auto", model, INFO) == learned_for(LEARNED, model, INFO) == file
    assert learned_for(f"learned:{file}", model, INFO) == file
    assert learned_for("lfu", model, INFO) is None
    assert candidates(file) == (*CANDIDATES, LEARNED) and candidates(None) == CANDIDATES


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    change(arrays)
    np.savez(path, **arrays)


def meta(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        said = json.loads(bytes(arrays["meta"])) | changes
        arrays["meta"] = np.frombuffer(json.dumps(said).encode(), np.uint8)

    return change


def flipped(content: bytes) -> bytes:
    """One bit of it, in the middle, is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "changed": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "version": lambda path: rewritten(path, meta(version=1)),
    "format": lambda path: rewritten(path, meta(format="pyengine profile")),
    "no words": lambda path: rewritten(path, lambda arrays: arrays.update(meta=np.zeros(3, np.uint8))),
    # As many experts altogether.
    "shape": lambda path: rewritten(path, meta(model=vars(replace(MODEL, n_layer=3, n_expert=8)))),
    "no model": lambda path: rewritten(path, meta(model=None)),
    "nothing": lambda path: rewritten(path, lambda arrays: [arrays.pop(n) for n in list(arrays) if n != "meta"]),
    "a part": lambda path: rewritten(path, lambda arrays: arrays.pop("into")),
    "infinite": lambda path: rewritten(path, lambda arrays: arrays.update(mix=arrays["mix"] + np.inf)),
    "text": lambda path: rewritten(path, lambda arrays: arrays.update(mix=arrays["mix"].astype(str))),
    "objects": lambda path: rewritten(path, lambda arrays: arrays.update(mix=arrays["mix"].astype(object))),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_none(kind: str, model: Path, file: Path) -> None:
    DAMAGE[kind](file)
    with pytest.raises((OSError, LearnedPolicyError)):
        load_policy(file, SHAPE)
    assert learned_for("auto", model, INFO) is None
    with pytest.raises(UsageError, match=r"no cache policy was learned for some\.gguf yet; .*learn-policy TRACE -m"):
        learned_for(LEARNED, model, INFO)


def test_what_cannot_be_written_leaves_the_old_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(stream: Any, **arrays: Any) -> None:
        stream.write(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(KeyboardInterrupt):
        save_policy(file, MODEL, knowing(1).save())
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_auto_judges_it_where_there_is_a_file(file: Path) -> None:
    recent = np.random.default_rng(1).integers(0, 6, (200, 2, 1)).repeat(2, axis=2).astype(np.uint16)
    recent[:, :, 1] += 6
    question = Question(recent, 12, 10, "lfu", 0.01, str(file))
    costs = judge(unpack(question.pack()))
    assert list(costs) == list(dict.fromkeys(["lfu", *CANDIDATES, LEARNED]))
    assert min(costs[LEARNED].missing) > 0 and costs[LEARNED].seconds > 0
    assert LEARNED not in judge(replace(question, learned=""))
