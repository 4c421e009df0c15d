"""Single jobs over a real server and real worker processes."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, wait_for

import dmap
from dmap import Client, Job
from dmap.errors import (
    ClosureError,
    DmapError,
    JobCancelled,
    JobTimeout,
    NoServer,
    RemoteError,
    WorkerLost,
)
from dmap.jobs import Data, Done, Status, Warning

pytestmark = pytest.mark.slow

MODULE = """
import os, time
from dmap import current_job, job

@job("resize")
def resize(path, size=1):
    return f"{path} at {size}"

@job("report", merge=True)
def report(path):
    with open(path, "a") as file:
        file.write("x")
    while not os.path.exists(path + ".go"):
        time.sleep(0.005)
    return "rows"

@job("tell")
def tell(path):
    here = current_job()
    here.status(1, 3)
    here.data({"rows": [1, 2]})
    here.warning("the index is old")
    while not os.path.exists(path):
        time.sleep(0.005)
    return "told"
"""


@pytest.fixture(scope="module")
def cluster(kept: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "jobs_of_a_test.py").write_text(MODULE)
    with Cluster() as one:
        one.start_worker(2, "--name", "papag", "--import", "jobs_of_a_test", path=folder)
        yield one


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoints) as one:
        yield one


def test_a_job_returns_what_its_function_returned(client: Client) -> None:
    rate = 3
    assert client.submit(lambda price: price * rate, 14).result() == 42


@pytest.mark.parametrize("call", ["dmap", "imap", "starmap"])
def test_a_function_in_the_place_of_the_items_is_told(call: str) -> None:
    with (
        Client("ipc:///nowhere") as client,
        pytest.raises(TypeError, match=r"the first argument must be a function, not list .*\[1\]"),
    ):
        getattr(client, call)([1], abs)


def test_arguments_may_have_names(client: Client) -> None:
    assert client.submit(int, "ff", base=16).result() == 255


def test_a_closure_is_taken_as_it_is_at_each_submit(client: Client) -> None:
    counter = [1]

    def look() -> int:
        return counter[0]

    first = client.submit(look)
    counter[0] = 2
    second = client.submit(look)
    assert (first.result(), second.result()) == (1, 2)


def test_a_captured_number_is_taken_as_it_is_at_each_submit(client: Client) -> None:
    rate = 1000

    def look() -> int:
        return rate

    first = client.submit(look)
    rate = 2000
    assert (first.result(), client.submit(look).result()) == (1000, 2000)


def test_many_jobs_each_have_their_own_result(client: Client) -> None:
    jobs = [client.submit(lambda x: x * x, n) for n in range(2000)]
    assert [job.result() for job in jobs] == [n * n for n in range(2000)]


def test_the_exception_arrives_as_itself(client: Client) -> None:
    job = client.submit(lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing") as caught:
        job.result()
    assert "KeyError" in str(caught.value.__cause__)
    assert any("papag" in note or "on " in note for note in caught.value.__notes__)
    assert isinstance(job.exception(), KeyError)


def test_a_result_that_will_not_pickle_is_an_error(client: Client) -> None:
    with pytest.raises((ClosureError, RemoteError)):
        client.submit(lambda: threading.Lock()).result()


def test_an_argument_that_will_not_pickle_is_refused_at_once(client: Client) -> None:
    with pytest.raises(ClosureError):
        client.submit(len, threading.Lock())


def test_waiting_for_a_result_can_be_given_up(client: Client, tmp_path: Path) -> None:
    job = client.submit(wait_for_file, str(tmp_path / "go"))
    with pytest.raises(TimeoutError):
        job.result(timeout=0.05)
    (tmp_path / "go").touch()
    assert job.result() == "gone on"


def wait_for_file(path: str) -> str:
    import os
    import time

    with open(path + ".begun", "w"):
        pass
    while not os.path.exists(path):
        time.sleep(0.005)
    return "gone on"


def test_a_time_limit_ends_the_run(client: Client, tmp_path: Path) -> None:
    job = client.options(timeout=0.2).submit(wait_for_file, str(tmp_path / "never"))
    with pytest.raises(JobTimeout):
        job.result()


def test_a_running_job_can_be_cancelled(client: Client, tmp_path: Path) -> None:
    def hang(path: str) -> None:
        import time

        with open(path, "w"):
            pass
        try:
            time.sleep(60)
        finally:
            with open(path + ".ended", "w"):
                pass

    path = tmp_path / "begun"
    job = client.submit(hang, str(path))
    wait_for(path.exists)
    assert job.cancel()
    assert job.cancelled()
    with pytest.raises(CancelledError):
        job.result()
    wait_for(Path(f"{path}.ended").exists)


def test_an_ended_job_cannot_be_cancelled(client: Client) -> None:
    job = client.submit(pow, 2, 3)
    job.result()
    assert not job.cancel()


def test_a_job_that_kills_its_worker_fails_by_name(client: Client) -> None:
    with pytest.raises(WorkerLost) as caught:
        client.options(attempts=2).submit(os._exit, 3).result()
    assert caught.value.attempts == 2
    assert caught.value.exit == "exit code 3"


def test_a_named_function_needs_no_code_here(client: Client) -> None:
    assert client.submit("resize", "a.png", size=3).result() == "a.png at 3"


def test_equal_calls_of_a_merging_function_share_one_run(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    jobs: list[Job[Any]] = [client.submit("report", str(path)) for _ in range(10)]
    wait_for(path.exists)
    jobs += [client.submit("report", str(path)) for _ in range(10)]
    assert jobs[-1].handle == jobs[0].handle
    Path(f"{path}.go").touch()
    assert {job.result() for job in jobs} == {"rows"}
    assert path.read_text() == "x"


def test_a_job_tells_of_itself_while_it_runs(client: Client, tmp_path: Path) -> None:
    job: Job[str] = client.submit("tell", str(tmp_path / "go"))
    events = job.events(timeout=20)
    told = [next(events) for _ in range(3)]
    assert told == [Status(1, 3), Data({"rows": [1, 2]}), Warning("the index is old")]
    assert job.status() == Status(1, 3)
    (tmp_path / "go").touch()
    assert list(events) == [Done("told")]
    assert job.status().ended == "complete"


def test_what_a_job_said_before_anyone_asked_is_kept(client: Client, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    job: Job[str] = client.submit("tell", str(tmp_path / "go"))
    job.result()
    assert [type(event) for event in job.events()] == [Status, Data, Warning, Done]


def test_events_can_be_given_up(client: Client, tmp_path: Path) -> None:
    job = client.submit(wait_for_file, str(tmp_path / "go"))
    with pytest.raises(JobTimeout):
        next(job.events(timeout=0.05))
    (tmp_path / "go").touch()
    assert job.result() == "gone on"


def test_a_background_job_is_found_again_by_its_handle(cluster: Cluster, tmp_path: Path) -> None:
    with Client(cluster.endpoints) as first:
        handle = first.background(wait_for_file, str(tmp_path / "go"))
    assert handle.startswith("sammy:")
    wait_for((tmp_path / "go.begun").exists)
    with Client(cluster.endpoints) as second:
        job = second.attach(handle)
        assert job.status().running
        (tmp_path / "go").touch()
        assert job.result() == "gone on"
        late = second.attach(handle)
        assert late.result() == "gone on"


def test_a_handle_that_nobody_knows_says_so(client: Client) -> None:
    with pytest.raises(DmapError, match="not to be had"):
        client.attach(client.submit(int).handle.rpartition(":")[0] + ":999999").result()
    with pytest.raises(DmapError, match="nobody"):
        client.attach("nobody:b1:1").result()
    with pytest.raises(ValueError, match="no handle"):
        client.attach("nonsense")


def test_jobs_are_awaited(client: Client) -> None:
    async def main() -> list[int]:
        return await asyncio.gather(*(client.submit(pow, 2, n) for n in range(5)))

    assert asyncio.run(main()) == [1, 2, 4, 8, 16]


def test_wait_tells_what_has_ended(client: Client, tmp_path: Path) -> None:
    quick = client.submit(pow, 2, 3)
    slow = client.submit(wait_for_file, str(tmp_path / "go"))
    done, not_done = dmap.wait([quick, slow], return_when=FIRST_COMPLETED)
    assert (done, not_done) == ({quick}, {slow})
    done, not_done = dmap.wait([quick, slow], timeout=0.05)
    assert not_done == {slow}
    (tmp_path / "go").touch()
    assert dmap.wait([quick, slow]).done == {quick, slow}


def test_as_completed_yields_in_the_order_of_the_ends(client: Client, tmp_path: Path) -> None:
    slow = client.submit(wait_for_file, str(tmp_path / "go"))
    quick = client.submit(pow, 2, 3)
    ended = dmap.as_completed([slow, quick], timeout=30)
    assert next(ended) is quick
    (tmp_path / "go").touch()
    assert list(ended) == [slow]


def test_as_completed_can_be_given_up(client: Client, tmp_path: Path) -> None:
    slow = client.submit(wait_for_file, str(tmp_path / "go"))
    with pytest.raises(TimeoutError):
        next(dmap.as_completed([slow], timeout=0.05))
    (tmp_path / "go").touch()
    assert slow.result() == "gone on"


def test_several_threads_wait_at_once(client: Client) -> None:
    results: dict[int, list[int]] = {}

    def run(n: int) -> None:
        results[n] = [client.submit(pow, n, k).result() for k in range(50)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n**k for k in range(50)] for n in range(6)}


def test_a_callback_may_wait_for_another_job(client: Client) -> None:
    got: list[int] = []
    called = threading.Event()

    def callback(job: Any) -> None:
        got.append(client.submit(pow, job.result(), 2).result())
        called.set()

    job = client.submit(pow, 2, 3)
    job.add_done_callback(callback)
    assert called.wait(20)
    assert got == [64]


def test_jobs_inside_a_job_finish_on_one_process(tmp_path: Path) -> None:
    def outer(n: int) -> int:
        import dmap

        inner = [dmap.submit(lambda x: x + 1, k) for k in range(n)]
        total = sum(dmap.dmap(lambda x: x * 2, range(n)))
        done, _ = dmap.wait(inner)
        return total + sum(job.result() for job in dmap.as_completed(done))

    with Cluster() as cluster, Client(cluster.endpoints) as client:
        cluster.start_worker(1)
        assert client.submit(outer, 5).result(timeout=30) == 20 + 15


def test_a_client_that_was_closed_says_so(cluster: Cluster, tmp_path: Path) -> None:
    client = Client(cluster.endpoints)
    job = client.submit(wait_for_file, str(tmp_path / "never"))
    wait_for((tmp_path / "never.begun").exists)
    client.close()
    with pytest.raises(JobCancelled):
        job.result()
    with pytest.raises(RuntimeError, match="closed"):
        client.submit(pow, 2, 3)


def test_no_server_is_an_error_within_its_bound(tmp_path: Path) -> None:
    with Client(f"ipc://{tmp_path}/nobody") as client:
        began = time.monotonic()
        with pytest.raises(NoServer, match="nobody"):
            client.submit(pow, 2, 3).result()
        assert time.monotonic() - began < 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_makes_its_own_connection(cluster: Cluster) -> None:
    code = f"""
import os, sys
from dmap import Client
client = Client({cluster.endpoints!r})
old = client.submit(pow, 2, 2)
assert old.result() == 4
pending = client.submit(pow, 2, 4)
pid = os.fork()
if not pid:
    try:
        assert client.submit(pow, 2, 3).result(20) == 8
        try:
            pending.result(5)
        except Exception as error:
            assert "forked" in str(error), error
        else:
            assert pending.done()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert pending.result(20) == 16
client.close()
"""
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "options",
    [
        {"priority": "urgent"},
        {"attempts": 0},
        {"timeout": 0},
        {"not_before": -1},
        {"uniq": ""},
        {"labels": "gpu"},
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Client("sammy").options(**options)


def test_not_before_delays_a_job(client: Client) -> None:
    began = time.monotonic()
    client.options(not_before=0.3).submit(pow, 2, 3).result()
    assert time.monotonic() - began >= 0.3


def test_a_uniq_merges_closures_if_that_is_asked_for(client: Client, tmp_path: Path) -> None:
    path = str(tmp_path / "go")
    merging = client.options(uniq="report of today", merge=True)
    jobs = [merging.submit(wait_for_file, path) for _ in range(5)]
    assert len({job.handle for job in jobs}) == 1
    (tmp_path / "go").touch()
    assert {job.result() for job in jobs} == {"gone on"}
