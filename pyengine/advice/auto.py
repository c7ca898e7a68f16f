"""What the policy "auto" is: it begins with what earlier runs have left, chooses a cache policy by the tokens that
come, and leaves what it has learned. Only "auto" reads and writes profiles: who names a policy gets the same from every
start."""

from __future__ import annotations

import atexit
import contextlib
import os
from dataclasses import replace
from pathlib import Path

from pyengine.advice.choosing import Chooser
from pyengine.advice.first_layer import FirstLayer
from pyengine.advice.first_looks import FirstLooks
from pyengine.advice.keeper import Keeper
from pyengine.advice.profile import LEAST_TOKENS, Profile, load_profile, profile_file, update_profile
from pyengine.native import ModelInfo, NativeEngine
from pyengine.policies import DEFAULT_POLICY, candidates
from pyengine.traces.routing_log import RoutingLog


class AutoPolicy:
    """
    Args:
        model: its GGUF file, of a split model the first.
        learned: the file of the policy learned for it; None: there is none.
        experts_used: by a token, where it is not as the file says: such runs learn apart.

    Attributes:
        profile: what earlier runs have left; None: nothing.
        first_layer: whoever guesses about the first layer; what it learns is kept. None: nobody.
    """

    def __init__(
        self,
        native: NativeEngine,
        info: ModelInfo,
        log: RoutingLog,
        model: Path,
        learned: Path | None = None,
        experts_used: int | None = None,
    ) -> None:
        self._info = info
        self._owner = os.getpid()
        self._path: Path | None = None
        self.profile: Profile | None = None
        with contextlib.suppress(OSError):  # the model file was removed meanwhile
            self._path = profile_file(model, experts_used)
            self.profile = load_profile(self._path, info)
        judged = self.profile is not None and self.profile.policy in candidates(learned)
        first = self.profile.policy if self.profile is not None and judged else DEFAULT_POLICY
        self._keeper = Keeper(native, info, log, first, learned, instead_of_lru=DEFAULT_POLICY)
        self._chooser = Chooser(native, info, self._keeper, self.profile)
        log.listen(self._chooser)  # after the keeper, which a new policy replaces between two tokens
        if not judged:
            chooser = self._chooser
            log.listen(FirstLooks(native, info, self._keeper, chooser.recent, lambda: chooser.judged))
        self.first_layer: FirstLayer | None = None
        if self.profile is not None:
            self._keeper.begin_warm(self.profile.recent, self.profile.uses)
        self._chooser.begin()
        # Who never closes a model ends when the interpreter can no longer write a file.
        atexit.register(self.close)

    @property
    def policy(self) -> str:
        """The name of the policy in use."""
        return self._keeper.policy

    def refill(self) -> None:
        """There may be more slots: let the engine read the best of what is missing. From any thread."""
        self._keeper.refill()

    def close(self) -> None:
        """Keep what this run has shown, if that is enough to say something. Harmless when repeated, and in a forked
        child."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner:
            return
        self._chooser.stop()
        path, self._path = self._path, None
        if path is None or self._chooser.n_token < LEAST_TOKENS:
            return
        run = self._chooser.learned()
        table = None if self.first_layer is None else self.first_layer.table
        with contextlib.suppress(OSError):  # a full disk, say: the next start is as this one was
            update_profile(path, self._info, replace(run, first_layer=table))
