"""A process that never loads pyengine: does with stock llama.cpp what a tape says (see tape.py)."""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp
import numpy as np


class SharedContext(llama_cpp.Llama):
    """With several sequences, which llama_cpp.Llama has no option for."""

    def __init__(self, model: str, n_sequences: int, **options: Any) -> None:
        self._n_sequences = n_sequences
        super().__init__(model, verbose=False, **options)

    @property
    def context_params(self) -> Any:
        return self._params

    @context_params.setter
    def context_params(self, value: Any) -> None:
        value.n_seq_max, value.kv_unified = self._n_sequences, True
        self._params = value


def main() -> None:
    job = json.load(sys.stdin)
    llm = SharedContext(job["model"], **job["options"])
    context, memory = llm.ctx, llama_cpp.llama_get_memory(llm.ctx)
    raw = llama_cpp.llama_batch_init(llm.n_batch, 0, 1)
    logits = []
    for kind, *what in job["steps"]:
        if kind == "copy":
            llama_cpp.llama_memory_seq_cp(memory, *what)
        elif kind == "remove":
            llama_cpp.llama_memory_seq_rm(memory, *what)
        else:
            (batch,) = what
            raw.n_tokens = len(batch)
            for i, (token, position, sequence, output) in enumerate(batch):
                raw.token[i], raw.pos[i], raw.n_seq_id[i], raw.logits[i] = token, position, 1, output
                raw.seq_id[i][0] = sequence
            assert llama_cpp.llama_decode(context, raw) == 0
            for row, (*_, output) in enumerate(batch):
                if output:
                    values = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (llm.n_vocab(),))
                    logits.append(values.copy())
    np.save(job["out"], np.array(logits))
    assert "pyengine" not in sys.modules
    llama_cpp.llama_batch_free(raw)
    llm.close()


if __name__ == "__main__":
    main()
