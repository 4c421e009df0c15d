"""A server that takes two megabytes at once: what is larger fails by name, and nothing waits."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Process, wait_for

from dmap import Client
from dmap.errors import Busy, RemoteError

pytestmark = pytest.mark.slow

LIMIT = 2_000_000
LARGE = 3_000_000
WITHIN = 30.0  # seconds until a test gives up on what should be there at once


@pytest.fixture(scope="module")
def client(kept: None) -> Iterator[Client]:
    folder = Path(tempfile.mkdtemp(prefix="dmap-"))
    address = f"ipc://{folder}/sammy"
    started: list[Process] = []
    try:
        argv = ["-m", "jobserver", "--bind", address, "--name", "sammy", "--max-bytes", str(LIMIT)]
        started.append(Process([sys.executable, *argv]))
        wait_for((folder / "sammy").exists)
        argv = ["-m", "dmap.supervisor", "--servers", address, "--processes", "1"]
        started.append(Process([sys.executable, *argv]))
        with Client([address]) as one:
            yield one
    finally:
        for process in reversed(started):
            process.end()
        shutil.rmtree(folder, ignore_errors=True)


def works(client: Client) -> bool:
    return client.submit(lambda x: x + 1, 41).result(WITHIN) == 42


def test_an_argument_that_is_too_large_is_an_error_that_says_how_large(client: Client) -> None:
    job = client.submit(len, bytes(LARGE))
    with pytest.raises(Busy, match=rf"sammy: a body of 3000\d+ bytes; at most {LIMIT} are taken"):
        job.result(WITHIN)
    assert works(client)


def test_a_result_that_is_too_large_is_an_error_that_says_how_large(client: Client) -> None:
    job = client.submit(bytes, LARGE)
    with pytest.raises(RemoteError, match=r"its result is too large for sammy: a body of 3000\d+"):
        job.result(WITHIN)
    assert works(client)


def test_an_exception_that_is_too_large_is_an_error_that_says_so(client: Client) -> None:
    def bad() -> None:
        raise ValueError(bytes(LARGE))

    job = client.submit(bad)
    with pytest.raises(RemoteError, match=r"its exception \(ValueError\) is too large for sammy"):
        job.result(WITHIN)
    assert works(client)


def test_a_function_that_carries_too_much_is_an_error_that_says_so(client: Client) -> None:
    carried = bytes(LARGE)
    job = client.submit(lambda: len(carried))
    with pytest.raises(Busy, match="what the function carries: sammy: a body of 3000"):
        job.result(WITHIN)
    assert works(client)


def test_an_item_that_is_too_large_fails_alone(client: Client) -> None:
    items = [b"x"] * 50
    items[20] = bytes(LARGE)
    values = client.dmap(len, items, on_error="return", timeout=WITHIN)
    assert isinstance(values[20], Busy)
    assert values[:20] + values[21:] == [1] * 49


def test_an_item_whose_result_is_too_large_fails_alone(client: Client) -> None:
    sizes = [1] * 50
    sizes[20] = LARGE
    values = client.dmap(bytes, sizes, on_error="return", timeout=WITHIN)
    assert isinstance(values[20], RemoteError)
    assert values[:20] + values[21:] == [b"\0"] * 49
