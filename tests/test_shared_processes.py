"""Large arguments and results between real processes, and what is left when those die."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import Clients
from cluster import Cluster, wait_for

from dmap import Client, references, shared
from dmap.references import Reference
from jobserver.protocol import Body

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="has no memory files, or no /proc"),
]

N = 2 * shared.SHARED_NBYTES // 8  # doubles


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        cluster.start_worker(2)
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    gc.collect()
    with Client(cluster.endpoints) as client:
        client.dmap(abs, range(8))
        yield client
    gc.collect()
    assert n_shared() == (0, 0)


def children(cluster: Cluster) -> list[int]:
    return [row["pid"] for row in cluster.rows(0, "workers")]


def n_shared(pid: int | str = "self") -> tuple[int, int]:
    """Return how many descriptors and mappings of shared memory a process has."""
    folder = Path(f"/proc/{pid}/fd")
    links = [os.readlink(folder / fd) for fd in os.listdir(folder) if (folder / fd).is_symlink()]
    maps = Path(f"/proc/{pid}/maps").read_text()
    return sum("dmap-shared" in link for link in links), maps.count("dmap-shared")


def an_array(n: int) -> Any:
    return np.full(N, float(n))


def write_and_sum(array: Any) -> float:
    array[0] += 1
    return float(array.sum())


def test_results_come_through_memory_and_nothing_is_left(cluster: Cluster, client: Client) -> None:
    results = client.dmap(an_array, range(6))
    assert [array.sum() for array in results] == [n * N for n in range(6)]
    assert n_shared() == (0, 6)
    results[3][5] = 7  # they are the caller's own
    del results
    gc.collect()
    assert n_shared() == (0, 0)
    for pid in children(cluster):
        wait_for(lambda pid=pid: n_shared(pid) == (0, 0))


def test_arguments_go_through_memory_and_nothing_is_left(cluster: Cluster, client: Client) -> None:
    arrays = [an_array(n) for n in range(6)]
    assert client.dmap(write_and_sum, arrays) == [n * N + 1 for n in range(6)]
    assert [array[0] for array in arrays] == list(range(6)), "a job writes to its own"
    job = client.submit(lambda array, folder: (array.sum(), n_shared(os.getpid())), arrays[1], 7)
    arrays[1][:] = 0  # after the submit
    total, (_, n_mapped) = job.result()
    assert total == N
    assert n_mapped == 1, "the worker has mapped it"
    wait_for(lambda: n_shared() == (0, 0))
    for pid in children(cluster):
        wait_for(lambda pid=pid: n_shared(pid) == (0, 0))


def test_merged_results_come_by_the_socket(client: Client) -> None:
    results = client.dmap(an_array, range(3), merge=True)
    assert [array.sum() for array in results] == [n * N for n in range(3)]
    assert n_shared() == (0, 0)


def test_a_worker_that_shares_nothing_gets_and_gives_all_by_the_socket() -> None:
    with Cluster() as cluster:
        os.environ["DMAP_SHARED"] = "0"
        try:
            cluster.start_worker(1)
        finally:
            del os.environ["DMAP_SHARED"]
        with Client(cluster.endpoints) as client:
            result = client.submit(lambda array: array + 1, an_array(1)).result()
            assert result.sum() == 2 * N
            assert n_shared() == (0, 0)


def noting(folder: Path) -> Callable[[int], Any]:
    """Return a function that makes an array, and notes in a file that it ran."""
    file = str(folder / "runs")

    def run(n: int) -> Any:
        with open(file, "a") as runs:
            runs.write("x")
        return an_array(n)

    return run


def test_a_result_that_cannot_be_opened_is_made_again_and_comes_whole(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: references.Named) -> memoryview:
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(shared, "_open", refuse)
    results = client.dmap(noting(tmp_path), range(3), chunksize=1)
    assert [array.sum() for array in results] == [n * N for n in range(3)]
    assert 3 < len((tmp_path / "runs").read_text()) <= 6
    runs = len((tmp_path / "runs").read_text())
    client.dmap(noting(tmp_path), range(3), chunksize=1)
    assert len((tmp_path / "runs").read_text()) == runs + 3, "nothing is shared for a while"


def test_an_argument_that_cannot_be_opened_goes_again_and_whole(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_referred = 0

    def refer_elsewhere(body: Body) -> Reference | None:
        nonlocal n_referred
        reference = refer(body)
        if reference is None:
            return None
        n_referred += 1
        names, rest = references.read(reference)
        return references.make([name._replace(pid=1) for name in names], bytes(rest), body)

    refer = shared.refer
    monkeypatch.setattr(shared, "refer", refer_elsewhere)
    arrays = [an_array(n) for n in range(3)]
    assert client.dmap(write_and_sum, arrays) == [n * N + 1 for n in range(3)]
    assert n_referred


WAITING = """
import json, sys
import numpy as np
from dmap import submit, dmap

folder, n, is_small = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["small"]

def make(argument):
    import os, time
    with open(f"{folder}/runs", "a") as runs:
        runs.write("x")
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.002)
    return argument[:10] if is_small else argument + 1

dmap(abs, [-1])
job = submit(make, np.ones(n))
job.handle
open(f"{folder}/submitted", "w").close()
print(json.dumps(job.result().sum()))
"""


def test_a_result_whose_process_was_killed_before_it_was_taken_is_made_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    with Clients(tmp_path, cluster.endpoints) as clients:
        client = clients.start(WAITING, tmp_path, N)
        client.wait_for("submitted")
        client.wait_for("runs")
        client.popen.send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        wait_for(lambda: any(n_shared(pid)[0] == 1 for pid in children(cluster)))
        (holder,) = [pid for pid in children(cluster) if n_shared(pid)[0] == 1]
        wait_for(lambda: not cluster.rows(0, "jobs"))  # its end is known to the server
        os.kill(holder, signal.SIGKILL)
        wait_for(lambda: holder not in children(cluster))
        client.popen.send_signal(signal.SIGCONT)
        assert client.answer() == 2 * N
        assert (tmp_path / "runs").read_text() == "xx"


@pytest.mark.parametrize("who", ["client", "supervisor"])
def test_nothing_is_left_when_a_process_that_shares_is_killed(
    cluster: Cluster, tmp_path: Path, who: str
) -> None:
    with Clients(tmp_path, cluster.endpoints) as clients:
        # A result would stay until the session of a killed client is over.
        client = clients.start(WAITING, tmp_path, N, "small" if who == "client" else "large")
        client.wait_for("submitted")
        client.wait_for("runs")
        pids = children(cluster)
        assert n_shared(client.popen.pid)[0] == 1
        assert sum(n_shared(pid)[1] for pid in pids) == 1
        if who == "client":
            client.kill()
            (tmp_path / "go").touch()
            for pid in pids:
                wait_for(lambda pid=pid: n_shared(pid) == (0, 0))
            return
        cluster.workers[0].kill()
        for pid in pids:
            wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())
        (tmp_path / "go").touch()
        cluster.start_worker(1)
        assert client.answer() == 2 * N
