"""How large results come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness import Call, Question, Values, Way, measured
from benchmarks.limits import copied_by_forks
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


@contextmanager
def copied() -> Iterator[Call]:
    yield lambda n: {UNIT: n * MB / copied_by_forks(n, MB * 1_000_000, filled)}


QUESTION = Question(
    name="results",
    title="{n} results of 16 MB",
    about=(
        "Each item makes an array of two million floats and returns it; the time is until the "
        "caller has them all. The limit is bare forks that make the same arrays and copy each once "
        "into fresh memory that the caller sees."
    ),
    ways=[
        *ways("MAP", gathered),
        Way("limit: made, and copied once, in bare forks", "limit", copied),
    ],
    n=64,
    quick_n=16,
    take=measured,
    seconds=1.0,
    n_rounds=3,
    warm_up=2,
)
