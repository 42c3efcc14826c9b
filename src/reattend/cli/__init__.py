"""The command line. Nothing here imports torch before a command needs it."""

import logging
import os
import sys
import traceback
import warnings
from typing import Any

import click

import reattend
from reattend import processes
from reattend.cli.commands import COMMANDS
from reattend.cli.signals import Stopped, stopping
from reattend.cli.streams import flush_output, open_streams, tell
from reattend.errors import ReattendError

# Third-party chatter is kept off the terminal: these libraries read the environment at import.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
          "LOGURU_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false", "BITSANDBYTES_NOWELCOME": "1",
          "TQDM_DISABLE": "1", "TQDM_DELAY": "1e9"}  # fmt: skip
_LOGGERS = ("bitsandbytes", "lm_eval")
# The delay is for bars whose caller says disable=False, which wins over the environment.
_asked = {"debug": False, "command": ""}  # what the line said that is being run, as far as it was parsed


def _debug(context: click.Context, option: click.Parameter, chosen: bool) -> None:
    if chosen:
        _asked["debug"] = True
        _unsilence()


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"], is_flag=True, is_eager=True, expose_value=False, callback=_debug,
        help="Show tracebacks and other libraries' messages.",
    )  # fmt: skip


def _not_empty(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value == "":
        raise click.BadParameter("it is empty", context, parameter)
    return value


def _complete(command: click.Command) -> click.Command:
    """Give a command, and those below it, what all of them have."""
    command.params.append(_debug_option())
    for parameter in command.params:
        if isinstance(parameter.type, click.types.StringParamType) and parameter.callback is None:
            parameter.callback = _not_empty
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        _complete(below)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(reattend.__version__, prog_name="reattend")
@click.pass_context
def cli(context: click.Context) -> None:
    """Rewrite a pretrained checkpoint by a recipe, and prove what the rewrite did."""
    _asked["command"] = context.invoked_subcommand or ""
    if not _asked["debug"]:
        _silence()


for command in COMMANDS:
    cli.add_command(command)
_complete(cli)


def _silence() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _unsilence() -> None:
    """Take back `_silence`, for a --debug that comes after the command."""
    for name, value in _QUIET.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)
    warnings.resetwarnings()


def main() -> None:
    """Run the command line: exit 0 done, 1 failure, 2 usage or refusal, 128 + a signal's number."""
    open_streams()
    _asked.update(debug=False, command="")
    code = _run()
    if not flush_output() and code == 0:
        _tell("the output could not be written to standard output, and is lost")
        code = 1
    sys.exit(code)


def _run() -> int:
    try:
        with stopping():
            code = cli(prog_name="reattend", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        tell(error.format_message())
        return error.exit_code
    except click.ClickException as error:
        _tell(_usage(error))
        return error.exit_code
    except (Stopped, click.Abort, KeyboardInterrupt) as error:
        kept = ": --resume goes on with what was written" if _asked["command"] in ("apply", "convert", "heal") else ""
        _tell(f"interrupted{kept}")
        return error.exit_code if isinstance(error, Stopped) else 130
    except Exception as error:  # noqa: BLE001 (told in one line, whatever it is)
        if _asked["debug"]:
            traceback.print_exc()
        known = isinstance(error, ReattendError)
        _tell(str(error) if known else f"{type(error).__name__}: {error} (run with --debug for the traceback)")
        return error.exit_code if isinstance(error, ReattendError) else 1


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return error.format_message() + (f" (see {context.command_path} --help)" if context else "")


def _tell(message: str) -> None:
    who = f" (process {processes.rank()})" if processes.count() > 1 else ""
    tell(f"reattend: error{who}: {' '.join(message.split())}")
