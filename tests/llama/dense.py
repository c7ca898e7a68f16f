"""A tiny random model without experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.architecture import model_keys, model_tensors
from models.container import write_tensors
from models.generator import Plan, open_writer, plan_model
from models.layout import ExpertLayout
from models.weights import encode, random_values


def write_dense_model(path: Path) -> Path:
    """Write a llama model whose blocks all have a dense FFN."""
    plan = plan_model("llama", n_layer=2, n_embd=64, n_ff=32)
    dims = replace(plan.dims, n_dense_lead=plan.dims.n_layer, n_expert=0, n_expert_used=0)
    arch = replace(plan.arch, experts_are_ff=False)
    tensors = tuple(model_tensors(arch, dims, ExpertLayout()))
    types = {t.name: "F16" if t.role in ("matrix", "embedding", "output") else "F32" for t in tensors}
    specs = {t.name: t for t in tensors}
    dense = Plan(arch, dims, tensors, types)
    assert not [name for name in specs if "exps" in name]
    assert model_keys(arch, dims)["expert_count"] == 0
    write_tensors(
        open_writer(path, dense), dense.encoded(), lambda t: encode(random_values(specs[t.name], 0), types[t.name])
    )
    return path
