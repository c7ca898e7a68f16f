"""Every policy and every form of predictor, priorities of all kinds, a disk that stalls at random: stock's bits.

Each child process decodes a script with many engines, one after another; the tests then look at each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from bundles.making import make
from models.facts import ModelFacts
from models.generator import write_model
from models.vocabulary import N_VOCAB

from pyengine import bundled_model
from pyengine.native import ModelInfo, NativeEngine
from pyengine.policies import POLICIES

from .advice_settings import BUDGETS, LOOKS, PRIORITIES, Setting, mixtures
from .children import Child
from .decoding import Logits, Script, random_script
from .managed import assert_as_stock, assert_same_bits
from .random_predictors import keep_learned
from .reference import StockProcess

# A prompt, an answer, the next turn, and more: experts are fetched ahead in the middle of prompts, too.
SIZES = [40, *[1] * 16, 9, *[1] * 8]
SCRIPT = random_script(SIZES, N_VOCAB, seed=31)
SETTINGS = mixtures([*POLICIES, "auto"])
#: Much is fetched ahead, by each way to look ahead and another policy.
FEW = [
    Setting(policy, look, 0.5, priorities, bundle=False, expecting=True)
    for policy, look, priorities in zip(POLICIES, LOOKS[1:], (*PRIORITIES, "policy"), strict=False)
]
FEW_WITH_BUNDLE = [replace(setting, bundle=True, share=0.25) for setting in FEW]


class Subject(NamedTuple):
    """A model with its bundle and its learned predictors."""

    path: Path
    bundle: Path


class Decoded(NamedTuple):
    """What came of one setting; see tasks.advice.decode."""

    setting: Setting
    logits: Logits
    stats: dict[str, Any]
    faults: int
    errors: list[str]
    set: int
    repacked: bool


def prepared(path: Path, bundle: Path) -> Subject:
    """Make the bundle and the predictors of a model."""
    make(path, bundle)
    keep_learned(path, info_of(path))
    return Subject(path, bundle)


def info_of(path: Path) -> ModelInfo:
    engine = NativeEngine(path)
    try:
        return engine.info
    finally:
        engine.close()


def decode(
    subject: Subject, script: Script, settings: Sequence[Setting], library: Path, folder: Path, **trouble: int
) -> list[Decoded]:
    """Decode with every setting over a disk that stalls; see tasks.advice.decode for the trouble."""
    environment = {
        "LD_PRELOAD": str(library),
        "FAULTY_DISK_STALL_US": "160",  # reads are in pieces and begun again: on average each waits twice
        "FAULTY_DISK_SHORT": "1",
        "FAULTY_DISK_SEED": "7",
    }
    places = {"path": str(subject.path), "bundle": str(subject.bundle)}

    def child(part: Sequence[Setting], out: Path) -> list[Decoded]:
        fields = [asdict(setting) for setting in part]
        task = Child("advice.decode", script=script, settings=fields, out=str(out), **places, **trouble)
        answers = task.run(environment, timeout=600)
        with np.load(out) as logits:
            found = zip(part, answers, logits.values(), strict=True)
            return [Decoded(setting, values, **answer) for setting, answer, values in found]

    # They mostly wait: two at a time.
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(child, (settings[::2], settings[1::2]), (folder / "even.npz", folder / "odd.npz"))
    return [one for part in parts for one in part]


@pytest.fixture(autouse=True, scope="module")
def cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is said here to be learned must reach no other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    """Five layers of sixteen experts, of which a token uses four."""
    path = tmp_path_factory.mktemp("advised") / "advised.gguf"
    return write_model(path, arch="qwen3moe", n_layer=5, n_expert=16, n_expert_used=4, expert_types="Q4_0", seed=41)


@pytest.fixture(scope="module")
def subject(facts: ModelFacts) -> Subject:
    return prepared(facts.path, facts.path.with_suffix(".bundle"))


@pytest.fixture(scope="module")
def decoded(subject: Subject, faulty_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoded]:
    """Every setting, decoded once."""
    folder = tmp_path_factory.mktemp("decoded")
    return {d.setting.name: d for d in decode(subject, SCRIPT, SETTINGS, faulty_disk, folder)}


@pytest.mark.parametrize("name", [s.name for s in SETTINGS])
def test_same_bits_with_advice(name: str, decoded: dict[str, Decoded], subject: Subject, stock: StockProcess) -> None:
    got = decoded[name]
    assert_as_stock(got.logits, stock.run(subject.path, SCRIPT).logits, SCRIPT)
    setting, stats = got.setting, got.stats
    assert stats["evictions"] > 0 and stats["slots"] < stats["experts"]
    assert got.faults > 0 and not got.errors and stats["prefetches_failed"] == 0
    assert (stats["bundle"] is not None) == setting.bundle
    if setting.look == "off" and not setting.expecting:
        assert stats["guesses"] == stats["prefetches"] == 0
    elif setting.share > min(BUDGETS):
        assert stats["prefetches"] > 0
    assert stats["guesses"] > 0 or setting.look == "off"
    assert got.set > 0 or (setting.priorities == "policy" and not setting.expecting)


def test_every_two_kinds_of_advice_meet() -> None:
    kinds: dict[str, Sequence[object]] = {
        "policy": [*POLICIES, "auto"],
        "look": LOOKS,
        "share": BUDGETS,
        "priorities": PRIORITIES,
        "bundle": [False, True],
        "expecting": [False, True],
    }
    for one, other in combinations(kinds, 2):
        assert {(getattr(s, one), getattr(s, other)) for s in SETTINGS} == set(product(kinds[one], kinds[other]))


@pytest.mark.parametrize("bundle", [False, True])
def test_stalls_let_prefetches_end_in_every_way(bundle: bool, decoded: dict[str, Decoded]) -> None:
    """Without that, the comparison would say little: in time, late and adopted, given up or evicted unused."""
    stats = [d.stats for d in decoded.values() if d.setting.bundle == bundle]
    for way in ("prefetch_hits", "prefetches_late", "prefetches_wasted"):
        assert sum(s[way] for s in stats) > 20, way
    assert any(s["stall_seconds"] > 0 for s in stats)


def test_experts_that_are_fetched_ahead_in_pieces(stock: StockProcess, faulty_disk: Path, tmp_path: Path) -> None:
    """Experts of 2.7 MB in a bundle: prefetches are stopped and adopted between two pieces, too."""
    sizes = {"n_layer": 3, "n_expert": 6, "n_expert_used": 2, "n_embd": 512, "n_ff": 3072}
    facts = write_model(tmp_path / "large.gguf", arch="qwen3moe", expert_types="Q4_0", seed=42, **sizes)
    subject = prepared(facts.path, tmp_path / "large.bundle")
    script = SCRIPT[-12:]
    wanted = stock.run(subject.path, script).logits
    found = decode(subject, script, FEW_WITH_BUNDLE, faulty_disk, tmp_path)
    for got in found:
        assert_same_bits(got.logits, wanted)
        # Where kernels do not repack, experts are read whole, as they are in the model's file.
        assert (
            not got.repacked
            or got.stats["reads"] > got.stats["prefetches"] + got.stats["misses"] - got.stats["prefetches_late"]
        )
    assert sum(got.stats["prefetches_late"] for got in found) > 0
    assert sum(got.stats["prefetches_wasted"] for got in found) > 0


def test_same_bits_of_the_bundled_model(stock: StockProcess, faulty_disk: Path, tmp_path: Path) -> None:
    """A trained one: guesses come true."""
    script = random_script([20, *[1] * 10], 49152, seed=33)
    path = Path(bundled_model())
    keep_learned(path, info_of(path))
    make(path, tmp_path / "bundled.bundle")
    wanted = stock.run(path, script).logits
    settings = [FEW[0], FEW_WITH_BUNDLE[1]]
    found = decode(Subject(path, tmp_path / "bundled.bundle"), script, settings, faulty_disk, tmp_path)
    for got in found:
        assert_as_stock(got.logits, wanted, script)
        assert got.stats["prefetch_hits"] > 0 and got.stats["prefetches_wasted"] > 0
    assert sum(got.stats["prefetches_late"] for got in found) > 0


# ---- a disk that fails


@pytest.mark.parametrize("settings", [FEW, FEW_WITH_BUNDLE], ids=["model", "bundle"])
def test_reads_that_fail_at_random(
    settings: list[Setting], subject: Subject, stock: StockProcess, faulty_disk: Path, tmp_path: Path
) -> None:
    """Whoever waits for an expert whose read fails gets an error, also if it was being fetched ahead; nobody else
    notices, and no token is wrong. What a bundle does not give comes from the model's file, so that few errors are
    left."""
    wanted = stock.run(subject.path, SCRIPT).logits
    found = decode(subject, SCRIPT, settings, faulty_disk, tmp_path, errors_one_in=60)
    for got in found:
        assert_as_stock(got.logits, wanted, SCRIPT)
        assert got.stats["read_errors"] > 0
        for error in got.errors:
            assert re.fullmatch(
                r"ExpertReadError: expert load failed: reading .+ at byte \d+: Input/output error", error
            )
    assert sum(got.stats["prefetches_failed"] for got in found) > 0
    assert settings[0].bundle or sum(len(got.errors) for got in found) > 0


def test_a_disk_that_lies_is_noticed(subject: Subject, stock: StockProcess, faulty_disk: Path, tmp_path: Path) -> None:
    """The comparison can fail: it does where some reads bring wrong bytes, which a model's file does not betray."""
    wanted = stock.run(subject.path, SCRIPT).logits
    for got in decode(subject, SCRIPT, FEW, faulty_disk, tmp_path, lies_one_in=60):
        assert not got.errors and got.stats["prefetch_hits"] > 0
        with pytest.raises(AssertionError, match=r"other logits|NMSE"):
            assert_as_stock(got.logits, wanted, SCRIPT)
