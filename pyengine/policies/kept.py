"""What the learned policy knows about a model, as a file in the cache folder; `pyengine learn-policy` makes it.

A NumPy .npz archive. `meta` is UTF-8 JSON as bytes: format, version, and the model it belongs to; the arrays are those
of LearnedPolicy.save(). Written whole or not at all.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyengine.cache import cache_dir
from pyengine.errors import UsageError
from pyengine.policies.learned import LearnedPolicy, LearnedPolicyError
from pyengine.policies.policy import CacheShape
from pyengine.whole_file import written_whole

if TYPE_CHECKING:
    from pyengine.native import ModelInfo
    from pyengine.traces import TracedModel

FORMAT, VERSION = "pyengine learned cache policy", 2
#: The word that stands for it wherever a policy is named; "learned:FILE" names the file, too.
LEARNED = "learned"

#: Bound on what a file may claim, so that a hostile one cannot take the memory.
_MOST_BYTES = 1 << 28
_DAMAGE = (
    *(ValueError, KeyError, TypeError, EOFError, NotImplementedError, RuntimeError, SyntaxError, RecursionError),
    *(zipfile.BadZipFile, zlib.error, MemoryError, OSError),
)


def policy_file(model: Path) -> Path:
    """Where the learned policy of this model file (of a split model: its first) is kept; files are told apart as their
    profiles are. Raises OSError: no such model."""
    from pyengine.advice.profile import profile_file  # replaying a trace needs no native engine

    return cache_dir() / "policies" / profile_file(model).name


def save_policy(path: Path, model: TracedModel, learned: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write what LearnedPolicy.save() gave; a file of that name is replaced at once or not at all. Raises OSError."""
    meta = json.dumps({"format": FORMAT, "version": VERSION, "model": asdict(model)}).encode()
    with written_whole(path) as file:
        np.savez(file, meta=np.frombuffer(meta, np.uint8), **dict(learned))  # type: ignore[arg-type]


def load_policy(path: Path, shape: CacheShape) -> LearnedPolicy:
    """A fresh policy that knows what the file says.

    Raises:
        OSError: the file cannot be read.
        LearnedPolicyError: it holds no learned policy, is damaged, or belongs to a model of another shape.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise LearnedPolicyError("it is absurdly large")
        with np.load(io.BytesIO(content), allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
        meta = json.loads(bytes(arrays.pop("meta")).decode("utf-8"))
        if meta["format"] != FORMAT or meta["version"] != VERSION:
            raise LearnedPolicyError("it has another format or version")
        model = meta["model"]
        if (model["n_layer"], model["n_expert"]) != (shape.n_layer, shape.n_expert) or not arrays:
            raise LearnedPolicyError("it belongs to a model of another shape")
        if any(a.dtype != np.dtype("<f2") for a in arrays.values()):
            raise LearnedPolicyError("its numbers are not what they should be")
        return LearnedPolicy(shape, arrays)
    except LearnedPolicyError as error:
        raise LearnedPolicyError(f"{path} holds no usable cache policy: {error}") from error
    except _DAMAGE as error:
        raise LearnedPolicyError(f"{path} holds no usable cache policy: damaged") from error


def learned_for(policy: str, model: Path, info: ModelInfo) -> Path | None:
    """The file that the policy "auto", "learned" or "learned:FILE" can use for a model; None if "auto" has none and
    for every other policy.

    Raises:
        UsageError: "learned" is wanted, but nothing was learned for this model.
        OSError, LearnedPolicyError: FILE cannot be used.
    """
    kind, _, file = policy.partition(":")
    if policy != "auto" and kind != LEARNED:
        return None
    shape = CacheShape(info.n_layer, info.n_expert, info.n_expert_used, info.n_layer)
    if file:
        load_policy(Path(file), shape)
        return Path(file)
    try:
        path = policy_file(model)
        load_policy(path, shape)
    except (OSError, LearnedPolicyError) as error:
        if policy == LEARNED:
            raise UsageError(
                f"no cache policy was learned for {model.name} yet; "
                f"`pyengine learn-policy TRACE -m {model.name}` does it, from a trace of `pyengine run --trace`"
            ) from error
        return None
    return path
