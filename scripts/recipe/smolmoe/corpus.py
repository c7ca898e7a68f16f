"""Step 1: real English text from Debian documentation packages, as token streams."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .config import ChatTokens
from .corpus_files import TRAINING_STREAM, held_out_file
from .corpus_sources import PackageTree, held_out_sources, training_sources
from .text_extraction import tidy
from .vocabulary import load_tokenizer

_SHORTEST_DOCUMENT = 400
"""characters; what is shorter is mostly a page without text"""


def usable(documents: Iterable[str]) -> list[str]:
    """The documents that are long enough, tidied."""
    return [text for text in map(tidy, documents) if len(text) > _SHORTEST_DOCUMENT]


def token_stream(tokenizer: Tokenizer, documents: list[str]) -> NDArray[np.uint16]:
    """Tokens of all documents, each after an <|endoftext|>; shape [n_tokens]."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids.append(ChatTokens().end_of_text)
        ids += encoding.ids
    return np.array(ids, dtype=np.uint16)


def build_corpus(base: Path, packages: Path, out: Path) -> None:
    """Write the training stream and the held-out sets, each a 1-D uint16 array, into the folder `out`.

    The held-out sets are written as text, too, for other programs that measure perplexity.

    Args:
        base: the base model's GGUF, for its tokenizer.
        packages: folder with one folder per unpacked Debian package.
        out: created if absent.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(base)
    tree = PackageTree(packages)
    for name, documents in held_out_sources(tree):
        texts = usable(documents)
        tokens = token_stream(tokenizer, texts)
        np.save(out / held_out_file(name), tokens)
        (out / held_out_file(name)).with_suffix(".txt").write_text("\n\n".join(texts), encoding="utf-8")
        print(f"held out {name}: {len(texts)} documents, {len(tokens)} tokens")
    streams = []
    for name, documents in training_sources(tree, np.random.default_rng(0)):
        texts = usable(documents)
        tokens = token_stream(tokenizer, texts)
        streams.append(tokens)
        print(f"{name}: {len(texts)} documents, {len(tokens) / 1e6:.2f} M tokens")
    stream = np.concatenate(streams)
    np.save(out / TRAINING_STREAM, stream)
    print(f"training text: {len(stream) / 1e6:.2f} M tokens")
