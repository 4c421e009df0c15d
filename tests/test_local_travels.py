"""Local modules on real workers that have none of them: what runs is what the client has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import Clients
from cluster import Cluster

N_PROCESSES = 2


@pytest.fixture(scope="module")
def cluster(kept: None) -> Iterator[Cluster]:
    with Cluster() as cluster:
        cluster.start_worker(n_processes=N_PROCESSES)
        yield cluster


@pytest.fixture
def clients(cluster: Cluster, tmp_path: Path) -> Iterator[Clients]:
    with Clients(tmp_path, cluster.endpoints) as clients:
        yield clients


def write(folder: Path, **texts: str) -> None:
    """Write modules; two underscores in a name stand for a slash."""
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_module_next_to_the_script_travels_with_what_it_imports(clients: Clients) -> None:
    write(
        clients.folder,
        shop="import threading\nfrom prices import price\nlock = threading.Lock()\n"
        "def total(n):\n    with lock:\n        return price(n) * 2\n",
        prices="def price(n):\n    return n + 1\n",
    )
    script = "import json, dmap, shop\nprint(json.dumps(dmap.dmap(shop.total, range(3))))"
    assert clients.start(script).answer() == [2, 4, 6]


def test_a_package_travels_that_is_first_imported_inside_of_the_function(clients: Clients) -> None:
    write(
        clients.folder,
        app__init="",
        app__main="from . import base\nfrom .deep.one import g\n"
        "def run(x):\n    import importlib\n"
        "    return [base.f(x), g(x), importlib.import_module('app.deep.' + 'two').h(x)]\n",
        app__base="def f(x):\n    return x\n",
        app__deep__one="from ..base import f\ndef g(x):\n    return 10 * f(x)\n",
        app__deep__two="def h(x):\n    return 100 * x\n",
    )
    (clients.folder / "app" / "init.py").rename(clients.folder / "app" / "__init__.py")
    script = """
import json, sys, dmap
def f(x):
    from app import main
    return main.run(x)
found = dmap.dmap(f, [1, 2])
assert "app" not in sys.modules
print(json.dumps(found))
"""
    assert clients.start(script).answer() == [[1, 10, 100], [2, 20, 200]]


def test_items_results_and_exceptions_of_local_classes_come_back_as_these(clients: Clients) -> None:
    write(
        clients.folder,
        shapes="import enum\nclass Point:\n    def __init__(self, x):\n        self.x = x\n"
        "class Color(enum.Enum):\n    RED = 1\n"
        "class Odd(Exception):\n    def __init__(self, point, why):\n"
        "        super().__init__(point, why)\n        self.point = point\n",
    )
    script = """
import json, dmap
from shapes import Color, Odd, Point
def moved(p):
    if p.x == 3:
        raise Odd(p, "three")
    return Point(p.x + 1), Color.RED
found = dmap.dmap(lambda p: p.x, [Point(5)])
for point, color in dmap.dmap(moved, [Point(1), Point(2)]):
    assert type(point) is Point and color is Color.RED
    found.append(point.x)
try:
    dmap.dmap(moved, [Point(3)])
except Odd as error:
    found.append(error.point.x)
job = dmap.submit(repr, Color.RED)
print(json.dumps([*found, job.result()]))
"""
    assert clients.start(script).answer() == [5, 2, 3, 3, "<Color.RED: 1>"]


def test_an_edited_module_runs_as_edited_on_warm_workers(clients: Clients) -> None:
    write(clients.folder, rates="RATE = 1\ndef rate(x):\n    return x * RATE\n")
    script = """
import importlib, json, os, dmap, rates

def unseen(x):
    import later
    return later.f(x)

def edit(name, text):
    with open(name, "w") as file:
        file.write(text)

found = [dmap.dmap(rates.rate, [1, 2])]
edit("rates.py", "RATE = 10\\ndef rate(x):\\n    return x * RATE + 1\\n")
importlib.reload(rates)
found.append(dmap.dmap(rates.rate, [1, 2]))
rates.RATE = 100
found.append(dmap.dmap(rates.rate, [1, 2]))
edit("later.py", "def f(x):\\n    return x\\n")
found.append(dmap.dmap(unseen, [1, 2]))
edit("later.py", "def f(x):\\n    return -x\\n")
found.append(dmap.dmap(unseen, [1, 2]))
print(json.dumps(found))
"""
    assert clients.start(script).answer() == [[1, 2], [11, 21], [101, 201], [1, 2], [-1, -2]]


def test_single_jobs_run_what_was_set_and_loaded_since_the_last_one(clients: Clients) -> None:
    write(
        clients.folder, rates="RATE = 1\nTABLE = {1: 1}\ndef rate(x):\n    return TABLE[x] * RATE\n"
    )
    script = """
import importlib, json, dmap, rates
found = []
for n in range(5):
    rates.RATE = n
    rates.TABLE[1] = n + 1
    found.append(dmap.submit(rates.rate, 1).result())
print(json.dumps(found))
"""
    assert clients.start(script).answer() == [0, 2, 6, 12, 20]


def test_two_clients_run_their_own_versions_of_a_module_at_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    script = """
import json, dmap, mine
print(json.dumps([dmap.dmap(mine.f, range(50), chunksize=1) for _ in range(20)]))
"""
    folders = [tmp_path / "one", tmp_path / "other"]
    for n, folder in enumerate(folders):
        write(folder, mine=f"def f(x):\n    return [x, {n}]\n")
    with (
        Clients(folders[0], cluster.endpoints) as some,
        Clients(folders[1], cluster.endpoints) as more,
    ):
        running = [some.start(script), more.start(script)]
        for n, client in enumerate(running):
            assert client.answer() == [[[x, n] for x in range(50)]] * 20


def test_a_named_function_keeps_the_worker_s_own_module(cluster: Cluster, tmp_path: Path) -> None:
    installed, own = tmp_path / "installed", tmp_path / "own"
    write(
        installed,
        both="from dmap import job\nWHOSE = 'the worker'\n@job('whose')\n"
        "def whose(x):\n    import both\n    return both.WHOSE\n",
    )
    write(own, both="WHOSE = 'the client'\ndef whose(x):\n    import both\n    return both.WHOSE\n")
    script = """
import json, dmap, both
client = dmap.Client()
def nested(x):
    inside = dmap.Client().submit("whose", x).result()
    return [both.whose(x), inside, both.whose(x)]
found = [dmap.dmap(both.whose, [1]), client.submit("whose", 1).result(), dmap.dmap(nested, [1])]
print(json.dumps(found))
"""
    with Cluster() as other, Clients(own, other.endpoints) as clients:
        other.start_worker(1, "--import", "both", path=installed)
        answer = clients.start(script).answer()
    mine, its = "the client", "the worker"
    assert answer == [[mine], its, [[mine, its, mine]]]


def test_a_job_that_maps_ships_the_modules_on(clients: Clients) -> None:
    write(clients.folder, inner="def f(x):\n    return x + 1\n")
    script = """
import json, dmap
import inner
def outer(x):
    from dmap import dmap
    return dmap(inner.f, range(x))
print(json.dumps(dmap.dmap(outer, [2, 3])))
"""
    assert clients.start(script).answer() == [[1, 2], [1, 2, 3]]


def test_a_module_that_the_worker_lacks_is_named_with_what_to_do(clients: Clients) -> None:
    script = """
import json, dmap
def f(x):
    import no_such_module_anywhere
try:
    dmap.dmap(f, [1])
except ModuleNotFoundError as error:
    print(json.dumps(error.__notes__))
"""
    advice, where = clients.start(script).answer()
    assert "no module no_such_module_anywhere on" in advice
    assert "install it there" in advice
    assert "local code" in advice
    assert where.startswith("item 0 (1), on ")


def test_a_second_map_with_the_same_function_ships_nothing(clients: Clients) -> None:
    write(clients.folder, tables="def f(x):\n    return x\n")
    script = """
import json, logging, dmap, tables
import numpy as np
said = []
class Hear(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage().partition("; ")[2])
log = logging.getLogger("dmap.map")
log.setLevel("INFO")
log.addHandler(Hear())
table = np.zeros(1_000_000)
f = lambda x: tables.f(x) + table[x]
dmap.dmap(f, range(3))
dmap.dmap(f, range(3))
dmap.dmap(lambda x: table[x] - 1, range(3))
print(json.dumps(said))
"""
    first, second, third = clients.start(script).answer()
    assert first.startswith("shipped 8.0 MB once to 1 server")
    assert second == "shipped nothing"
    assert "kB once to 1 server" in third
