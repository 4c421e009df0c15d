"""Processes that are killed, or told to leave, while six clients map over three servers."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from clients import ClientProcess, Clients
from cluster import Cluster, Process, wait_for

from dmap import Client
from dmap.connection import python_version
from dmap.cores import n_cores
from dmap.errors import NoServer
from jobserver import protocol as wire

pytestmark = pytest.mark.slow

N_ITEMS = 300
N_PROCESSES = 4  # workers, of two supervisors

MAP = """
import json, os, sys, time
from dmap import dmap

folder = os.getcwd()
name, n_items = sys.argv[1], int(sys.argv[2])

def triple(x):
    if x == 60:
        open(f"{folder}/begun-{name}", "w").close()
    time.sleep(0.005)
    with open(f"{folder}/runs-{name}", "a") as runs:
        runs.write(f"{x}\\n")
    return 3 * x

assert dmap(abs, [-1]) == [1]
open(f"ready-{name}", "w").close()
while not os.path.exists("start"):
    time.sleep(0.005)
print(json.dumps(dmap(triple, range(n_items))))
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Run three servers, and two supervisors with two processes each."""
    with Cluster(n_servers=3) as cluster:
        for name in ("sammy", "papag"):
            cluster.start_worker(2, "--name", name)
        yield cluster


@pytest.fixture
def clients(cluster: Cluster, tmp_path: Path) -> Iterator[Clients]:
    with Clients(tmp_path, cluster.endpoints) as clients:
        yield clients


def start_maps(clients: Clients, n_maps: int = 6) -> list[ClientProcess]:
    """Have clients map, all from the same moment on, and wait until each is in the middle."""
    maps = [clients.start(MAP, name, N_ITEMS) for name in range(n_maps)]
    for name, one in enumerate(maps):
        one.wait_for(f"ready-{name}")
    (clients.folder / "start").touch()
    for name, one in enumerate(maps):
        one.wait_for(f"begun-{name}")
    return maps


def see_lists(maps: list[ClientProcess]) -> None:
    """Assert that every list comes back, and is right."""
    for one in maps:
        assert one.answer() == [3 * x for x in range(N_ITEMS)]


def runs_of(clients: Clients) -> Counter[tuple[int, int]]:
    """Count the runs of each item of each map."""
    return Counter(
        (name, int(line))
        for name in range(6)
        for line in (clients.folder / f"runs-{name}").read_text().split()
    )


def each_item_ran_once(clients: Clients) -> bool:
    every = {(name, x) for name in range(6) for x in range(N_ITEMS)}
    return runs_of(clients) == Counter(every)


def children(process: Process) -> list[int]:
    pid = process.popen.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- kill -9 --------------------------------------------------------------------------------------


def test_a_child_may_be_killed_in_the_middle(cluster: Cluster, clients: Clients) -> None:
    maps = start_maps(clients)
    os.kill(children(cluster.workers[0])[0], signal.SIGKILL)
    see_lists(maps)
    assert max(runs_of(clients).values()) <= 2


def test_a_supervisor_may_be_killed_in_the_middle(cluster: Cluster, clients: Clients) -> None:
    maps = start_maps(clients)
    orphans = children(cluster.workers[0])
    cluster.workers[0].kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in orphans))
    see_lists(maps)
    assert max(runs_of(clients).values()) <= 2


@pytest.mark.parametrize("victim", range(3))
def test_any_server_may_be_killed_in_the_middle(
    cluster: Cluster, clients: Clients, victim: int
) -> None:
    maps = start_maps(clients)
    cluster.servers[victim].kill()
    see_lists(maps)
    assert max(runs_of(clients).values()) <= 2


def test_a_server_may_be_killed_and_come_back_in_the_middle(
    cluster: Cluster, clients: Clients
) -> None:
    maps = start_maps(clients)
    for server in cluster.servers:
        server.kill()
        server.start()
    see_lists(maps)


# --- SIGTERM --------------------------------------------------------------------------------------


def test_a_supervisor_that_is_told_to_leave_loses_nothing(
    cluster: Cluster, clients: Clients
) -> None:
    maps = start_maps(clients)
    cluster.workers[0].popen.terminate()
    assert cluster.workers[0].popen.wait(20) == 0
    see_lists(maps)
    assert each_item_ran_once(clients)


@pytest.mark.parametrize("leaver", range(3))
def test_a_server_that_is_told_to_leave_loses_nothing(
    cluster: Cluster, clients: Clients, leaver: int
) -> None:
    maps = start_maps(clients)
    cluster.servers[leaver].popen.terminate()
    assert cluster.servers[leaver].popen.wait(20) == 0
    see_lists(maps)
    assert each_item_ran_once(clients)


# --- the server that holds a map, or a report -----------------------------------------------------


def test_the_server_that_holds_a_map_may_be_killed(cluster: Cluster, clients: Clients) -> None:
    (one,) = start_maps(clients, 1)
    (holder,) = [number for number in range(3) if cluster.rows(number, "jobs")]
    cluster.servers[holder].kill()
    assert one.answer() == [3 * x for x in range(N_ITEMS)]


REPORTS = """
import json, os, sys
from dmap import Client

name, n_clients = sys.argv[1], int(sys.argv[2])
folder = os.getcwd()

def report():
    import os, time
    with open(f"{folder}/runs", "a") as runs:
        runs.write("x")
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.005)
    return "rows"

mine = [Client() for _ in range(n_clients)]
jobs = [client.options(uniq="report", merge=True).submit(report) for client in mine]
with open(f"asked-{name}.new", "w") as asked:
    print(*{job.handle for job in jobs}, file=asked)
os.rename(f"asked-{name}.new", f"asked-{name}")
print(json.dumps([job.result() for job in jobs]))
"""


@pytest.mark.parametrize("comes_back", [False, True])
def test_twenty_clients_that_wait_for_one_report_outlive_its_server(
    cluster: Cluster, clients: Clients, tmp_path: Path, comes_back: bool
) -> None:
    askers = [clients.start(REPORTS, name, 4) for name in range(5)]
    for name, asker in enumerate(askers):
        asker.wait_for(f"asked-{name}")
    handles = {(tmp_path / f"asked-{name}").read_text().strip() for name in range(5)}
    (handle,) = handles
    runs = tmp_path / "runs"
    wait_for(runs.exists)
    server = cluster.servers[cluster.names.index(handle.partition(":")[0])]
    server.kill()
    if comes_back:
        server.start()
    wait_for(lambda: runs.read_text() == "xx")
    (tmp_path / "go").touch()
    assert [asker.answer() for asker in askers] == [["rows"] * 4] * 5
    assert runs.read_text() == "xx", "it ran once more, for all"


# --- workers that vanish in between ---------------------------------------------------------------


class FleetingWorker:
    """Goes to sleep at every server, before all others, and does no more."""

    def __init__(self, endpoints: list[str]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        session = os.urandom(16)
        for endpoint in endpoints:
            socket = self._context.socket(zmq.DEALER)
            socket.connect(endpoint)
            self._poller.register(socket, zmq.POLLIN)
            hello = wire.Hello(1, 0, "worker", session, python_version())
            for message in (hello, wire.CanDo([wire.Ability("dmap")]), wire.GrabJobs()):
                socket.send(wire.encode(message))
            self._wait(socket, wire.NoJob)
            socket.send(wire.encode(wire.PreSleep()))

    def wait_noop(self) -> None:
        """Wait until a server wakes it."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for socket, _ in self._poller.poll(1000):
                if isinstance(wire.decode_to_peer(socket.recv_multipart()[0]), wire.Noop):
                    return
        raise AssertionError("no server woke it")

    def _wait(self, socket: zmq.Socket[bytes], kind: type[wire.Message]) -> None:
        while not isinstance(wire.decode_to_peer(socket.recv_multipart()[0]), kind):
            pass

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "silent"])
def test_a_worker_that_vanishes_after_its_noop_leaves_the_job_to_another(is_gone: bool) -> None:
    with Cluster(n_servers=3) as cluster:
        fleeting = FleetingWorker(cluster.endpoints)
        try:
            cluster.start_worker(1)
            cluster.wait_asleep(2)
            with Client(cluster.endpoints) as client:
                job = client.submit(pow, 2, 3)
                fleeting.wait_noop()
                if is_gone:
                    fleeting.close()
                # Not as late as a silent worker is taken for lost, which is after twenty seconds.
                assert job.result(10) == 8
        finally:
            fleeting.close()


@pytest.mark.parametrize("number", range(3))
def test_a_sleeper_is_woken_from_any_server(cluster: Cluster, number: int) -> None:
    cluster.wait_asleep(N_PROCESSES)
    with Client(cluster.endpoints[number]) as client:
        assert client.dmap(abs, range(-20, 0)) == list(range(20, 0, -1))
    cluster.wait_asleep(N_PROCESSES)


# --- no server at all -----------------------------------------------------------------------------


def test_no_server_is_an_error_with_every_address(cluster: Cluster) -> None:
    for server in cluster.servers:
        server.kill()
    with Client(cluster.endpoints) as client:
        began = time.monotonic()
        with pytest.raises(NoServer) as caught:
            client.dmap(abs, range(10))
        assert time.monotonic() - began < 25  # five times the bound
    assert all(endpoint in str(caught.value) for endpoint in cluster.endpoints)
    assert "jobserver" in str(caught.value)


def slow_double() -> Callable[[int], int]:
    """Return a function that goes to workers by value, unlike one of this module."""

    def double(x: int) -> int:
        time.sleep(0.005)
        return 2 * x

    return double


def test_a_map_whose_servers_are_all_gone_ends_with_its_time(cluster: Cluster) -> None:
    with Client(cluster.endpoints) as client:
        values = client.imap(slow_double(), range(1000), timeout=3.0)
        assert next(values) == 0
        for server in cluster.servers:
            server.kill()
        with pytest.raises(NoServer) as caught:
            list(values)
    assert all(endpoint in str(caught.value) for endpoint in cluster.endpoints)


def test_a_map_goes_on_when_its_servers_come_back(cluster: Cluster) -> None:
    with Client(cluster.endpoints) as client:
        values = client.imap(slow_double(), range(300))
        got = list(itertools.islice(values, 20))
        for server in cluster.servers:
            server.kill()
        for server in cluster.servers:
            server.start()
        got += values
    assert got == [2 * x for x in range(300)]


# --- clients that are killed ----------------------------------------------------------------------


ABANDONED = """
import os, sys, time
from dmap import submit

folder = os.getcwd()

def hang(number):
    import os, time
    open(f"{folder}/begun-{number}", "w").close()
    try:
        time.sleep(600)
    finally:
        open(f"{folder}/ended-{number}", "w").close()

jobs = [submit(hang, number) for number in range(10)]
time.sleep(600)
"""


def test_a_killed_clients_jobs_stop(cluster: Cluster, clients: Clients, tmp_path: Path) -> None:
    """They have the ten seconds in which it might have come back."""
    abandoned = clients.start(ABANDONED)
    wait_for(lambda: len(list(tmp_path.glob("begun-*"))) == N_PROCESSES)
    abandoned.kill()
    wait_for(lambda: len(list(tmp_path.glob("ended-*"))) == N_PROCESSES, within=40)
    cluster.wait_asleep(N_PROCESSES)
    assert len(list(tmp_path.glob("begun-*"))) == N_PROCESSES, "what was not begun was never begun"


LOCAL = """
import os, dmap, dmap.cores, dmap.local

folder = os.getcwd()

def hold(x):
    import itertools, os
    with open(f"{folder}/job.new", "w") as file:
        print(os.getpid(), os.getppid(), file=file)
    os.rename(f"{folder}/job.new", f"{folder}/job")
    sum(itertools.repeat(1))  # for ever, in C

job = dmap.submit(hold, 1)
supervisor = dmap.local._cluster._process.pid
children = []
while len(children) < 1 + dmap.cores.n_cores():  # the server and the workers
    with open(f"/proc/{supervisor}/task/{supervisor}/children") as file:
        children = file.read().split()
with open("cluster.new", "w") as file:
    print(supervisor, *children, file=file)
os.rename("cluster.new", "cluster")
job.result()
"""


def test_a_killed_clients_local_cluster_is_gone_though_its_job_is_busy(tmp_path: Path) -> None:
    with Clients(tmp_path) as clients:
        client = clients.start(LOCAL)
        client.wait_for("cluster")
        client.wait_for("job")
        pids = [
            int(pid) for name in ("cluster", "job") for pid in (tmp_path / name).read_text().split()
        ]
        assert len(set(pids)) == 2 + n_cores()  # the supervisor, the server, the workers
        client.kill()
        wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), within=10)
