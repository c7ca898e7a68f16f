"""From messages to tokens, through the chat template that llama_cpp found in the model.

llama_cpp's chat handlers render, tokenize and complete in one call. Here they are given something that keeps what they
would complete, so that the scheduler can do it, along with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp
from jinja2 import TemplateError
from llama_cpp import llama_chat_format

from pyengine.batch.errors import invalid_body
from pyengine.errors import one_line

if TYPE_CHECKING:
    from pyengine import Llama


class _Rendered(Exception):  # noqa: N818  (no error)
    """Carries a rendered prompt out of a chat handler."""

    def __init__(self, tokens: Sequence[int], stop: Sequence[str]) -> None:
        super().__init__()
        self.tokens, self.stop = tokens, stop


class _Completer:
    """What a chat handler takes for the model."""

    verbose = False

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return self._llm.tokenize(text, add_bos=add_bos, special=special)

    def create_completion(self, prompt: Sequence[int], stop: Any = (), **_: Any) -> Any:
        raise _Rendered(prompt, [stop] if isinstance(stop, str) else list(stop or ()))


class PromptReader:
    """Makes tokens of prompts and messages for one model."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._completer = _Completer(llm)
        self._n_vocab = llm.n_vocab()
        name = llm.chat_format or ""
        self._handler = (
            llm.chat_handler or llm._chat_handlers.get(name) or llama_chat_format.get_chat_completion_handler(name)
        )

    def chat(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of a conversation up to where the assistant's answer begins, and the template's stop texts.

        Raises:
            LineError: the model's template refuses these messages.
        """
        try:
            self._handler(llama=self._completer, messages=list(messages))  # type: ignore[arg-type]
        except _Rendered as rendered:
            return list(rendered.tokens), tuple(text for text in rendered.stop if text)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = one_line(str(error)) or type(error).__name__
            message = f"the model's chat template refuses these messages: {reason}"
            raise invalid_body("invalid_value", message, "messages") from error
        raise AssertionError("the chat handler completed nothing")

    def text(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, which may be ids already.

        Raises:
            LineError: an id that the model lacks, or an empty prompt where it has no token to begin a text with.
        """
        if isinstance(prompt, str):
            tokens = self._llm.tokenize(prompt.encode(), add_bos=True, special=True)
        else:
            tokens = list(prompt)
            for token in tokens:
                if not 0 <= token < self._n_vocab:
                    raise invalid_body("invalid_value", f"the model has no token {token}", "prompt")
        if not tokens:
            message = "the prompt is empty, and this model has no token to begin a text with"
            raise invalid_body("invalid_value", message, "prompt")
        return tokens


def context_size(llm: Llama) -> int:
    """KV cells of the model's context."""
    return int(llama_cpp.llama_n_ctx(llm.ctx))
