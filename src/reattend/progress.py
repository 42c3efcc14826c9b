"""How long-running work tells how far it is."""

from collections.abc import Callable

# Called with the phase ("rewriting", "calibrating", "evaluating"), and what is done of the total. A first call
# at the start of a phase says what an earlier run had done: rates count from there.
Progress = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """Tell nobody."""
