"""What widening refuses, and that it leaves a whole file or none."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import gguf
import pexpect
import pytest
from bad_input.gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Gguf,
    array,
    scalar,
    text,
)
from click.testing import Result
from models.fixtures import ModelFactory

from gguf_tools.errors import RequestError
from gguf_tools.widen import plan_widening
from pyengine import bundled_model

Invoke = Callable[..., Result]
COMMAND = [sys.executable, "-m", "gguf_tools", "widen"]
ROOT = Path(__file__).parents[2]
OWN, COMMON = "llama.expert_feed_forward_length", "llama.feed_forward_length"


@pytest.fixture
def source(generated_model: ModelFactory, tmp_path: Path) -> Path:
    """A copy of a small model in a folder of its own: 64 neurons, Q4_0."""
    folder = tmp_path / "in"
    folder.mkdir()
    return Path(shutil.copy(generated_model("model-order").path, folder / "model.gguf"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "wide.gguf"


def keys(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_says_what_it_made(source: Path, target: Path, invoke: Invoke) -> None:
    done = invoke("widen", source, target, "--ff", "128")
    assert done.exit_code == 0
    assert "experts of 64 neurons widened to 128" in done.stdout
    assert done.stderr == ""
    assert keys(target)[COMMON] == 128


def test_an_odd_width_gets_a_note(generated_model: ModelFactory, target: Path, invoke: Invoke) -> None:
    done = invoke("widen", generated_model("odd-f16").path, target, "--ff", "101")
    assert done.exit_code == 0
    assert "rows of 37 values, no multiple of 64" in done.stderr


def test_nothing_is_replaced_unless_forced(source: Path, target: Path, invoke: Invoke) -> None:
    target.write_text("precious")
    done = invoke("widen", source, target, "--ff", "128")
    assert done.exit_code == 1
    assert done.stderr == f"gguf_tools: error: {target} exists already; --force replaces it\n"
    assert target.read_text() == "precious"
    assert invoke("widen", source, target, "--ff", "128", "--force").exit_code == 0
    assert keys(target)[COMMON] == 128


def test_a_forced_target_that_is_a_link_stays_one(source: Path, target: Path, tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "elsewhere.gguf"
    file.write_text("old")
    file.chmod(0o600)
    target.symlink_to(file)
    assert invoke("widen", source, target, "--ff", "128", "--force").exit_code == 0
    assert target.is_symlink() and keys(file)[COMMON] == 128
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("same", ["path", "link"])
def test_the_model_itself_is_never_replaced(same: str, source: Path, target: Path, invoke: Invoke) -> None:
    if same == "link":
        target.symlink_to(source)
    before = source.read_bytes()
    done = invoke("widen", source, source if same == "path" else target, "--ff", "128", "--force")
    assert done.exit_code == 1
    assert "is the model itself" in done.stderr
    assert source.read_bytes() == before


@pytest.mark.parametrize("place", ["/dev/null", "folder", "missing/wide.gguf"])
def test_only_regular_files_are_written(place: str, source: Path, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "folder").mkdir()
    done = invoke("widen", source, tmp_path / place, "--ff", "128", "--force")
    assert done.exit_code == 1
    assert done.stderr.endswith(("is not a regular file\n", "missing is not a folder\n"))
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("n_ff", "said"), [(32, "have 64 neurons; --ff must not be less"), (100, "--ff must be a multiple of 32")]
)
def test_impossible_widths(n_ff: int, said: str, source: Path) -> None:
    with pytest.raises(RequestError, match=said):
        plan_widening(source, n_ff)


def test_a_width_that_no_key_can_hold(source: Path) -> None:
    with pytest.raises(RequestError, match="cannot hold"):
        plan_widening(source, 1 << 40)


def test_dense_models_have_nothing_to_widen(tmp_path: Path) -> None:
    from llama.dense import write_dense_model

    with pytest.raises(RequestError, match="has no experts"):
        plan_widening(write_dense_model(tmp_path / "dense.gguf"), 128)


def widths(path: Path, out: Path, n_ff: int = 128) -> dict[str, object]:
    """The keys for widths after widening."""
    plan_widening(path, n_ff).write(out, lambda n: None, force=True)
    return {name: value for name, value in keys(out).items() if name in (OWN, COMMON)}


def test_which_key_is_changed(source: Path, target: Path) -> None:
    model = Gguf.read(source)
    common_only = model.without_key(OWN)
    assert widths(common_only.write(source), target) == {COMMON: 128}
    assert widths(model.without_key(COMMON).write(source), target) == {OWN: 128}
    # Of another value, the common key is about dense layers.
    other = model.with_key(COMMON, UINT32, scalar(UINT32, 96))
    assert widths(other.write(source), target) == {OWN: 128, COMMON: 96}
    with pytest.raises(RequestError, match=r"neither .* is the width of an expert"):
        plan_widening(common_only.with_key(COMMON, UINT32, scalar(UINT32, 96)).write(source), 128)
    with pytest.raises(RequestError, match="neither"):
        plan_widening(common_only.without_key(COMMON).write(source), 128)


def test_keys_that_give_a_width_for_each_layer(source: Path, target: Path) -> None:
    model = Gguf.read(source).without_key(OWN)
    per_layer = model.with_key(COMMON, ARRAY, array(INT32, [64, 64, 64]))
    assert widths(per_layer.write(source), target) == {COMMON: [128, 128, 128]}
    longer = model.with_key(COMMON, ARRAY, array(UINT32, [64, 64, 64, 999]))  # of a layer without experts
    assert widths(longer.write(source), target) == {COMMON: [128, 128, 128, 999]}
    for wrong in ([64, 64], [64, 32, 64]):
        with pytest.raises(RequestError, match="neither"):
            plan_widening(model.with_key(COMMON, ARRAY, array(UINT32, wrong)).write(source), 128)


def test_a_key_that_dense_layers_need_is_left_alone(source: Path, target: Path) -> None:
    """The router of one block becomes a dense layer as wide as the experts, as far as names and shapes say."""
    model = Gguf.read(source).with_tensor("blk.1.attn_q.weight", name="blk.1.ffn_up.weight", shape=(144, 64))
    assert widths(model.write(source), target) == {OWN: 128, COMMON: 64}
    with pytest.raises(RequestError, match="is the width of dense layers, too"):
        plan_widening(model.without_key(OWN).write(source), 128)


def test_a_full_disk_is_seen_before(source: Path, target: Path, invoke: Invoke, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    done = invoke("widen", source, target, "--ff", "128")
    assert done.exit_code == 1
    assert "and the disk has only 0.00 GB free" in done.stderr
    assert not any(target.parent.iterdir())


def test_a_failing_write_leaves_nothing(target: Path) -> None:
    """The system refuses more than a megabyte, as a full disk or a quota would."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [*COMMAND, str(bundled_model()), str(target), "--ff", "128"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr == "gguf_tools: error: File too large\n"
    assert not any(target.parent.iterdir())


@pytest.mark.alone
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_leaves_things_as_they_were(force: bool, target: Path) -> None:
    if force:
        target.write_text("precious")
    command = [*COMMAND, str(bundled_model()), str(target), "--ff", "4096", *(["--force"] if force else [])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (parts := list(target.parent.glob(".*.part"))) or parts[0].stat().st_size < 1 << 20:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, said, complained) == (130, "", "")
    assert [p.name for p in target.parent.iterdir()] == (["wide.gguf"] if force else [])
    assert not force or target.read_text() == "precious"


def test_a_model_cut_short_meanwhile_is_noticed(source: Path, target: Path) -> None:
    widening = plan_widening(source, 128)
    os.truncate(source, source.stat().st_size - 4096)
    with pytest.raises(ValueError, match="changed while it was read"):
        widening.write(target, lambda n: None)
    assert not any(target.parent.iterdir())


def test_keys_of_every_type_are_copied(source: Path, target: Path) -> None:
    model = Gguf.read(source)
    for kind in (UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, UINT64, INT64, FLOAT64):
        model = model.with_key(f"test.number.{kind}", kind, scalar(kind, 1))
        model = model.with_key(f"test.array.{kind}", ARRAY, array(kind, [1, 0, 1]))
        model = model.with_key(f"test.empty.{kind}", ARRAY, array(kind, []))
    model = model.with_key("test.text", STRING, text("Straße \U0001f600"))
    strings = struct.pack("<IQ", STRING, 3) + text("") + text("a") + text("long " * 1000)
    model = model.with_key("test.texts", ARRAY, strings)
    plan_widening(model.write(source), 128).write(target, lambda n: None)
    assert [k for k in Gguf.read(target).keys if k.name not in (OWN, COMMON)] == [
        k for k in model.keys if k.name not in (OWN, COMMON)
    ]


@pytest.mark.alone
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_bar_on_a_terminal(interrupted: bool, target: Path) -> None:
    """It shows bytes and speed, goes away, and gives the cursor back also after Ctrl-C."""
    arguments = [
        "-m",
        "gguf_tools",
        "widen",
        str(bundled_model()),
        str(target),
        "--ff",
        "4096" if interrupted else "512",
    ]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    child = pexpect.spawn(sys.executable, arguments, cwd=str(ROOT), env=environment, encoding="utf-8", timeout=60)
    child.expect(r"Writing wide\.gguf")
    child.expect(r"[0-9.]+/[0-9.]+ [MG]B")
    if interrupted:
        child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert "\x1b[?25h" in child.before, "the cursor is back"
    assert "Traceback" not in child.before
    assert child.exitstatus == (130 if interrupted else 0)
    assert [p.name for p in target.parent.iterdir()] == ([] if interrupted else ["wide.gguf"])


def test_a_file_of_version_2_stays_one(source: Path, target: Path) -> None:
    raw = bytearray(source.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    source.write_bytes(raw)
    plan_widening(source, 128).write(target, lambda n: None)
    assert struct.unpack("<I", target.read_bytes()[4:8]) == (2,)
