"""What the items do. Here by itself, since peers import it and dmap takes its source along."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


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


def read(array: Any, item: int) -> float:
    """Look at one number of an array."""
    return float(array[item])


def reader(array: Any) -> Callable[[int], float]:
    """Return a closure over an array."""
    return lambda item: float(array[item])


shared: list[Any] = []


def share(array: Any) -> None:
    """Keep an array in this process, as a pool's initializer does."""
    shared[:] = [array]


def read_shared(item: int) -> float:
    """Look at one number of the array that this process keeps."""
    return float(shared[0][item])


def ends(array: Any) -> float:
    """Return the sum of the first and the last number of an array."""
    return float(array[0] + array[-1])


def filled(item: int) -> Any:
    """Return an array of 16 MB, all of whose numbers are the item's."""
    import numpy as np

    return np.full(2_000_000, float(item))
