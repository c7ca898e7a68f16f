"""`--bundle auto`: when a bundle is offered, who is asked, and what the background program leaves."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest

from pyengine import background_bundle
from pyengine.background_bundle import BackgroundBundle, Offer, cap_bytes, consider
from pyengine.bundles import beside, cache_folder, in_cache, partial_of
from pyengine.errors import UsageError

from .conftest import Pair

GB = 10**9


class Engine:
    """As much of an ExpertEngine as is looked at."""

    gpu_devices: tuple[int, ...] = ()

    def __init__(self, slot_bytes: int, budget_bytes: int, bundle: str | None = None) -> None:
        self.info = SimpleNamespace(slot_bytes=slot_bytes)
        self._stats = {"bundle": bundle, "budget_bytes": budget_bytes}

    def stats(self) -> dict[str, Any]:
        return self._stats


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The name of a model in a writable folder of a disk with 100 of 200 GB free."""
    usage = shutil.disk_usage(tmp_path)._replace(total=200 * GB, free=100 * GB)
    monkeypatch.setattr(background_bundle.shutil, "disk_usage", lambda _: usage)
    return tmp_path / "model.gguf"


def offered(engine: Engine | None, model: Path, cap: str = "25%") -> Offer | str:
    return consider(engine, model, cap)  # type: ignore[arg-type]


def test_an_offer(model: Path) -> None:
    offer = offered(Engine(8 * GB, 2 * GB), model)
    assert offer == Offer(model, beside(model), 8 * GB, begun=False)
    assert isinstance(offer, Offer)
    assert offer.question == "Make a bundle of model.gguf beside it (8.0 GB, about 32 s)?"


@pytest.mark.parametrize(
    ("engine", "cap", "reason"),
    [
        (None, "25%", "no experts"),
        (Engine(8 * GB, 2 * GB, bundle="x.bundle"), "25%", "in use"),
        (Engine(8 * GB, 8 * GB), "25%", "fit into memory"),
        (Engine(26 * GB, 2 * GB), "25%", "--bundle-cap 25% allows 25.0 GB"),
        (Engine(8 * GB, 2 * GB), "7.9e9", "not understood"),
        (Engine(8 * GB, 2 * GB), "4GiB", "--bundle-cap 4GiB allows 4.3 GB"),
        (Engine(91 * GB, 2 * GB), "100%", "10.0 GB of the disk are to stay free"),
    ],
)
def test_no_offer(engine: Engine | None, cap: str, reason: str, model: Path) -> None:
    if reason == "not understood":
        with pytest.raises(UsageError, match=reason):
            offered(engine, model, cap)
        return
    answer = offered(engine, model, cap)
    assert isinstance(answer, str) and reason in answer, answer


def test_bundles_in_the_cache_folder_count(model: Path) -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / "other.bundle").write_bytes(bytes(6_000_000))
    engine = Engine(8_000_000, 2_000_000)
    assert isinstance(offered(engine, model, "15M"), Offer)
    answer = offered(engine, model, "12M")
    assert isinstance(answer, str) and "allows 7 MB beside 6 MB of other bundles" in answer


def test_what_was_begun_is_gone_on_with(model: Path) -> None:
    partial_of(beside(model)).write_bytes(bytes(8192))
    offer = offered(Engine(8 * GB, 2 * GB), model)
    assert isinstance(offer, Offer) and offer.begun


def test_the_package_s_own_folder_stays_as_it_is(model: Path) -> None:
    from pyengine import bundled_model

    offer = offered(Engine(8 * GB, 2 * GB), bundled_model())
    assert isinstance(offer, Offer) and offer.target == in_cache(bundled_model())


@pytest.mark.parametrize("cap", ["", "auto", "1x", "-5", "half"])
def test_caps_that_are_not_understood(cap: str) -> None:
    with pytest.raises(UsageError, match="bundle cap"):
        cap_bytes(cap, GB)


def test_made_in_the_background(pair: Pair) -> None:
    wanted = pair.bundle.read_bytes()
    pair.bundle.unlink()
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    work = BackgroundBundle(Offer(pair.model, pair.bundle, 1, begun=False), said.put)
    assert said.get(timeout=120) == f"the bundle {pair.bundle.name} is ready; it is used from the next start on"
    assert work.stop() is False
    assert pair.bundle.read_bytes() == wanted


def test_stopped_at_once(pair: Pair) -> None:
    pair.bundle.unlink()
    said: list[str] = []
    work = BackgroundBundle(Offer(pair.model, pair.bundle, 1, begun=False), said.append)
    assert work.stop() is True
    assert not work.running and said == []
    assert not pair.bundle.exists()


def test_a_failure_is_one_line(pair: Pair) -> None:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    work = BackgroundBundle(Offer(pair.model.with_name("none.gguf"), pair.bundle, 1, begun=False), said.put)
    line = said.get(timeout=120)
    assert line.startswith(f"the bundle {pair.bundle.name} was not made: ") and "none.gguf" in line
    work.stop()


def run(model: Path, *options: str, n: str = "2") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyengine", "run", "-m", str(model), "-p", "the rain", "-n", n, "-c", "256"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)


def test_nobody_to_ask(pair: Pair) -> None:
    pair.bundle.unlink()
    done = run(pair.model, "--bundle", "auto", "--ram-budget", "25%")
    assert f"no bundle is made: nobody is there to agree; --yes makes {pair.bundle}" in done.stderr
    assert list(pair.model.parent.iterdir()) == [pair.model]


def terminal(*arguments: str) -> pexpect.spawn:
    """The command line in a terminal wide enough for its lines."""
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
    return pexpect.spawn(
        sys.executable,
        ["-m", "pyengine", *arguments, "-c", "256", "--bundle", "auto", "--ram-budget", "25%"],
        encoding="utf-8",
        timeout=120,
        env=environment,
        dimensions=(50, 400),
    )


def test_made_during_a_chat_and_used_by_the_next(pair: Pair) -> None:
    wanted = pair.bundle.read_bytes()
    pair.bundle.unlink()
    child = terminal("chat", "-m", str(pair.model), "--yes")
    child.expect(f"making the bundle {pair.bundle} in the background")
    child.expect(f"the bundle {pair.bundle.name} is ready; it is used from the next start on")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert pair.bundle.read_bytes() == wanted
    for word, place in (("use", f"over bundle {pair.bundle.name}"), ("off", "over disk"), ("auto", "over bundle")):
        assert place in run(pair.model, "--ram-budget", "25%", "--bundle", word).stderr


@pytest.mark.parametrize("answer", ["y", "n"])
def test_the_question(answer: str, pair: Pair) -> None:
    pair.bundle.unlink()
    child = terminal("run", "-m", str(pair.model), "-p", "the rain", "-n", "4")
    child.expect(r"Make a bundle of .* beside it \(.* MB, about .* s\)\? \[y/N\]: ")
    child.sendline(answer)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert ("in the background" in child.before) == (answer == "y")
