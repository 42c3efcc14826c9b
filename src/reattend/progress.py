"""How long-running work tells how far it is."""

from collections.abc import Callable

# Called with the phase ("rewriting", "calibrating", "evaluating"), and what is done of the total.
Progress = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """Tell nobody."""
