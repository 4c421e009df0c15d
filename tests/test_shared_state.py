"""What server, worker and client think of memory that they share. Time is an argument."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_net import MACHINE, Client, Net, Worker

from dmap.client_state import FIRST_UNSHARED, ClientState
from dmap.references import Reference
from dmap.tickets import Attached, Completed, Failed, Terms, Ticket
from dmap.worker_state import LENT_WITHOUT, MAX_UNACCEPTED_NBYTES, WorkerState
from jobserver import protocol as wire

MIB = 2**20
SESSION = b"client of a test"


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.quiet()


def lend(worker: Worker, handle: int, seq: int = 7) -> None:
    """Complete a job with a result that lies in the worker's memory."""
    worker.say(wire.WorkComplete(seq, [wire.WorkDone(handle, 3, 0, 5 * MIB)]), b"ref")


# --- the server: results ----------------------------------------------------------------------


def test_a_result_may_be_shared_when_all_who_listen_are_on_the_workers_machine(net: Net) -> None:
    here, elsewhere = Client(net, machine="m"), Client(net, 2, machine="other")
    silent = Client(net, 3)
    worker = Worker(net, "f", machine="m")
    for client, shared, expected in (
        (here, True, True),
        (here, False, False),
        (elsewhere, True, False),
        (silent, True, False),
    ):
        client.submitted(shared=shared)
        assert worker.grab().shared is expected


def test_nothing_is_shared_with_a_worker_that_says_no_machine(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    client.submitted(shared=True)
    assert not worker.grab().shared


def test_results_of_merged_and_background_jobs_are_not_shared(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    client.submitted(shared=True, merge=True, uniq=b"u")
    assert not worker.grab().shared
    client.submitted(shared=True, background=True)
    assert not worker.grab().shared


def test_memory_is_kept_until_its_result_is_taken(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    handle = client.submitted(shared=True)
    worker.grab()
    lend(worker, handle)
    assert worker.take(wire.WorkAccepted).seqs == [wire.Range(7, 1)]
    worker.nothing()
    message, bodies = client.take_with_bodies(wire.JobComplete)
    assert message.jobs == [wire.Completed(1, 3, 1, 5 * MIB)]
    assert bodies == (b"ref",)
    assert net.state.book.nbytes == 5 * MIB + 3, "what is lent counts towards the budget"
    client.taken(1)
    assert worker.take(wire.WorkTaken).seqs == [wire.Range(7, 1)]
    assert net.state.book.nbytes == 0


def test_memory_is_kept_until_the_last_listener_has_taken_its_result(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    other = Client(net, 2, machine="m")
    handle = client.submitted(shared=True)
    worker.grab()
    other.say(wire.Attach(1, handle))
    other.take(wire.JobsAccepted)
    lend(worker, handle)
    worker.take(wire.WorkAccepted)
    assert client.result() == (1, b"ref")
    worker.nothing()
    assert other.result() == (1, b"ref")
    worker.take(wire.WorkTaken)


def test_memory_is_let_go_when_the_session_of_its_listener_ends(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    handle = client.submitted(shared=True)
    worker.grab()
    lend(worker, handle)
    worker.take(wire.WorkAccepted)
    client.cut()
    client.inbox.clear()
    net.tick(11.0)
    assert worker.take(wire.WorkTaken).seqs == [wire.Range(7, 1)]


def test_memory_that_nobody_wants_is_let_go_at_once(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    handle = client.submitted(shared=True)
    worker.grab()
    client.say(wire.CancelJobs([wire.Range(1, 1)]))
    client.take(wire.JobFail)
    worker.inbox.clear()  # the word to stop
    lend(worker, handle)
    worker.take(wire.WorkAccepted)
    assert worker.take(wire.WorkTaken).seqs == [wire.Range(7, 1)]


def test_a_report_said_again_lets_nothing_go_that_is_still_needed(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    handle = client.submitted(shared=True)
    worker.grab()
    lend(worker, handle)
    worker.take(wire.WorkAccepted)
    worker.cut()
    worker.reconnect(boot="b1", holding=[handle])
    worker.take(wire.Welcome)
    lend(worker, handle)
    worker.take(wire.WorkAccepted)
    worker.nothing()
    client.take(wire.JobComplete)
    client.taken(1)
    worker.take(wire.WorkTaken)
    lend(worker, handle)  # had it missed that, it would say so once more
    worker.take(wire.WorkAccepted)
    worker.take(wire.WorkTaken)


def test_a_job_whose_new_listener_cannot_open_its_result_is_run_again(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    other = Client(net, 2, machine="other")
    handle = client.submitted(shared=True)
    assert worker.grab().shared
    other.say(wire.Attach(1, handle))
    other.take(wire.JobsAccepted)
    lend(worker, handle)
    worker.take(wire.WorkAccepted)
    worker.take(wire.WorkTaken)
    again = worker.grab()
    assert (again.handle, again.shared, again.attempt) == (handle, False, 1)
    worker.complete(handle, b"r")
    assert client.result() == other.result() == (1, b"r")


def test_a_shared_result_goes_alone_and_as_it_is_when_said_again(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    handle = client.submitted(shared=True)
    worker.grab()
    worker.say(
        wire.WorkComplete(1, [wire.WorkDone(handle, 3, 0, MIB), wire.WorkDone(9, 0)]), b"ref"
    )
    assert worker.take(wire.Error).code == "bad_frame"
    lend(worker, handle)
    worker.take(wire.WorkAccepted)
    client.take(wire.JobComplete)
    client.cut()
    client.reconnect()
    client.take(wire.Welcome)
    assert client.take(wire.JobComplete).jobs == [wire.Completed(1, 3, 1, 5 * MIB)]
    client.taken(1)
    worker.take(wire.WorkTaken)


# --- the server: arguments --------------------------------------------------------------------


def test_an_argument_in_memory_goes_to_a_worker_on_its_machine_only(net: Net) -> None:
    client = Client(net, machine="m")
    here, elsewhere = Worker(net, "f", machine="m"), Worker(net, "f", number=2, machine="other")
    client.submitted(shared=True, referred=True)
    elsewhere.grab_nothing()
    refused = client.take(wire.JobsRefused)
    assert (refused.tickets, refused.code) == ([wire.Range(1, 1)], "shared")
    assert not net.state.book.jobs
    client.submitted(shared=True, referred=True)
    assert here.grab().referred


def test_a_standing_grab_is_answered_when_the_job_is_refused(net: Net) -> None:
    client, elsewhere = Client(net, machine="m"), Worker(net, "f", machine="other")
    elsewhere.say(wire.GrabJobs(wait=True))
    client.submit(shared=True, referred=True)
    elsewhere.take(wire.NoJob)
    client.take(wire.JobsAccepted)
    assert client.take(wire.JobsRefused).code == "shared"


def test_a_worker_that_cannot_open_an_argument_has_the_job_submitted_anew(net: Net) -> None:
    client, worker = Client(net, machine="m"), Worker(net, "f", machine="m")
    handle = client.submitted(shared=True, referred=True)
    worker.grab()
    worker.say(wire.CannotOpen(handle, "no such file"))
    refused = client.take(wire.JobsRefused)
    assert (refused.code, "no such file" in refused.text) == ("shared", True)
    assert not net.state.book.jobs
    worker.say(wire.CannotOpen(handle, "no such file"))
    assert net.state.counters["late"] == 1


# --- the worker -------------------------------------------------------------------------------


def a_reference(shared: int = 5 * MIB) -> Reference:
    reference = Reference(b"ref")
    reference.whole, reference.shared = b"", shared
    return reference


def a_worker() -> WorkerState:
    worker = WorkerState(wire.Hello(1, 1, "worker", b"s" * 16, machine="m"), 1, [])
    worker.on_connected(0)
    worker.on_message(0, WELCOME, (), 0.0)
    return worker


def run(worker: WorkerState, handle: int, result: wire.Body) -> list[wire.WorkComplete]:
    origin = wire.Origin(SESSION, handle)
    lane = wire.LaneId(SESSION, 0)
    job = wire.Assigned(handle, origin, "f", 0, 1, 1, "pickle", b"", 0.0, 0.0, (), (), lane, True)
    worker.on_message(0, wire.JobAssign([job]), (b"",), 0.0)
    worker.start()
    worker.complete(result, 1, 0.1)
    sends = worker.flush()
    worker.seek(0.0)
    worker.check()
    return [send.message for send in sends if isinstance(send.message, wire.WorkComplete)]


WELCOME = wire.Welcome(1, 1, "sammy", "b1", False, 1.0, 1000, MIB, "m")


def test_a_workers_memory_is_kept_after_it_is_accepted_until_it_is_taken() -> None:
    worker = a_worker()
    (report,) = run(worker, 1, a_reference())
    assert report.jobs[0].shared == 5 * MIB
    worker.on_message(0, wire.WorkAccepted([wire.Range(1, 1)]), (), 0.0)
    assert worker.all_accepted, "its server knows of its end"
    assert not worker.drained, "somebody still needs this process"
    worker.check()
    worker.on_message(0, wire.WorkTaken([wire.Range(1, 1)]), (), 0.0)
    assert worker.drained
    assert not worker.n_lent
    worker.check()


def test_a_shared_result_goes_alone() -> None:
    worker = a_worker()
    for handle, result in ((1, b"small"), (2, a_reference(MIB)), (3, b"small")):
        origin, lane = wire.Origin(SESSION, handle), wire.LaneId(SESSION, 0)
        job = wire.Assigned(
            handle, origin, "f", 0, 1, 1, "pickle", b"", 0.0, 0.0, (), (), lane, True
        )
        worker.on_message(0, wire.JobAssign([job]), (b"",), 0.0)
        worker.start()
        worker.complete(result, 1, 0.1)
    sent = [send.message for send in worker.flush()]
    assert [len(message.jobs) for message in sent] == [1, 1, 1]  # type: ignore[union-attr]


def test_a_worker_with_much_memory_lent_takes_no_more_work() -> None:
    worker = a_worker()
    run(worker, 1, a_reference(MAX_UNACCEPTED_NBYTES))
    worker.on_message(0, wire.WorkAccepted([wire.Range(1, 1)]), (), 0.0)
    assert not worker.seek(0.0)
    sends = worker.on_message(0, wire.WorkTaken([wire.Range(1, 1)]), (), 0.0)
    assert [type(send.message) for send in sends] == [wire.GrabJobs]


def test_memory_lent_is_said_again_to_a_server_that_came_back() -> None:
    worker = a_worker()
    run(worker, 1, a_reference())
    worker.on_message(0, wire.WorkAccepted([wire.Range(1, 1)]), (), 0.0)
    worker.on_disconnected(0, 1.0)
    worker.on_connected(0)
    sends = worker.on_message(0, WELCOME, (), 2.0)
    assert isinstance(sends[0].message, wire.WorkComplete)
    assert type(sends[0].bodies[0]) is Reference


def test_memory_lent_is_let_go_when_its_server_stays_away() -> None:
    worker = a_worker()
    run(worker, 1, a_reference())
    worker.on_disconnected(0, 100.0)
    worker.forget_lent(100.0 + LENT_WITHOUT - 1)
    assert worker.n_lent == 1
    worker.forget_lent(100.0 + LENT_WITHOUT)
    assert worker.n_lent == 0
    worker.check()


def test_a_held_job_whose_argument_cannot_be_opened_goes_back_to_who_submitted_it() -> None:
    worker = a_worker()
    origin, lane = wire.Origin(SESSION, 1), wire.LaneId(SESSION, 0)
    job = wire.Assigned(1, origin, "f", 0, 1, 1, "pickle", b"", 0.0, 0.0, (), (), lane, True, True)
    worker.on_message(0, wire.JobAssign([job]), (b"",), 0.0)
    (send,) = worker.cannot_open("gone")
    assert send.message == wire.CannotOpen(1, "gone")
    assert not worker.held


# --- the client -------------------------------------------------------------------------------


class Owner:
    def __init__(self) -> None:
        self.events: list[object] = []

    def hear(self, event: object) -> None:
        self.events.append(event)


def a_client(machine: str = MACHINE, its: str = MACHINE) -> ClientState:
    hello = wire.Hello(1, 1, "client", SESSION, machine=machine)
    client = ClientState(SESSION, ["ipc:///sammy"], 0.0, hello)
    client.on_connected(0, 0.0)
    client.on_message(0, wire.Welcome(1, 1, "sammy", "b1", False, 1.0, 1000, 2**30, its), (), 0.0)
    client.flush(0.0)
    return client


def submits(client: ClientState, now: float) -> list[wire.SubmitJobs]:
    sends = client.flush(now)
    client.check()
    return [send.message for send in sends if isinstance(send.message, wire.SubmitJobs)]


def submit(client: ClientState, terms: Terms, number: int = 1, nbytes: int = 2 * MIB) -> Ticket:
    ticket = Ticket(number, terms, bytes(nbytes), Owner())
    client.submit(ticket, 0.0)
    return ticket


@pytest.mark.parametrize(
    ("terms", "machine", "its", "nbytes", "expected"),
    [
        ({}, MACHINE, MACHINE, 2 * MIB, (True, True)),
        ({}, MACHINE, MACHINE, 10, (True, False)),
        ({}, MACHINE, "another", 2 * MIB, (True, False)),
        ({}, MACHINE, "", 2 * MIB, (True, False)),  # a server of an earlier version
        ({}, "", "", 2 * MIB, (False, False)),
        ({"once": True}, MACHINE, MACHINE, 2 * MIB, (False, False)),
        ({"background": True}, MACHINE, MACHINE, 2 * MIB, (False, False)),
        ({"merge": True}, MACHINE, MACHINE, 2 * MIB, (False, False)),
    ],
)
def test_a_client_says_what_of_a_job_may_lie_in_memory(
    terms: dict[str, bool], machine: str, its: str, nbytes: int, expected: tuple[bool, bool]
) -> None:
    client = a_client(machine, its)
    submit(client, Terms("f", **terms), nbytes=nbytes)  # type: ignore[arg-type]
    (message,) = submits(client, 0.0)
    assert (message.shared, message.referred) == expected


def test_a_job_whose_argument_could_not_be_opened_goes_again_whole_and_nothing_is_shared() -> None:
    client = a_client()
    submit(client, Terms("f"))
    submits(client, 0.0)
    client.on_message(0, wire.JobsRefused([wire.Range(1, 1)], "shared", "gone"), (), 1.0)
    (again,) = submits(client, 1.0)
    assert (again.jobs[0].ticket, again.shared, again.referred) == (1, False, False)
    submit(client, Terms("f"), 2)
    (later,) = submits(client, 1.0 + FIRST_UNSHARED)
    assert later.referred, "it tries again after a while"
    client.on_message(0, wire.JobsRefused([wire.Range(2, 1)], "shared", "gone"), (), 40.0)
    submits(client, 40.0)
    submit(client, Terms("f"), 3)
    (still,) = submits(client, 40.0 + 1.5 * FIRST_UNSHARED)
    assert not still.shared, "each time after a longer one"


def test_a_result_that_cannot_be_opened_is_acknowledged_and_made_again() -> None:
    client = a_client()
    ticket = submit(client, Terms("f"))
    submits(client, 0.0)
    client.on_message(0, wire.JobsAccepted([wire.Accepted(1, 1, 5)], 1), (), 0.0)
    lost = wire.JobComplete([wire.Completed(1, 3, 1, 5 * MIB)], 0.1, "here", 1)
    assert not client.on_unopened(0, lost, 1.0)
    said = [send.message for send in client.flush(1.0)]
    assert [type(message) for message in said] == [wire.ResultsTaken, wire.SubmitJobs]
    assert not said[1].shared  # type: ignore[union-attr]
    client.check()
    client.on_message(0, wire.JobsAccepted([wire.Accepted(1, 1, 6)], 1), (), 1.0)
    whole = wire.JobComplete([wire.Completed(1, 3, 1)], 0.1, "here", 1)
    (event,) = client.on_message(0, whole, (b"abc",), 2.0)
    assert isinstance(event, Completed)
    assert event.ticket is ticket


def test_a_listener_to_anothers_job_fails_if_it_cannot_open_the_result() -> None:
    client = a_client()
    client.submit(Attached(1, "sammy:b1", 5, Owner()), 0.0)
    client.flush(0.0)
    lost = wire.JobComplete([wire.Completed(1, 3, 1, 5 * MIB)], 0.1, "here", 1)
    (event,) = client.on_unopened(0, lost, 1.0)
    assert isinstance(event, Failed)
    client.check()


def test_a_shared_result_is_acknowledged_at_once() -> None:
    client = a_client()
    submit(client, Terms("f"))
    submits(client, 0.0)
    client.on_message(0, wire.JobsAccepted([wire.Accepted(1, 1, 5)], 1), (), 0.0)
    done = wire.JobComplete([wire.Completed(1, 3, 1, 5 * MIB)], 0.1, "here", 1)
    client.on_message(0, done, (b"abc",), 5.0)
    assert [type(send.message) for send in client.flush(5.0)] == [wire.ResultsTaken]
