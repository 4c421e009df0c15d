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


def test_the_blobs_of_a_job_that_was_cancelled_may_be_dropped() -> None:
    net = Net(limits=Limits(blob_nbytes=10))
    client = Client(net)
    first, second = b"closure", b"another"
    client.say(wire.PutBlob(digest(first)), first)
    client.take(wire.BlobTaken)
    client.submitted(blobs=(digest(first),))
    client.say(wire.CancelJobs([wire.Range(1, 1)]))
    client.take(wire.JobFail)
    client.say(wire.PutBlob(digest(second)), second)
    assert client.take(wire.BlobTaken).text == ""
    net.quiet()


def submit(client: Client, *specs: wire.JobSpec, **terms: object) -> list[wire.Accepted]:
    """Submit jobs with one message and one byte each; return what is accepted."""
    client.say(wire.SubmitJobs("f", list(specs), **terms), b"x" * len(specs))
    return client.take(wire.JobsAccepted).jobs


def test_a_list_of_new_jobs_has_handles_in_its_order(net: Net) -> None:
    specs = [wire.JobSpec(ticket, 1) for ticket in (7, 8, 3)]
    assert submit(Client(net), *specs) == [wire.Accepted(7, 2, 1), wire.Accepted(3, 1, 3)]


@pytest.mark.parametrize("background", [False, True])
def test_a_ticket_that_is_twice_in_a_list_is_one_job(net: Net, background: bool) -> None:
    specs = [wire.JobSpec(ticket, 1) for ticket in (1, 2, 1)]
    submit(Client(net), *specs, background=background)
    assert len(net.state.book.jobs) == 2


@pytest.mark.parametrize("background", [False, True])
def test_only_what_is_new_in_a_list_is_a_new_job(net: Net, background: bool) -> None:
    client = Client(net)
    client.submitted(ticket=2, background=background)
    specs = [wire.JobSpec(ticket, 1) for ticket in (1, 2, 3)]
    accepted = submit(client, *specs, background=background)
    assert accepted == [wire.Accepted(1, 1, 2), wire.Accepted(2, 1, 1), wire.Accepted(3, 1, 3)]


def test_what_has_ended_in_a_list_is_told_again_and_the_others_are_new(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    worker.complete(handle)
    client.take(wire.JobComplete)
    specs = [wire.JobSpec(ticket, 1) for ticket in (1, 2)]
    assert submit(client, *specs) == [wire.Accepted(2, 1, 2)]
    assert client.result() == (1, b"r")
    assert len(net.state.book.jobs) == 1


def test_a_uniq_that_is_twice_in_a_list_is_one_job(net: Net) -> None:
    specs = [wire.JobSpec(ticket, 1, uniq) for ticket, uniq in enumerate((b"u", b"v", b"u"), 1)]
    accepted = submit(Client(net), *specs, merge=True)
    assert accepted == [wire.Accepted(1, 2, 1), wire.Accepted(3, 1, 1)]


def test_a_list_with_new_uniqs_joins_where_it_can(net: Net) -> None:
    client = Client(net)
    client.submitted(uniq=b"u", merge=True)
    specs = [wire.JobSpec(ticket, 1, uniq) for ticket, uniq in ((5, b"u"), (6, b"v"))]
    assert submit(client, *specs, merge=True) == [wire.Accepted(5, 2, 1)]


def test_a_list_that_is_partly_too_much_is_taken_in_part() -> None:
    net = Net(limits=Limits(session_jobs=2))
    client = Client(net)
    specs = [wire.JobSpec(ticket, 1) for ticket in (1, 2, 3)]
    client.say(wire.SubmitJobs("f", specs), b"xyz")
    assert client.take(wire.JobsAccepted).jobs == [wire.Accepted(1, 2, 1)]
    assert client.take(wire.JobsRefused).tickets == [wire.Range(3, 1)]
    net.quiet()


def test_a_list_whose_bytes_are_too_many_is_taken_in_part() -> None:
    net = Net(limits=Limits(session_nbytes=2))
    client = Client(net)
    specs = [wire.JobSpec(ticket, 1) for ticket in (1, 2, 3)]
    client.say(wire.SubmitJobs("f", specs), b"xyz")
    assert client.take(wire.JobsAccepted).jobs == [wire.Accepted(1, 2, 1)]
    assert client.take(wire.JobsRefused).tickets == [wire.Range(3, 1)]
    net.quiet()


def test_a_job_said_twice_in_one_report_has_one_end(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    done = [wire.WorkDone(handle, 1), wire.WorkDone(handle, 1)]
    worker.say(wire.WorkComplete(1, done), b"ab")
    worker.take(wire.WorkAccepted)
    assert client.result() == (1, b"a")
    assert net.state.counters["late"] == 1


def test_results_of_several_kinds_go_to_all_who_listen(net: Net) -> None:
    """One job that two joined, one of another function, and plain ones around them."""
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f", "g")
    handles = [
        one.submitted(),
        one.submitted(uniq=b"u", merge=True),
        one.submitted("g"),
        two.submitted(),
        one.submitted(),
    ]
    assert two.submitted(uniq=b"u", merge=True) == handles[1]
    for _ in handles:
        worker.grab()
    done = [wire.WorkDone(handle, 1) for handle in handles]
    worker.say(wire.WorkComplete(1, done), b"abcde")
    worker.take(wire.WorkAccepted)
    for client, tickets, results in ((one, [1, 2, 3, 4], b"abce"), (two, [2, 1], b"bd")):
        complete, bodies = client.take_with_bodies(wire.JobComplete)
        assert [job.ticket for job in complete.jobs] == tickets
        assert bodies == (results,)
        client.say(wire.ResultsTaken([wire.Range(1, 4)]))
    assert not net.state.book.nbytes


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


def test_a_job_that_ended_in_one_of_its_lanes_does_not_keep_its_argument(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted(uniq=b"u", merge=True, lane=1)
    client.submitted(uniq=b"u", merge=True, lane=2)
    client.say(wire.CancelJobs([wire.Range(2, 1)]))
    client.take(wire.JobFail)
    job = net.state.book.jobs[handle]
    worker.grab()
    worker.complete(handle)
    client.result()
    assert job.argument == b""
