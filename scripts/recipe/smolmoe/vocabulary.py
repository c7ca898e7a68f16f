"""The tokenizer of a GGUF file as a `tokenizers.Tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a byte-level BPE vocabulary whose pre-tokenizer is llama.cpp's "smollm".

    That pre-tokenizer isolates every digit and then splits as GPT-2 does. Tokens of the type CONTROL are special.

    Raises:
        ValueError: the file's tokenizer is of another kind.
    """
    fields = gguf.GGUFReader(path).fields

    def content(key: str) -> Any:
        if key not in fields:
            raise ValueError(f"{path}: no {key} in the metadata")
        return fields[key].contents()

    kind = (content("tokenizer.ggml.model"), content("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{path}: the tokenizer is {kind}, not a smollm BPE")
    tokens = content("tokenizer.ggml.tokens")
    types = content("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in content("tokenizer.ggml.merges")]

    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer
