"""The standard streams, where one may be closed, full, or a pipe that nobody reads any more."""

import errno
import io
import os
import sys

import click

from reattend.errors import Failure


class _Closed(io.TextIOBase):
    """Stands for a stream that was closed before the program began."""

    def write(self, text: str) -> int:
        """Fail as the closed stream would."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def open_streams() -> None:
    """Occupy closed descriptors, or the next file opened, an output even, would be taken for the stream."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = _Closed()


def put(text: str, *, nl: bool = True) -> None:
    """Print a part of the report."""
    try:
        click.echo(text, nl=nl)
    except OSError as error:
        raise Failure(f"the report can't be written to standard output: {error.strerror or error}") from error


def tell(message: str) -> None:
    """Write a line to standard error; where that is impossible, nothing depends on it."""
    try:
        click.echo(message, err=True)
    except (OSError, ValueError):
        _abandon(2)


def flush_output() -> bool:
    """Whether all that was printed reached standard output; what did not is given up."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _abandon(1)
        return False
    return True


def _abandon(descriptor: int) -> None:
    """Let what is still buffered go nowhere, or the interpreter would complain at its end."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
    except OSError:
        pass
