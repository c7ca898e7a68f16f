"""A vocabulary of any size in which only letters, digits and a few signs mean something; bytes stand for the rest."""

from __future__ import annotations

import string

from gguf import GGUFWriter, TokenType

_SPACE = "\u2581"  # how SentencePiece writes a space
_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{b:02X}>" for b in range(256))
_PIECES = (_SPACE, *string.ascii_letters, *string.digits, *".,;:!?'-()")
_UNKNOWN, _BEGIN, _END = range(3)

#: How many of the first tokens a text must not have: it would end, or not be UTF-8.
UNWRITABLE = len(_SPECIAL) + len(_BYTES)

LEAST_TOKENS = UNWRITABLE + len(_PIECES)

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"


def add_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    """Write the metadata of a tokenizer of n_vocab tokens. Raises ValueError for fewer than LEAST_TOKENS."""
    if n_vocab < LEAST_TOKENS:
        raise ValueError(f"a vocabulary needs at least {LEAST_TOKENS} tokens, not {n_vocab}")
    fillers = [f"{_SPACE}n{i}" for i in range(n_vocab - LEAST_TOKENS)]  # no merge of pieces leads there
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * len(_BYTES) + [TokenType.NORMAL] * (len(_PIECES) + len(fillers))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*_SPECIAL, *_BYTES, *_PIECES, *fillers])
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(types)
    writer.add_unk_token_id(_UNKNOWN)
    writer.add_bos_token_id(_BEGIN)
    writer.add_eos_token_id(_END)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_CHAT_TEMPLATE)
