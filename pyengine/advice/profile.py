"""What is kept about a model between runs, so that the next start is warm: experts its user's texts use, the last
tokens' routing, the cache policy that did best with them.

A NumPy .npz archive in the cache folder. `meta` is UTF-8 JSON as bytes: format, version, the model's numbers, and
Profile's own; the arrays are those of Profile. Written whole or not at all. Of two processes with the same model each
adds its uses to what the file holds when it ends; should both do so at the same moment, the last one's stays, which
loses a little of what was learned. A file that is damaged, foreign or of another version is as good as none.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.cache import cache_dir
from pyengine.native import ModelInfo
from pyengine.whole_file import written_whole

FORMAT, VERSION = "pyengine profile", 1

#: Decoded tokens whose routing is kept.
RECENT = 1024
#: A run of fewer decoded tokens says too little.
LEAST_TOKENS = 32
#: Tokens that the shares of uses stand for at most: older ones fade. Some sessions' worth.
_MEMORY = 4096
#: Of the model file, what its digest is made of: the metadata, which begins the file.
_HEAD = 1 << 16
_MOST_BYTES = 1 << 28
_FAULTS = (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RecursionError)


@dataclass(frozen=True, eq=False)
class Profile:
    uses: npt.NDArray[np.float32]
    """float32 [n_layer, n_expert]: of a layer's uses by decoded tokens, the share of each expert"""
    recent: npt.NDArray[np.uint16]
    """uint16 [n_token, n_layer, n_expert_used]: experts of the last decoded tokens, at most RECENT of them"""
    n_token: int = 0
    """tokens that `uses` stands for"""
    policy: str = ""
    """the cache policy chosen last; empty if none was chosen yet"""
    unjudged: int = 0
    """tokens since policies were last compared"""
    first_layer: npt.NDArray[np.int16] | None = None
    """int16 [n_vocab, n_expert_used]: what the first layer's router chose for each token id, -1 where it is not known;
    None: nobody has looked"""


def profile_file(model: Path, experts_used: int | None = None) -> Path:
    """Where the profile of this model file (of a split model: its first) is kept; files of the same name and size still
    differ by their metadata. `experts_used`: by a token, if llama.cpp is told another number than the file says.
    Raises OSError: no such model."""
    with model.open("rb") as file:
        digest = hashlib.blake2b(file.read(_HEAD), digest_size=8).hexdigest()
    apart = "" if experts_used is None else f"-{experts_used}used"
    return cache_dir() / "profiles" / f"{model.stem}-{model.stat().st_size:x}-{digest}{apart}.npz"


def load_profile(path: Path, info: ModelInfo) -> Profile | None:
    """The profile in a file; None if there is no usable one of such a model."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES)
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            meta = json.loads(bytes(archive["meta"]).decode("utf-8"))
            profile = Profile(
                uses=archive["uses"],
                recent=archive["recent"],
                n_token=meta["n_token"],
                policy=meta["policy"],
                unjudged=meta["unjudged"],
                first_layer=archive["first_layer"] if "first_layer" in archive.files else None,
            )
        sound = all(meta[key] == value for key, value in _of(info).items()) and _sound(profile, info)
    except (*_FAULTS, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None
    return profile if sound else None


def update_profile(path: Path, info: ModelInfo, run: Profile) -> None:
    """Add what a run has shown to the profile in `path`.

    Args:
        run: `uses` of this run alone; what is None or empty in it stays as it was.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    profile = merged(load_profile(path, info), run)
    arrays: dict[str, Any] = {"uses": profile.uses.astype(np.float32), "recent": profile.recent.astype(np.uint16)}
    if profile.first_layer is not None:
        arrays["first_layer"] = profile.first_layer.astype(np.int16)
    numbers = {"n_token": profile.n_token, "policy": profile.policy, "unjudged": profile.unjudged}
    meta = json.dumps(_of(info) | numbers).encode()
    # Should the machine fail now, checksums tell, and the next start is cold.
    with written_whole(path, durable=False) as file:
        np.savez(file, meta=np.frombuffer(meta, np.uint8), **arrays)


def merged(old: Profile | None, run: Profile) -> Profile:
    """What is known after a run: the more tokens it had, the more its uses count."""
    if old is None:
        return run
    known, new = float(min(old.n_token, max(0, _MEMORY - run.n_token))), float(run.n_token)
    share = new / (known + new) if known + new else 0.0
    # A layer without uses, of a model that was stopped early, adds nothing.
    seen = run.uses.sum(axis=1, keepdims=True) > 0
    return Profile(
        uses=np.where(seen, (1 - share) * old.uses + share * run.uses, old.uses).astype(np.float32),
        recent=run.recent if len(run.recent) else old.recent,
        n_token=min(_MEMORY, old.n_token + run.n_token),
        policy=run.policy or old.policy,
        unjudged=run.unjudged,
        first_layer=old.first_layer if run.first_layer is None else run.first_layer,
    )


def _of(info: ModelInfo) -> dict[str, Any]:
    model = {"n_layer": info.n_layer, "n_expert": info.n_expert, "n_expert_used": info.n_expert_used}
    return {"format": FORMAT, "version": VERSION, **model}


def _sound(profile: Profile, info: ModelInfo) -> bool:
    """Whether everything is of the kind and in the range that Profile says."""
    uses, recent, first = profile.uses, profile.recent, profile.first_layer
    width = info.n_expert_used
    return (
        all(type(n) is int and n >= 0 for n in (profile.n_token, profile.unjudged))
        and isinstance(profile.policy, str)
        and uses.dtype == np.float32
        and uses.shape == (info.n_layer, info.n_expert)
        and bool(np.isfinite(uses).all())
        and float(uses.min()) >= 0
        and recent.dtype == np.uint16
        and recent.shape[1:] == (info.n_layer, width)
        and len(recent) <= RECENT
        and int(recent.max(initial=0)) < info.n_expert
        and (
            first is None
            or (
                first.dtype == np.int16
                and (first.ndim, first.shape[-1]) == (2, width)
                and int(first.min(initial=0)) >= -1
                and int(first.max(initial=0)) < info.n_expert
            )
        )
    )
