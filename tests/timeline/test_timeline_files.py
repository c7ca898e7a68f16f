"""The two files: a Chrome trace by the format's rules, and a picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chrome_format import check_format
from made_up import decode, spans

from pyengine.errors import UsageError
from pyengine.timeline.chrome import chrome_trace
from pyengine.timeline.plot import draw
from pyengine.timeline.spans import Timeline


@pytest.mark.parametrize("seed", range(3))
def test_the_trace_keeps_the_format(seed: int) -> None:
    check_format(chrome_trace(decode(3, 6, seed), {"model": "m"}))


def test_the_trace_of_nothing() -> None:
    check_format(chrome_trace(Timeline(spans(), np.array([[0, 10]])), {}))


def test_the_trace_tells_all_there_is() -> None:
    timeline = decode(3, 6)
    trace = chrome_trace(timeline, {"model": "m", "slots": 3})
    assert trace["otherData"] == {"model": "m", "slots": 3}
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(timeline.spans) + len(timeline.tokens)
    # Times survive to the nanosecond.
    written = sorted((round(1e3 * e["ts"]), round(1e3 * (e["ts"] + e["dur"]))) for e in events)
    kept = [(int(s["begin_ns"]), int(s["end_ns"])) for s in timeline.spans]
    assert written == sorted(kept + [(int(a), int(b)) for a, b in timeline.tokens])
    by_load = sorted((e["args"]["layer"], e["args"]["expert"]) for e in events if e["cat"] == "load")
    loads = timeline.spans[timeline.spans["expert"] != 0xFFFF]
    assert by_load == sorted((int(s["layer"]), int(s["expert"])) for s in loads)
    tokens = [e for e in events if e["cat"] == "token"]
    assert all(first["ts"] + first["dur"] <= then["ts"] + 1e-6 for first, then in pairwise(tokens))
    for event in tokens:
        assert event["args"]["total"] == pytest.approx(event["dur"] / 1e3, abs=1e-3)
        assert sum(event["args"].values()) == pytest.approx(2 * event["args"]["total"], abs=0.01)


def test_pictures_are_the_same_for_the_same_token(tmp_path: Path) -> None:
    token = decode(3, 6).typical()
    for name in ("a.png", "b.png"):
        draw(token, "title", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw(decode(3, 6, 1).typical(), "title", tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_a_picture_says_in_words_what_it_shows(tmp_path: Path) -> None:
    token = decode(1, 6).typical()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(token, "One token", tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in ("One token", f"waiting for loads: {token.shares().waiting:.1f} ms", "load, awaited: ", "layer 3"):
        assert words in text


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_pictures_of_little(tmp_path: Path, layers: int) -> None:
    timeline = decode(1, layers) if layers else Timeline(spans(), np.array([[0, 1000]]))
    draw(timeline.typical(), "", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_kind_of_picture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.xyz: matplotlib cannot write"):
        draw(decode(1, 3).typical(), "", tmp_path / "a.xyz")
