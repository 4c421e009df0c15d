"""The tables of jobs: what counts against whom, and what outlives a job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_net import Client, Net, Supervisor, Worker

from jobserver import protocol as wire
from jobserver.blobs import digest
from jobserver.jobs import Limits


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.quiet()


def test_results_that_a_client_does_not_take_count_against_its_limit() -> None:
    net = Net(limits=Limits(session_jobs=1))
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    worker.complete(handle)
    client.take(wire.JobComplete)
    client.submit()
    assert client.take(wire.JobsRefused).code == "busy"
    client.taken(1)
    client.submitted()
    net.quiet()


def test_a_server_takes_no_more_jobs_than_its_own_limit() -> None:
    net = Net(limits=Limits(max_jobs=1))
    one, two = Client(net), Client(net, 2)
    one.submitted()
    two.submit()
    assert two.take(wire.JobsRefused).code == "busy"
    net.quiet()


def test_who_joins_a_job_often_stands_in_its_lane_once(net: Net) -> None:
    one, two = Client(net), Client(net, 2)
    handle = one.submitted(uniq=b"u", merge=True)
    for _ in range(5):
        two.submitted(uniq=b"u", merge=True)
    queue = net.state.book.jobs[handle].queue
    assert [len(lane.jobs) for lane in queue.lanes[wire.NORMAL].values()] == [1, 1]


def test_a_job_that_comes_back_stands_in_every_joiners_lane(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True)
    worker.grab()
    worker.say(wire.GiveBack([handle]))
    assert worker.grab(lanes=[wire.LaneId(two.session, 0)]).handle == handle


def test_the_status_of_a_run_that_was_lost_is_told_to_nobody(net: Net) -> None:
    one, two, supervisor = Client(net), Client(net, 2), Supervisor(net)
    worker = Worker(net, "f", child=1)
    handle = one.submitted(uniq=b"u", merge=True)
    worker.grab()
    worker.say(wire.WorkStatus(handle, 3, 10))
    one.take(wire.JobStatus)
    supervisor.say(wire.ChildLost(1, [handle], 0, 1, "SIGKILL"))
    two.submitted(uniq=b"u", merge=True)
    two.nothing()


def test_the_blobs_of_a_job_that_ended_may_be_dropped() -> None:
    net = Net(limits=Limits(blob_nbytes=10))
    client, worker = Client(net), Worker(net, "f")
    first, second = b"closure", b"another"
    client.say(wire.PutBlob(digest(first)), first)
    client.take(wire.BlobTaken)
    handle = client.submitted(blobs=(digest(first),))
    worker.grab()
    worker.complete(handle)
    client.result()
    client.say(wire.PutBlob(digest(second)), second)
    assert client.take(wire.BlobTaken).text == ""
    net.quiet()


def test_a_job_that_ended_does_not_keep_its_argument(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True)
    job = net.state.book.jobs[handle]  # as an entry of two's lane does
    worker.grab()
    worker.complete(handle)
    one.result()
    two.result()
    assert job.argument == b""


def test_taken_results_count_no_more(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    worker.complete(handle)
    client.result()
    session = net.state.book.sessions[client.session]
    assert (session.nbytes, net.state.book.nbytes) == (0, 0)
