"""What is measured, and each contender's own best way to do it.

The pools are the standard library's, with as many processes as dmap's local cluster has workers.
`start` makes them before dmap has threads, since they fork. All stay up during all rounds and rest
while another works.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import Pool
from typing import Any

from dmap import dmap, submit

N_WORKERS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
CHUNKS_A_WORKER = (1, 2, 4, 16, 64, 256)
"""Among these is every contender's best, for no-ops as for items of a millisecond."""


@dataclass(frozen=True)
class Way:
    """One contender's way.

    Attributes:
        who: Its name in the table.
        call: Does the work on n items, or item number n where each call is timed.
        share: How much of the work it is given; less than 1 for the slow, whose rate is what
            counts.
        try_chunksizes: Whether ``call`` takes a chunksize too, and is to be measured at its best.
    """

    who: str
    call: Callable[..., Any]
    share: float = 1.0
    try_chunksizes: bool = False

    def settle(self, n: int) -> Way:
        """Return this way with the chunksize that takes the least time for n items."""
        if not self.try_chunksizes:
            return self
        sizes = sorted({max(1, n // (N_WORKERS * chunks)) for chunks in CHUNKS_A_WORKER})
        best = min(sizes, key=lambda size: min(timed(self.call, n, size) for _ in range(2)))
        call = self.call
        return replace(
            self,
            who=f"{self.who}, chunksize={best:,} (best)",
            call=lambda n: call(n, best),
            try_chunksizes=False,
        )


@dataclass(frozen=True)
class Figure:
    """One question, asked of all contenders.

    Attributes:
        name: For the command line.
        title: For the table; ``{n}`` in it is the number of items.
        n: Items, or calls.
        ways: The contenders; dmap is the first.
        measure: Returns the values of a round, each with its unit, from the seconds that it took
            (of the whole, or of each call) and the number of items.
        result: What each way must return for n items.
        is_each_timed: Whether the calls are made, and timed, one by one.
        is_more_better: Whether the larger value wins.
    """

    name: str
    title: str
    n: int
    ways: Sequence[Way]
    measure: Callable[[list[float], int], dict[str, float]]
    result: Callable[[int], Any]
    is_each_timed: bool = False
    is_more_better: bool = True

    def take(self, way: Way, scale: float) -> dict[str, float]:
        """Run one round of one way and return its values.

        Raises:
            AssertionError: the result was wrong.
        """
        n = self.n_items(way, scale)
        if self.is_each_timed:
            seconds = []
            for item in range(n):
                start = time.perf_counter()
                result = way.call(item)
                seconds.append(time.perf_counter() - start)
                assert result == self.result(item), f"{way.who}: {result!r}"
        else:
            start = time.perf_counter()
            result = way.call(n)
            seconds = [time.perf_counter() - start]
            assert result == self.result(n), f"{way.who} gave a wrong result"
        return self.measure(seconds, n)

    def n_items(self, way: Way, scale: float) -> int:
        """Return how many items that is; never fewer than ten."""
        return max(10, int(self.n * way.share * scale))


def timed(call: Callable[..., Any], *arguments: int) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


# --- the work ---------------------------------------------------------------------------------


def same(item: int) -> int:
    """Do nothing."""
    return item


def one_ms(item: int) -> int:
    """Use a millisecond of processor time, so that what others use of it is not hidden."""
    until = time.thread_time() + 0.001
    while time.thread_time() < until:
        pass
    return item


def in_bare_forks(n: int) -> list[int]:
    """Do the items of a millisecond in a static part for each of some forks; nothing comes back."""
    children = []
    for number in range(N_WORKERS):
        pid = os.fork()
        if not pid:
            for item in range(number, n, N_WORKERS):
                one_ms(item)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    return list(range(n))


DMAP = "from dmap import dmap; print(dmap(abs, range({n})))"
POOL = "import multiprocessing; print(multiprocessing.Pool({workers}).map(abs, range({n})))"
EXECUTOR = (
    "from concurrent.futures import ProcessPoolExecutor\n"
    "with ProcessPoolExecutor({workers}) as executor: print(list(executor.map(abs, range({n}))))"
)


def in_a_new_process(code: str) -> Callable[[int], str]:
    """Return what runs the code in a Python of its own, and returns what it printed."""

    def run(n: int) -> str:
        argv = [sys.executable, "-c", code.format(n=n, workers=N_WORKERS)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    return run


# --- the values -------------------------------------------------------------------------------


def jobs_per_second(seconds: list[float], n: int) -> dict[str, float]:
    """Return the rate of a run."""
    return {"jobs/s": n / seconds[0]}


def items_per_second(seconds: list[float], n: int) -> dict[str, float]:
    """Return the rate of a run."""
    return {"items/s": n / seconds[0]}


def percent_of_ideal(seconds: list[float], n: int) -> dict[str, float]:
    """Return how near a run of items of a millisecond comes to all workers being busy all along."""
    return {"% of ideal": 100 * n * 0.001 / N_WORKERS / seconds[0]}


def latency(seconds: list[float], n: int) -> dict[str, float]:
    """Return the median and the 99th percentile of single calls."""
    percentiles = statistics.quantiles(seconds, n=100)
    return {"us, p50": percentiles[49] * 1e6, "us, p99": percentiles[98] * 1e6}


def start() -> tuple[list[Figure], Callable[[], None]]:
    """Start all contenders; return the figures, and what ends the pools."""
    pool = Pool(N_WORKERS)
    executor = ProcessPoolExecutor(N_WORKERS)
    list(executor.map(same, range(1000)))  # forks its processes

    single = Figure(
        "single",
        "single jobs, submitted one by one and gathered",
        100_000,
        [
            Way("dmap.submit", lambda n: [j.result() for j in [submit(same, i) for i in range(n)]]),
            Way(
                "Pool.apply_async",
                lambda n: [r.get() for r in [pool.apply_async(same, (i,)) for i in range(n)]],
            ),
            Way(
                "ProcessPoolExecutor.submit",
                lambda n: [f.result() for f in [executor.submit(same, i) for i in range(n)]],
                share=0.2,
            ),
        ],
        jobs_per_second,
        lambda n: list(range(n)),
    )
    there_and_back = Figure(
        "back",
        "one job there and back",
        4_000,
        [
            Way("dmap.submit().result", lambda item: submit(same, item).result()),
            Way("Pool.apply", lambda item: pool.apply(same, (item,))),
            Way(
                "ProcessPoolExecutor.submit().result",
                lambda item: executor.submit(same, item).result(),
            ),
        ],
        latency,
        lambda item: item,
        is_each_timed=True,
        is_more_better=False,
    )
    noop = Figure(
        "noop",
        "a map of a function that does nothing, over {n} items",
        1_000_000,
        [
            Way("dmap", lambda n: dmap(same, range(n))),
            Way("Pool.map", lambda n: pool.map(same, range(n))),
            Way("Pool.map", lambda n, size: pool.map(same, range(n), size), try_chunksizes=True),
            Way(
                "ProcessPoolExecutor.map", lambda n: list(executor.map(same, range(n))), share=0.02
            ),
            Way(
                "ProcessPoolExecutor.map",
                lambda n, size: list(executor.map(same, range(n), chunksize=size)),
                try_chunksizes=True,
            ),
            Way("builtin map", lambda n: list(map(same, range(n)))),
        ],
        items_per_second,
        lambda n: list(range(n)),
    )
    ms = Figure(
        "ms",
        "a map of {n} items of 1 ms",
        4_000,
        [
            Way("dmap", lambda n: dmap(one_ms, range(n))),
            Way("Pool.map", lambda n: pool.map(one_ms, range(n))),
            Way("Pool.map", lambda n, size: pool.map(one_ms, range(n), size), try_chunksizes=True),
            Way("ProcessPoolExecutor.map", lambda n: list(executor.map(one_ms, range(n)))),
            Way(
                "ProcessPoolExecutor.map",
                lambda n, size: list(executor.map(one_ms, range(n), chunksize=size)),
                try_chunksizes=True,
            ),
            Way("a static part in each of some bare forks", in_bare_forks),
        ],
        percent_of_ideal,
        lambda n: list(range(n)),
    )
    cold = Figure(
        "cold",
        "cold start: a new Python, ten items, exit",
        10,
        [
            Way("dmap", in_a_new_process(DMAP)),
            Way("Pool.map", in_a_new_process(POOL)),
            Way("ProcessPoolExecutor.map", in_a_new_process(EXECUTOR)),
        ],
        lambda seconds, n: {"s": seconds[0]},
        lambda n: str(list(range(n))),
        is_more_better=False,
    )

    def end() -> None:
        pool.terminate()
        pool.join()
        executor.shutdown()

    return [single, there_and_back, noop, ms, cold], end
