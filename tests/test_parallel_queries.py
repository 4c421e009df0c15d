"""The example of parallel queries, on a PostgreSQL that lives as long as this file's tests.

What happened is asked of the database itself: who is connected, who waits for a lock that the
test holds, how often a report ran. A locked table makes a query slow for as long as a test wants.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import WITHIN, Cluster, wait_for

from dmap import Client, Job

psycopg = pytest.importorskip("psycopg")

EXAMPLES = Path(__file__).parent.parent / "examples"
N_WORKERS = 2
ASK = """
from dmap import Client
with Client() as client:
    job = client.submit("best_products", 4)
    print(job.handle, flush=True)
    print(job.result())
"""


def programs() -> Path | None:
    """Return the folder of PostgreSQL's server programs, which is seldom in PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if shutil.which("pg_config"):
        said = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=True)
        folders.append(Path(said.stdout.strip()))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def unprivileged() -> str | None:
    """Return whom PostgreSQL runs as, since it refuses root; None for who we are."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        programs() is None, reason="no PostgreSQL is installed (apt-get install postgresql)"
    ),
]


@pytest.fixture(scope="module")
def database(kept: None) -> Iterator[Path]:
    """Start a PostgreSQL that listens on a unix socket only, and yield the socket's folder."""
    bin_folder, user = programs(), unprivileged()
    assert bin_folder is not None
    # Outside this run's own folder, which another user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    if user is not None:
        shutil.chown(folder, user, pwd.getpwnam(user).pw_gid)
    options: dict[str, Any] = {
        "user": user,
        "group": None if user is None else pwd.getpwnam(user).pw_gid,
        "extra_groups": None if user is None else [],
        "cwd": folder,
        # Without the mark by which this run's processes are known: backends come and go.
        "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"},
    }
    try:
        initdb = [str(bin_folder / "initdb"), "--pgdata=data", "--username=tester"]
        initdb += ["--auth=trust", "--encoding=UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, **options)
        with (folder / "log").open("wb") as log:
            argv = [str(bin_folder / "postgres"), "-D", "data", "-k", str(folder)]
            argv += ["-c", "listen_addresses=", "-c", "fsync=off"]
            postgres = subprocess.Popen(argv, stderr=log, **options)
        try:
            wait_for((folder / ".s.PGSQL.5432").exists)
            yield folder
        finally:
            postgres.send_signal(signal.SIGINT)  # "fast": it does not wait for its clients
            try:
                postgres.wait(WITHIN)
            except subprocess.TimeoutExpired:
                postgres.kill()
                postgres.wait()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(database: Path) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as environment, Cluster() as one:
        environment.setenv("PGHOST", str(database))
        environment.setenv("PGUSER", "tester")
        environment.setenv("PGDATABASE", "postgres")
        environment.setenv("DMAP_SERVERS", ",".join(one.endpoints))
        one.start_worker(N_WORKERS, "--import", "parallel_queries", path=EXAMPLES)
        yield one


@pytest.fixture(scope="module")
def example(cluster: Cluster) -> str:
    """Run the example, which also makes the tables, and return what it said."""
    said = subprocess.run(
        [sys.executable, str(EXAMPLES / "parallel_queries.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    return said.stdout


@pytest.fixture
def sql(example: str) -> Iterator[Any]:
    with psycopg.connect(autocommit=True) as connection:
        yield connection


@contextlib.contextmanager
def locked_orders() -> Iterator[None]:
    """Let every query of the orders wait until the block is left."""
    with psycopg.connect() as connection:  # commits at its end
        connection.execute("LOCK TABLE orders")
        yield


def workers_connections(sql: Any, condition: str = "true") -> set[int]:
    """Return the pids of the backends that serve workers."""
    found = sql.execute(
        f"SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'worker %' AND {condition}"
    )
    return {pid for (pid,) in found}


def wait_all_busy(sql: Any) -> None:
    """Wait until as many queries as there are workers stand at the lock at the same time."""
    waiting = "wait_event_type = 'Lock'"
    wait_for(lambda: len(workers_connections(sql, waiting)) == N_WORKERS)


def n_runs(sql: Any) -> int:
    (n,) = sql.execute("SELECT count(*) FROM report_runs").fetchone()
    return int(n)


def submit_days(client: Client, n: int) -> list[Job[int]]:
    """Submit a query for each of the first days; they are on their way when this returns."""
    jobs: list[Job[int]] = [client.submit("revenue", day) for day in range(1, n + 1)]
    assert jobs[0].handle
    return jobs


def ask_in_a_process() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True)


def test_the_example_tells_what_it_found(example: str) -> None:
    queries, report, runs = example.splitlines()
    assert queries.startswith("365 queries in ")
    assert report.startswith("20 clients asked for the best products, and all heard [('product ")
    assert runs.startswith("the report has run 1 time ")


def test_queries_run_on_all_workers_at_once_and_come_home_in_order(
    cluster: Cluster, sql: Any
) -> None:
    expected = sql.execute("SELECT day, sum(cents) FROM orders GROUP BY day ORDER BY day")
    with Client(cluster.endpoints) as client:
        with locked_orders():
            jobs = submit_days(client, 365)
            wait_all_busy(sql)
        assert list(enumerate((job.result() for job in jobs), 1)) == expected.fetchall()


def test_a_worker_keeps_its_one_connection_across_jobs(cluster: Cluster, sql: Any) -> None:
    rounds = []
    for _ in range(3):
        with Client(cluster.endpoints) as client:
            with locked_orders():
                jobs = submit_days(client, 50)
                wait_all_busy(sql)
            assert all(job.result() for job in jobs)
        rounds.append(workers_connections(sql))
    assert rounds[0] == rounds[1] == rounds[2]
    processes = sql.execute(
        "SELECT DISTINCT application_name FROM pg_stat_activity WHERE application_name ~ '^worker '"
    )
    assert len(rounds[0]) == len(processes.fetchall()) == N_WORKERS


def test_forty_clients_get_the_answer_of_one_run(cluster: Cluster, sql: Any) -> None:
    n_before = n_runs(sql)
    handles: list[str] = []
    processes: list[subprocess.Popen[str]] = []

    with contextlib.ExitStack() as ending:

        def ask() -> list[Job[Any]]:
            """Ask from twenty clients, four of them processes; wait until all are heard."""
            asking = [ending.enter_context(ask_in_a_process()) for _ in range(4)]
            for process in asking:
                ending.callback(process.kill)
            clients = [ending.enter_context(Client(cluster.endpoints)) for _ in range(16)]
            jobs: list[Job[Any]] = [client.submit("best_products", 4) for client in clients]
            handles.extend(job.handle for job in jobs)
            for process in asking:
                assert process.stdout is not None
                handles.append(process.stdout.readline().strip())
            processes.extend(asking)
            return jobs

        with locked_orders():
            jobs = ask()
            # It has been running for a second when the others come.
            wait_for(lambda: age_of_the_last_run(sql) >= 1)
            jobs += ask()
        answers = {repr(job.result()) for job in jobs}
        answers |= {process.communicate(timeout=WITHIN)[0].strip() for process in processes}

    assert len(handles) == 40
    assert len(set(handles)) == 1
    assert len(answers) == 1
    assert "('product " in answers.pop()
    assert n_runs(sql) == n_before + 1


def age_of_the_last_run(sql: Any) -> float:
    """Return the seconds since the latest report began."""
    (age,) = sql.execute(
        "SELECT extract(epoch FROM clock_timestamp() - max(started)) FROM report_runs"
    ).fetchone()
    return float(age)


def test_who_asks_after_the_end_gets_a_fresh_run(cluster: Cluster, sql: Any) -> None:
    n_before = n_runs(sql)
    with Client(cluster.endpoints) as client:
        for _ in range(2):
            job: Job[list[tuple[str, int]]] = client.submit("best_products", 2)
            assert len(job.result()) == 2
    assert n_runs(sql) == n_before + 2
