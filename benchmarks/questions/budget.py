"""Who uses how much of the processor for a single job."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.echo import echo
from benchmarks.harness import Call, Open, Question, Values, Way, measured
from benchmarks.processes import descendants
from benchmarks.work import same
from dmap import shutdown, submit


def used(roles: dict[int, str]) -> Counter[str]:
    """Return the microseconds that processes have used, by role.

    What libzmq's own thread uses, and the kernel on its behalf, stands apart.
    """
    found: Counter[str] = Counter()
    for pid, role in roles.items():
        for task in Path(f"/proc/{pid}/task").iterdir():
            is_zmq = (task / "comm").read_text().startswith("ZMQbg")
            nanoseconds = int((task / "schedstat").read_text().split()[0])
            found["us, I/O threads" if is_zmq else f"us, {role}"] += nanoseconds / 1000
    return found


def per_job(roles: dict[int, str], call: Call) -> Call:
    """Return what says how much the processes use for each of n jobs."""

    def counted(n: int) -> Values:
        before = used(roles)
        call(n)
        after = used(roles)
        return {who: (after[who] - before[who]) / n for who in sorted(after)}

    return counted


def together(n: int) -> None:
    """Submit all jobs, then gather."""
    jobs = [submit(same, item) for item in range(n)]
    assert [job.result() for job in jobs] == list(range(n))


def one_by_one(n: int) -> None:
    """Wait for each job before the next."""
    for item in range(n):
        assert submit(same, item).result() == item


def local_roles() -> dict[int, str]:
    """Return the processes of the local cluster, and this one, with what they are."""
    jobs = [submit(os.getppid) for _ in range(10)]
    (supervisor,) = {job.result() for job in jobs}
    workers = {submit(os.getpid).result() for _ in range(200)}
    roles = dict.fromkeys(descendants(os.getpid()), "server")
    return roles | {
        os.getpid(): "client",
        supervisor: "supervisor",
        **dict.fromkeys(workers, "workers"),
    }


def with_dmap(call: Call) -> Open:
    """Return what starts the local cluster."""

    @contextmanager
    def opened() -> Iterator[Call]:
        yield per_job(local_roles(), call)
        shutdown()

    return opened


@contextmanager
def with_echo() -> Iterator[Call]:
    """Start the router and its workers."""
    with echo("once") as once:
        first, *others = descendants(os.getpid())
        roles = {os.getpid(): "client", first: "server", **dict.fromkeys(others, "workers")}

        def call(n: int) -> None:
            for item in range(n):
                once(item)

        yield per_job(roles, call)


QUESTION = Question(
    name="budget",
    title="the processor time of a single job, {n} at a time and one by one",
    about=(
        "Microseconds of processor time a job, by the process that uses them. libzmq's I/O threads "
        "of all processes are counted together. The last row passes a message over as many hops."
    ),
    ways=[
        Way("dmap, submitted together", "dmap", with_dmap(together)),
        Way("dmap, each waited for", "dmap", with_dmap(one_by_one)),
        Way("limit: a bare ROUTER echo, each waited for", "limit", with_echo),
    ],
    n=20_000,
    quick_n=2_000,
    take=measured,
    is_more_better=False,
)
