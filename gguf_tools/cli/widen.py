"""`gguf_tools widen`: the same model with larger experts."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("widen", short_help="Make experts larger without changing what the model says.")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--ff", "n_ff", type=click.IntRange(min=1), required=True, metavar="N", help="Neurons of an expert's hidden layer."
)
@click.option("-f", "--force", is_flag=True, help="Replace OUT if it exists.")
def command(source: Path, target: Path, n_ff: int, force: bool) -> None:
    """Write OUT, which says what IN says with experts of N neurons each.

    New neurons repeat an expert's own and have no weight in its output: routing and text stay those of IN, while the
    experts get the size of larger models'. Choose N as a multiple of 32, or of 256 for K types. IN may be the first
    file of a split model; OUT is one file.
    """
    from gguf_tools.cli.progress import byte_progress
    from gguf_tools.new_file import check_free
    from gguf_tools.widen import plan_widening

    check_free(target, force=force)
    widening = plan_widening(source, n_ff)
    for remark in widening.remarks:
        click.echo(f"note: {remark}", err=True)
    with byte_progress(f"Writing {target.name}", widening.tensor_bytes) as advance:
        widening.write(target, advance, force=force)
    before = " or ".join(map(str, widening.n_ff_before))
    click.echo(
        f"{target}: {widening.file_bytes / 1e9:.2f} GB, experts of {before} neurons widened to {n_ff} "
        f"({widening.expert_bytes_before / 1e9:.2f} to {widening.expert_bytes / 1e9:.2f} GB)"
    )
