"""How large results come back."""

from __future__ import annotations

import time

from benchmarks.harness import Call, Question, Values, Way, measured
from benchmarks.limits import megabytes_a_second
from benchmarks.peers import Running, ways
from benchmarks.work import filled

MB = 16
UNIT = "MB/s"


def gathered(running: Running) -> Call:
    """Return what times a map whose results are arrays."""

    def call(n: int) -> Values:
        start = time.perf_counter()
        arrays = running.map(filled, range(n))
        seconds = time.perf_counter() - start
        assert [array[-1] for array in arrays] == list(range(n))
        return {UNIT: n * MB / seconds}

    return call


QUESTION = Question(
    name="results",
    title="results of 16 MB each, {n} at most",
    about=(
        "Each item makes an array of two million floats and returns it; the time is until the "
        "caller has them all. The limit is bare forks that make the same arrays and copy each once "
        "into memory that the caller sees: fresh, which the kernel has to find and to clear, or "
        "used before, as in a store that is kept."
    ),
    ways=[
        *ways("MAP", gathered),
        *(
            Way(
                f"limit: made and copied once by bare forks, into {memory}",
                "limit",
                megabytes_a_second(MB, lambda n: filled, is_fresh),
            )
            for memory, is_fresh in (("fresh memory", True), ("memory used before", False))
        ),
    ],
    n=64,
    quick_n=16,
    take=measured,
    seconds=0.6,
    n_rounds=3,
    warm_up=4,
)
