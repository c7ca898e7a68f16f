"""What lies in a widened file: copies of rows, zeros in columns, and everything else as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from models.fixtures import ModelFactory

from gguf_tools import edits
from gguf_tools.widen import plan_widening

TIMES = 3

# Peak memory, bytes, that widening may add to what the interpreter with gguf and numpy takes.
MOST_MEMORY = 64 << 20


def tensors_of(files: list[Path]) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for path in files for t in gguf.GGUFReader(path).tensors}


def rows_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Bytes [..., row], numpy's order."""
    raw = np.asarray(tensor.data).view(np.uint8)
    return raw.reshape(*(int(n) for n in reversed(tensor.shape[1:])), -1)


def widened(generated_model: ModelFactory, model_id: str, folder: Path) -> tuple[dict, dict]:
    """The tensors of a generated model, and of the same with experts three times as wide."""
    facts = generated_model(model_id)
    n_ff = max(t.shape[0] for t in facts.expert_tensors if t.projection == "down")
    widening = plan_widening(facts.path, TIMES * n_ff)
    written: list[int] = []
    widening.write(folder / "wide.gguf", written.append)
    assert sum(written) == widening.tensor_bytes
    assert (folder / "wide.gguf").stat().st_size == widening.file_bytes
    assert [p.name for p in folder.iterdir()] == ["wide.gguf"]
    return tensors_of(list(facts.files)), tensors_of([folder / "wide.gguf"])


# The second run has pieces so small that every tensor takes several, and most experts, too.
@pytest.mark.parametrize("piece", [edits.PIECE, 1000])
@pytest.mark.parametrize(
    "model_id",
    [
        "llama",
        "gpt-oss",
        "merged-deepseek2",
        "merged-granite_swa-odd",
        "q4_k_m",
        "odd-f16",
        "split-align64",
        "gaps",
        "scales",
        "no-gate",
    ],
)
def test_rows_repeat_and_columns_are_zero(
    model_id: str, piece: int, generated_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edits, "PIECE", piece)
    before, after = widened(generated_model, model_id, tmp_path)
    assert list(before) == list(after), "the same tensors in the same order"
    changed = set()
    for name, old in before.items():
        new = after[name]
        assert new.tensor_type == old.tensor_type
        if np.array_equal(new.shape, old.shape):
            np.testing.assert_array_equal(rows_of(new), rows_of(old))
            continue
        changed.add(name.split(".", 2)[2])
        if "_down_" in name:
            old_rows, new_rows = rows_of(old), rows_of(new)
            assert new_rows.shape == (*old_rows.shape[:-1], TIMES * old_rows.shape[-1])
            np.testing.assert_array_equal(new_rows[..., : old_rows.shape[-1]], old_rows)
            assert not new_rows[..., old_rows.shape[-1] :].any()
        else:
            # Along the axis of neurons; gate and up apart where they share a tensor.
            old_values, new_values = (np.asarray(t.data) if "bias" in name else rows_of(t) for t in (old, new))
            axis = old_values.ndim - 1 if "bias" in name else old_values.ndim - 2
            parts = np.split(old_values, 2, axis=axis) if "gate_up" in name else [old_values]
            wanted = np.concatenate([part for part in parts for _ in range(TIMES)], axis=axis)
            np.testing.assert_array_equal(new_values, wanted)
    exps = {name.split(".", 2)[2] for name in before if "_exps.weight" in name and "norm" not in name}
    assert changed >= exps
    if model_id == "gpt-oss":
        assert changed == exps | {"ffn_gate_exps.bias", "ffn_up_exps.bias"}


@pytest.mark.parametrize("model_id", ["llama", "gpt-oss", "split"])
def test_all_other_metadata_is_kept(model_id: str, generated_model: ModelFactory, tmp_path: Path) -> None:
    facts = generated_model(model_id)
    widened(generated_model, model_id, tmp_path)
    old, new = (gguf.GGUFReader(path).fields for path in (facts.path, tmp_path / "wide.gguf"))
    left_out = {name for name in old if name.startswith("split.")}
    assert bool(left_out) == (model_id == "split")
    assert [name for name in old if name not in left_out] == list(new)
    differ = {n for n in new if not n.startswith("GGUF.") and old[n].contents() != new[n].contents()}
    # Mixtral's architecture reads the common key, which this generator writes beside that of experts.
    common = {f"{facts.arch}.feed_forward_length"} if model_id == "llama" else set()
    assert differ == {f"{facts.arch}.expert_feed_forward_length"} | common
    assert {new[n].contents() for n in differ} == {TIMES * old[n].contents() for n in differ} and len(differ) > 0


def test_the_present_width_gives_the_same_tensors(generated_model: ModelFactory, tmp_path: Path) -> None:
    """So that widening to it joins a split model."""
    facts = generated_model("split")
    plan_widening(facts.path, 64).write(tmp_path / "joined.gguf", lambda n: None)
    before, after = tensors_of(list(facts.files)), tensors_of([tmp_path / "joined.gguf"])
    assert list(before) == list(after)
    assert all(np.array_equal(before[name].data, after[name].data) for name in before)


def test_memory_stays_small(tmp_path: Path) -> None:
    """Whatever the size: here tensors of 32 MB become ones of 128 MB."""
    from models.big import write_big_model

    source = write_big_model(tmp_path / "big.gguf", 0.05, n_expert=8, n_embd=2048, n_ff=3456)
    assert max(t.n_bytes for t in source.expert_tensors) > 30e6
    script = (
        "import resource, sys; from pathlib import Path; from gguf_tools.widen import plan_widening\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "plan_widening(Path(sys.argv[1]), 13824).write(Path(sys.argv[2]), lambda n: None)\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(source.path), str(tmp_path / "wide.gguf")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "wide.gguf").stat().st_size > 4 * MOST_MEMORY
    assert int(done.stdout) < MOST_MEMORY
