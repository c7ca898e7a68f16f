"""`gguf_tools verify`: is a bundle sound, and does it belong to the model?"""

from __future__ import annotations

from pathlib import Path

import click

EXIT_DAMAGED = 4
EXIT_STALE = 5
_MOST_NAMED = 20


@click.command("verify", short_help="Check every record of a bundle.")
@click.argument("path", metavar="BUNDLE|MODEL", type=click.Path(path_type=Path))
@click.option("-m", "--model", metavar="MODEL", type=click.Path(path_type=Path), help="Compare it with this model.")
@click.option("--refresh", is_flag=True, help="If every record is the model's, make the bundle fit it again.")
@click.option("-q", "--quiet", is_flag=True, help="Say only what is wrong.")
@click.pass_context
def command(ctx: click.Context, path: Path, model: Path | None, refresh: bool, quiet: bool) -> None:
    """Read every record of a bundle and compare it with its checksum; with a model also with what the model gives.

    A MODEL's name stands for its bundle, beside it or in the cache folder. --refresh is for a model that was copied or
    touched: the bundle takes over its new date once everything is found equal.

    Exit code: 0 the bundle is sound, and fits the model if one is given; 4 it is damaged or unfinished; 5 it is sound
    and does not fit.
    """
    from gguf_tools.bundles.check import refresh as write_identity
    from gguf_tools.bundles.check import verify_bundle
    from gguf_tools.bundles.format import BundleError
    from gguf_tools.bundles.model import prepare
    from gguf_tools.bundles.progress import no_progress
    from gguf_tools.bundles.shelf import bundle_of, is_model
    from gguf_tools.cli.progress import byte_progress

    if is_model(path):
        if model is not None:
            raise click.UsageError("name the model once.")
        path, model = bundle_of(path), path
    if refresh and model is None:
        raise click.UsageError("--refresh needs the model.")
    prepare()
    try:
        verdict = verify_bundle(path, model, no_progress if quiet else byte_progress)
    except BundleError as error:
        click.echo(f"{path}: {error}", err=True)
        ctx.exit(EXIT_DAMAGED)
    for title, places in (("damaged", verdict.damaged), ("not the model's", verdict.differing)):
        for block, expert in places[:_MOST_NAMED]:
            click.echo(f"{path}: {title}: layer {block}, expert {expert}", err=True)
        if len(places) > _MOST_NAMED:
            click.echo(f"{path}: {title}: {len(places) - _MOST_NAMED} more", err=True)
    if verdict.missing:
        click.echo(f"{path}: unfinished: {verdict.missing:,} of {verdict.records:,} records are missing", err=True)
    if not verdict.whole:
        click.echo(f"{path}: damaged; `gguf_tools bundle` makes it anew", err=True)
        ctx.exit(EXIT_DAMAGED)
    if model is not None and verdict.unlike and refresh and verdict.compared and not verdict.differing:
        write_identity(path, model)
        verdict.unlike = []
        click.echo(f"{path}: refreshed")
    if verdict.differing or verdict.unlike:
        for reason in verdict.unlike:
            click.echo(f"{path}: {reason}", err=True)
        equal = verdict.compared and not verdict.differing and not refresh
        click.echo(
            f"{path}: stale; "
            + ("its records are the model's, --refresh makes it fit" if equal else "`gguf_tools bundle` makes it anew"),
            err=True,
        )
        ctx.exit(EXIT_STALE)
    if not quiet:
        fits = f" and as {model} gives them" if model is not None else ""
        click.echo(f"{path}: all {verdict.records:,} records are sound{fits}")
