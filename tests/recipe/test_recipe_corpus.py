"""Documentation to plain text, and which documents are used for what."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lxml")

from smolmoe.corpus_sources import PackageTree, held_out_sources, training_sources
from smolmoe.text_extraction import html_text, join_wrapped_lines, pod_text, read_text, tidy

PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<html><head><title>not this</title></head><body>
<div class="navheader">Prev Next</div>lost? <nav>Home</nav>no
<h1>Heading</h1>
<p>A paragraph whose
source has <b>several
lines</b>.</p>
<ul><li>one</li><li>two</li></ul>
<pre>code
  stays</pre><script>alert(1)</script>
</body></html>"""


def test_html(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    text = tidy(html_text(path))
    assert "A paragraph whose source has several lines." in text
    assert "code\n  stays" in text
    assert "one\n" in text and "two\n" in text
    assert "lost? no" in " ".join(text.split())
    for dropped in ("not this", "Prev", "Home", "alert"):
        assert dropped not in text


def test_html_without_content(tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    path.write_text("")
    assert html_text(path) == ""


def test_pod(tmp_path: Path) -> None:
    path = tmp_path / "page.pod"
    path.write_text("=head1 NAME\n\nperl - C<the> B<< big >> one\n\n=over 4\n\n=item *\n\nI<x>\n\n=back\n\n=cut\n")
    text = pod_text(path)
    assert "NAME" in text and "perl - the big one" in text
    assert "=" not in text and "<" not in text


def test_wrapped_lines() -> None:
    text = "Prose that was\nwrapped.\n\nA list:\n- one\n* two\n  indented\nand 1\n2. number"
    assert join_wrapped_lines(text) == "Prose that was wrapped.\n\nA list:\n- one\n* two\n  indented and 1\n2. number"


def test_tidy() -> None:
    assert tidy("\r\n a\u00a0b¶  \n\n\n\n\nc\t\n") == "a b\n\nc"


def test_packed_text(tmp_path: Path) -> None:
    path = tmp_path / "entries.dict.dz"
    path.write_bytes(gzip.compress("Wörter".encode()))
    assert read_text(path) == "Wörter"
    path.write_bytes(b"bytes \xff")
    assert read_text(path) == "bytes \ufffd"


class TestSources:
    N_ESSAY = 50

    @pytest.fixture
    def tree(self, tmp_path: Path) -> PackageTree:
        essays = tmp_path / "anarchism/usr/share/doc/anarchism/html"
        manual = tmp_path / "python3.11-doc/usr/share/doc/python3.11/html/library"
        for folder in (essays, manual):
            folder.mkdir(parents=True)
        for i in range(self.N_ESSAY):
            (essays / f"{i:03}.html").write_text(f"<p>essay {i}.</p>")
        for name in ("os", "sys", "genindex", "changelog"):
            (manual / f"{name}.html").write_text(f"<p>page {name}.</p>")
        return PackageTree(tmp_path)

    def test_held_out_documents_are_not_trained_on(self, tree: PackageTree) -> None:
        name, training = next(training_sources(tree, np.random.default_rng(0)))
        held_name, held = next(held_out_sources(tree))
        assert (name, held_name) == ("anarchism", "docs")
        assert held and not set(held) & set(training)
        assert len(held) + len(training) == self.N_ESSAY

    def test_lists_are_left_out(self, tree: PackageTree) -> None:
        sources = training_sources(tree, np.random.default_rng(0))
        documents = next(documents for name, documents in sources if name == "python")
        assert sorted(document.strip() for document in documents) == ["page os.", "page sys."]

    def test_missing_package(self, tree: PackageTree) -> None:
        with pytest.raises(FileNotFoundError, match=r"gcide.*is the package unpacked"):
            list(training_sources(tree, np.random.default_rng(0)))
