"""A random dense model in the recipe's base format, small enough to train in seconds."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_LAYER, WIDTH, N_HEAD, N_HEAD_KV, FFN_WIDTH = 2, 64, 4, 2, 192
N_VOCAB = 12_288
"""a multiple of 4,096, and enough for the token ids that open a turn of a chat"""
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"))


def _byte_characters() -> list[str]:
    """How byte-level BPE writes each byte: printable ones as they are, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    replaced = {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [replaced.get(byte, chr(byte)) for byte in range(256)]


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    known = [*_CONTROL, *_byte_characters(), *("".join(merge) for merge in _MERGES)]
    unused = [f"<unused{i}>" for i in range(N_VOCAB - len(known))]
    types = [gguf.TokenType.CONTROL] * len(_CONTROL) + [gguf.TokenType.NORMAL] * (len(known) - len(_CONTROL))
    types += [gguf.TokenType.UNUSED] * len(unused)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(known + unused)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in _MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def write_tiny_base(path: Path, seed: int = 3) -> None:
    """Write the model, all weights float32, so that dequantising it loses nothing."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a random dense model")
    writer.add_license("apache-2.0")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN_WIDTH)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_rope_dimension_count(WIDTH // N_HEAD)
    _add_vocabulary(writer)

    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    kv_width = WIDTH // N_HEAD * N_HEAD_KV
    writer.add_tensor("token_embd.weight", matrix(N_VOCAB, WIDTH))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for i in range(N_LAYER):
        block = f"blk.{i}"
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", (1 + 0.1 * rng.standard_normal(WIDTH)).astype(np.float32))
        writer.add_tensor(f"{block}.attn_q.weight", matrix(WIDTH, WIDTH))
        writer.add_tensor(f"{block}.attn_k.weight", matrix(kv_width, WIDTH))
        writer.add_tensor(f"{block}.attn_v.weight", matrix(kv_width, WIDTH))
        writer.add_tensor(f"{block}.attn_output.weight", matrix(WIDTH, WIDTH))
        writer.add_tensor(f"{block}.ffn_gate.weight", matrix(FFN_WIDTH, WIDTH))
        writer.add_tensor(f"{block}.ffn_up.weight", matrix(FFN_WIDTH, WIDTH))
        writer.add_tensor(f"{block}.ffn_down.weight", matrix(WIDTH, FFN_WIDTH))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
