"""The profile of a model: it comes back, it fades, two processes share it, and a bad one is as good as none."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyengine import bundled_model
from pyengine.advice.profile import Profile, load_profile, profile_file, update_profile
from pyengine.native import ModelInfo
from pyengine.planning.routing import routing_of_recent

EVEN = np.full((2, 4), 0.25, np.float32)
RECENT = np.array([[[0, 1], [2, 3]], [[3, 2], [1, 0]], [[0, 3], [0, 1]]], np.uint16)


@pytest.fixture(scope="module")
def small(info: ModelInfo) -> ModelInfo:
    return replace(info, n_layer=2, n_expert=4, n_expert_used=2)


def loaded(path: Path, info: ModelInfo) -> Profile:
    profile = load_profile(path, info)
    assert profile is not None
    return profile


def test_everything_comes_back(tmp_path: Path, small: ModelInfo) -> None:
    path = tmp_path / "folder" / "p.npz"
    assert load_profile(path, small) is None
    table = np.array([[-1, -1], [3, 0]], np.int16)
    update_profile(path, small, Profile(EVEN, RECENT, 40, "lru", 17, table))
    got = loaded(path, small)
    assert (got.uses == EVEN).all() and (got.recent == RECENT).all() and got.recent.dtype == np.uint16
    assert (got.n_token, got.policy, got.unjudged) == (40, "lru", 17)
    assert got.first_layer is not None and (got.first_layer == table).all()
    assert [p.name for p in path.parent.iterdir()] == ["p.npz"]


def test_runs_are_added_by_their_lengths_and_old_ones_fade(tmp_path: Path, small: ModelInfo) -> None:
    path = tmp_path / "p.npz"
    one, other = (np.eye(4, dtype=np.float32)[[e, e]] for e in (0, 1))
    table = np.zeros((1, 2), np.int16)
    update_profile(path, small, Profile(one, RECENT, 100, "lru", first_layer=table))
    update_profile(path, small, Profile(other, RECENT[:0], 300))
    got = loaded(path, small)
    assert got.uses[0].tolist() == [0.25, 0.75, 0, 0]
    assert got.policy == "lru" and len(got.recent) == 3 and got.first_layer is not None, "what a run lacks stays"
    for _ in range(100):
        update_profile(path, small, Profile(other, RECENT, 300))
    assert loaded(path, small).uses[0, 0] < 0.01
    update_profile(path, small, Profile(one, RECENT, 100_000))
    assert loaded(path, small).uses[0].tolist() == [1, 0, 0, 0]


def test_a_bad_profile_is_as_good_as_none_and_is_written_over(tmp_path: Path, small: ModelInfo) -> None:
    path = tmp_path / "p.npz"
    update_profile(path, small, Profile(EVEN, RECENT, 40))
    good = path.read_bytes()
    for other in (replace(small, n_expert=8), replace(small, n_layer=3), replace(small, n_expert_used=1)):
        assert load_profile(path, other) is None
    for content in (b"", b"nonsense", good[: len(good) // 2]):
        path.write_bytes(content)
        assert load_profile(path, small) is None
    rng = np.random.default_rng(3)
    for _ in range(200):
        bad = bytearray(good)
        bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        found = load_profile(path, small)
        assert found is None or ((found.uses == EVEN).all() and (found.recent == RECENT).all())
    path.write_bytes(good[:-5])
    update_profile(path, small, Profile(EVEN, RECENT, 40))
    assert loaded(path, small).n_token == 40


@pytest.mark.parametrize(
    "wrong",
    [
        {"uses": EVEN.astype(np.float64)[:1]},
        {"uses": -EVEN},
        {"uses": EVEN * np.float32("nan")},
        {"recent": RECENT + 4},
        {"recent": RECENT[:, :1]},
        {"first_layer": np.full((3, 2), 4, np.int16)},
        {"first_layer": np.full((3, 1), -1, np.int16)},
        {"n_token": -1},
        {"policy": 5},
    ],
)
def test_numbers_that_cannot_be_are_no_profile(tmp_path: Path, small: ModelInfo, wrong: dict[str, object]) -> None:
    path = tmp_path / "p.npz"
    update_profile(path, small, replace(Profile(EVEN, RECENT, 40), **wrong))  # type: ignore[arg-type]
    assert load_profile(path, small) is None


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, small: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.npz"
    update_profile(path, small, Profile(EVEN, RECENT, 40))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    with pytest.raises(OSError, match="No space"):
        update_profile(path, small, Profile(EVEN, RECENT, 40))
    assert loaded(path, small).n_token == 40
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from pyengine.advice.profile import Profile, load_profile, update_profile
info = SimpleNamespace(n_layer=2, n_expert=4, n_expert_used=2)
recent = np.full((900, 2, 2), int(sys.argv[2]), np.uint16)
for _ in range(60):
    update_profile(Path(sys.argv[1]), info, Profile(np.full((2, 4), 0.25, np.float32), recent, 1))
    found = load_profile(Path(sys.argv[1]), info)
    assert found is not None and len(set(found.recent.ravel().tolist())) == 1
"""


def test_two_processes_write_and_read_whole_profiles(tmp_path: Path, small: ModelInfo) -> None:
    path = tmp_path / "p.npz"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), expert], stderr=subprocess.PIPE, text=True)
        for expert in "12"
    ]
    for writer in writers:
        _, complaint = writer.communicate(timeout=120)
        assert writer.returncode == 0, complaint
    got = loaded(path, small)
    assert len(got.recent) == 900 and 1 <= got.n_token <= 120
    assert list(tmp_path.iterdir()) == [path]


def test_the_last_tokens_are_a_routing_to_plan_with() -> None:
    recent = np.tile(np.array([[[7, 3], [0, 1]]], np.uint16), (300, 1, 1))
    routing = routing_of_recent(recent, 8)
    assert routing is not None and routing.ids[0].tolist() == [[3, 7], [0, 1]]
    assert routing.decode([(0, 1)], [4]).hit_rate == 1
    assert routing.decode([(0, 1)], [3]).hit_rate == 0.5
    assert routing_of_recent(recent[:100], 8) is None


def test_models_that_differ_only_in_their_metadata_have_profiles_of_their_own(tmp_path: Path) -> None:
    with Path(bundled_model()).open("rb") as file:
        head = file.read(4096)
    paths = []
    for folder, content in (("a", head), ("b", head[:-1] + b"x"), ("c", head)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.gguf").write_bytes(content)
        paths.append(profile_file(tmp_path / folder / "m.gguf"))
    assert paths[0] != paths[1] and paths[0] == paths[2]
    with pytest.raises(OSError):
        profile_file(tmp_path / "none.gguf")
