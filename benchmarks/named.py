"""A function that workers have under a name."""

from __future__ import annotations

from benchmarks.work import one_ms
from dmap import job


@job("one_ms")
def named_ms(item: int) -> int:
    """Use a millisecond of processor time."""
    return one_ms(item)
