"""What no peer can beat: the same work without jobs, results or order."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import Call
from benchmarks.peers import N_WORKERS


@contextmanager
def builtin_map(function: Callable[[Any], Any]) -> Iterator[Call]:
    """Yield what maps in this process."""
    yield lambda n: list(map(function, range(n)))


def in_forks(work: Callable[[int], None]) -> None:
    """Run ``work`` in a fork for each worker, with its number, and wait for them."""
    children = []
    for number in range(N_WORKERS):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work(number)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    for pid in children:
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("a fork failed")


@contextmanager
def bare_forks(function: Callable[[Any], Any]) -> Iterator[Call]:
    """Yield what does a static part of the items in each of some forks; nothing comes back."""

    def call(n: int) -> list[int]:
        def part(number: int) -> None:
            for item in range(number, n, N_WORKERS):
                function(item)

        in_forks(part)
        return list(range(n))

    yield call


def copied_by_forks(n: int, nbytes: int, make: Callable[[int], Any]) -> float:
    """Have forks make arrays and copy each once into fresh memory that all share.

    Args:
        n: Arrays.
        nbytes: Bytes of each.
        make: Returns an array, given its number.

    Returns:
        Seconds.
    """
    import numpy as np

    with mmap.mmap(-1, n * nbytes) as shared:

        def part(number: int) -> None:
            for item in range(number, n, N_WORKERS):
                array = make(item)
                there = np.frombuffer(shared, array.dtype, array.size, item * nbytes)
                there[:] = array

        start = time.perf_counter()
        in_forks(part)
        return time.perf_counter() - start
