"""A stand-in for pyengine.Llama: the same shape, scripted answers, no model. Words are tokens."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyengine.errors import BudgetError, ExpertReadError, ModelFileError

END = 0  # the end-of-generation token
EXPERTS = 960
HITS_PER_TOKEN, MISSES_PER_TOKEN = 180, 60


class FakeLlama:
    """Counts positions as llama_cpp.Llama does: the token sampled last is not evaluated yet.

    Class attributes script it; a test sets them on a subclass.
    """

    answers: tuple[str, ...] = ("You said: {text}",)
    completion: tuple[bytes, ...] = (b" one", b" two", b" three")
    token_delay_s = 0.0
    prompt_delay_s = 0.0
    load_delay_s = 0.0
    fail_at_token: int | None = None
    warnings_at_load: tuple[str, ...] = ()
    made: list[FakeLlama]

    def __init_subclass__(cls) -> None:
        cls.made = []

    def __init__(self, model_path: Path | None = None, *, ram_budget: str | int = "auto", **arguments: Any) -> None:
        if model_path is not None and not Path(model_path).exists():
            raise ModelFileError(f"{model_path}: no such file")
        time.sleep(self.load_delay_s)
        for line in self.warnings_at_load:
            logging.getLogger("pyengine").warning("%s", line)
        self.model_path = str(model_path or "smolmoe-32x8-q4_0.gguf")
        self.arguments = arguments
        self.n_tokens = 0
        self.n_threads = arguments.get("n_threads") or 2
        self.n_threads_batch = arguments.get("n_threads_batch") or 2
        self.closed = False
        self.seeds: list[int] = []
        self.chats: list[dict[str, Any]] = []
        self.sampling: dict[str, Any] = {}
        self._vocabulary: list[bytes] = [b""]
        self._ids: dict[bytes, int] = {}
        self._share = 0
        self._accessed = 0
        self.set_ram_budget(ram_budget)
        type(self).made.append(self)

    # ---- what pyengine.Llama adds

    @property
    def engaged(self) -> str:
        return f"30 layers x {self._share * 32 // 100} of 32 experts in RAM over disk, fake"

    def expert_stats(self) -> dict[str, Any]:
        hits, misses = self._accessed * HITS_PER_TOKEN, self._accessed * MISSES_PER_TOKEN
        resident = EXPERTS * self._share // 100
        return {
            "managed": True,
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / max(1, hits + misses),
            "bytes_read": misses * 62208,
            "stall_seconds": misses * 1e-4,
            "resident_bytes": resident * 62208,
            "slots": resident,
            "experts": EXPERTS,
            "resident": resident,
            "budget_bytes": resident * 62208,
        }

    def set_ram_budget(self, value: str | int) -> None:
        shares = {"auto": 100}
        if isinstance(value, str) and value.endswith("%"):
            shares[value] = int(value[:-1])
        if value not in shares:
            raise BudgetError(f"ram_budget {value!r} is below the least budget of 497664 bytes")
        self._share = shares[value]

    def close(self) -> None:
        self.closed = True

    # ---- what llama_cpp.Llama has

    def n_ctx(self) -> int:
        return int(self.arguments["n_ctx"])

    def set_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [self._id(word) for word in re.findall(rb"\s*\S+|\s+", text)]

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None) -> bytes:
        return b"".join(self._vocabulary[token] for token in tokens)

    def eval(self, tokens: list[int]) -> None:
        time.sleep(self.prompt_delay_s if len(tokens) > 1 else self.token_delay_s)
        self.n_tokens += len(tokens)
        self._accessed += len(tokens)
        if self.fail_at_token is not None and self.n_tokens >= self.fail_at_token:
            raise ExpertReadError("layer 3, expert 7: cannot read 62208 bytes: Input/output error")

    def generate(self, tokens: list[int], **sampling: Any) -> Iterator[int]:
        self.sampling = sampling
        self.n_tokens = 0
        self.eval(list(tokens))
        yield from self._decode([self._id(piece) for piece in self.completion])

    def create_chat_completion(
        self, messages: list[dict[str, str]], *, stream: bool, seed: int, max_tokens: int | None, **sampling: Any
    ) -> Iterator[dict[str, Any]]:
        assert stream
        self.chats.append({"messages": messages, "seed": seed, "max_tokens": max_tokens, "sampling": sampling})
        return self._chat(messages, max_tokens)

    def _chat(self, messages: list[dict[str, str]], max_tokens: int | None) -> Iterator[dict[str, Any]]:
        prompt = [token for message in messages for token in [1, *self.tokenize(message["content"].encode())]]
        room = self.n_ctx() - len(prompt)
        if room <= 0:
            raise ValueError(f"Requested tokens ({len(prompt)}) exceed context window of {self.n_ctx()}")
        limit = min(room, max_tokens or room)
        asked = sum(message["role"] == "user" for message in messages)
        answer = self.answers[(asked - 1) % len(self.answers)].format(text=messages[-1]["content"])
        self.n_tokens = 0
        self.eval(prompt)
        reason = "stop"
        for count, token in enumerate(self._decode(self.tokenize(answer.encode())), start=1):
            if token == END:
                break
            if count == 1:
                yield _chunk({"role": "assistant"})
            yield _chunk({"content": self.detokenize([token]).decode()})
            if count == limit:
                reason = "length"
                break
        yield _chunk({}, reason)

    def _decode(self, tokens: list[int]) -> Iterator[int]:
        for token in tokens:
            yield token
            self.eval([token])
        yield END

    def _id(self, piece: bytes) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._vocabulary)
            self._vocabulary.append(piece)
        return self._ids[piece]


FakeLlama.made = []


def _chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
