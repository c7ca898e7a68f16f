"""`--bundle auto`: asks once whether to make a bundle, and has it made while the command runs."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyengine.cli.options import ModelOptions
from pyengine.cli.output import is_terminal, notice

if TYPE_CHECKING:
    from pyengine import Llama
    from pyengine.background_bundle import Offer


@contextlib.contextmanager
def bundle_made_meanwhile(llm: Llama, options: ModelOptions) -> Iterator[None]:
    """With `--bundle auto`, make the model's bundle during the block if that pays and the user agrees; what is not done
    when the block ends is left for the next time. Says in one line why none is made.

    Raises:
        UsageError: the cap is not understood.
    """
    if options.bundle != "auto":
        yield
        return
    from pyengine.background_bundle import BackgroundBundle, consider

    offer = consider(llm.engine, Path(llm.model_path), options.bundle_cap)
    if isinstance(offer, str):
        if llm.engine is None or llm.expert_stats()["bundle"] is None:  # else there is nothing to say
            notice(f"no bundle is made: {offer}")
        yield
        return
    if not _agreed(offer, options.yes):
        yield
        return
    log = logging.getLogger("pyengine")
    work = BackgroundBundle(offer, lambda line: log.warning("%s", line))
    notice(f"{'going on with' if offer.begun else 'making'} the bundle {offer.target} in the background")
    try:
        yield
    finally:
        if work.stop():
            notice(f"the bundle {offer.target.name} is not ready; --bundle auto goes on with it next time")


def _agreed(offer: Offer, yes: bool) -> bool:
    if yes or offer.begun:
        return True
    if is_terminal(sys.stdin) and is_terminal(sys.stderr):
        return click.confirm(offer.question, err=True)
    from pyengine.background_bundle import format_size

    notice(f"no bundle is made: nobody is there to agree; --yes makes {offer.target} ({format_size(offer.n_bytes)})")
    return False
