"""How fast a job server takes jobs on, and what it holds them in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from benchmarks.cluster import Peer, servers_up
from benchmarks.harness import Call, Open, Question, Values, Way, measured
from benchmarks.processes import descendants
from jobserver import protocol as wire

N_EACH = 4_096
ARGUMENT = b"an argument"


class Submitter:
    """Submits in batches to a server that has no workers, each time as another client."""

    def __init__(self, endpoint: str, n_uniqs: int, *, merge: bool) -> None:
        self._context = zmq.Context.instance()
        self._endpoint = endpoint
        self._n_uniqs = n_uniqs
        self._merge = merge
        self._ticket = 0

    def __call__(self, n: int) -> Values:
        batches = [self._batch(min(N_EACH, n - first)) for first in range(0, n, N_EACH)]
        peer = Peer(self._context, self._endpoint, "client")
        assert isinstance(peer.hear(), wire.Welcome)
        before = resident()
        start = time.perf_counter()
        for header, body in batches:
            peer.socket.send_multipart([header, body])
        n_accepted = 0
        while n_accepted < n:
            answer = peer.hear()
            assert isinstance(answer, wire.JobsAccepted), answer
            n_accepted += sum(accepted.n for accepted in answer.jobs)
        seconds = time.perf_counter() - start
        per_job = (resident() - before) / n - len(ARGUMENT)
        peer.say(wire.Goodbye())  # which ends the jobs that are not in the background
        peer.socket.close(1000)
        return {"submits/s": n / seconds, "bytes a job": max(0.0, per_job)}

    def _batch(self, n: int) -> tuple[bytes, bytes]:
        jobs = []
        for _ in range(n):
            self._ticket += 1
            uniq = b"%d" % (self._ticket % self._n_uniqs) if self._n_uniqs else b""
            jobs.append(wire.JobSpec(self._ticket, len(ARGUMENT), uniq))
        submit = wire.SubmitJobs("nobody", jobs, background=not self._merge, merge=self._merge)
        return wire.encode(submit), ARGUMENT * n


def resident() -> int:
    """Return the bytes of memory of the processes below this one."""
    pages = 0
    for pid in descendants(os.getpid()):
        pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def to_a_server(n_uniqs: int = 0, *, merge: bool = False) -> Open:
    """Return what starts a server, and submits to it."""

    @contextmanager
    def opened() -> Iterator[Call]:
        with servers_up(1) as (endpoint,):
            yield Submitter(endpoint, n_uniqs, merge=merge)

    return opened


QUESTION = Question(
    name="background",
    title="{n} jobs taken on by one job server",
    about=(
        f"Submitted by one client in lists of {N_EACH:,}, and accepted; the time is from "
        "the first send to the last acceptance. Bytes are those by which the server's resident "
        "memory grew, without the argument."
    ),
    ways=[
        Way("dmap: background jobs", "dmap", to_a_server()),
        Way("dmap: the same, 1,000 uniqs", "dmap", to_a_server(1_000)),
        Way("dmap: the same, 200,000 uniqs", "dmap", to_a_server(200_000)),
        Way("dmap: merged, 100 uniqs", "dmap", to_a_server(100, merge=True)),
    ],
    n=200_000,
    quick_n=50_000,
    take=measured,
)
