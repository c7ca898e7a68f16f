"""Lines of a prompts file and their keys."""

from __future__ import annotations

import io

from pyengine.batch.lines import read_lines, split_key


def lines(data, **options):
    return list(read_lines(io.BytesIO(data), **options))


def test_blank_lines_are_counted_and_left_out():
    found = lines(b'\n{"a": 1}\r\n  \t\r\n{"b": 2}')
    assert [(line.number, line.data) for line in found] == [(2, b'{"a": 1}'), (4, b'{"b": 2}')]


def test_a_byte_order_mark_is_no_content():
    assert lines(b'\xef\xbb\xbf{"a": 1}\n') == lines(b'{"a": 1}\n')
    assert lines(b"\xef\xbb\xbf\n") == []


def test_a_key_names_the_line_and_its_content():
    first, second, changed = lines(b"a\na\nb\n")
    assert split_key(first.key) == (1, first.digest)
    assert first.digest == second.digest != changed.digest
    assert len({first.key, second.key, changed.key}) == 3
    assert lines(b"  a  \r\n")[0].key == first.key  # what is around a line is not part of it
    assert split_key(first._replace(number=12_345_678).key) == (12_345_678, first.digest)


def test_other_ids_are_no_keys():
    for key in (
        None,
        7,
        "",
        "batch_req_abc",
        "batch_req_0000001_0123456789abcdeg",
        "batch_req_0000001_0123456789abcdef ",
    ):
        assert split_key(key) is None


def test_a_line_that_is_too_long_is_told_from_others_without_being_kept():
    exact, long, longer, after = lines(b"123456\n1234567\n" + b"x" * 50 + b"\nend", most_bytes=6)
    assert exact.data == b"123456"
    assert long.data is None and long.number == 2
    assert longer.data is None and longer.digest != long.digest
    assert (after.number, after.data) == (4, b"end")
    (last,) = lines(b"y" * 20, most_bytes=6)
    assert last.data is None
