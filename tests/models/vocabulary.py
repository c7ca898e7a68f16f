"""A tiny SentencePiece-style vocabulary: special tokens, one token for each byte, and short readable pieces."""

from __future__ import annotations

import string

import gguf
import numpy as np

SPACE = "\u2581"  # how SentencePiece writes a space
_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{b:02X}>" for b in range(256))
_PAIRS = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is", "it")
_LETTERS = tuple(string.ascii_lowercase)
_PIECES = (
    SPACE,
    *_LETTERS,
    *(SPACE + c for c in _LETTERS),
    *_PAIRS,
    *(SPACE + p for p in _PAIRS),
    *string.digits,
    *".,!?'-:",
)
TOKENS = (*_SPECIAL, *_BYTES, *_PIECES)
N_VOCAB = len(TOKENS)
BOS, EOS, UNKNOWN = 1, 2, 0
N_TOKEN_TYPES = 2  # of models that tell sentences apart

# Tokens a generated model may write: the readable pieces.
WRITABLE_TOKENS = np.arange(N_VOCAB) >= len(_SPECIAL) + len(_BYTES)

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Write the tokenizer's metadata."""
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * len(_BYTES) + [gguf.TokenType.NORMAL] * len(_PIECES)
    # A merge is taken by its score: longer pieces first, so that text uses them.
    scores = [0.0] * (len(_SPECIAL) + len(_BYTES)) + [float(10 * len(p)) - 0.01 * i for i, p in enumerate(_PIECES)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(TOKENS))
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_CHAT_TEMPLATE)
