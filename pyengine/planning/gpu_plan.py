"""What of a model fits into VRAM, RAM and disk, what each budget misses, and how fast it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyengine.budget import Budget, available_memory, resolve
from pyengine.native import Device
from pyengine.planning.gpu_probe import GpuMeasured
from pyengine.planning.link import LinkSpeed
from pyengine.planning.plan import SHARES
from pyengine.planning.routing import Routing
from pyengine.planning.shape import ModelShape
from pyengine.planning.tiers import TokenTime, token_time
from pyengine.planning.vram_needs import VramNeeds, largest_context, no_room, read_sizes
from pyengine.vram import left_free


@dataclass(frozen=True)
class GpuLine:
    """One VRAM budget over the RAM that was asked for."""

    name: str
    """of the VRAM budget, as the user would write it"""
    vram_bytes: int
    ram_bytes: int
    """of the tier behind: no more than VRAM leaves over is used"""
    slots: int
    ram_slots: int
    fits: bool
    """the VRAM"""
    shares: tuple[float, float, float]
    """of all uses of experts by decoded tokens: found in VRAM, found in RAM, read from disk"""
    missing: float
    """experts per token that are not in VRAM"""
    time: TokenTime | None
    """of a decoded token; None without a measurement"""


@dataclass(frozen=True)
class GpuPlan:
    shape: ModelShape
    """with slots of the size that they have on the device"""
    device: Device
    link: LinkSpeed | None
    n_ctx: int
    needs: VramNeeds
    left_bytes: int
    """left free on the device by "auto" """
    ram_available: int
    routing: str
    measured: GpuMeasured | None
    chosen: GpuLine
    """the budgets that were asked for"""
    lines: list[GpuLine]
    largest_context: int
    """tokens that fit beside the least slots"""

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data; sizes in bytes, times in seconds."""
        info, device, link = self.shape.info, self.device, self.link
        return {
            "model": str(self.shape.path),
            "architecture": info.architecture,
            "layers": info.n_layer,
            "experts": info.n_expert,
            "experts_used": info.n_expert_used,
            "expert_bytes": info.expert_bytes,
            "slot_bytes": info.slot_bytes,
            "least_budget": info.least_budget,
            "n_ctx": self.n_ctx,
            "largest_context": self.largest_context,
            "available_bytes": self.ram_available,
            "routing": self.routing,
            "gpu": {
                "name": device.name,
                "description": device.description,
                "free_bytes": device.free_bytes,
                "total_bytes": device.total_bytes,
                "unified": device.unified,
                "link_bytes_per_s": None if link is None else link.bytes_per_s,
                "link_latency_s": None if link is None else link.latency_s,
                "dense_bytes": self.needs.dense,
                "kv_bytes": self.needs.kv,
                "compute_bytes": self.needs.compute,
                "left_bytes": self.left_bytes,
            },
            "chosen": _line_json(self.chosen),
            "budgets": [_line_json(line) for line in self.lines],
        }


def _line_json(line: GpuLine) -> dict[str, Any]:
    out: dict[str, Any] = {
        "budget": line.name,
        "vram_bytes": line.vram_bytes,
        "ram_bytes": line.ram_bytes,
        "slots": line.slots,
        "ram_slots": line.ram_slots,
        "fits": line.fits,
        "missing_per_token": line.missing,
        **dict(zip(("in_vram", "in_ram", "from_disk"), line.shares, strict=True)),
    }
    if line.time is not None:
        time = line.time
        out |= {
            "decode_tokens_per_s": time.tokens_per_s,
            "compute_s": time.compute_s,
            "link_s": time.link_s,
            "disk_s": time.disk_s,
            "bound": time.bound,
            "bound_tokens_per_s": time.bound_tokens_per_s,
        }
    return out


def make_gpu_plan(
    shape: ModelShape,
    device: Device,
    vram_budget: Budget,
    ram_budget: Budget,
    n_ctx: int,
    routing: Routing,
    routing_words: str,
    link: LinkSpeed | None,
    measured: GpuMeasured | None,
    available: int | None = None,
) -> GpuPlan:
    """The plan for these budgets and the usual shares.

    Args:
        shape: with slots of the size that they have on the device (vram_needs.on_device()).
        vram_budget, ram_budget: as pyengine.Llama takes them.
        n_ctx: tokens of context; 0 is the model's own.
        link: None where nothing is moved from RAM.
        available: bytes of RAM that this process could take now; None asks the system.

    Raises:
        BudgetError: a budget is not understood or below the least, or the context has no room in VRAM.
    """
    info, n_ctx = shape.info, n_ctx or shape.n_ctx_train
    sizes = read_sizes(shape)
    needs, left = sizes.needs(n_ctx), left_free(device)
    if needs.total + info.least_budget > device.free_bytes:
        raise no_room(shape, sizes, n_ctx, device)
    ram = available_memory() if available is None else available
    behind = 0 if device.unified else resolve(ram_budget, slot_bytes=info.slot_bytes, least=0, available=ram)
    room = device.free_bytes - needs.total

    def line(budget: Budget) -> GpuLine:
        # As pyengine.vram.settle() does.
        size = resolve(
            budget,
            slot_bytes=info.slot_bytes,
            least=info.least_budget,
            available=room,
            left=left,
            name="vram_budget",
        )
        return _line(shape, str(budget), size, behind, size <= room, routing, link, measured)

    chosen = line(vram_budget)
    usual: list[Budget] = [s for s in SHARES if float(s[:-1]) / 100 * info.slot_bytes >= info.least_budget]
    lines = [chosen if budget == vram_budget else line(budget) for budget in usual]
    lines += [chosen] if vram_budget not in (*usual, "auto") else []
    lines.append(chosen if vram_budget == "auto" else line("auto"))
    return GpuPlan(
        shape,
        device,
        link,
        n_ctx,
        needs,
        left,
        ram,
        routing_words,
        measured,
        chosen,
        lines,
        largest_context(shape, sizes, device.free_bytes),
    )


def _line(
    shape: ModelShape,
    name: str,
    vram_bytes: int,
    ram_bytes: int,
    fits: bool,
    routing: Routing,
    link: LinkSpeed | None,
    measured: GpuMeasured | None,
) -> GpuLine:
    info = shape.info
    slots = shape.slots(vram_bytes)
    # The engine divides RAM as it divides VRAM, and takes whole slots.
    ram_slots = [int(ram_bytes / info.slot_bytes * c.n_expert * len(c.layers) + 1e-6) for c in shape.classes]
    decode, read = routing.decode_tiers([c.layers for c in shape.classes], slots, ram_slots)
    uses = float(decode.wanted.sum())
    missing, from_disk = float(decode.per_layer.sum()), float(read.sum())
    time = None
    if measured is not None:
        costs = measured.costs(shape, link)
        time = token_time(costs, info.n_layer, missing, from_disk, everything=sum(slots) >= info.n_experts_total)
    return GpuLine(
        name=name,
        vram_bytes=vram_bytes,
        ram_bytes=ram_bytes,
        slots=sum(slots),
        ram_slots=sum(ram_slots),
        fits=fits,
        shares=(1 - missing / uses, (missing - from_disk) / uses, from_disk / uses),
        missing=missing,
        time=time,
    )
