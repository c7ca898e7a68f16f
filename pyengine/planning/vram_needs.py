"""What a model takes of a GPU's memory before it has a single slot, and the error when that is too much."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyengine.errors import BudgetError
from pyengine.native import Device, NativeEngine
from pyengine.planning.gguf_header import read_header, split_files
from pyengine.planning.predict import MICRO_BATCH
from pyengine.planning.shape import ModelShape, is_expert_weight

_F32 = 4

#: Tokens that llama.cpp rounds a context up to.
_STEP = 256

#: Activations of a micro-batch that lie there at once, as multiples of its widest one; after llama.cpp's own logs.
_ALIVE = 4


@dataclass(frozen=True)
class VramNeeds:
    """Bytes of a GPU's memory that are not slots."""

    dense: int
    """weights that are no experts; the table of token embeddings stays in RAM unless it also makes the logits"""
    kv: int
    """KV cache of the whole context, f16"""
    compute: int
    """estimated: activations of a micro-batch of 512 tokens, logits and attention scores among them"""

    @property
    def total(self) -> int:
        return self.dense + self.kv + self.compute


def on_device(shape: ModelShape, device: str) -> ModelShape:
    """The same model with slots of the size that they have on this ggml device; or several, with commas.

    Raises PyengineError.
    """
    engine = NativeEngine(shape.path)
    try:
        engine.use_gpus(device.split(","))
        return replace(shape, info=engine.info)
    finally:
        engine.close()


@dataclass(frozen=True)
class VramSizes:
    """What VramNeeds follow from, of one model."""

    dense: int
    kv_per_token: int
    heads: int
    """attention heads of a layer, the most of any; 0 with flash attention, which keeps no scores"""
    widest: int
    """numbers per token where activations are widest, attention scores aside"""
    width: int
    """numbers per token between layers"""

    def needs(self, n_ctx: int) -> VramNeeds:
        """For a context of `n_ctx` tokens."""
        numbers = max(self.widest, self.heads * n_ctx + _ALIVE * self.width)
        return VramNeeds(self.dense, n_ctx * self.kv_per_token, MICRO_BATCH * _F32 * numbers)


def read_sizes(shape: ModelShape, *, flash_attn: bool = False) -> VramSizes:
    """From the file's tensors and <arch>.attention.head_count. Raises ModelFileError."""
    first = read_header(shape.path)
    headers = [first, *(read_header(path) for path in split_files(shape.path, first)[1:])]
    tensors = [tensor for header in headers for tensor in header.tensors]
    others = {t.name: t.n_bytes for t in tensors if not is_expert_weight(t.name)}
    dense = sum(others.values())
    if "output.weight" in others:
        dense -= others.get("token_embd.weight", 0)
    info = shape.info
    heads = first.per_layer(f"{info.architecture}.attention.head_count", info.n_layer, 0)
    vocabulary = max((t.shape[1] for t in tensors if t.name in ("output.weight", "token_embd.weight")), default=0)
    n_ff = max((t.shape[1] for t in tensors if is_expert_weight(t.name) and ".ffn_down_" not in t.name), default=0)
    return VramSizes(
        dense=dense,
        kv_per_token=shape.kv_bytes_per_token,
        heads=0 if flash_attn else max(heads, default=0),
        widest=max(vocabulary + info.n_embd, info.n_expert_used * (2 * n_ff + info.n_embd) + _ALIVE * info.n_embd),
        width=info.n_embd,
    )


@dataclass(frozen=True)
class Room:
    """What loading a model onto a GPU is about to take, and what there was of it."""

    shape: ModelShape
    """with the sizes of slots on this device (on_device())"""
    sizes: VramSizes
    n_ctx: int
    device: Device
    """as it was before loading"""

    def check(self) -> None:
        """Raise BudgetError if the model cannot be loaded: the message has the numbers, and the largest context that
        fits. Goes by what is certain of its needs; what kernels take is estimated."""
        needs = self.sizes.needs(self.n_ctx)
        if needs.dense + needs.kv + self.shape.info.least_budget > self.device.free_bytes:
            raise self.error()

    @property
    def tight(self) -> bool:
        """Whether it would be no wonder if loading failed."""
        return self.sizes.needs(self.n_ctx).total + self.shape.info.least_budget > self.device.free_bytes

    def error(self) -> BudgetError:
        """What to say if it failed."""
        return no_room(self.shape, self.sizes, self.n_ctx, self.device)

    def shortage(self, slots: int) -> str:
        """A warning if there are slots for less than one token's experts, else empty."""
        info = self.shape.info
        wanted = info.n_expert_used * info.n_layer
        if slots >= min(wanted, info.n_experts_total):
            return ""
        kv, free = _size(self.sizes.needs(self.n_ctx).kv), _size(self.device.free_bytes)
        return (
            f"{self.device.name} has slots for {slots} experts, and a token uses {wanted}: nothing stays there from "
            f"one token to the next; of {free} that were free, a context of {self.n_ctx} tokens takes {kv}"
        )


def no_room(shape: ModelShape, sizes: VramSizes, n_ctx: int, device: Device) -> BudgetError:
    """The error for a context that does not fit."""
    needs, least = sizes.needs(n_ctx), shape.info.least_budget
    largest = largest_context(shape, sizes, device.free_bytes)
    advice = f"the largest context that fits is {largest} tokens" if largest else "no context at all fits"
    return BudgetError(
        f"a context of {n_ctx} tokens has no room in the memory of {device.name}: "
        f"{_size(needs.kv)} for its KV cache, {_size(needs.dense)} for weights that are no experts, about "
        f"{_size(needs.compute)} to compute and {_size(least)} for slots at least are "
        f"{_size(needs.total + least)}, of which {_size(device.free_bytes)} are free; {advice}"
    )


def largest_context(shape: ModelShape, sizes: VramSizes, free_bytes: int) -> int:
    """Tokens that fit beside the least slots, a multiple of 256 and no more than the model was trained for; 0 if none
    fit."""
    room = free_bytes - shape.info.least_budget
    low, high = 0, max(shape.n_ctx_train // _STEP, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sizes.needs(middle * _STEP).total <= room else (low, middle - 1)
    return low * _STEP


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 10 * 2**30 else f"{n_bytes / 2**20:.0f} MiB"
