"""Parallel queries on PostgreSQL: a connection a worker process, reports that run once for all.

The functions at the top belong to the workers, which import this file. A client asks for them by
name, and needs neither this code nor a way to the database:

    jobserver &                                                          # on the host sammy
    cd examples && dmap-worker --servers sammy --import parallel_queries &
    DMAP_SERVERS=sammy python examples/parallel_queries.py

Both find the database by PGHOST, PGDATABASE and the other variables of PostgreSQL's programs.
"""

import os
import time

import psycopg

from dmap import Client, Job, job, per_worker


@per_worker
def connection() -> psycopg.Connection:
    """Open this process's own connection: at the first job, for all later ones."""
    return psycopg.connect(autocommit=True, application_name=f"worker {os.getpid()}")


@job("revenue")
def revenue(day: int) -> int:
    """Return what was sold on a day of the year, in cents."""
    found = connection().execute("SELECT sum(cents) FROM orders WHERE day = %s", [day]).fetchone()
    return found[0] if found and found[0] else 0


@job("best_products", merge=True)
def best_products(n: int) -> list[tuple[str, int]]:
    """Return the products that sold best, with their revenue in cents.

    Slow, and wanted by everybody at nine o'clock. With ``merge=True`` it runs once for all who ask
    before it is done.
    """
    connection().execute("INSERT INTO report_runs DEFAULT VALUES")
    return connection().execute(BEST_PRODUCTS, [n]).fetchall()


BEST_PRODUCTS = """
    SELECT product, sum(cents) FROM orders, (SELECT pg_sleep(1)) AS slow
    GROUP BY product ORDER BY sum(cents) DESC, product LIMIT %s
"""

TABLES = """
    CREATE TABLE IF NOT EXISTS report_runs (started timestamptz DEFAULT clock_timestamp());
    DROP TABLE IF EXISTS orders;
    CREATE TABLE orders AS
        SELECT n % 365 + 1 AS day, 'product ' || n % 23 AS product, n * 7919 % 9973 AS cents
        FROM generate_series(1, 100000) AS n
"""


def main() -> None:
    """Ask for every day of the year, and from twenty clients at once for the best products."""
    connection().execute(TABLES)

    with Client() as client:
        start = time.perf_counter()
        days: list[Job[int]] = [client.submit("revenue", day) for day in range(1, 366)]
        year = [job.result() for job in days]
        seconds = time.perf_counter() - start
        print(f"365 queries in {seconds:.2f} seconds; the year's revenue is {sum(year) / 100:,.2f}")

    clients = [Client() for _ in range(20)]
    reports: list[Job[list[tuple[str, int]]]] = [
        client.submit("best_products", 3) for client in clients
    ]
    answers = [job.result() for job in reports]
    print(f"{len(answers)} clients asked for the best products, and all heard {answers[0]}")
    for client in clients:
        client.close()

    (runs,) = connection().execute("SELECT count(*) FROM report_runs").fetchone() or (0,)
    print(f"the report has run {runs} time{'s' * (runs != 1)} since its table was made")


if __name__ == "__main__":
    main()
