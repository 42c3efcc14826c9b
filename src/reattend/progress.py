"""How long-running work tells how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called with the phase ("rewriting", "calibrating", "healing", "evaluating"), and what is done of the total.

    A first call at the start of a phase says what an earlier run had done: rates count from there. Training, and
    nothing else, also says how it goes, in a `note`.
    """

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Tell."""


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """Tell nobody."""
