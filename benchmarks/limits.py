"""What no peer can beat: the same work without jobs, results or order."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.harness import Call, Open
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


@contextmanager
def copied_by_forks(nbytes: int, make_all: Callable[[int], Call], is_fresh: bool) -> Iterator[Call]:
    """Yield what has forks make arrays and copy each once into memory that all share.

    Args:
        nbytes: Bytes of an array.
        make_all: Given the number of arrays, returns what makes each, given its number. It is
            called before the time begins.
        is_fresh: Whether the kernel has to find the memory, and to clear it. Otherwise it is that
            of the last call, as in a store that is kept.

    The call takes the number of arrays and returns the seconds.
    """
    import numpy as np

    with ExitStack() as kept:
        memories: dict[int, mmap.mmap] = {}  # number of arrays -> memory that has been used

        def call(n: int) -> float:
            make = make_all(n)
            if is_fresh:
                with mmap.mmap(-1, n * nbytes) as shared:
                    return fill(shared, n, make)
            if n not in memories:
                memories[n] = kept.enter_context(mmap.mmap(-1, n * nbytes))
                fill(memories[n], n, make)
            return fill(memories[n], n, make)

        def fill(shared: mmap.mmap, n: int, make: Call) -> float:
            def part(number: int) -> None:
                for item in range(number, n, N_WORKERS):
                    array = make(item)
                    there = np.frombuffer(shared, array.dtype, array.size, item * nbytes)
                    there[:] = array

            start = time.perf_counter()
            in_forks(part)
            return time.perf_counter() - start

        yield call


def megabytes_a_second(mb: int, make_all: Callable[[int], Call], is_fresh: bool) -> Open:
    """Return what opens ``copied_by_forks`` for arrays of so many megabytes, as a rate."""

    @contextmanager
    def opened() -> Iterator[Call]:
        with copied_by_forks(mb * 1_000_000, make_all, is_fresh) as seconds:
            yield lambda n: {"MB/s": n * mb / seconds(n)}

    return opened
