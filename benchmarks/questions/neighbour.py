"""What ten items wait for beside a million jobs of somebody else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from benchmarks.cluster import Peer, cluster_up
from benchmarks.harness import Call, Open, Question, Values, Way, measured
from benchmarks.work import one_ms
from dmap import Client
from jobserver import protocol as wire

N_READY = 1_000_000
N_EACH = 10_000
ARGUMENT = b"\x80\x05K\x01\x85}\x86."
"""``((1,), {})`` as pickle writes it: the argument of ``one_ms(1)``."""


def timed(client: Client) -> Call:
    """Return what times a map of n items of a millisecond."""

    def call(n: int) -> Values:
        start = time.perf_counter()
        assert client.dmap(one_ms, range(n)) == list(range(n))
        return {"ms": 1000 * (time.perf_counter() - start)}

    return call


def beside(n_ready: int) -> Open:
    """Return what starts a cluster at which so many jobs of a millisecond are ready."""

    @contextmanager
    def opened() -> Iterator[Call]:
        with (
            cluster_up(1) as endpoints,
            zmq.Context() as context,
            Client(endpoints) as client,
        ):
            client.dmap(one_ms, range(10))
            other = Peer(context, endpoints[0], "client")
            assert isinstance(other.hear(), wire.Welcome)
            for first in range(1, n_ready, N_EACH):
                submit(other, first)
            yield timed(client)
            other.socket.close()

    return opened


def submit(peer: Peer, first: int) -> None:
    """Submit a batch of background jobs, and wait until all are accepted."""
    tickets = range(first, first + N_EACH)
    jobs = [wire.JobSpec(ticket, len(ARGUMENT)) for ticket in tickets]
    peer.say(wire.SubmitJobs("one_ms", jobs, background=True), ARGUMENT * N_EACH)
    n_accepted = 0
    while n_accepted < N_EACH:
        answer = peer.hear()
        assert isinstance(answer, wire.JobsAccepted), answer
        n_accepted += sum(accepted.n for accepted in answer.jobs)
    peer.say(wire.ResultsTaken([wire.Range(first, N_EACH)]))


QUESTION = Question(
    name="neighbour",
    title="a map of {n} items of 1 ms beside a million ready jobs",
    about=(
        "The jobs, of a millisecond each, are another client's: one lane of theirs and the "
        "map's take turns. They run meanwhile, on all workers."
    ),
    ways=[
        Way("dmap, alone", "dmap", beside(0)),
        Way(f"dmap, beside {N_READY:,} ready jobs", "dmap", beside(N_READY)),
    ],
    n=10,
    quick_n=10,
    take=measured,
    is_more_better=False,
)
