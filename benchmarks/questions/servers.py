"""What more job servers cost, and how evenly they are used."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.cluster import cluster_up
from benchmarks.harness import Call, Open, Question, Values, Way, latency, measured
from benchmarks.work import same
from dmap import Client, current_job

N_BACK = 500
N_MAPS = 64


def share(counts: Counter[str], n_servers: int) -> float:
    """Return the largest part of any server, where 1 is an even part."""
    return max(counts.values()) * n_servers / counts.total()


def work(client: Client) -> Call:
    """Return what submits single jobs, one by one and many together, and times both."""

    def call(n: int) -> Values:
        start = time.perf_counter()
        results = [job.result() for job in [client.submit(same, item) for item in range(n)]]
        seconds = time.perf_counter() - start
        assert results == list(range(n))
        back = latency(lambda item: client.submit(same, item).result(), N_BACK)
        return {"jobs/s": n / seconds, "us, p50": back["us, p50"]}

    return call


def even(client: Client, n_servers: int) -> Call:
    """Return what counts which server had how much of single jobs, and of maps."""

    def call(n: int) -> Values:
        jobs = [client.submit(same, item) for item in range(n)]
        singles = Counter(job.handle.rpartition(":")[0] for job in jobs)
        maps = Counter(client.dmap(where, range(1), chunksize=1)[0] for _ in range(N_MAPS))
        return {
            "x an even part of the jobs": share(singles, n_servers),
            "x an even part of the maps": share(maps, n_servers),
        }

    return call


def where(item: int) -> str:
    """Return the server that gave this job."""
    return current_job().handle.rpartition(":")[0]


def on(n_servers: int, ask: Callable[[Client], Call]) -> Open:
    """Return what starts so many servers, and workers for them, and a client."""

    @contextmanager
    def opened() -> Iterator[Call]:
        with cluster_up(n_servers) as endpoints, Client(endpoints) as client:
            client.dmap(same, range(10))
            yield ask(client)

    return opened


QUESTION = Question(
    name="servers",
    title="several job servers instead of one, {n} jobs",
    about=(
        "Single jobs that do nothing, submitted together and one by one; the same number of "
        "workers asks all servers. The last rows say how evenly servers are used: the largest part "
        f"that one of them had, of the single jobs and of {N_MAPS} maps, where 1 is an even part."
    ),
    ways=[
        Way("dmap, one server", "dmap", on(1, work)),
        Way("dmap, two servers", "dmap", on(2, work)),
        Way("dmap, three servers", "dmap", on(3, work)),
        Way("dmap, parts of two servers", "dmap", on(2, lambda client: even(client, 2))),
        Way("dmap, parts of four servers", "dmap", on(4, lambda client: even(client, 4))),
    ],
    n=20_000,
    quick_n=4_000,
    take=measured,
)
