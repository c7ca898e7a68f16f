"""Files that are replaced, overwritten or cut under an engine that reads them: exact, or a clear error; never other
tokens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from engine.decoding import Context, DecodeError, Logits, random_script
from engine.managed import assert_same_bits
from engine.reference import StockProcess
from models.vocabulary import N_VOCAB

from pyengine.native import NativeEngine

from .conftest import Pair
from .making import opened

SCRIPT = random_script([1] * 8, N_VOCAB, seed=6)


@pytest.fixture
def wanted(sound: Pair, stock: StockProcess) -> Logits:
    """Stock's logits of SCRIPT."""
    return stock.run(sound.model, SCRIPT).logits


def again(context: Context) -> Logits:
    context.clear()
    return context.run(SCRIPT)


def overwrite(path: Path) -> None:
    """Other bytes in the same file, as cp writes them."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(os.urandom(size))


def replace(path: Path) -> None:
    """Another file of that name, as mv and most downloads do it."""
    other = path.with_name("other")
    shutil.copyfile(path, other)
    overwrite(other)
    other.replace(path)


def failure(engine: NativeEngine) -> str:
    """The reason why computing failed. Fails if it did not."""
    reason = engine.take_failure()
    assert reason is not None
    return str(reason)


@pytest.mark.parametrize("with_bundle", [False, True])
def test_a_model_replaced_by_another_file(with_bundle: bool, pair: Pair, wanted: Logits) -> None:
    bundle = pair.bundle if with_bundle else None
    with opened(pair.model, bundle) as (_, model), model.context() as context:
        assert_same_bits(context.run(SCRIPT), wanted)
        replace(pair.model)
        assert_same_bits(again(context), wanted)


def test_a_model_overwritten_in_place(pair: Pair, wanted: Logits) -> None:
    with opened(pair.model, None) as (engine, model), model.context() as context:
        assert_same_bits(context.run(SCRIPT), wanted)
        overwrite(pair.model)
        with pytest.raises(DecodeError):
            again(context)
        assert "changed" in failure(engine) or "written" in failure(engine)


def test_a_model_overwritten_in_place_whose_experts_come_from_a_bundle(pair: Pair, wanted: Logits) -> None:
    with opened(pair.model, pair.bundle) as (_, model), model.context() as context:
        overwrite(pair.model)
        assert_same_bits(context.run(SCRIPT), wanted)


@pytest.mark.parametrize("harm", [overwrite, replace, lambda path: os.truncate(path, 5000), os.unlink])
def test_a_bundle_harmed_in_use(harm: object, pair: Pair, wanted: Logits) -> None:
    with opened(pair.model, pair.bundle) as (_, model), model.context() as context:
        assert_same_bits(context.run(SCRIPT), wanted)
        assert callable(harm)
        harm(pair.bundle)
        assert_same_bits(again(context), wanted)
        assert_same_bits(again(context), wanted)


def test_both_overwritten(pair: Pair, wanted: Logits) -> None:
    with opened(pair.model, pair.bundle) as (engine, model), model.context() as context:
        assert_same_bits(context.run(SCRIPT), wanted)
        overwrite(pair.bundle)
        overwrite(pair.model)
        with pytest.raises(DecodeError):
            again(context)
        assert str(pair.model) in failure(engine)
