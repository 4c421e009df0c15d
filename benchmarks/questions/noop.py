"""What a map costs an item."""

from __future__ import annotations

from benchmarks.harness import Question, Way, rate
from benchmarks.limits import builtin_map
from benchmarks.peers import map_ways
from benchmarks.work import same

QUESTION = Question(
    name="noop",
    title="a map of a function that does nothing, over {n} items",
    about=(
        "By default, and with the chunk size that was the best of four. Who would take long is "
        "given fewer items, since its rate is what counts. The limit is the builtin `map` in one "
        "process: no pool can pay for such items."
    ),
    ways=[
        *map_ways(same),
        Way("limit: builtin map", "limit", lambda: builtin_map(same)),
    ],
    n=1_000_000,
    quick_n=1_000_000,
    take=rate("items/s", lambda n: list(range(n))),
    seconds=0.5,
)
