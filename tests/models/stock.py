"""Stock llama.cpp through the low-level API of llama-cpp-python: the reference that generated models are checked with.

Run as a module to compute in a process of its own: `python -m tests.models.stock MODEL OUT.npz --n-new 8`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from .ggml import ggml_base
from .vocabulary import SPACE

FloatArray = NDArray[np.float32]

_ARGSORT = b"ffn_moe_argsort-"  # llama.cpp's name of the node that ranks a block's experts, followed by the block
_BYTES_OF_ID = 4


class StockModel:
    """A model with one context and one sequence. Use it in a with statement."""

    def __init__(self, path: Path, *, n_ctx: int = 128, n_threads: int = 2, watch_routing: bool = False) -> None:
        """Load the model. Raises RuntimeError when llama.cpp refuses it.

        watch_routing: record in `routing` which experts are chosen; llama.cpp then computes node by node.
        """
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = n_ctx
        context.n_threads = context.n_threads_batch = n_threads
        self.routing: dict[int, list[tuple[int, ...]]] = {}
        self._watch = _routing_callback(self.routing) if watch_routing else None
        if self._watch is not None:
            context.cb_eval = self._watch
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            llama_cpp.llama_model_free(self.model)
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_past = 0

    def __enter__(self) -> StockModel:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of text, the begin-of-text token first."""
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 2))()
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        n = llama_cpp.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), True, False)
        if n < 0:
            raise RuntimeError(f"{-n} tokens do not fit {len(buffer)}")
        return list(buffer[:n])

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens."""
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        pieces = (llama_cpp.llama_vocab_get_text(vocab, token).decode() for token in tokens)
        return "".join(pieces).replace(SPACE, " ")

    def decode(self, tokens: Sequence[int]) -> FloatArray:
        """Evaluate tokens after those before; returns logits [n_tokens, n_vocab] of every one."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, self.n_past + i
                batch.n_seq_id[i], batch.logits[i] = 1, True
                batch.seq_id[i][0] = 0
            status = llama_cpp.llama_decode(self.context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")
        self.n_past += len(tokens)
        rows = (llama_cpp.llama_get_logits_ith(self.context, i) for i in range(len(tokens)))
        return np.stack([np.ctypeslib.as_array(row, (self.n_vocab,)).copy() for row in rows])

    def greedy(self, prompt: Sequence[int], n_new: int) -> tuple[list[int], FloatArray]:
        """Decode the prompt at once, then n_new tokens one by one, each the likeliest.

        Returns the new tokens and the logits [n_new, n_vocab] that chose them.
        """
        logits = [self.decode(prompt)[-1]]
        tokens = [int(logits[0].argmax())]
        while len(tokens) < n_new:
            logits.append(self.decode(tokens[-1:])[0])
            tokens.append(int(logits[-1].argmax()))
        return tokens, np.stack(logits)

    @contextlib.contextmanager
    def adapter(self, path: Path, scale: float = 1.0) -> Iterator[None]:
        """Decode with a LoRA adapter. Raises RuntimeError when llama.cpp refuses it."""
        lora = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())
        if not lora:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        scales = (ctypes.c_float * 1)(scale)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
        if llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales) != 0:
            raise RuntimeError(f"llama.cpp cannot use {path}")
        try:
            yield
        finally:
            llama_cpp.llama_set_adapters_lora(self.context, None, 0, None)


def _routing_callback(routing: dict[int, list[tuple[int, ...]]]) -> Callable[..., bool]:
    """A callback for llama.cpp that notes, for each block and token, all experts from the most to the least wanted."""
    ggml = ggml_base()

    def note(tensor: int, ask: bool, _user: object) -> bool:
        name: bytes = ggml.ggml_get_name(tensor)
        if not name.startswith(_ARGSORT):
            return not ask
        if not ask:
            n_bytes, n_rows = ggml.ggml_nbytes(tensor), ggml.ggml_nrows(tensor)
            ids = np.empty((n_rows, n_bytes // _BYTES_OF_ID // n_rows), dtype=np.int32)
            ggml.ggml_backend_tensor_get(tensor, ids.ctypes.data, 0, n_bytes)
            routing.setdefault(int(name[len(_ARGSORT) :]), []).extend(tuple(row) for row in ids.tolist())
        return True

    callback: Callable[..., bool] = llama_cpp.ggml_backend_sched_eval_callback(note)
    return callback


def main() -> None:
    """Write prompt, new tokens and logits of a greedy answer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", default="the rain in an open field")
    parser.add_argument("--n-new", type=int, default=8)
    parser.add_argument("--n-threads", type=int, default=2)
    args = parser.parse_args()
    with StockModel(args.model, n_threads=args.n_threads) as model:
        prompt = model.tokenize(args.prompt)
        tokens, logits = model.greedy(prompt, args.n_new)
        text = model.text(tokens)
    np.savez(args.out, prompt=prompt, tokens=tokens, logits=logits, text=text)


if __name__ == "__main__":
    main()
