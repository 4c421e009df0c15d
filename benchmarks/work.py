"""What the items do. Here by itself, since peers import it and dmap takes its source along."""

from __future__ import annotations

import time


def same(item: int) -> int:
    """Do nothing."""
    return item


def one_ms(item: int) -> int:
    """Use a millisecond of processor time, so that what others use of it is not hidden."""
    until = time.thread_time() + 0.001
    while time.thread_time() < until:
        pass
    return item


def sleep(seconds: float) -> float:
    """Wait."""
    time.sleep(seconds)
    return seconds
