"""A file that takes another's place stands for it: links, mode and owner stay as they were."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pyengine.whole_file import check_writable, written_whole


def write(path: Path, content: bytes = b"new") -> None:
    with written_whole(path) as file:
        file.write(content)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_goes_on_leading_to_the_file(tmp_path: Path, absolute: bool) -> None:
    (tmp_path / "shelf").mkdir()
    file, link, outer = tmp_path / "shelf" / "file", tmp_path / "link", tmp_path / "outer"
    file.write_bytes(b"old")
    link.symlink_to(file if absolute else Path("shelf/file"))
    outer.symlink_to("link")
    write(outer)
    assert outer.is_symlink() and link.is_symlink() and not file.is_symlink()
    assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["file"] and sorted(os.listdir(tmp_path)) == ["link", "outer", "shelf"]


def test_a_link_to_nothing_gets_its_file(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("later/file")
    check_writable(link)
    write(link)
    assert link.is_symlink() and (tmp_path / "later" / "file").read_bytes() == b"new"


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o666, 0o755, 0o400])
def test_the_mode_stays(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(kept)
    with written_whole(path) as file:
        (part,) = set(tmp_path.iterdir()) - {path}
        assert mode(part) == kept, "nobody else may read what is not finished"
        file.write(b"new")
    assert mode(path) == kept and path.read_bytes() == b"new"


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    write(tmp_path / "ours")
    (tmp_path / "usual").touch()
    assert mode(tmp_path / "ours") == mode(tmp_path / "usual")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_leaves_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    path.chmod(0o640)
    write(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 54321, 0o640)


def test_who_may_not_give_a_file_away_may_replace_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    if os.geteuid() == 0:
        os.chown(path, 12345, 54321)
    path.chmod(0o600)

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refused)
    write(path)
    assert path.read_bytes() == b"new" and mode(path) == 0o600 and path.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("what", ["pipe", "folder", "circle"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(what)
    before = os.lstat(path)
    reason = {"pipe": "not a regular file", "folder": "Is a directory", "circle": "symbolic links"}[what]
    for refused in (write, check_writable):
        with pytest.raises(OSError, match=reason):
            refused(path)
    assert os.lstat(path) == before and os.listdir(tmp_path) == [what]


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to(file)
    with pytest.raises(RuntimeError, match="no"), written_whole(link) as out:
        out.write(b"new")
        raise RuntimeError("no")
    assert file.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["file", "link"]
