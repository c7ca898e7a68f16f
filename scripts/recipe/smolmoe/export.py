"""Step 5: trained weights to a GGUF file in the layout of Mixtral, quantised."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from .checkpoint import load_tensors
from .config import WEIGHT_BITS, ExpertLayout

_TYPES = {4: GGMLQuantizationType.Q4_0, 5: GGMLQuantizationType.Q5_0}
_REPLACED_KEYS = {
    "general.architecture",
    "general.name",
    "general.basename",
    "general.finetune",
    "general.size_label",
    "general.file_type",
    "general.organization",
    "llama.feed_forward_length",
}
"""keys of the base that would be wrong in the new file"""


def stored_type(tensor_name: str) -> GGMLQuantizationType:
    """The type in the file of a tensor by its full GGUF name, such as "blk.3.attn_q.weight"."""
    bits = WEIGHT_BITS.get(tensor_name.split(".")[-2])
    return GGMLQuantizationType.F32 if bits is None else _TYPES[bits]


def write_gguf(
    base: Path, tensors: dict[str, NDArray[np.float32]], out: Path, layout: ExpertLayout | None = None
) -> None:
    """Write the model file.

    Args:
        base: GGUF of the dense model, whose tokenizer and hyper-parameters are copied.
        tensors: float32 weights under their GGUF names, in the order of the file; expert matrices are
            [n_expert, rows, columns].
        out: the file to write.
        layout: the experts' number and size.
    """
    layout = layout or ExpertLayout()
    writer = GGUFWriter(out, "llama")
    _describe(writer, layout)
    _copy_metadata(GGUFReader(base), writer)
    writer.add_feed_forward_length(layout.width)
    writer.add_expert_count(layout.n_expert)
    writer.add_expert_used_count(layout.n_used)
    for name, values in tensors.items():
        kind = stored_type(name)
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: GGUFWriter, layout: ExpertLayout) -> None:
    writer.add_name(f"SmolMoE 162M-A82M Instruct ({layout.n_expert} experts, {layout.n_used} used)")
    writer.add_basename("SmolMoE")
    writer.add_finetune("Instruct")
    writer.add_size_label("162M-A82M")
    writer.add_description(
        f"SmolLM2-135M-Instruct upcycled to a mixture of experts ({layout.n_expert} experts of {layout.width} neurons "
        f"a layer, top {layout.n_used}) and distilled from it"
    )
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "SmolLM2 135M Instruct")
    writer.add_base_model_organization(0, "HuggingFaceTB")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_0))


def _copy_metadata(base: GGUFReader, writer: GGUFWriter) -> None:
    for field in base.fields.values():
        if field.name.startswith("GGUF.") or field.name in _REPLACED_KEYS:
            continue
        kind = field.types[0]
        element_kind = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element_kind)


def export(base: Path, weights: Path, out: Path) -> None:
    """Write the GGUF for the weights that `train` saved as .npz."""
    write_gguf(base, load_tensors(weights), out)
    print(f"{out}: {out.stat().st_size} bytes")
