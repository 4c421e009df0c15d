"""Merged maps of several client processes, whose functions and items are equal and not their bytes.

No worker is there until all that is to meet has been submitted, so nothing depends on time.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import Clients
from cluster import Cluster, wait_for

pytestmark = pytest.mark.slow

# Each client's is another file: the function stands on another line, after other code.
SCRIPT = """
import json, os, random, sys
from dataclasses import dataclass
import dmap

{before}
@dataclass(frozen=True)
class Query:
    table: str
    fields: frozenset[str]
    limit: int = 10

KNOWN = {{"red", "green", "blue"}}

def helper(query):
    return sorted(query.fields & KNOWN)

folder = os.getcwd()

def run(query):
    with open(f"{{folder}}/{{query.table}}", "a") as runs:
        runs.write("x")
    return [query.table, helper(query), query.limit]

first, last = map(int, sys.argv[1:3])
queries = [
    Query("table" + str(n), frozenset(random.sample(["red", "blue", "grey", str(n)], 4)))
    for n in range(first, last)
]
if {is_shuffled}:
    random.shuffle(queries)
open(f"ready{{first}}", "w").close()
found = {call}
print(json.dumps(sorted(found)))
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(n_servers=3) as cluster:
        yield cluster


def n_jobs(cluster: Cluster) -> int:
    """Count the jobs that are known to the servers."""
    return sum(len(cluster.rows(n, "jobs")) for n in range(len(cluster.names)))


def n_listeners(cluster: Cluster) -> int:
    return sum(row["listeners"] for n in range(3) for row in cluster.rows(n, "jobs"))


def expected(first: int, last: int) -> list[list[object]]:
    return sorted([f"table{n}", ["blue", "red"], 10] for n in range(first, last))


def test_two_maps_share_every_common_item_however_they_are_cut(
    cluster: Cluster, tmp_path: Path
) -> None:
    one = SCRIPT.format(before="", is_shuffled=False, call="dmap.dmap(run, queries, merge=True)")
    other = SCRIPT.format(
        before="import math\ndef unrelated(x):\n    return math.pi * x\n\n",
        is_shuffled=True,
        call="list(dmap.imap(run, queries, merge=True, ordered=False, buffersize=70))",
    )
    with Clients(tmp_path, cluster.endpoints) as clients:
        maps = [clients.start(one, 0, 60), clients.start(other, 30, 90)]
        wait_for(lambda: n_listeners(cluster) == 120)
        assert n_jobs(cluster) == 90
        cluster.start_worker(n_processes=2)
        assert maps[0].answer() == expected(0, 60)
        assert maps[1].answer() == expected(30, 90)
    runs = {path.name: path.read_text() for path in tmp_path.glob("table*")}
    assert runs == {f"table{n}": "x" for n in range(90)}


def test_single_jobs_with_equal_arguments_meet(cluster: Cluster, tmp_path: Path) -> None:
    submit = """[
        job.result()
        for job in [dmap.Client().options(merge=True).submit(run, query) for query in queries]
    ]"""
    with Clients(tmp_path, cluster.endpoints) as clients:
        scripts = [
            SCRIPT.format(before=f"# {n}\n" * n, is_shuffled=bool(n), call=submit) for n in range(2)
        ]
        asked = [clients.start(script, 0, 20) for script in scripts]
        wait_for(lambda: n_listeners(cluster) == 40)
        assert n_jobs(cluster) == 20
        cluster.start_worker(n_processes=2)
        assert [json.dumps(one.answer()) for one in asked] == [json.dumps(expected(0, 20))] * 2
    assert {path.read_text() for path in tmp_path.glob("table*")} == {"x"}


def test_a_call_and_an_item_of_a_map_are_two_jobs(cluster: Cluster, tmp_path: Path) -> None:
    both = """dmap.dmap(run, queries, merge=True, priority="high")
job = dmap.Client().options(merge=True).submit(run, queries[0])
found += [job.result()]"""
    with Clients(tmp_path, cluster.endpoints) as clients:
        script = SCRIPT.format(before="", is_shuffled=False, call=both)
        asked = clients.start(script, 0, 1)
        cluster.start_worker(n_processes=1)
        assert asked.answer() == 2 * expected(0, 1)
    assert (tmp_path / "table0").read_text() == "xx"


def test_seeded_maps_share_an_item_only_at_the_same_index(cluster: Cluster, tmp_path: Path) -> None:
    call = "dmap.dmap(run, queries, merge=True, seed=7)"
    with Clients(tmp_path, cluster.endpoints) as clients:
        script = SCRIPT.format(before="", is_shuffled=False, call=call)
        maps = [clients.start(script, 0, 10) for _ in range(2)]
        maps.append(clients.start(script, 5, 15))  # the common ones are elsewhere in it
        wait_for(lambda: n_listeners(cluster) == 30)
        assert n_jobs(cluster) == 20
        cluster.start_worker(n_processes=2)
        assert [one.answer() for one in maps] == [expected(0, 10)] * 2 + [expected(5, 15)]
