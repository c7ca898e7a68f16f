"""Loading reads metadata and what is not an expert, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models.big import write_big_model
from models.facts import ModelFacts, read_facts

from pyengine import bundled_model

from . import page_cache
from .children import Child

# What is in the page cache, and who read it.
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFacts]:
    """64 MiB of experts in three files."""
    folder = tmp_path_factory.mktemp("split")
    yield write_big_model(folder / "model.gguf", 1 / 16, n_expert=16, split=3)
    shutil.rmtree(folder)


@pytest.fixture(params=["bundled", "split"])
def cold_model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelFacts]:
    """A model large enough for a read-ahead to show, in files that no other process keeps in memory."""
    if request.param == "bundled":
        copy = tmp_path / "model.gguf"
        shutil.copyfile(bundled_model(), copy)
        yield read_facts([copy])
        copy.unlink()
    else:
        yield request.getfixturevalue("split_model")


def test_a_cold_load_reads_no_expert(cold_model: ModelFacts) -> None:
    files = [str(path) for path in cold_model.files]
    said = Child("measuring.load", path=str(cold_model.path), files=files).run()
    if not said["cold"]:
        pytest.skip("this file system does not let go of cached pages")
    file_bytes = sum(path.stat().st_size for path in cold_model.files)
    others = file_bytes - cold_model.expert_bytes
    print(f"ready in {said['seconds']:.3f} s; of {file_bytes:,} bytes, {others:,} in no expert; read: {said['io']}")
    assert others < said["io"]["rchar"] < 1.2 * others
    assert said["io"]["read_bytes"] < 1.2 * others
    assert said["reads_of_experts"] == 0
    for path in cold_model.files:
        pages = said["pages"][str(path)]
        experts = np.zeros(-(-path.stat().st_size // 4096), bool)
        for t in cold_model.expert_tensors:
            if t.path == path:
                experts[page_cache.pages_within(t.offset, t.n_bytes)] = True
        assert experts.sum() > 1000
        assert not experts[pages].any(), f"{experts[pages].sum()} pages of experts are in the page cache"


def test_the_page_cache_is_seen(tmp_path: Path) -> None:
    """The test above can fail: pages that were read are resident, and dropped ones are not."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert page_cache.resident(path).all()
    page_cache.drop([path])
    if page_cache.resident(path).any():
        pytest.skip("this file system does not let go of cached pages")
    with path.open("rb", buffering=0) as file:
        file.read(1)
    assert page_cache.resident(path)[0] and not page_cache.resident(path).all()
