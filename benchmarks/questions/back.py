"""How long one job takes there and back."""

from __future__ import annotations

from benchmarks.echo import echo
from benchmarks.harness import Question, Way, latency
from benchmarks.peers import ways
from benchmarks.work import same

QUESTION = Question(
    name="back",
    title="one job there and back",
    about=(
        "One job at a time, each waited for. The limit is a bare ROUTER of libzmq between client "
        "and worker: client, router, worker, router, client, a thread's or process's wake-up each."
    ),
    ways=[
        *ways("ONCE", lambda running: lambda item: running.once(same, item)),
        Way("limit: a bare ROUTER echo", "limit", lambda: echo("once")),
    ],
    n=2_000,
    quick_n=500,
    take=latency,
    is_more_better=False,
    seconds=0.5,
    warm_up=50,
)
