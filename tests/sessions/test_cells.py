"""The count of KV cells against a plain model of it: a set of cells for each sequence."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest
from models.fixtures import ModelFactory

from pyengine import Llama
from pyengine.sessions import PrefixCache, Scheduler
from pyengine.sessions.cells import KvCells

from .requests import greedy, prompt


@pytest.mark.parametrize("seed", range(5))
def test_cells_are_counted_right(tiny: Llama, seed: int) -> None:
    pick, number = random.Random(seed), itertools.count()
    cells = KvCells(tiny)
    plain: dict[int, list[int]] = {}
    for _ in range(300):
        what = pick.choice(("take", "extend", "extend", "share", "share", "release"))
        if what == "take" and cells.free_sequences:
            plain[cells.take()] = []
        elif what == "share" and cells.free_sequences and plain:
            source = pick.choice(list(plain))
            n = pick.randint(0, len(plain[source]))
            plain[cells.share(source, n)] = plain[source][:n]
        elif what == "extend" and plain:
            sequence, n = pick.choice(list(plain)), pick.randint(1, 9)
            cells.extend(sequence, n)
            plain[sequence] += itertools.islice(number, n)
        elif what == "release" and plain:
            sequence = pick.choice(list(plain))
            cells.release(sequence)
            del plain[sequence]
        some = pick.sample(sorted(plain), pick.randint(0, len(plain)))
        others = {cell for sequence in plain if sequence not in some for cell in plain[sequence]}
        mine = {cell for sequence in some for cell in plain[sequence]}
        assert cells.used == len(mine | others) == cells.n_cells - cells.free
        assert cells.held(some) == len(mine)
        assert cells.only_of(some) == len(mine - others)
        for sequence, have in plain.items():
            assert cells.length(sequence) == len(have)
            n = pick.randint(0, len(have))
            assert cells.held_of(sequence, n, some) == len(mine & set(have[:n]))
    cells.close()


def test_every_cell_can_be_used_and_none_more(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted as free is free in llama.cpp: a context filled to its last cell, half of it shared."""
    beginning = prompt(200, seed=1)
    with Scheduler(tiny, prefixes=PrefixCache(), max_sequences=4) as scheduler:
        scheduler.submit(greedy(beginning, 0))
        list(scheduler.run())
        sessions = [scheduler.submit(greedy(beginning + prompt(20, seed=2 + i), 85)) for i in range(3)]
        used, extend = [], scheduler._cells.extend

        def noted(sequence: int, n_tokens: int) -> None:
            extend(sequence, n_tokens)
            used.append(scheduler._cells.used)

        monkeypatch.setattr(scheduler._cells, "extend", noted)
        list(scheduler.run())
        assert [(s.cached_tokens, len(s.tokens), s.preemptions) for s in sessions] == [(200, 85, 0)] * 3
        assert max(used) == 200 + 3 * (20 + 84) == 512


@pytest.mark.parametrize("n_sequences", [0, 257])
def test_as_many_sequences_as_llama_cpp_can_have(generated_model: ModelFactory, n_sequences: int) -> None:
    with pytest.raises(ValueError, match="n_sequences must be 1 to 256"):
        Llama(generated_model("qwen2moe").path, n_sequences=n_sequences)


@pytest.mark.parametrize("sizes", [{"n_batch": 7}, {"n_ctx": 7}, {"n_ctx": 0, "n_batch": 7}])
def test_a_call_has_room_for_a_token_of_each_sequence(generated_model: ModelFactory, sizes: dict[str, int]) -> None:
    """Where it has not, llama.cpp ends the process."""
    path = generated_model("qwen2moe").path
    with pytest.raises(ValueError, match="needs n_batch and n_ctx of at least 8, and the smaller one is 7"):
        Llama(path, n_sequences=8, **sizes)
    with contextlib.closing(Llama(path, n_sequences=7, **sizes)) as llama:
        assert KvCells(llama).n_sequences == llama.n_batch == 7


def test_a_copy_of_a_model_has_as_many_sequences(tiny: Llama) -> None:
    assert tiny.__getstate__()["n_sequences"] == 8
    assert KvCells(tiny).n_sequences == 8
