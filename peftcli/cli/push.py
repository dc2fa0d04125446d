"""``peftcli push``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, Quiet, progress_log
from peftcli.data.rows import count_of


def push(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder or hub id.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="USER/NAME on the hub; created if missing.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Visibility of a repository that this push creates.")
    ] = True,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; created if missing. Commands read it as USER/NAME@BRANCH.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="First line of the commit message.")] = None,
    base_model_id: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Hub id of the base model, if the adapter was trained from a folder."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files; upload nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an adapter and its model card to the hub."""
    tell = progress_log(quiet)
    from dataclasses import asdict

    from peftcli.adapters import load, push

    pushed = push.push(
        load.adapter_folder(adapter),
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        dry_run=dry_run,
        base_model_id=base_model_id,
    )
    if as_json:
        console.print_json(asdict(pushed))
        return
    if dry_run:
        if console.is_terminal(sys.stdout):
            console.markdown(pushed.card)
        tell = console.out  # the list is the answer
    for name in pushed.files:
        tell(name)
    files, visibility = count_of(len(pushed.files), "file"), "private" if pushed.private else "public"
    tell(f"{'would upload' if dry_run else 'uploaded'} {files}, {pushed.bytes:,} bytes, {visibility}")
    console.out(pushed.url)
