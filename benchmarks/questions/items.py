"""How near a map of small items comes to all cores being busy all along."""

from __future__ import annotations

from benchmarks.harness import Call, Question, Values, Way, rate
from benchmarks.limits import bare_forks
from benchmarks.peers import N_WORKERS, map_ways
from benchmarks.work import one_ms

SECONDS = 0.001


def percent_of_ideal(call: Call, n: int) -> Values:
    rates = rate("items/s", lambda n: list(range(n)))(call, n)
    return {"% of ideal": 100 * rates["items/s"] * SECONDS / N_WORKERS}


QUESTION = Question(
    name="items",
    title="a map of {n} items of 1 ms",
    about=(
        "An item uses a millisecond of processor time. The ideal is all cores busy with items from "
        "begin to end. The limit is bare forks, each with a static part of the items, that return "
        "nothing; on a machine that does other things meanwhile, whoever shares the items out as "
        "they get done may pass it."
    ),
    ways=[
        *map_ways(one_ms),
        Way("limit: a static part in each of some bare forks", "limit", lambda: bare_forks(one_ms)),
    ],
    n=2_000,
    quick_n=400,
    take=percent_of_ideal,
    n_rounds=3,
)
