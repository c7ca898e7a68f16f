"""What a model takes of a GPU's memory before it has a single slot, and the error when that is too much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pyengine import vram
from pyengine.architectures import MANAGED
from pyengine.errors import BudgetError, PyengineError
from pyengine.native import Device, NativeEngine
from pyengine.planning.gguf_header import read_header, split_files
from pyengine.planning.predict import MICRO_BATCH
from pyengine.planning.shape import F16, ModelShape, is_expert_weight, kv_bytes_per_token, looks_back, read_shape

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
    """estimated: activations of a micro-batch, logits and attention scores among them"""
    scores: int
    """of these the attention scores of one layer, which are there for sure"""

    @property
    def certain(self) -> int:
        """No less than this much is taken."""
        return self.dense + self.kv + self.scores

    @property
    def total(self) -> int:
        return self.dense + self.kv + self.compute


@dataclass(frozen=True)
class Context:
    """What an application asks of a context, by llama_cpp.Llama's names and with its defaults."""

    n_ctx: int = 512
    n_batch: int = 512
    n_ubatch: int = MICRO_BATCH
    n_sequences: int = 1
    flash_attn: bool = False
    offload_kqv: bool = True
    swa_full: bool = True
    type_k: int = F16
    type_v: int = F16


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
    states: int
    """bytes that recurrent layers keep of all sequences, however long they are"""
    heads: int
    """attention heads of a layer, the most of any; 0 with flash attention, which keeps no scores"""
    widest: int
    """numbers per token where activations are widest, attention scores aside"""
    width: int
    """numbers per token between layers"""
    micro_batch: int = MICRO_BATCH
    """tokens computed at once"""

    def needs(self, n_ctx: int) -> VramNeeds:
        """For a context of `n_ctx` tokens."""
        row = _F32 * min(self.micro_batch, n_ctx)  # bytes of one number of each token
        numbers = max(self.widest, self.heads * n_ctx + _ALIVE * self.width)
        return VramNeeds(
            self.dense, n_ctx * self.kv_per_token + self.states, row * numbers, scores=row * self.heads * n_ctx
        )


def read_sizes(shape: ModelShape, context: Context | None = None) -> VramSizes:
    """From the file's tensors and keys; of `context` everything but n_ctx counts. Raises ModelFileError."""
    context = context or Context()
    first = read_header(shape.path)
    headers = [first, *(read_header(path) for path in split_files(shape.path, first)[1:])]
    tensors = [tensor for header in headers for tensor in header.tensors]
    others = {t.name: t.n_bytes for t in tensors if not is_expert_weight(t.name)}
    dense = sum(others.values())
    if "output.weight" in others:
        dense -= others.get("token_embd.weight", 0)
    info, arch = shape.info, shape.info.architecture
    n_block = first.number(f"{arch}.block_count", info.n_layer)
    heads = first.per_layer(f"{arch}.attention.head_count", n_block, 0)
    kv = kv_bytes_per_token(first, arch, tensors, context.type_k, context.type_v)
    # Of layers that look back a few tokens only so many are kept then; how many layers that are, no key says.
    keeps_all = context.swa_full or not first.number(f"{arch}.attention.sliding_window", 0)
    state = first.number(f"{arch}.ssm.state_size", 0) * first.number(f"{arch}.ssm.inner_size", 0)
    n_recurrent = sum(t.name.endswith(".ssm_conv1d.weight") for t in tensors)
    vocabulary = max((t.shape[1] for t in tensors if t.name in ("output.weight", "token_embd.weight")), default=0)
    n_ff = max((t.shape[1] for t in tensors if is_expert_weight(t.name) and ".ffn_down_" not in t.name), default=0)
    return VramSizes(
        dense=dense,
        kv_per_token=kv if keeps_all and context.offload_kqv else 0,
        states=_F32 * state * n_recurrent * context.n_sequences if context.offload_kqv else 0,
        heads=max(heads, default=0)
        if context.offload_kqv and not context.flash_attn and looks_back(first, arch)
        else 0,
        widest=max(vocabulary + info.n_embd, info.n_expert_used * (2 * n_ff + info.n_embd) + _ALIVE * info.n_embd),
        width=info.n_embd,
        micro_batch=min(context.n_batch, context.n_ubatch),
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
        fits. Goes by what is certain of its needs; most of what kernels take is estimated."""
        needs = self.sizes.needs(self.n_ctx)
        if needs.certain + self.shape.info.least_budget > self.device.free_bytes:
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


def room_on(path: Path, gpus: vram.Gpus, context: Context) -> Room | None:
    """What loading a model with this context onto these GPUs is about to take. None where it is not known: experts stay
    with stock llama.cpp, only some layers go to the GPUs, or loading itself will say what is wrong."""
    try:
        shape = read_shape(path)
        n_block = read_header(path).number(f"{shape.info.architecture}.block_count", 0)
        if shape.info.architecture not in MANAGED or 0 <= gpus.n_gpu_layers <= n_block:
            return None
        shape = on_device(shape, gpus.name)
        sizes = read_sizes(shape, context)
    except (PyengineError, OSError):
        return None
    return Room(shape, sizes, context.n_ctx or shape.n_ctx_train, vram.find(gpus.name))


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
