"""How large arguments get to the workers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness import Call, Question, Values, Way, measured
from benchmarks.limits import copied_by_forks
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


@contextmanager
def copied() -> Iterator[Call]:
    def call(n: int) -> Values:
        arrays = [filled(item) for item in range(n)]
        seconds = copied_by_forks(n, MB * 1_000_000, arrays.__getitem__)
        return {UNIT: n * MB / seconds}

    yield call


QUESTION = Question(
    name="arguments",
    title="{n} arguments of 16 MB",
    about=(
        "A map over arrays of two million floats, of which an item looks at two. The limit is bare "
        "forks that have the arrays already and copy each once into fresh shared memory."
    ),
    ways=[
        *ways("MAP", sent),
        Way("limit: copied once, in bare forks", "limit", copied),
    ],
    n=32,
    quick_n=8,
    take=measured,
    seconds=1.0,
    n_rounds=3,
    warm_up=2,
)
