"""Signals that end a run are exceptions, so that what it holds is released on the way out."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # some systems lack the last


class Stopped(BaseException):
    """A signal asked the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def _stop(number: int, frame: Any) -> NoReturn:
    raise Stopped(number)


@contextmanager
def stopping() -> Iterator[None]:
    """Raise `Stopped` on a signal; one that is ignored (nohup, a job in the background) stays so."""
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
