"""The command `report`."""

from typing import Any

import click

from reattend import processes
from reattend.cli.console import progress, show
from reattend.cli.recipes import as_json
from reattend.errors import Failure
from reattend.modeling.dtypes import DTYPES


@click.command()
@click.argument("out")
@click.option("--against", metavar="MODEL", help="The source, to compare with.")
@click.option("--text", metavar="TEXT", help="UTF-8 file to measure perplexity on, or dataset:PATH.")
@click.option("--window", type=click.IntRange(2), default=2048, show_default=True, help="Tokens in a window.")
@click.option("--windows", type=click.IntRange(1), help="Windows to measure [default: all].")
@click.option("--dtype", default="auto", show_default=True, help=", ".join(DTYPES))
@click.option("--outliers", is_flag=True, help="Also inf-norms, kurtosis and attention to the first token, by layer.")
@click.option("--device", default="cpu", show_default=True, help="Where models run: cpu, cuda:0.")
@click.option("--base-model", "base", metavar="ORG/NAME", help="The base model on the Hub, for the card.")
@click.option(
    "--repository", metavar="ORG/NAME", help="Where OUT will be pushed, for the card [default: its folder]."
)
@as_json
def report(out: str, as_json: bool, **options: Any) -> None:
    """Verify and measure OUT; leave report.json, REPORT.md, plots and a model card (README.md) in it."""
    import reattend
    from reattend.reporting.figures import summary

    with progress() as told:
        content = reattend.report(out, progress=told, **options)
    if processes.rank():
        return
    show(content if as_json else {"out": out, **summary(content)}, as_json=as_json)
    problems = content["verification"]["problems"]
    if problems:
        raise Failure(f"{out}: {len(problems)} problems, the first: {problems[0]}")
