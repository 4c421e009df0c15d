"""How fast single jobs are submitted and gathered."""

from __future__ import annotations

from benchmarks.echo import echo
from benchmarks.harness import Question, Way, rate
from benchmarks.peers import N_WORKERS, ways
from benchmarks.work import same

QUESTION = Question(
    name="single",
    title="single jobs of a function that does nothing, submitted one by one and gathered",
    about=(
        "All are submitted before the first result is asked for. The limit is a bare ROUTER of "
        "libzmq that passes as many messages of 64 bytes on, over as many hops: from the client to "
        f"one of {N_WORKERS} workers and back. Who packs several jobs into a message can pass it."
    ),
    ways=[
        *ways("EACH", lambda running: lambda n: running.each(same, range(n))),
        Way("limit: a bare ROUTER echo, pipelined", "limit", lambda: echo("each")),
    ],
    n=50_000,
    quick_n=10_000,
    take=rate("jobs/s", lambda n: list(range(n))),
    seconds=0.5,
)
