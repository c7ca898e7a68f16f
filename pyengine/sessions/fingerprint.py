"""What a saved state belongs to: computed by another model, or computed otherwise, it would give wrong text in
silence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import llama_cpp

import pyengine

#: Of the model file: its metadata, which begins it (as pyengine.advice.profile), and samples of its weights, which tell
#: two trainings of one model apart.
_HEAD, _SAMPLE, _SAMPLES = 1 << 16, 1 << 12, 16

#: Fields of llama_context_params that change what is in a KV cell.
_CONTEXT = (
    *("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor"),
    *("yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx", "attention_type", "flash_attn_type", "type_k", "type_v"),
    "swa_full",
)


def model_digest(model: Path) -> str:
    """Of a GGUF file (of a split model: its first). Raises OSError."""
    size = model.stat().st_size
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with model.open("rb") as file:
        digest.update(file.read(_HEAD))
        for i in range(1, _SAMPLES + 1):
            file.seek(max(0, size * i // _SAMPLES - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def fingerprint(llama: pyengine.Llama) -> dict[str, str | float]:
    """Everything that a state depends on, by what to call it in a message. Raises OSError: a file is gone."""
    params = llama.context_params
    architecture = llama.metadata.get("general.architecture", "")
    original = llama.metadata.get(f"{architecture}.rope.scaling.original_context_length")
    # Some models rotate otherwise in contexts longer than those of their training.
    stretched = llama.n_ctx() > int(original or llama_cpp.llama_model_n_ctx_train(llama.model))
    adapter = f"{model_digest(Path(llama.lora_path))} x {llama.lora_scale}" if llama.lora_path else ""
    return {
        "model": model_digest(Path(llama.model_path)),
        "llama_cpp": llama_cpp.__version__,
        "adapter": adapter,
        "kv_overrides": repr(sorted((llama.kv_overrides or {}).items())),
        "longer than trained": float(stretched),
        **{name: float(getattr(params, name)) for name in _CONTEXT},
    }
