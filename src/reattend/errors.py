"""The two ways in which a request ends badly, and their exit codes."""

from typing import ClassVar


class ReattendError(Exception):
    """Base of the errors that a user can act on; the message is one line."""

    exit_code: ClassVar[int] = 1


def first_line(error: Exception) -> str:
    """Return the first line of a foreign error's message, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Refusal(ReattendError, ValueError):
    """The input can't be taken: the message names the file, tensor or key. Nothing was written."""

    exit_code = 2


class DeadEndError(Refusal):
    """What only reading or running the weights can tell, and no run can get around: nothing is kept for `resume`."""


class BadNumbersError(DeadEndError):
    """The weights hold NaN or inf, or make them."""


class Failure(ReattendError, RuntimeError):
    """The work was started and did not succeed."""
