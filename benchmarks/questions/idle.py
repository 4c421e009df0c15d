"""What a cluster at rest costs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from benchmarks.cluster import Peer, cpu_seconds, servers_up
from benchmarks.harness import Call, Question, Values, Way, measured
from benchmarks.peers import ways
from benchmarks.processes import descendants
from benchmarks.work import same
from jobserver import protocol as wire

N_CONNECTIONS = 2_000
CALM = 1.0
"""Seconds after which what the start has left to do is over; not waited for, only not measured."""


def rested(seconds: float) -> Values:
    """Return what the processes below this one use in so many seconds."""
    pids = descendants(os.getpid())
    before, start = cpu_seconds(pids), time.monotonic()
    time.sleep(seconds)
    used = cpu_seconds(pids) - before
    return {"% of a core": 100 * used / (time.monotonic() - start)}


def at_rest(running: Any) -> Call:
    """Use the peer once, so that all of it is there."""
    running.map(same, range(10))
    time.sleep(CALM)
    return rested


@contextmanager
def many_connections() -> Iterator[Call]:
    """Connect idle workers, each by a socket of its own, to one server."""
    with servers_up(1) as (endpoint,), zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, N_CONNECTIONS + 100)
        peers = [Peer(context, endpoint, "worker") for _ in range(N_CONNECTIONS)]
        for peer in peers:
            assert isinstance(peer.hear(), wire.Welcome)
            peer.say(wire.CanDo([wire.Ability("dmap")]))
            peer.say(wire.PreSleep())
        time.sleep(CALM)
        yield rested
        for peer in peers:
            peer.socket.close()


QUESTION = Question(
    name="idle",
    title="a cluster at rest, {n} s",
    about=(
        "The processor time of all processes that are there for work, after a first map, while "
        "there is none. The last row is one job server to which 2,000 idle workers are connected."
    ),
    ways=[
        *ways("MAP", at_rest),
        Way(f"dmap: a server with {N_CONNECTIONS:,} idle workers", "dmap", many_connections),
    ],
    n=10,
    quick_n=3,
    take=measured,
    is_more_better=False,
    n_rounds=3,
)
