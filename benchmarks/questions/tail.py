"""How a map fares with items of which few take nearly all of the time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import Call, Question, Values, Way, measured
from benchmarks.peers import N_WORKERS, opened, ways
from benchmarks.work import sleep

SECONDS_AN_ITEM = 1 / 300
ORDERS = ("random", "descending", "ascending")


def durations(n: int) -> list[float]:
    """Return n durations in seconds: Pareto's, cut off at 60 times the mean."""
    chance = random.Random(2005)
    found = [min(chance.paretovariate(1.1), 100.0) for _ in range(n)]
    scale = n * SECONDS_AN_ITEM / sum(found)
    return [one * scale for one in found]


def ordered(order: str, n: int) -> list[float]:
    """Return the durations in an order."""
    found = durations(n)
    return found if order == "random" else sorted(found, reverse=order == "descending")


def ideal(n: int) -> float:
    """Return the seconds that n items take at least."""
    found = durations(n)
    return max(sum(found) / N_WORKERS, *found)


def in_all_orders(mapped: Any) -> Call:
    """Return what measures a map, a function of the items, in all orders."""

    def call(n: int) -> Values:
        values = {}
        for order in ORDERS:
            items = ordered(order, n)
            start = time.perf_counter()
            assert mapped(items) == items
            seconds = time.perf_counter() - start
            values[f"% of ideal, {order}"] = 100 * ideal(n) / seconds
        return values

    return call


@contextmanager
def greedy() -> Iterator[Call]:
    """Yield what would be if whoever is free took the next item, at no cost."""

    def call(n: int) -> Values:
        values = {}
        for order in ORDERS:
            free = [0.0] * N_WORKERS
            for seconds in ordered(order, n):
                free[free.index(min(free))] += seconds
            values[f"% of ideal, {order}"] = 100 * ideal(n) / max(free)
        return values

    yield call


QUESTION = Question(
    name="tail",
    title="a map of {n} items, few of which take most of the time",
    about=(
        "The durations are Pareto's of a fixed seed, a second in all; an item sleeps, which is "
        "steadier than work where other programs run, and hides what a peer uses of the processor. "
        "The ideal is the longest item, or all divided by the workers. The limit is computed: each "
        "worker that is free takes the next item at no cost."
    ),
    ways=[
        *ways("MAP", lambda running: in_all_orders(lambda items: running.map(sleep, items))),
        *(
            Way(
                f"{who}, chunksize=1",
                name,
                opened(
                    name,
                    lambda running: in_all_orders(lambda items: running.best(sleep, items, 1)),
                ),
            )
            for who, name in (("Pool.map", "pool"), ("mpire WorkerPool.map", "mpire"))
        ),
        Way("limit: the next item to who is free", "limit", greedy),
    ],
    n=300,
    quick_n=100,
    take=measured,
    n_rounds=3,
)
