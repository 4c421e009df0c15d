"""Jobs that wait for jobs, in real processes: they end, however few processes there are."""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from clients import Clients
from cluster import Cluster, wait_for

import dmap
from dmap import Client
from dmap.calls import _client
from dmap.errors import JobTimeout, WorkerLost

LONG = 60.0
"""Seconds in which whatever is asked for here must have come, on any machine."""


MOMENT = 5.0
"""Half of what a session lives on that was left without a goodbye."""


def worker_pids(cluster: Cluster) -> list[int]:
    """Return the processes under the cluster's supervisors."""
    found: list[int] = []
    for worker in cluster.workers:
        pid = worker.popen.pid
        found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


@pytest.fixture(scope="module")
def cluster(kept: None) -> Iterator[Cluster]:
    """Start one server and one worker process, for all tests that leave both alive."""
    with Cluster() as cluster:
        cluster.start_worker(1)
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    """Return a client; the test fails if its jobs took a further process, or another one."""
    wait_for(lambda: len(worker_pids(cluster)) == 1)
    before = worker_pids(cluster)
    with Client(cluster.endpoints) as client:
        yield client
    assert worker_pids(cluster) == before


# --- all ways to wait -----------------------------------------------------------------------------

Func = Callable[[int], int]


def by_dmap(func: Func, items: Sequence[int]) -> int:
    return sum(dmap.dmap(func, items))


def by_imap(func: Func, items: Sequence[int]) -> int:
    return sum(dmap.imap(func, items, buffersize=1))


def by_result(func: Func, items: Sequence[int]) -> int:
    return sum(dmap.submit(func, item).result() for item in items)


def by_wait(func: Func, items: Sequence[int]) -> int:
    left: set[Any] = {dmap.submit(func, item) for item in items}
    total = 0
    while left:
        done, left = dmap.wait(left, return_when="FIRST_COMPLETED")
        total += sum(job.result() for job in done)
    return total


def by_as_completed(func: Func, items: Sequence[int]) -> int:
    return sum(job.result() for job in dmap.as_completed(dmap.submit(func, n) for n in items))


WAYS = [by_dmap, by_imap, by_result, by_wait, by_as_completed]


def tree(ways: Sequence[Callable[[Func, Sequence[int]], int]], item: int) -> int:
    """Wait for jobs by the first of these ways, inside which they wait by the next, and so on."""
    return ways[0](functools.partial(tree, ways[1:]), [item, item + 1]) if ways else item


def sum_of(depth: int, item: int) -> int:
    """Return what a tree so deep comes to."""
    return sum(sum_of(depth - 1, item + n) for n in range(2)) if depth else item


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_jobs_may_wait_in_any_way(
    client: Client, way: Callable[[Func, Sequence[int]], int], depth: int
) -> None:
    found = client.dmap(functools.partial(tree, [way] * depth), range(3), timeout=LONG)
    assert found == [sum_of(depth, item) for item in range(3)]


@pytest.mark.parametrize("first", range(len(WAYS)))
def test_ways_to_wait_may_be_mixed(client: Client, first: int) -> None:
    ways = WAYS[first:] + WAYS[:first]
    assert client.submit(tree, ways, 1).result(LONG) == sum_of(len(ways), 1)


EMBEDDED = """
import json, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # so there is one process
from dmap import dmap

def count(depth):
    pid = {os.getpid()}
    return pid.union(*dmap(count, [depth - 1] * 3)) if depth else pid

print(json.dumps(len(set().union(*dmap(count, [2] * 3)))))
"""


@pytest.mark.slow
def test_maps_inside_maps_end_in_a_local_cluster_of_one_process(tmp_path: Path) -> None:
    with Clients(tmp_path) as clients:
        assert clients.start(EMBEDDED).answer() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("n_servers", "n_processes"), [(2, 1), (3, 1), (3, 2)])
def test_jobs_wait_for_jobs_of_several_servers(n_servers: int, n_processes: int) -> None:
    with Cluster(n_servers) as cluster, Client(cluster.endpoints) as client:
        cluster.start_worker(n_processes)
        found = client.dmap(functools.partial(tree, WAYS), range(2), timeout=LONG)
        assert found == [sum_of(len(WAYS), item) for item in range(2)]
        assert len(worker_pids(cluster)) == n_processes


# --- merged ---------------------------------------------------------------------------------------


def mark(folder: Path, name: object) -> None:
    """Leave a mark of one run."""
    (folder / f"{name} {time.monotonic_ns()}").touch()


def marks(folder: Path) -> list[str]:
    """Return the names of all runs, in order."""
    return sorted(path.name.partition(" ")[0] for path in folder.iterdir())


def test_equal_items_of_each_level_run_once(client: Client, tmp_path: Path) -> None:
    def run(depth: int, item: str) -> list[str]:
        mark(tmp_path, item)
        if not depth:
            return [item]
        items = [f"{item}{letter}" for letter in "abaab"]
        lists = dmap.dmap(functools.partial(run, depth - 1), items, merge=True)
        return list(itertools.chain(*lists))

    (leaves,) = client.dmap(functools.partial(run, 3), ["x"], timeout=LONG)
    assert len(leaves) == 5**3
    distinct = [f"x{a}{b}{c}" for a in ("", *"ab") for b in ("", *"ab") for c in ("", *"ab")]
    assert marks(tmp_path) == sorted(set(distinct))


def fibonacci(folder: Path, n: int) -> int:
    mark(folder, n)
    if n < 2:
        return n
    return sum(dmap.dmap(functools.partial(fibonacci, folder), [n - 1, n - 2], merge=True))


def test_a_merged_recursion_runs_each_item_once(client: Client, tmp_path: Path) -> None:
    call = functools.partial(fibonacci, tmp_path)
    assert client.dmap(call, [16], merge=True, timeout=LONG) == [987]
    assert marks(tmp_path) == sorted(map(str, range(17)))


@pytest.mark.slow
def test_a_merged_recursion_ends_on_several_servers_and_processes(tmp_path: Path) -> None:
    with Cluster(3) as cluster, Client(cluster.endpoints) as client:
        cluster.start_worker(2)
        call = functools.partial(fibonacci, tmp_path)
        assert client.dmap(call, [12, 11], merge=True, timeout=LONG) == [144, 89]
    # What has ended before it is asked for again runs again.
    assert set(marks(tmp_path)) == set(map(str, range(13)))


def test_inner_maps_of_many_outer_items_share_runs_that_are_under_way(tmp_path: Path) -> None:
    def inner(item: int) -> int:
        mark(tmp_path, f"inner-{item}")
        wait_for_file(tmp_path / "go")
        return item

    def middle(item: int) -> int:
        return sum(dmap.dmap(inner, range(2), merge=True)) + item

    def outer(item: int) -> int:
        return sum(dmap.dmap(middle, [item]))

    with Cluster() as cluster, Client(cluster.endpoints) as client:
        cluster.start_worker(4)
        results = [client.submit(outer, item) for item in range(4)]
        # Four wait in as many processes, two of which run the inner items meanwhile.
        wait_for(lambda: [j["listeners"] for j in jobs_of(cluster, "inner")] == [4, 4], LONG)
        (tmp_path / "go").touch()
        assert [job.result(LONG) for job in results] == [1, 2, 3, 4]
    (tmp_path / "go").unlink()
    assert marks(tmp_path) == ["inner-0", "inner-1"]


def wait_for_file(path: Path) -> None:
    """Wait, in a job, for a file that the test makes."""
    while not path.exists():
        time.sleep(0.005)


def jobs_of(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    """Return the live jobs of a map's function at all servers."""
    rows = [row for n in range(len(cluster.names)) for row in cluster.rows(n, "jobs")]
    return [row for row in rows if row["description"].rpartition(".")[2] == name]


def test_a_job_inside_itself_joins_none_of_those_around_it(client: Client, tmp_path: Path) -> None:
    def ping(n_runs: int) -> int:
        mark(tmp_path, "ping")
        if len(marks(tmp_path)) >= n_runs:
            return 0
        return 1 + dmap.dmap(pong, [n_runs], merge=True)[0]

    def pong(n_runs: int) -> int:
        mark(tmp_path, "pong")
        return 1 + dmap.dmap(ping, [n_runs], merge=True)[0]

    assert client.dmap(ping, [5], merge=True, timeout=LONG) == [4]
    assert marks(tmp_path) == ["ping"] * 3 + ["pong"] * 2


def one() -> int:
    return 1


def two() -> int:
    return dmap.submit(one).result() + 1


def three() -> int:
    return _client().options(merge=True).submit(two).result() + 1


def two_and_three() -> tuple[int, int]:
    merged = _client().options(merge=True)  # of the process's own client, as `submit` is
    jobs = merged.submit(two), merged.submit(three)
    return jobs[0].result(), jobs[1].result()


def test_a_sibling_may_wait_for_the_equal_of_one_that_waits(client: Client) -> None:
    assert client.submit(two_and_three).result(LONG) == (2, 3)


def test_a_job_that_waits_runs_no_job_of_another(client: Client) -> None:
    def leaf(item: int) -> int:
        return item

    def middle(item: int) -> int:
        return dmap.submit(leaf, item).result()

    def outer(n: int) -> int:
        return sum(
            job.result() for job in dmap.as_completed([dmap.submit(middle, 1) for _ in range(n)])
        )

    # If each ran the next one inside itself, they would soon be too deep.
    assert client.submit(outer, 100).result(LONG) == 100


def visit(folder: Path, page: str) -> int:
    """Count the pages that are found first from this one on; each has links to all others."""
    if page in marks(folder):
        return 0
    mark(folder, page)
    links = [other for other in "abc" if other != page]
    return 1 + sum(dmap.dmap(functools.partial(visit, folder), links, merge=True))


@pytest.mark.parametrize("n_processes", [1, 3])
def test_a_search_that_goes_in_circles_ends(tmp_path: Path, n_processes: int) -> None:
    with Cluster() as cluster, Client(cluster.endpoints) as client:
        cluster.start_worker(n_processes)
        # Each is asked for by the others before it ends. What is inside it must not wait for it.
        client.dmap(functools.partial(visit, tmp_path), "abc", merge=True, timeout=LONG)
    assert set(marks(tmp_path)) == set("abc")


# --- how they end otherwise -----------------------------------------------------------------------


def test_what_the_innermost_job_raises_comes_out_with_a_note_of_each(client: Client) -> None:
    def inner(item: int) -> float:
        return 1 / item

    def middle(item: int) -> list[float]:
        return dmap.dmap(inner, [2, 1, item], chunksize=1)

    def outer(item: int) -> list[list[float]]:
        return dmap.dmap(middle, [1, item], chunksize=1)

    with pytest.raises(ZeroDivisionError) as caught:
        client.dmap(outer, [1, 1, 1, 0], chunksize=1, timeout=LONG)
    notes = re.findall(r"^item \d+", "\n".join(caught.value.__notes__), re.MULTILINE)
    assert notes == ["item 2", "item 1", "item 3"]
    assert client.dmap(outer, [1], timeout=LONG) == [[[0.5, 1.0, 1.0]] * 2]


def test_a_job_may_catch_what_one_inside_it_raises(client: Client) -> None:
    def inner(item: int) -> float:
        return 1 / item

    def outer(item: int) -> list[Any]:
        return dmap.dmap(inner, [item, 1], on_error="skip")

    assert client.dmap(outer, [0, 1], timeout=LONG) == [[1.0], [1.0, 1.0]]


def test_twenty_jobs_may_wait_one_inside_the_other(client: Client) -> None:
    def count(depth: int) -> int:
        return 1 + dmap.dmap(count, [depth - 1])[0] if depth else 0

    assert client.dmap(count, [20], timeout=LONG) == [20]


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_a_recursion_without_an_end_is_an_error(client: Client, merge: bool) -> None:
    def count(n: int) -> int:
        return 1 + dmap.dmap(count, [n + 1], merge=merge)[0]

    with pytest.raises(RecursionError, match="60 jobs wait one inside the other"):
        client.dmap(count, [0], timeout=LONG)
    assert client.dmap(abs, [-1], timeout=LONG) == [1]


@pytest.mark.slow
def test_no_job_is_lost_where_the_frames_run_out(client: Client) -> None:
    def inner() -> int:
        def endless(n: int) -> int:
            return 1 + endless(n)

        return endless(0)

    def outer(depth: int) -> str:
        job = dmap.submit(inner)

        def down(left: int) -> str:
            if left:
                return down(left - 1)
            try:
                return str(job.result())
            except RecursionError:
                return "deep"

        return down(depth)

    for depth in range(930, 980, 3):
        assert client.submit(outer, depth).result(LONG) == "deep"


# --- what stops them ------------------------------------------------------------------------------


def sleep_inside(folder: Path, item: int) -> list[int]:
    """Wait for two jobs that never end."""

    def sleep(other: int) -> int:
        mark(folder, f"begun-{other}")
        time.sleep(600)
        return other

    return dmap.dmap(sleep, [item, item + 1], chunksize=1)


@pytest.fixture(params=[1, 2])
def lone(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Start a cluster whose processes may be lost: a single one, or one more for inner items."""
    with Cluster() as cluster:
        cluster.start_worker(request.param)
        wait_until_free(cluster)
        yield cluster


def wait_until_free(cluster: Cluster) -> None:
    """Wait until all processes of the only server's only worker have come, and wait for work."""
    free = ["waiting"] * int(cluster.workers[0].argv[-1])
    wait_for(lambda: [row["state"] for row in cluster.rows(0, "workers")] == free)


def assert_all_have_ended(cluster: Cluster) -> None:
    """See that no job is left after a moment, and that all processes are there and free."""
    wait_for(lambda: not cluster.rows(0, "jobs"), MOMENT)
    wait_until_free(cluster)
    assert len(worker_pids(cluster)) == int(cluster.workers[0].argv[-1])


def cancel(client: Client, folder: Path, wait_until_begun: Callable[[], None]) -> None:
    job = client.submit(sleep_inside, folder, 0)
    wait_until_begun()
    assert job.cancel()


def let_its_time_be_over(client: Client, folder: Path, wait_until_begun: object) -> None:
    with pytest.raises(JobTimeout):
        client.options(timeout=3).submit(sleep_inside, folder, 0).result(LONG)


def let_an_items_time_be_over(client: Client, folder: Path, wait_until_begun: object) -> None:
    with pytest.raises(JobTimeout):
        client.dmap(functools.partial(sleep_inside, folder), [0], item_timeout=3, timeout=LONG)


def let_the_maps_time_be_over(client: Client, folder: Path, wait_until_begun: object) -> None:
    with pytest.raises(JobTimeout):
        client.dmap(functools.partial(sleep_inside, folder), [0], timeout=3)


def end_the_client(client: Client, folder: Path, wait_until_begun: Callable[[], None]) -> None:
    client.submit(sleep_inside, folder, 0)
    wait_until_begun()
    client.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        cancel,
        let_its_time_be_over,
        let_an_items_time_be_over,
        let_the_maps_time_be_over,
        end_the_client,
    ],
)
def test_a_job_that_is_stopped_takes_those_inside_it_along(
    lone: Cluster, tmp_path: Path, stop: Callable[[Client, Path, Callable[[], None]], None]
) -> None:
    n_processes = int(lone.workers[0].argv[-1])
    with Client(lone.endpoints) as client:
        stop(client, tmp_path, lambda: wait_for(lambda: len(marks(tmp_path)) == n_processes))
    assert marks(tmp_path) == ["begun-0", "begun-1"][:n_processes]
    assert_all_have_ended(lone)


INTERRUPTED = """
import json, os, time
from dmap import dmap

folder = os.getcwd()

def sleep(item):
    open(f"{folder}/marks/begun-{item}", "w").close()
    time.sleep(600)

try:
    dmap(lambda n: dmap(lambda m: dmap(sleep, [n + m]), [0, 1], chunksize=1), [0])
except KeyboardInterrupt:
    print(json.dumps("interrupted"))
"""


@pytest.mark.slow
def test_ctrl_c_ends_maps_inside_maps(lone: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "marks"
    folder.mkdir()
    n_processes = int(lone.workers[0].argv[-1])
    with Clients(tmp_path, lone.endpoints) as clients:
        script = clients.start(INTERRUPTED)
        wait_for(lambda: len(marks(folder)) == n_processes)
        script.popen.send_signal(signal.SIGINT)
        assert script.answer() == "interrupted"
    assert_all_have_ended(lone)


@pytest.mark.slow
def test_a_process_that_dies_in_an_inner_job_costs_an_attempt_of_all_that_it_ran(
    lone: Cluster, tmp_path: Path
) -> None:
    def inner(item: int) -> int:
        mark(tmp_path, item)
        if item == 1 and marks(tmp_path).count("1") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    def outer(item: int) -> int:
        return sum(dmap.dmap(inner, range(3), chunksize=1)) + item

    with Client(lone.endpoints) as client:
        assert client.dmap(outer, range(2), timeout=LONG) == [3, 4]


@pytest.mark.slow
def test_a_job_that_may_run_once_is_lost_with_the_one_inside_it(tmp_path: Path) -> None:
    def inner(item: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return item

    def outer(item: int) -> list[int]:
        mark(tmp_path, "outer")
        return dmap.dmap(inner, [item])

    with Cluster() as cluster, Client(cluster.endpoints) as client:
        cluster.start_worker(1)
        with pytest.raises(WorkerLost) as caught:
            client.dmap(outer, [0], attempts=1, timeout=LONG)
    assert (caught.value.attempts, caught.value.exit) == (1, "SIGKILL")
    assert marks(tmp_path) == ["outer"]


@pytest.mark.slow
def test_a_worker_that_leaves_first_ends_the_job_that_waits_for_jobs(tmp_path: Path) -> None:
    def first(item: int) -> int:
        mark(tmp_path, "begun")
        wait_for_file(tmp_path / "go")
        return item

    def second(item: int) -> int:  # its closure is fetched when its worker leaves
        return 2 * item

    def outer(item: int) -> int:
        return sum(dmap.dmap(second, dmap.dmap(first, [item, item])))

    with Cluster() as cluster, Client(cluster.endpoints) as client:
        worker = cluster.start_worker(1)
        job = client.submit(outer, 1)
        wait_for(lambda: marks(tmp_path) == ["begun"])
        worker.popen.terminate()
        (tmp_path / "go").touch()
        assert job.result(LONG) == 4
        assert worker.popen.wait(LONG) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_inner_maps_outlive_any_one_of_three_servers(tmp_path: Path, number: int) -> None:
    def inner(item: int) -> int:
        mark(tmp_path, "inner")
        time.sleep(0.02)
        return item

    def outer(item: int) -> int:
        return sum(dmap.dmap(inner, range(20), chunksize=1)) + item

    with Cluster(3) as cluster, Client(cluster.endpoints) as client:
        cluster.start_worker(2)
        results = [client.submit(outer, item) for item in range(3)]
        wait_for(lambda: len(marks(tmp_path)) >= 5)
        cluster.servers[number].kill()
        assert [job.result(LONG) for job in results] == [190, 191, 192]
