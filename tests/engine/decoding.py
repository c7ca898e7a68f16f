"""llama.cpp through its C API, with the experts in our engine or as stock: the same calls either way.

Imports nothing of pyengine, so that a process can stay stock.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import llama_cpp
import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Script = list[list[int]]  # token ids, one list for each llama_decode

logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # what its log callback prints

_EXPERT_WEIGHTS = rb"blk\.[0-9]+\.ffn_(gate|up|down|gate_up)_exps\.weight$"


class HasBufferType(Protocol):
    """pyengine.native.NativeEngine, as far as loading is concerned."""

    @property
    def buffer_type(self) -> int: ...


class DecodeError(RuntimeError):
    """llama_decode answered a number other than 0."""

    def __init__(self, status: int) -> None:
        super().__init__(f"llama_decode answered {status}")
        self.status = status


class _BufferOverride(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def random_script(sizes: Sequence[int], n_vocab: int, seed: int = 0) -> Script:
    """Random token ids in chunks of the given sizes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, n_vocab, size).tolist() for size in sizes]


class Model:
    """A loaded model. engine: where its experts go; None loads it as stock llama.cpp does. Use in a with statement.

    devices: addresses of the ggml_backend_devices that layers go to, divided by `split`; none: the CPU.
    plain: weights as they are in the file, and not in the layouts that the CPU's kernels prefer.
    metadata: what llama.cpp is told in the place of numbers in the file, GGUF key -> value.
    """

    def __init__(
        self,
        path: Path,
        engine: HasBufferType | None = None,
        *,
        devices: Sequence[int] = (),
        split: Sequence[float] = (),
        plain: bool = False,
        metadata: Mapping[str, int] | None = None,
    ) -> None:
        """Raises RuntimeError when llama.cpp refuses the model."""
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = -1 if devices else 0
        params.use_extra_bufts = not plain
        listed = (ctypes.c_void_p * (len(devices) + 1))(*devices)  # a null ends the list
        shares = (ctypes.c_float * llama_cpp.LLAMA_MAX_DEVICES)(*split)
        if devices:
            params.devices = ctypes.cast(listed, ctypes.c_void_p)
            params.tensor_split = shares
        numbers = (llama_cpp.llama_model_kv_override * (len(metadata or {}) + 1))()  # an empty key ends the list
        for number, (key, value) in zip(numbers, (metadata or {}).items(), strict=False):
            number.key, number.tag = key.encode(), llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            number.value.val_i64 = value
        if metadata:
            params.kv_overrides = numbers
        overrides = (_BufferOverride * 2)()  # the second one ends the list
        if engine is not None:
            overrides[0].pattern, overrides[0].buft = _EXPERT_WEIGHTS, engine.buffer_type
            params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.handle = model
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_model_free(self.handle)

    def context(
        self, *, n_ctx: int = 256, n_ubatch: int = 512, n_threads: int = 2, embeddings: bool = False
    ) -> Context:
        """A new context of one sequence. embeddings: of a model that has no logits; what is said of logits holds for
        its embeddings then, [n_tokens, n_embd]."""
        return Context(self, n_ctx, n_ubatch, n_threads, embeddings)


class Context:
    """One sequence of a model. Use in a with statement."""

    def __init__(self, model: Model, n_ctx: int, n_ubatch: int, n_threads: int, embeddings: bool = False) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = min(n_ubatch, n_ctx)
        params.n_threads = params.n_threads_batch = n_threads
        params.embeddings = embeddings
        context = llama_cpp.llama_init_from_model(model.handle, params)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        self.handle = context
        self.n_past = 0
        self._n_values = llama_cpp.llama_model_n_embd(model.handle) if embeddings else model.n_vocab
        self._result = llama_cpp.llama_get_embeddings_ith if embeddings else llama_cpp.llama_get_logits_ith
        self._abort: object = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_free(self.handle)

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Evaluate tokens after those before; logits [n_tokens, n_vocab] of every one. Raises DecodeError; what was
        evaluated before it stays, the tokens themselves leave nothing."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, self.n_past + i
                batch.n_seq_id[i], batch.logits[i] = 1, True
                batch.seq_id[i][0] = 0
            status = llama_cpp.llama_decode(self.handle, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status != 0:
            # An aborted or failed batch may have left its first micro-batches in the memory.
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.handle), 0, self.n_past, -1)
            raise DecodeError(status)
        self.n_past += len(tokens)
        rows = (self._result(self.handle, i) for i in range(len(tokens)))
        return np.stack([np.ctypeslib.as_array(row, (self._n_values,)).copy() for row in rows])

    def run(self, script: Script) -> Logits:
        """Decode chunk after chunk; logits [tokens of all chunks, n_vocab]."""
        return np.concatenate([self.decode(chunk) for chunk in script])

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.handle), True)
        self.n_past = 0

    def set_warmup(self, on: bool) -> None:
        """While on, llama.cpp routes every token to all experts."""
        llama_cpp.llama_set_warmup(self.handle, on)

    def set_abort(self, wanted: Callable[[], bool] | None) -> None:
        """Ask `wanted` now and then while computing; llama_decode stops once it answers True."""
        callback = llama_cpp.ggml_abort_callback()
        if wanted is not None:
            callback = llama_cpp.ggml_abort_callback(lambda _: wanted())
        llama_cpp.llama_set_abort_callback(self.handle, callback, ctypes.c_void_p(0))
        self._abort = callback  # llama.cpp keeps only its address


@contextlib.contextmanager
def llama_log() -> Iterator[list[str]]:
    """Collect what llama.cpp logs, all levels, one item a line; then log nothing but what llama_cpp would."""
    from llama_cpp import _logger

    pieces: list[str] = []
    lines: list[str] = []

    def note(_level: int, text: bytes, _user: object) -> None:
        pieces.append(text.decode("utf-8", "replace"))

    callback = llama_cpp.llama_log_callback(note)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
        lines += "".join(pieces).splitlines()
