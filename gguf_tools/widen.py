"""Function-preserving enlargement: experts get neurons, and the model computes what it did.

Each expert's gate and up get rows that repeat its own, so that activations stay in their range, and its down gets
columns of zero bytes, which every ggml type decodes to zero: a new neuron fires and nothing listens (the widening of
Net2Net, Chen et al. 2015, with all of the outgoing weight left to the first copy). Routing and text stay those of the
trained model, and its experts get the size of real ones. Biases of gate and up repeat as the rows do; the bias of down,
the factors of experts and everything else are copied as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_tools.edits import Advance, AppendZeros, RepeatRows
from gguf_tools.errors import ModelFileError, RequestError
from gguf_tools.experts import ExpertTensor, find_experts
from gguf_tools.header import TensorEntry, tensor_bytes
from gguf_tools.model import Model, open_model
from gguf_tools.new_file import check_free
from gguf_tools.rewrite import NewTensor, Rewrite
from gguf_tools.width_keys import changed_keys, shared_experts_that_follow

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

# Kernels sum this many values of a row at a time and the rest apart, so that other widths may round differently.
_FLOAT_STEP, _QUANTISED_STEP = 64, 32


@dataclass(frozen=True)
class Widening:
    """An enlargement that has been found possible.

    n_ff_before: the widths of experts now, one as a rule. remarks: sentences for the user. Sizes in bytes.
    """

    model: Model
    n_ff_before: tuple[int, ...]
    n_ff: int
    expert_bytes_before: int
    expert_bytes: int
    tensor_bytes: int
    remarks: tuple[str, ...]
    rewrite: Rewrite

    @property
    def file_bytes(self) -> int:
        return self.rewrite.file_bytes

    def write(self, path: Path, advance: Advance, *, force: bool = False) -> None:
        """Write the larger model as one file. Holds a few megabytes in memory whatever its size.

        Args:
            path: the new file; it appears when it is complete.
            advance: called with the bytes of tensor data written since the last call, `tensor_bytes` in the end.
            force: replace a file of that name.

        Raises:
            RequestError: the name is taken, the disk is too full, or the file is the model itself.
            OSError: reading or writing failed.
        """
        check_free(path, force=force)
        if path.exists() and any(path.samefile(header.path) for header in self.model.headers):
            raise RequestError(f"{path} is the model itself; give the larger one another name")
        self.rewrite.write(path, advance, force=force)


def plan_widening(source: Path, n_ff: int) -> Widening:
    """See whether all experts of a model can get n_ff neurons, and what that takes.

    Args:
        source: GGUF file, the first one of a split model.
        n_ff: neurons of an expert's hidden layer, at least what it is now and a multiple of the block of down's type.

    Raises:
        ModelFileError: the model is damaged.
        RequestError: it has no experts, or they cannot be given that width.
        OSError: it cannot be read.
    """
    model = open_model(source)
    experts = find_experts(model.tensors.values())
    if not experts:
        raise RequestError(f"{source} has no experts: nothing to widen")
    widths = _widths(model, experts)
    if n_ff < max(widths.values()):
        raise RequestError(f"the experts of {source} have {max(widths.values())} neurons; --ff must not be less")
    shared = shared_experts_that_follow(model, widths)
    changed = [_widened(e.tensor, e.projection, e.bias, n_ff) for e in experts.values()]
    changed += [_widened(t, projection, len(t.shape) == 1, times * n_ff) for t, projection, times in shared.values()]
    by_name = {t.source.name: t for t in changed}
    tensors = [by_name.get(t.name) or NewTensor(t, t.shape) for t in model.tensors.values()]
    return Widening(
        model=model,
        n_ff_before=tuple(sorted(set(widths.values()))),
        n_ff=n_ff,
        expert_bytes_before=sum(e.tensor.n_bytes for e in experts.values()),
        expert_bytes=sum(by_name[name].n_bytes for name in experts),
        tensor_bytes=sum(t.n_bytes for t in tensors),
        remarks=_remarks(changed, bool(shared)),
        rewrite=Rewrite(model, tensors, changed_keys(model, widths, n_ff)),
    )


def _widths(model: Model, experts: dict[str, ExpertTensor]) -> dict[int, int]:
    """The width of the experts of each block that has some."""
    widths: dict[int, int] = {}
    for e in experts.values():
        if e.bias and e.projection == "down":
            continue
        if widths.setdefault(e.block, e.n_ff) != e.n_ff:
            raise ModelFileError(f"{e.tensor.path}: tensor {e.tensor.name} does not fit the others of block {e.block}")
    for block in widths:
        if f"blk.{block}.ffn_down_exps.weight" not in experts:
            raise ModelFileError(f"{model.path}: block {block} has experts without ffn_down")
    return widths


def _widened(tensor: TensorEntry, projection: str, bias: bool, n_ff: int) -> NewTensor:
    """What becomes of a tensor of experts, or of shared ones."""
    if projection == "down":
        if bias:
            return NewTensor(tensor, tensor.shape)
        try:
            new = tensor_bytes((n_ff,), tensor.type)
        except ValueError:
            block = GGML_QUANT_SIZES[tensor.type][0]
            raise RequestError(
                f"{tensor.name} is of type {tensor.type.name}: --ff must be a multiple of {block}"
            ) from None
        return NewTensor(tensor, (n_ff, *tensor.shape[1:]), AppendZeros(tensor.row_bytes, new))
    # The rows of one expert, of gate and of up apart where they are together: a bias has a number for each.
    at = 0 if bias else 1
    parts = 2 if projection == "gate_up" else 1
    row = tensor_bytes((1,), tensor.type) if bias else tensor.row_bytes
    shape = (*tensor.shape[:at], parts * n_ff, *tensor.shape[at + 1 :])
    return NewTensor(tensor, shape, RepeatRows(tensor.shape[at] // parts * row, n_ff * row))


def _remarks(changed: list[NewTensor], shared: bool) -> tuple[str, ...]:
    remarks = []
    if shared:
        remarks.append("Shared experts are widened, too: this architecture makes them as wide as several experts.")
    for t in changed:
        step = _FLOAT_STEP if t.source.type in _FLOATS else _QUANTISED_STEP
        uneven = [width for width in (t.source.shape[0], t.shape[0]) if width % step]
        if isinstance(t.edit, AppendZeros) and uneven:
            remarks.append(
                f"{t.source.name} has or gets rows of {uneven[0]} values, no multiple of {step}: kernels may sum them "
                f"in another order, so logits may differ slightly."
            )
            break
    return tuple(remarks)
