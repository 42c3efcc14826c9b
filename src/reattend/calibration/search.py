"""Searches on a measured figure."""

from collections.abc import Callable


def fewest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the least count that fits, bisected; `most` fits, and what fits is taken to fit with more."""
    low, high = 0, most
    if fits(low):
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
