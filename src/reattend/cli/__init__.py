"""The command line. Nothing here imports torch before a command needs it."""

import logging
import os
import sys
import warnings

import click

import reattend
from reattend.cli.commands import COMMANDS
from reattend.errors import ReattendError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(reattend.__version__, prog_name="reattend")
@click.option("--debug", is_flag=True, help="Show tracebacks and other libraries' messages.")
def cli(debug: bool) -> None:
    """Rewrite a pretrained checkpoint by a recipe, and prove what the rewrite did."""
    if not debug:
        _silence()


for command in COMMANDS:
    cli.add_command(command)


def _silence() -> None:
    """Keep third-party chatter off the terminal: these libraries read the environment at import."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
             "LOGURU_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false", "BITSANDBYTES_NOWELCOME": "1",
             "TQDM_DISABLE": "1", "TQDM_DELAY": "1e9"}  # fmt: skip
    # The delay is for bars whose caller says disable=False, which wins over the environment.
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main() -> None:
    """Run the command line: exit 0 done, 1 failure, 2 usage or refusal."""
    try:
        cli()
    except ReattendError as error:
        if "--debug" in sys.argv:
            raise
        _tell(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _tell(f"{type(error).__name__}: {error} (run with --debug for the traceback)")
        sys.exit(1)


def _tell(message: str) -> None:
    click.echo(f"reattend: error: {' '.join(message.split())}", err=True)
