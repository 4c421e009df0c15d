"""How large arguments get to the workers."""

from __future__ import annotations

import time

from benchmarks.harness import Call, Question, Values, Way, measured
from benchmarks.limits import megabytes_a_second
from benchmarks.peers import Running, ways
from benchmarks.work import ends, filled

MB = 16
UNIT = "MB/s"


def sent(running: Running) -> Call:
    """Return what times a map over arrays, which are made before."""

    def call(n: int) -> Values:
        arrays = [filled(item) for item in range(n)]
        start = time.perf_counter()
        results = running.map(ends, arrays)
        seconds = time.perf_counter() - start
        assert results == [2.0 * item for item in range(n)]
        return {UNIT: n * MB / seconds}

    return call


def made(n: int) -> Call:
    """Return what has so many arrays already, given the number of one."""
    return [filled(item) for item in range(n)].__getitem__


QUESTION = Question(
    name="arguments",
    title="arguments of 16 MB each, {n} at most",
    about=(
        "A map over arrays of two million floats, of which an item looks at two. The limit is bare "
        "forks that have the arrays already and copy each once into memory that all share: fresh, "
        "which the kernel has to find and to clear, or used before, as in a store that is kept."
    ),
    ways=[
        *ways("MAP", sent),
        *(
            Way(
                f"limit: copied once by bare forks, into {memory}",
                "limit",
                megabytes_a_second(MB, made, is_fresh),
            )
            for memory, is_fresh in (("fresh memory", True), ("memory used before", False))
        ),
    ],
    n=32,
    quick_n=8,
    take=measured,
    seconds=0.6,
    n_rounds=3,
    warm_up=4,
)
