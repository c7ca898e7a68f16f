"""`gguf_tools synthesize`: a model of a real shape with random weights."""

from __future__ import annotations

from pathlib import Path

import click

from gguf_tools.shapes import SHAPES


@click.command("synthesize", short_help="Make a model of a real shape with random weights.")
@click.argument("shape", metavar="SHAPE", type=click.Choice(list(SHAPES)))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1, 512), metavar="N", help="Layers, if not as many as the real model.")
@click.option(
    "--divide", type=click.IntRange(1, 64), default=1, metavar="N", help="Make all widths smaller by this factor."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides the weights.")
@click.option("-f", "--force", is_flag=True, help="Replace OUT if it exists.")
def command(shape: str, target: Path, layers: int | None, divide: int, seed: int, force: bool) -> None:
    """Write OUT, a model with the sizes and types of a real one and random weights, for measuring speed.

    Its text is meaningless, and so is its routing: take expert ids from a trace. The vocabulary has the real number of
    tokens, most of them fillers.

    \b
    SHAPE is one of gpt-oss-20b (12 GB), qwen3-30b-a3b (17 GB), deepseek-v2-lite (9 GB), mixtral-8x7b (26 GB).
    """
    from gguf_tools.cli.progress import byte_progress
    from gguf_tools.new_file import check_free
    from gguf_tools.synthesize import plan_synthesis

    check_free(target, force=force)
    synthesis = plan_synthesis(shape, layers=layers, divisor=divide, seed=seed)
    with byte_progress(f"Writing {target.name}", synthesis.tensor_bytes) as advance:
        synthesis.write(target, advance, force=force)
    n_layer = synthesis.shape.n_layer
    narrower = "" if divide == 1 else f", 1/{divide} as wide"
    click.echo(
        f"{target}: {synthesis.file_bytes / 1e9:.2f} GB, {n_layer} layer{'' if n_layer == 1 else 's'} in the shape of "
        f"{shape}{narrower}; random weights, text meaningless"
    )
