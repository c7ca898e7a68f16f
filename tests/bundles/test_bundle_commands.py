"""`gguf_tools bundle` and `verify`: what they say, and their exit codes."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from models.facts import read_facts
from models.generator import write_model

from gguf_tools.bundles.format import read_tables
from gguf_tools.bundles.partial import opened as locked
from gguf_tools.cli import main
from pyengine.bundles import beside, in_cache, partial_of
from pyengine.native import checksum

from .conftest import Pair
from .making import flip, planned

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Runs a command line of gguf_tools."""
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments], prog_name="gguf_tools")


def test_made_beside_the_model_and_only_once(pair: Pair, invoke: Invoke) -> None:
    wanted = pair.bundle.read_bytes()
    pair.bundle.unlink()
    first = invoke("bundle", pair.model)
    assert first.exit_code == 0, first.output
    assert str(pair.bundle) in first.stdout
    assert pair.bundle.read_bytes() == wanted
    inode = pair.bundle.stat().st_ino
    second = invoke("bundle", pair.model)
    assert second.exit_code == 0
    assert second.stderr == f"gguf_tools: {pair.bundle} exists already and fits; --force makes it anew\n"
    assert pair.bundle.stat().st_ino == inode
    assert invoke("bundle", pair.model, "--force").exit_code == 0
    assert pair.bundle.stat().st_ino != inode
    assert pair.bundle.read_bytes() == wanted
    assert sorted(pair.model.parent.iterdir()) == sorted([pair.model, pair.bundle])


def test_a_stale_one_is_made_anew(pair: Pair, invoke: Invoke) -> None:
    os.utime(pair.model)
    result = invoke("bundle", pair.model)
    assert result.exit_code == 0
    assert "was written after it was made" in result.stderr
    assert invoke("verify", pair.model).exit_code == 0


def test_quiet_and_low_priority(pair: Pair, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped_back = []
    monkeypatch.setattr("gguf_tools.cli.bundle._step_back", lambda: stepped_back.append(True))
    result = invoke("bundle", pair.model, "--force", "--quiet", "--low-priority")
    assert (result.exit_code, result.output, stepped_back) == (0, "", [True])


def test_into_the_cache_folder_where_the_model_s_is_not_writable(
    pair: Pair, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.bundle.unlink()
    folder = pair.model.parent
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and real(path, mode))
    result = invoke("bundle", pair.model)
    assert result.exit_code == 0, result.output
    assert not pair.bundle.exists()
    assert in_cache(pair.model).is_file()
    assert stat.S_IMODE(in_cache(pair.model).stat().st_mode) & 0o111 == 0
    listed = invoke("bundle", "--list")
    assert in_cache(pair.model).name in listed.stdout
    assert invoke("verify", pair.model).exit_code == 0


@pytest.mark.parametrize("kind", ["dense", "no model", "missing", "folder"])
def test_what_has_no_bundle(kind: str, tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "model.gguf"
    if kind == "dense":
        # The tensors' names are all that makes it one with experts.
        facts = write_model(path, "llama", n_layer=1, n_expert=2, n_embd=32, n_ff=32)
        facts.path.write_bytes(facts.path.read_bytes().replace(b"_exps.weight", b"_none.weight"))
    elif kind == "no model":
        path.write_text("hello")
    elif kind == "folder":
        path.mkdir()
    result = invoke("bundle", path)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and result.output.startswith("gguf_tools: error: "), result.output
    assert not beside(path).exists() and not partial_of(beside(path)).exists()


def test_words_that_do_not_go_together(invoke: Invoke, tmp_path: Path) -> None:
    for words in ((), ("a", "b"), ("--list", "--remove"), ("--all",), ("--remove",), ("--remove", "--all", "a")):
        assert invoke("bundle", *words).exit_code == 2, words
    assert invoke("verify").exit_code == 2


def test_list_says_the_state(pair: Pair, invoke: Invoke) -> None:
    def state() -> str:
        result = invoke("bundle", "--list", pair.model)
        assert result.exit_code == 0, result.output
        (line,) = [line for line in result.stdout.splitlines() if str(pair.bundle) in line]
        return line

    assert "repacked" in state() and "file" in state() and state().rstrip().endswith("fits")
    os.utime(pair.model)
    assert "stale" in state()
    flip(pair.bundle, 100)
    assert "damaged" in state()
    pair.bundle.unlink()
    with locked(pair.bundle, planned(pair.model)) as partial:
        partial.checkpoint(4)
        assert f"being made, {400 // planned(pair.model).n_total} %" in state()
    assert "unfinished" in state()
    partial.path.unlink()
    assert "no bundles" in invoke("bundle", "--list").stdout


def test_remove(pair: Pair, invoke: Invoke) -> None:
    partial_of(pair.bundle).write_bytes(b"")
    with locked(pair.bundle, planned(pair.model)):
        refused = invoke("bundle", "--remove", partial_of(pair.bundle))
        assert refused.exit_code == 1 and "another process is making" in refused.output
        assert partial_of(pair.bundle).exists()
    result = invoke("bundle", "--remove", pair.model)
    assert result.exit_code == 0, result.output
    assert sorted(pair.model.parent.iterdir()) == [pair.model]
    assert invoke("bundle", "--remove", pair.model).exit_code == 1


def test_remove_refuses_what_is_no_bundle(tmp_path: Path, pair: Pair, invoke: Invoke) -> None:
    letter = tmp_path / "letter.bundle"
    letter.write_text("dear reader")
    result = invoke("bundle", "--remove", pair.bundle, letter)
    assert result.exit_code == 1 and "neither a bundle nor a model" in result.output
    assert letter.exists() and pair.bundle.exists()


def test_remove_all_empties_the_cache_folder_only(pair: Pair, invoke: Invoke) -> None:
    cached = in_cache(pair.model)
    cached.parent.mkdir(parents=True)
    shutil.copy2(pair.bundle, cached)
    partial_of(cached).write_bytes(b"")
    assert invoke("bundle", "--remove", "--all").exit_code == 0
    assert list(cached.parent.iterdir()) == []
    assert pair.bundle.exists()


def test_verify_alone_and_with_the_model(pair: Pair, invoke: Invoke) -> None:
    n = planned(pair.model).n_total
    alone = invoke("verify", pair.bundle)
    assert (alone.exit_code, alone.stdout) == (0, f"{pair.bundle}: all {n} records are sound\n")
    both = invoke("verify", pair.bundle, "--model", pair.model)
    assert (both.exit_code, both.stdout) == (
        0,
        f"{pair.bundle}: all {n} records are sound and as {pair.model} gives them\n",
    )
    assert invoke("verify", "--quiet", pair.model).output == ""


def test_verify_names_the_damaged_records(pair: Pair, invoke: Invoke) -> None:
    tables = planned(pair.model)
    records = tables.records()
    for record in records[[2, 11]]:
        flip(pair.bundle, int(record["offset"]) + int(record["bytes"]) - 1)
    os.truncate(pair.bundle, int(records[-1]["offset"]) + 4096)
    result = invoke("verify", pair.bundle)
    assert result.exit_code == 4
    for record in records[[2, 11, -1]]:
        block = int(tables.layers["block"][0, record["layer"]])
        assert f"damaged: layer {block}, expert {int(record['expert'])}\n" in result.stderr
    assert result.stderr.count("damaged: layer") == 3


@pytest.mark.parametrize("offset", [0, 30, 1000])
def test_verify_of_a_damaged_head(offset: int, pair: Pair, invoke: Invoke) -> None:
    flip(pair.bundle, offset)
    result = invoke("verify", pair.bundle)
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.stderr


def test_verify_of_an_unfinished_bundle(pair: Pair, invoke: Invoke) -> None:
    tables = planned(pair.model)
    first = tables.records()[0]
    end = int(first["offset"] + first["bytes"])
    partial_of(pair.bundle).write_bytes(pair.bundle.read_bytes()[:end])
    with locked(pair.bundle, tables) as partial:
        tables.places["checksum"][0, 0] = checksum(pair.bundle.read_bytes()[int(first["offset"]) : end])
        partial.checkpoint(1)
    result = invoke("verify", partial_of(pair.bundle))
    assert result.exit_code == 4
    assert f"unfinished: {tables.n_total - 1} of {tables.n_total} records are missing" in result.stderr
    assert "damaged: layer" not in result.stderr


def test_refresh_after_a_copy(pair: Pair, invoke: Invoke) -> None:
    os.utime(pair.model)
    stale = invoke("verify", pair.model)
    assert stale.exit_code == 5
    assert "--refresh makes it fit" in stale.stderr
    records = pair.bundle.read_bytes()[4096:]
    refreshed = invoke("verify", "--refresh", pair.model)
    assert refreshed.exit_code == 0, refreshed.output
    assert invoke("verify", pair.model).exit_code == 0
    assert "exists already and fits" in invoke("bundle", pair.model).stderr
    assert pair.bundle.read_bytes()[4096:] == records


def test_no_refresh_for_another_model(pair: Pair, invoke: Invoke) -> None:
    """The same shapes and size, one other weight in the middle of an expert tensor."""
    before = pair.bundle.read_bytes()
    facts = read_facts([pair.model])
    tensor = facts.expert_tensor(facts.expert_blocks[-1], "down")
    flip(pair.model, tensor.offset + tensor.n_bytes // 2)
    result = invoke("verify", "--refresh", pair.model)
    assert result.exit_code == 5, result.output
    assert result.stderr.count("not the model's: layer") == 1
    assert pair.bundle.read_bytes() == before


def test_refresh_needs_a_model(pair: Pair, invoke: Invoke) -> None:
    assert invoke("verify", pair.bundle, "--refresh").exit_code == 2
    assert invoke("verify", pair.model, "--model", pair.model).exit_code == 2


def trace_file(path: Path, ids: np.ndarray) -> Path:
    np.savez(path, ids=ids, starts=np.zeros(1, np.int64))
    return path


def test_order_from_a_trace(pair: Pair, invoke: Invoke, tmp_path: Path) -> None:
    """Experts 0 and 5, and 2 and 7, are always used together."""
    n_layer, n_expert = planned(pair.model).layers.shape[1], 8
    pairs = np.array([[0, 5], [2, 7], [5, 0], [7, 2], [1, 3], [n_expert - 1, 2]], np.uint8)
    trace = trace_file(tmp_path / "t.npz", np.repeat(np.tile(pairs, (20, 1))[:, None, :], n_layer, axis=1))
    result = invoke("bundle", pair.model, "--force", "--order", trace)
    assert result.exit_code == 0, result.output
    assert "trace t.npz" in invoke("bundle", "--list", pair.model).stdout
    assert invoke("verify", pair.model).exit_code == 0
    with pair.bundle.open("rb") as file:
        records = read_tables(file.fileno()).records()
    for layer in range(n_layer):
        order = records["expert"][records["layer"] == layer].tolist()
        assert abs(order.index(0) - order.index(5)) == 1
        assert abs(order.index(2) - order.index(7)) == 1


@pytest.mark.parametrize("fault", ["layers", "experts", "damaged", "missing"])
def test_a_trace_that_does_not_fit(fault: str, pair: Pair, invoke: Invoke, tmp_path: Path) -> None:
    n_layer = planned(pair.model).layers.shape[1]
    trace = tmp_path / "t.npz"
    if fault == "damaged":
        trace.write_bytes(b"PK hello")
    elif fault != "missing":
        ids = np.zeros((5, n_layer + (fault == "layers"), 2), np.uint8)
        ids[:, :, 1] = 200 if fault == "experts" else 1
        trace_file(trace, ids)
    before = pair.bundle.read_bytes()
    result = invoke("bundle", pair.model, "--force", "--order", trace)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1, result.output
    assert pair.bundle.read_bytes() == before
