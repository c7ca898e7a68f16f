"""`gguf_tools bundle --list` and `--remove`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

_PIPE_WIDTH = 5000  # columns where there is no terminal to ask: a program that reads a path wants it on one line


def show_list(models: tuple[Path, ...]) -> None:
    """A table of the bundles in the cache folder and of those of the models."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from gguf_tools.bundles.model import prepare
    from gguf_tools.bundles.shelf import shelved
    from pyengine.bundles import cache_folder

    prepare()
    found = shelved(models)
    if not found:
        click.echo(f"no bundles in {cache_folder()}" + (" and none of these models" if models else ""))
        return
    bold = "" if os.environ.get("NO_COLOR") else "bold"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style=bold)
    for column in ("bundle", "size", "layout", "order", "model", "state"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for b in found:
        model = b.model.name if b.model is not None else ""
        table.add_row(str(b.path), f"{b.file_bytes / 1e9:.2f} GB", b.layout, b.order, model, b.state)
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def remove_bundles(names: tuple[Path, ...]) -> None:
    """Remove the bundles that names stand for; without names all in the cache folder."""
    from gguf_tools.bundles.shelf import chosen, files_in_cache, remove

    files = chosen(names) if names else files_in_cache()
    if not files:
        click.echo("there is nothing to remove")
    for path in files:
        n_bytes = remove(path)
        click.echo(f"removed {path} ({n_bytes / 1e9:.2f} GB)")
