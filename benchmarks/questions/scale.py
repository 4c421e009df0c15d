"""What a job costs the server's state, few and many at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness import Call, Open, Question, Values, Way, measured
from jobserver import protocol as wire
from jobserver.jobs import Limits
from jobserver.state import State

N_EACH = 1_000


class Scene:
    """A state with its workers and ready jobs, and no socket."""

    def __init__(self, n_workers: int, n_ready: int) -> None:
        self.state = State("sammy", "b1", limits=Limits(session_jobs=2 * n_ready + 10_000))
        self.seqs = itertools.count(1)
        self.ticket = 0
        self.now = 0.0
        self.say(b"client", wire.Hello(1, 0, "client", bytes(16)))
        self.workers = [b"worker%d" % number for number in range(n_workers)]
        self.turns = itertools.cycle(self.workers)
        for number, worker in enumerate(self.workers):
            session = b"%016d" % (number // 16)
            self.say(worker, wire.Hello(1, 0, "worker", session, child=number % 16 + 1))
            self.say(worker, wire.CanDo([wire.Ability("f")]))
        for _ in range(n_ready // N_EACH):
            self.submit()

    def say(self, peer: bytes, message: wire.Message, body: bytes = b"") -> list[wire.Message]:
        """Give the state a message; return what it says."""
        self.now += 1e-6
        sends = self.state.on_message(peer, message, (body,) if body else (), self.now)
        return [send.message for send in sends]

    def submit(self) -> None:
        """Submit a batch."""
        first, self.ticket = self.ticket + 1, self.ticket + N_EACH
        jobs = [wire.JobSpec(ticket, 1) for ticket in range(first, self.ticket + 1)]
        self.say(b"client", wire.SubmitJobs("f", jobs), bytes(N_EACH))

    def run(self) -> None:
        """Have as many jobs run as one batch has, each by the next worker, and take the results."""
        taken = []
        for _ in range(N_EACH):
            worker = next(self.turns)
            (assign,) = self.say(worker, wire.GrabJobs(1))
            assert isinstance(assign, wire.JobAssign)
            done = [wire.WorkDone(job.handle, 1) for job in assign.jobs]
            self.say(worker, wire.WorkComplete(next(self.seqs), done, 1.0), bytes(len(done)))
            taken += [wire.Range(job.origin.ticket, 1) for job in assign.jobs]
        self.say(b"client", wire.ResultsTaken(taken))

    def __call__(self, n: int) -> Values:
        start = time.process_time()
        for _ in range(n // N_EACH):
            self.submit()
            self.run()
        return {"us a job": 1e6 * (time.process_time() - start) / n}


def scene(n_workers: int, n_ready: int) -> Open:
    """Return what makes a state with so many workers and ready jobs."""

    @contextmanager
    def opened() -> Iterator[Call]:
        yield Scene(n_workers, n_ready)

    return opened


QUESTION = Question(
    name="scale",
    title="a job in the server's state, among many",
    about=(
        "Submitted in lists of a thousand, grabbed one by one by each worker in its turn, "
        "completed and taken; by the state alone, without sockets. Processor time."
    ),
    ways=[
        Way("10 workers, 1,000 ready jobs", "dmap", scene(10, 1_000)),
        Way("10,000 workers, 1,000,000 ready jobs", "dmap", scene(10_000, 1_000_000)),
    ],
    n=20_000,
    quick_n=5_000,
    take=measured,
    is_more_better=False,
)
