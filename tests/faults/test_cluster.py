"""Six client processes, three servers, two supervisors: what is shared, and what fails alone."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import Clients
from cluster import Cluster, wait_for

from dmap import Client
from dmap.errors import JobTimeout, RemoteError, WorkerLost

pytestmark = pytest.mark.slow

N_PROCESSES = 4

MODULE = """
import os, time
from dmap import job

def look_up(path):
    with open(path, "a") as runs:
        runs.write("x")
    while not os.path.exists(os.path.join(os.path.dirname(path), "go")):
        time.sleep(0.005)
    return os.path.basename(path)

@job("report", merge=True)
def report(folder):
    return look_up(f"{folder}/runs")
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the module that workers import."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "jobs_of_faults.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def cluster(kept: None, modules: Path) -> Iterator[Cluster]:
    with Cluster(n_servers=3) as cluster:
        for name in ("sammy", "papag"):
            cluster.start_worker(2, "--name", name, "--import", "jobs_of_faults", path=modules)
        cluster.wait_asleep(N_PROCESSES)
        yield cluster


@pytest.fixture
def clients(cluster: Cluster, tmp_path: Path) -> Iterator[Clients]:
    with Clients(tmp_path, cluster.endpoints) as clients:
        yield clients


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoints) as client:
        yield client


# --- merging --------------------------------------------------------------------------------------

ASK = """
import json, os, sys
import dmap

name, kind = sys.argv[1:]
folder = os.getcwd()

def report():
    import os, time
    with open(f"{folder}/runs", "a") as runs:
        runs.write("x")
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.005)
    return "runs"

if kind == "named":
    job = dmap.submit("report", folder)
else:
    job = dmap.Client().options(uniq=folder, merge=True).submit(report)
with open(f"asked-{name}.new", "w") as asked:
    asked.write(job.handle)
os.rename(f"asked-{name}.new", f"asked-{name}")
print(json.dumps(job.result()))
"""


@pytest.mark.parametrize("kind", ["named", "closure"])
def test_six_clients_share_one_run_also_those_that_ask_while_it_runs(
    clients: Clients, tmp_path: Path, kind: str
) -> None:
    askers = [clients.start(ASK, name, kind) for name in range(4)]
    wait_for((tmp_path / "runs").exists)
    askers += [clients.start(ASK, name, kind) for name in (4, 5)]
    for name, asker in enumerate(askers):
        asker.wait_for(f"asked-{name}")
    (tmp_path / "go").touch()
    assert [asker.answer() for asker in askers] == ["runs"] * 6
    assert (tmp_path / "runs").read_text() == "x"


MERGED_MAP = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from dmap import dmap
from jobs_of_faults import look_up

print(json.dumps(dmap(look_up, [f"{os.getcwd()}/{key}" for key in "abcabc"], merge=True)))
"""


def test_equal_items_of_six_clients_maps_run_once(
    cluster: Cluster, clients: Clients, modules: Path, tmp_path: Path
) -> None:
    askers = [clients.start(MERGED_MAP, modules) for _ in range(6)]

    def n_listeners() -> int:
        return sum(row["listeners"] for n in range(3) for row in cluster.rows(n, "jobs"))

    wait_for(lambda: n_listeners() == 6 * 6)
    (tmp_path / "go").touch()
    assert [asker.answer() for asker in askers] == [list("abcabc")] * 6
    assert [(tmp_path / key).read_text() for key in "abc"] == ["x"] * 3


def test_a_job_that_asks_for_itself_does_not_wait_for_itself(cluster: Cluster) -> None:
    def ask(depth: int) -> str:
        if depth == 0:
            return "an end"
        with Client() as inner:
            job = inner.options(uniq="the same", merge=True).submit(ask, depth - 1)
            return job.result()

    with Client(cluster.endpoints) as client:
        job = client.options(uniq="the same", merge=True).submit(ask, 3)
        assert job.result(30) == "an end"


# --- what is wrong with one item ------------------------------------------------------------------


def raise_error() -> Callable[[], object]:
    def spoil() -> object:
        raise ValueError("bad")

    return spoil


def exit_at_once() -> Callable[[], object]:
    return lambda: os._exit(3)


def exit_politely() -> Callable[[], object]:
    return lambda: sys.exit(3)


def be_killed() -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


def segfault() -> Callable[[], object]:
    return lambda: __import__("ctypes").string_at(1)


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize(
    ("make", "kind", "exit"),
    [
        (raise_error, ValueError, None),
        (exit_politely, RemoteError, None),
        (exit_at_once, WorkerLost, "exit code 3"),
        (be_killed, WorkerLost, "SIGKILL"),
        (segfault, WorkerLost, "SIGSEGV"),
    ],
)
def test_a_bad_item_among_five_hundred_fails_alone(
    client: Client,
    make: Callable[[], Callable[[], object]],
    kind: type[Exception],
    exit: str | None,
    attempts: int,
) -> None:
    spoil = make()

    def work(x: int) -> int:
        if x == 250:
            spoil()
        return 3 * x

    values: list[Any] = client.dmap(work, range(500), on_error="return", attempts=attempts)
    error = values.pop(250)
    assert type(error) is kind
    assert values == [3 * x for x in range(500) if x != 250]
    if isinstance(error, WorkerLost):
        assert (error.index, error.attempts, error.exit) == (250, attempts, exit)
    else:
        assert any("item 250" in note for note in error.__notes__)


# --- busy in C ------------------------------------------------------------------------------------


def backtrack() -> Callable[[], object]:
    return lambda: re.match(r"(a+)+$", "a" * 40 + "b")


def raise_to_a_power() -> Callable[[], object]:
    return lambda: pow(3, 10**9)


def add_for_ever() -> Callable[[], object]:
    return lambda: sum(__import__("itertools").repeat(1))


in_c = pytest.mark.parametrize("make", [backtrack, raise_to_a_power, add_for_ever])


@in_c
def test_an_item_that_holds_the_gil_runs_out_of_its_time(
    client: Client, make: Callable[[], Callable[[], object]]
) -> None:
    hold = make()

    def work(x: int) -> int:
        if x == 13:
            hold()
        return 3 * x

    values: list[Any] = client.dmap(work, range(50), item_timeout=0.5, on_error="return")
    error = values.pop(13)
    assert isinstance(error, JobTimeout)
    assert "item 13" in str(error) + "".join(getattr(error, "__notes__", ()))
    assert values == [3 * x for x in range(50) if x != 13]


@in_c
def test_a_job_that_holds_the_gil_can_be_cancelled(
    cluster: Cluster, client: Client, tmp_path: Path, make: Callable[[], Callable[[], object]]
) -> None:
    hold = make()
    begun = tmp_path / "begun"

    def work() -> None:
        begun.touch()
        hold()

    job = client.submit(work)
    wait_for(begun.exists)
    assert job.cancel()
    cluster.wait_asleep(N_PROCESSES)


# --- what goes with a function --------------------------------------------------------------------

CLOSURES = """
import functools, json, math
from dmap import dmap

RATE = 3

def scale(x):
    return RATE * x + math.floor(0.5)

def even(n):
    return True if n == 0 else odd(n - 1)

def odd(n):
    return False if n == 0 else even(n - 1)

class Point:
    scale = 10

    def __init__(self, x):
        self.x = x

    def times(self, n):
        return Point(self.x * n * self.scale)

class Far(Point):
    def times(self, n):
        return super().times(n + 1)

def make_adder(n):
    def add(x):
        return n + inner(x)

    def inner(x):
        return x * x

    return add

def main():
    x = 1
    seen = {}
    seen["locals"] = dmap(lambda v: v + x, range(1, 4))
    seen["functions of main"] = dmap(scale, range(3))
    seen["one another"] = dmap(even, range(4))
    seen["nested functions"] = dmap(make_adder(5), range(3))
    seen["classes"] = [p.x for p in dmap(lambda p: p.times(2), [Point(1), Far(1)])]
    seen["types"] = [type(p) is Far for p in dmap(Far, [1])]
    seen["bound methods"] = [p.x for p in dmap(Point(4).times, [1, 2])]
    seen["partials"] = dmap(functools.partial(pow, 2), range(4))
    seen["lambdas in lambdas"] = dmap(lambda v: (lambda w: v * w + x)(v), range(3))
    seen["builtins"] = dmap(len, ["a", "bb"])
    print(json.dumps(seen))

main()
"""


def test_closures_just_work(clients: Clients) -> None:
    assert clients.start(CLOSURES).answer() == {
        "locals": [2, 3, 4],
        "functions of main": [0, 3, 6],
        "one another": [True, False, True, False],
        "nested functions": [5, 6, 9],
        "classes": [20, 30],
        "types": [True],
        "bound methods": [40, 80],
        "partials": [1, 2, 4, 8],
        "lambdas in lambdas": [1, 2, 5],
        "builtins": [1, 2],
    }


# --- maps inside maps -----------------------------------------------------------------------------

NESTED = """
import sys
from dmap import dmap

def count(depth):
    return sum(dmap(count, [depth - 1] * 3)) if depth else 1

print(sum(dmap(count, [int(sys.argv[1])] * 2)))
"""


@pytest.mark.parametrize("depth", [1, 3])
def test_maps_inside_maps_finish_on_one_process(tmp_path: Path, depth: int) -> None:
    with Cluster(n_servers=3) as cluster, Clients(tmp_path, cluster.endpoints) as clients:
        cluster.start_worker(1)
        both = [clients.start(NESTED, depth) for _ in range(2)]
        assert [one.answer() for one in both] == [2 * 3**depth] * 2


# --- Ctrl-C ---------------------------------------------------------------------------------------

INTERRUPTED = """
import itertools, json, os, sys, time
from dmap import dmap

folder = os.getcwd()
kind = sys.argv[1]

def work(x):
    if x >= 3:
        open(f"{folder}/begun-{x}", "w").close()
        if kind == "wait":
            time.sleep(600)
        else:
            sum(itertools.repeat(1))  # for ever, in C
    return 2 * x

try:
    dmap(work, range(100), chunksize=1)
except KeyboardInterrupt as error:
    results = error.results
print(json.dumps([sorted(results.items()), dmap(abs, [-1, -2])]))
"""


@pytest.mark.parametrize("kind", ["wait", "hold"])
def test_ctrl_c_ends_a_map_and_leaves_the_cluster_usable(
    cluster: Cluster, clients: Clients, tmp_path: Path, kind: str
) -> None:
    client = clients.start(INTERRUPTED, kind)
    wait_for(lambda: len(list(tmp_path.glob("begun-*"))) == N_PROCESSES)
    began = time.monotonic()
    client.popen.send_signal(signal.SIGINT)
    results, after = client.answer()
    assert time.monotonic() - began < 10  # some five times the promise
    assert all(value == 2 * x for x, value in results)
    assert after == [1, 2]
    cluster.wait_asleep(N_PROCESSES)
