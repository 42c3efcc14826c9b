"""The command `push`."""

from typing import Any

import click

from reattend.cli.console import progress, show
from reattend.cli.recipes import as_json


@click.command()
@click.argument("out")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--revision", metavar="BRANCH", help="A branch, made where it is not [default: main].")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--overwrite", is_flag=True, help="Also into a repository that holds another model.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent; nothing is created or sent.")
@as_json
def push(out: str, repository: str, as_json: bool, **options: Any) -> None:
    """Push OUT, verified and reported, to ORG/NAME on the Hub; an interrupted push is gone on with by another."""
    import reattend

    with progress() as told:
        done = reattend.push(out, repository, progress=told, **options)
    show(done, as_json=as_json)
