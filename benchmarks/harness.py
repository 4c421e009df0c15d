"""Questions, the ways to answer them, and how a way is measured.

A question is one file in ``benchmarks/questions`` with a ``QUESTION``. Each of its ways runs in a
process of its own (``runner``), and starts its peer there, so that a peer that hangs or dies costs
its own row only::

    python -m benchmarks
      '-- runner: dmap           the local cluster's server and workers
      '-- runner: Pool           its processes
      '-- runner: a limit        ...

In each round every way has its turn, each time another one first, so that what else the machine
does meets all of them. Between its turns a way is idle, and those whose idle processes use the
processor (``Peer.is_restless``) are stopped by a signal. At the end of the question all are ended.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

Values = dict[str, float]  # unit -> value
Call = Callable[..., Any]
"""Does the work on n items. What it returns is the question's ``take`` to judge."""
Open = Callable[[], AbstractContextManager[Call]]
"""Starts a peer, yields the call, and ends the peer."""

START_TIMEOUT = 60.0
"""Seconds in which a peer must be up; all of a question start at the same time."""
SETTLE_TIMEOUT = 60.0
"""Seconds in which a way must have found its sizes."""
CALL_TIMEOUT = 60.0
"""Seconds in which a round of a way must end."""
CLOSE_TIMEOUT = 10.0
"""Seconds in which a peer must be down; then its processes are killed."""
CHUNKS_A_WORKER = (1, 4, 16, 64)
"""Among these is every peer's best, for no-ops as for items of a millisecond."""


@dataclass(frozen=True)
class Way:
    """One peer's way to answer a question.

    Attributes:
        who: Its name in the table.
        peer: Its name in ``peers.PEERS``; ``limit`` for what no peer can beat.
        open: Starts it: a context manager that yields the call.
        n_workers: What the chunk sizes are divided among; 0 if the call takes no chunk size.
            Otherwise it may be given one as its second argument, and is measured at its best, too.
        who_best: What it is called then, if not the same.
        at_most: Items that it is given at most, where more would only take longer; 0 for all.
    """

    who: str
    peer: str
    open: Open
    n_workers: int = 0
    who_best: str = ""
    at_most: int = 0


@dataclass(frozen=True)
class Question:
    """One question, asked of all ways.

    Attributes:
        name: Its file's name.
        title: For the table; ``{n}`` in it is the number of items.
        about: What the calls do, and how the table is to be read; in Markdown.
        ways: dmap is the first.
        n: Items.
        quick_n: Items with ``--quick``.
        take: Makes the call with n items and returns the values of that round.
        is_more_better: Whether the larger value wins.
        seconds: Where not None, a way that takes longer for n items is given fewer, so that a
            round takes about as long; its row says how many. Only for what is a rate.
        n_rounds: Where not None, a round is long: at most so many, and one with ``--quick``.
        warm_up: Items that each way does before it is measured, and in a round at least.
    """

    name: str
    title: str
    about: str
    ways: Sequence[Way]
    n: int
    quick_n: int
    take: Callable[[Call, int], Values]
    is_more_better: bool = True
    seconds: float | None = None
    n_rounds: int | None = None
    warm_up: int = 10


@dataclass
class Row:
    """What came of a way.

    Attributes:
        who: Its name in the table, with what was found out (chunk size, fewer items).
        peer: Its peer's name.
        n: Items a round.
        values: Unit -> one value a round.
        failed: Why there are none, in one line; else empty.
    """

    who: str
    peer: str
    n: int = 0
    values: dict[str, list[float]] = field(default_factory=dict)
    failed: str = ""


# --- ways to take a round ---------------------------------------------------------------------


def rate(unit: str, expected: Callable[[int], Any] | None = None) -> Callable[[Call, int], Values]:
    """Return what times one call and gives items a second.

    Args:
        unit: ``jobs/s``.
        expected: What the call must return for n items; None leaves that open.
    """

    def take(call: Call, n: int) -> Values:
        start = time.perf_counter()
        result = call(n)
        seconds = time.perf_counter() - start
        if expected is not None and result != expected(n):
            raise AssertionError("gave a wrong result")
        return {unit: n / seconds}

    return take


def duration(
    unit: str = "s", expected: Callable[[int], Any] | None = None
) -> Callable[[Call, int], Values]:
    """Return what times one call and gives its seconds."""
    per_second = rate("", expected)
    return lambda call, n: {unit: n / per_second(call, n)[""]}


def latency(call: Call, n: int) -> Values:
    """Time n calls one by one; return the median and the 99th percentile in microseconds."""
    seconds = []
    for item in range(n):
        start = time.perf_counter()
        result = call(item)
        seconds.append(time.perf_counter() - start)
        if result != item:
            raise AssertionError(f"gave {result!r} for {item}")
    percentiles = statistics.quantiles(seconds, n=100)
    return {"us, p50": percentiles[49] * 1e6, "us, p99": percentiles[98] * 1e6}


def measured(call: Call, n: int) -> Values:
    """Return what the call itself has measured."""
    values: Values = call(n)
    return values


# --- sizes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settled:
    """A way that is up, with what was found out.

    Attributes:
        who: Its name, with its chunk size if that was sought.
        call: Takes the number of items only.
        n: Items of a round.
    """

    who: str
    call: Call
    n: int


def settle(
    question: Question, way: Way, call: Call, n: int, seconds: float | None
) -> list[Settled]:
    """Find how many items a way can do in time, and its best chunk size.

    Args:
        question: What is asked.
        way: Who answers.
        call: What its ``open`` has yielded.
        n: Items wanted.
        seconds: What a round may take; None for all items, however long they take.

    Returns:
        The way as it is by default, and, where it takes a chunk size, with its best one.
    """
    n = min(n, way.at_most or n)
    found = [Settled(way.who, call, sized(question, call, n, seconds))]
    if way.n_workers:
        # Chunks at their largest say fast whether n is too many.
        n = sized(question, lambda n: call(n, max(1, min(n // 4, n // way.n_workers))), n, seconds)
        part = max(way.n_workers, n // 4)
        best = min(
            CHUNKS_A_WORKER,
            key=lambda chunks: timed(question, chunked(call, part, way, chunks), part),
        )
        size = max(1, n // (way.n_workers * best))
        who = f"{way.who_best or way.who}, chunksize={size:,} (best)"
        found.append(Settled(who, chunked(call, n, way, best), n))
    return found


def timed(question: Question, call: Call, n: int) -> float:
    """Return the seconds that a round takes."""
    start = time.perf_counter()
    question.take(call, n)
    return time.perf_counter() - start


def chunked(call: Call, n: int, way: Way, chunks: int) -> Call:
    """Return the call with the chunk size that gives each worker so many chunks of n items."""
    size = max(1, n // (way.n_workers * chunks))
    return lambda n: call(n, size)


def sized(question: Question, call: Call, n: int, seconds: float | None) -> int:
    """Return how many items the call does in so many seconds, n at most. Warms up as well."""
    if question.warm_up:
        question.take(call, min(n, question.warm_up))  # some start their processes only now
    if seconds is None:
        return n
    trial = least = max(1, min(n, question.warm_up))
    while True:
        took = timed(question, call, trial)
        fits = int(trial * seconds / took)
        # The cost of a call, beside that of its items, hides what more items would show.
        if trial >= n or took > seconds / 2:
            return n if fits >= n else max(least, round_down(fits))
        trial = min(n, max(trial * 2, min(trial * 10, fits)))


def round_down(n: int) -> int:
    """Return n with its first digit only: of 7,345 items, 7,000."""
    unit: int = 10 ** (len(str(max(n, 1))) - 1)
    return max(1, n // unit * unit)
