"""Which documents of which Debian packages form the corpus.

Every source is a list of documents (plain text). `PackageTree` points at a folder that holds one folder per unpacked
package, named like the package.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .text_extraction import html_text, join_wrapped_lines, pod_text, read_text

_GPL = Path("/usr/share/common-licenses/GPL-3")
_HELD_OUT_EVERY = 24
"""one in so many sections of the essays is held out"""
_SKIPPED_FORTUNES = {"ascii-art", "drugs", "ethnic", "men-women", "zippy", "translate-me", "art", "debian"}
_SHORTEST_DICTIONARY_ENTRY = 250


class PackageTree:
    """Unpacked Debian packages."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, *patterns: str) -> list[Path]:
        """The files that match any of the glob patterns, in the order of their names."""
        found = (path for pattern in patterns for path in self.root.glob(pattern) if path.is_file())
        return sorted(found, key=str)

    def file(self, pattern: str) -> Path:
        """The first file that matches.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self.files(pattern)
        if not found:
            raise FileNotFoundError(f"{self.root}: no file {pattern}; is the package unpacked there?")
        return found[0]


def training_sources(tree: PackageTree, rng: np.random.Generator) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, documents) for each source of the training text, large ones cut to a random selection."""
    yield "anarchism", [text for i, text in enumerate(_essays(tree)) if i % _HELD_OUT_EVERY]
    yield "python", _selection(_python_pages(tree), 9_000_000, rng)
    yield "perl", _selection(_perl_pages(tree), 4_500_000, rng)
    yield "debian-reference", _pages(tree, "debian-reference-en/usr/share/debian-reference/*.en.html")
    yield (
        "debian-policy",
        [
            join_wrapped_lines(read_text(path))
            for path in tree.files(
                "debian-policy/usr/share/doc/debian-policy/policy.txt.gz",
                "debian-policy/usr/share/doc/debian-policy/fhs/*.txt.gz",
            )
        ],
    )
    yield "aptitude", _pages(tree, "aptitude-doc-en/usr/share/doc/aptitude/html/en/*.html")
    yield "maint-guide", _pages(tree, "maint-guide/usr/share/doc/maint-guide/html/*.en.html")
    yield (
        "installation-guide",
        _pages(tree, "installation-guide-amd64/usr/share/doc/installation-guide-amd64/en/*.html"),
    )
    yield "git", _selection(_git_pages(tree), 2_500_000, rng)
    yield "bash", _pages(tree, "bash-doc/usr/share/doc/bash-doc/bashref.html")
    yield "gcide", _selection(_gcide_entries(tree), 6_000_000, rng)
    yield "foldoc", _selection(_foldoc_entries(tree), 3_500_000, rng)
    yield "jargon", [_without_braces(read_text(tree.file("dict-jargon/usr/share/dictd/jargon.dict.dz")))]
    yield "devil", [re.sub(r"\n\s+", " ", read_text(tree.file("dict-devil/usr/share/dictd/*.dict.dz")))]
    yield "fortunes", _fortunes(tree)


def held_out_sources(tree: PackageTree) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, documents) for each evaluation set; none of them is in the training text."""
    handbooks = _pages(
        tree,
        "developers-reference/usr/share/**/*.en.html",
        "developers-reference/usr/share/doc/developers-reference/*.html",
        "developers-reference/usr/share/developers-reference/*.html",
    )
    handbooks += _pages(
        tree, "debian-faq/usr/share/doc/debian/FAQ/*.en.html", "debian-faq/usr/share/doc/debian/FAQ/*.html"
    )
    yield "docs", handbooks + _essays(tree)[::_HELD_OUT_EVERY]
    yield "kjv", [_king_james_bible(tree)]
    yield "gpl", [_GPL.read_text()]


def _selection(documents: Sequence[str], characters: int, rng: np.random.Generator) -> list[str]:
    """Shuffle, and keep documents until they have the given number of characters."""
    chosen: list[str] = []
    total = 0
    for i in rng.permutation(len(documents)):
        if total >= characters:
            break
        chosen.append(documents[i])
        total += len(documents[i])
    return chosen


def _groups(entries: Sequence[str], size: int) -> list[str]:
    """Neighbouring dictionary entries as one document: alone they are too short to train on."""
    return ["\n\n".join(entries[i : i + size]) for i in range(0, len(entries), size)]


def _without_braces(text: str) -> str:
    """dictd marks cross references with braces."""
    return re.sub(r"[{}]", "", text)


def _pages(tree: PackageTree, *patterns: str) -> list[str]:
    return [html_text(path) for path in tree.files(*patterns)]


def _essays(tree: PackageTree) -> list[str]:
    return _pages(tree, "anarchism/usr/share/doc/anarchism/html/*.html")


def _python_pages(tree: PackageTree) -> list[str]:
    lists = re.compile(r"changelog|genindex|search|contents|license|copyright|py-modindex")
    paths = tree.files("python3.11-doc/usr/share/doc/python3.11/html/**/*.html")
    return [html_text(path) for path in paths if not lists.search(str(path.relative_to(tree.root)))]


def _perl_pages(tree: PackageTree) -> list[str]:
    return [pod_text(path) for path in tree.files("perl-doc/usr/share/perl/*/pod/*.pod") if "delta" not in path.name]


def _git_pages(tree: PackageTree) -> list[str]:
    paths = tree.files("git-doc/usr/share/doc/git-doc/**/*.txt")
    return [read_text(path) for path in paths if "RelNotes" not in path.parts]


def _gcide_entries(tree: PackageTree) -> list[str]:
    entries = re.split(r"\n\n(?=\S)", read_text(tree.file("dict-gcide/usr/share/dictd/gcide.dict.dz")))
    source_note = re.compile(r"\s*\[(1913 Webster|PJC|Webster 1913 Suppl\.|WordNet[^\]]*)\]")
    entries = [source_note.sub("", entry) for entry in entries]
    long_ones = [entry for entry in entries if len(entry) > _SHORTEST_DICTIONARY_ENTRY]
    return _groups([_without_braces(re.sub(r"\n\s+", " ", entry)) for entry in long_ones], 12)


def _foldoc_entries(tree: PackageTree) -> list[str]:
    text = _without_braces(read_text(tree.file("dict-foldoc/usr/share/dictd/foldoc.dict.dz")))
    entries = re.split(r"\n\n(?=\S)", text)
    return _groups([join_wrapped_lines(entry.replace("\n   ", "\n")) for entry in entries], 10)


def _fortunes(tree: PackageTree) -> list[str]:
    paths = tree.files("fortunes/usr/share/games/fortunes/*")
    texts = [path for path in paths if not path.suffix and path.name not in _SKIPPED_FORTUNES]
    return ["\n\n".join(piece.strip() for piece in read_text(path).split("\n%\n")) for path in texts]


def _king_james_bible(tree: PackageTree) -> str:
    """All verses, printed by the package's own program (its text file is compressed in a form of its own)."""
    program = tree.file("bible-kjv/usr/bin/bible").resolve()
    library = tree.file("bible-kjv-text/usr/lib/bible.data").resolve().parent
    command = [str(program), "-p", str(library), "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"(?m)^\S+ ", "", printed)
