"""Who drives: over sockets, against a server that does what the test says."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import wait_for
from fake_server import FakeServer

from dmap import work
from dmap.client_state import MIN_TAKEN
from dmap.connection import Connection, describe_no_workers
from dmap.errors import DmapError, JobCancelled
from dmap.jobs import Job
from dmap.tickets import NoWorkers, Terms, Ticket
from jobserver.protocol import (
    Accepted,
    CancelJobs,
    Completed,
    GetStatus,
    Goodbye,
    Heartbeat,
    Hello,
    JobComplete,
    JobsAccepted,
    ResultsTaken,
    StatusIs,
    SubmitJobs,
    nbytes_of,
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with tempfile.TemporaryDirectory(prefix="dmap-") as folder, FakeServer(Path(folder)) as fake:
        yield fake


@pytest.fixture
def connection(server: FakeServer) -> Iterator[Connection]:
    one = Connection([server.address])
    server.wait(Hello)
    yield one
    one.close()


TERMS = Terms("f")


def submit(connection: Connection, argument: bytes = b"x") -> Job[Any]:
    job: Job[Any] = Job(connection)
    ticket = Ticket(connection.next_number(), TERMS, argument, job)
    job._ticket = ticket
    connection.submit(ticket)
    return job


def complete(server: FakeServer, peer: bytes, ticket: int, value: object) -> None:
    body = work.dump_result(value)
    assert isinstance(body, bytes)
    done = JobComplete([Completed(ticket, len(body), 1)], 0.001, "papag", 1)
    server.say(peer, done, body)


class Serving(threading.Thread):
    """Answers submits as soon as they come, from a thread of its own."""

    def __init__(self, server: FakeServer) -> None:
        super().__init__()
        self.server = server
        self.sizes: list[int] = []
        self.stopping = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.stopping.is_set():
            heard = self.server.find(SubmitJobs, within=0.02)
            if heard is None:
                continue
            self.sizes.append(len(heard.message.jobs))
            for job in heard.message.jobs:
                complete(self.server, heard.peer, job.ticket, job.ticket)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self.join()


def test_a_submit_goes_without_anyone_waiting(server: FakeServer, connection: Connection) -> None:
    submit(connection)
    assert server.wait(SubmitJobs).bodies == (b"x",)


def test_a_result_comes_without_anyone_waiting(server: FakeServer, connection: Connection) -> None:
    job = submit(connection)
    heard = server.wait(SubmitJobs)
    complete(server, heard.peer, 1, "home")
    wait_for(job.done)
    assert job.result() == "home"
    server.wait(ResultsTaken)


def test_what_is_submitted_in_a_burst_goes_in_few_messages(
    server: FakeServer, connection: Connection
) -> None:
    with Serving(server) as serving:
        jobs = [submit(connection) for _ in range(3000)]
        assert [job.result(60) for job in jobs] == list(range(1, 3001))
    assert len(serving.sizes) < 1000


def test_acknowledgements_go_together_with_the_next_submit(
    server: FakeServer, connection: Connection
) -> None:
    assert server.hellos[0].message.together
    with Serving(server):
        for _ in range(2 * MIN_TAKEN):
            submit(connection).result(60)
    assert [ResultsTaken, SubmitJobs] in server.together


def test_waiting_threads_all_get_theirs(server: FakeServer, connection: Connection) -> None:
    n_right = [0] * 5

    def run(index: int) -> None:
        for _ in range(100):
            job = submit(connection)
            assert job._ticket is not None
            n_right[index] += job.result(60) == job._ticket.number

    with Serving(server):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert n_right == [100] * 5


def test_a_thread_waits_on_while_another_gets_its_result_first(
    server: FakeServer, connection: Connection
) -> None:
    first, second = submit(connection), submit(connection)
    got: list[Any] = []
    threads = [
        threading.Thread(target=lambda j=j: got.append(j.result(60))) for j in (first, second)
    ]
    for thread in threads:
        thread.start()
    peer = server.wait(SubmitJobs).peer
    complete(server, peer, 2, "second")
    wait_for(lambda: got == ["second"])
    complete(server, peer, 1, "first")
    for thread in threads:
        thread.join()
    assert got == ["second", "first"]


def test_a_callback_may_wait_in_its_turn(server: FakeServer, connection: Connection) -> None:
    got: list[Any] = []
    with Serving(server):
        job = submit(connection)
        job.add_done_callback(lambda _: got.append(submit(connection).result(60)))
        job.result(60)
        wait_for(lambda: got == [2])


def test_waiting_can_be_given_up(server: FakeServer, connection: Connection) -> None:
    job = submit(connection)
    with pytest.raises(TimeoutError):
        job.result(0.01)
    assert not job.done()


def test_a_cancel_is_said(server: FakeServer, connection: Connection) -> None:
    job = submit(connection)
    server.wait(SubmitJobs)
    assert job.cancel()
    (numbers,) = server.wait(CancelJobs).message.tickets
    assert tuple(numbers) == (1, 1)
    assert job.cancel(), "again is harmless"


def test_a_question_gets_its_answer(server: FakeServer, connection: Connection) -> None:
    job = submit(connection)
    heard = server.wait(SubmitJobs)
    server.say(heard.peer, JobsAccepted([Accepted(1, 1, 77)], 1))
    assert job.handle == f"fake:{server.boot}:77"
    said: list[Any] = []
    thread = threading.Thread(target=lambda: said.append(job.status()))
    thread.start()
    question = server.wait(GetStatus)
    assert question.message.handle == 77
    server.say(question.peer, StatusIs(question.message.request, 77, True, True, 1, 3, 1))
    thread.join()
    assert (said[0].numerator, said[0].denominator, said[0].running) == (1, 3, True)


def test_heartbeats_are_said_while_nothing_happens(server: FakeServer) -> None:
    with_heartbeats: list[Any] = []
    say = server._on_message

    def see(peer: bytes, message: Any, bodies: Any) -> None:
        if isinstance(message, Heartbeat):
            with_heartbeats.append(message)
        say(peer, message, bodies)

    server._on_message = see  # type: ignore[method-assign]
    connection = Connection([server.address])
    try:
        wait_for(lambda: server.pump(0.01) or len(with_heartbeats) >= 2)
    finally:
        connection.close()


def test_a_restarted_server_gets_the_jobs_again(server: FakeServer, connection: Connection) -> None:
    job = submit(connection)
    server.wait(SubmitJobs)
    server.restart()
    heard = server.wait(SubmitJobs)
    assert heard.message.resubmit
    complete(server, heard.peer, 1, "home")
    assert job.result(60) == "home"


def test_closing_says_goodbye_and_ends_what_is_under_way(
    server: FakeServer, connection: Connection
) -> None:
    job = submit(connection)
    waiting = threading.Thread(target=job.exception)
    waiting.start()
    server.wait(SubmitJobs)
    connection.close()
    waiting.join(20)
    assert not waiting.is_alive()
    assert isinstance(job.exception(), JobCancelled)
    server.wait(Goodbye)
    connection.close()  # again is harmless


def test_an_interrupted_wait_leaves_the_connection_whole(
    server: FakeServer, connection: Connection
) -> None:
    job = submit(connection)
    peer = server.wait(SubmitJobs).peer
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        job.result()
    timer.join()
    complete(server, peer, 1, "home")
    assert job.result(60) == "home"


def test_an_interrupt_in_mid_step_ends_the_connection_and_its_jobs(
    server: FakeServer, connection: Connection
) -> None:
    job = submit(connection)
    server.wait(SubmitJobs)

    def interrupt(state: Any, now: float) -> Any:
        raise KeyboardInterrupt

    me = threading.get_ident()

    def interrupt_the_driver() -> None:
        wait_for(lambda: connection._driver == me)
        connection.command(interrupt)

    thread = threading.Thread(target=interrupt_the_driver)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        job.result()
    thread.join()
    assert not connection.usable
    with pytest.raises(JobCancelled, match="interrupted"):
        job.result(60)


def test_what_is_submitted_after_the_end_ends_at_once(
    server: FakeServer, connection: Connection
) -> None:
    connection.close()
    with pytest.raises(JobCancelled):
        submit(connection).result(60)


def test_what_was_submitted_while_it_ended_ends_when_somebody_waits(
    server: FakeServer, connection: Connection
) -> None:
    connection.close()
    job: Job[Any] = Job(connection)
    job._ticket = Ticket(connection.next_number(), TERMS, b"x", job)
    connection._inbox.append(job._ticket)  # as a submit does that finds another thread driving
    assert isinstance(job.exception(), JobCancelled)


def test_a_large_argument_goes_in_pieces(server: FakeServer, connection: Connection) -> None:
    argument = bytes(20_000_000)
    job = submit(connection, argument)
    heard = server.wait(SubmitJobs)
    assert nbytes_of(heard.bodies[0]) == len(argument)
    complete(server, heard.peer, 1, "home")
    assert job.result(60) == "home"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_job_of_the_parent_is_refused_in_a_forked_child(
    server: FakeServer, connection: Connection
) -> None:
    job = submit(connection)
    pid = os.fork()
    if not pid:
        try:
            assert not connection.usable
            job.result(5)
        except DmapError as error:
            os._exit("forked" not in str(error))
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert connection.usable


CLOSURES = Terms("dmap", python="3.11", labels=("gpu", "cloudpickle-3"))


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            NoWorkers(Terms("resize"), 0, (), ()),
            "no worker at sammy, kenny can run the function 'resize': the jobs wait; "
            "start one: dmap-worker --servers ... --import the_module_that_registers_it",
        ),
        (
            NoWorkers(CLOSURES, 0, (), ()),
            "no worker at sammy, kenny can run closures: the jobs wait; "
            "start one: dmap-worker --servers ...",
        ),
        (
            NoWorkers(CLOSURES, 4, ("3.12",), ("big", "cloudpickle-3")),
            "no worker at sammy, kenny runs closures under Python 3.11 and cloudpickle 3 with the "
            "label gpu; there are 4 with Python 3.12, cloudpickle 3, the label big, but none with "
            "Python 3.11 or the label gpu: the jobs wait; start one that fits, or ask for less "
            "(`dmap workers` shows who is there)",
        ),
        (
            NoWorkers(CLOSURES, 1, ("3.11",), ("cloudpickle-2", "gpu")),
            "no worker at sammy, kenny runs closures under Python 3.11 and cloudpickle 3 with the "
            "label gpu; there is 1 with Python 3.11, cloudpickle 2, the label gpu, but none with "
            "cloudpickle 3: the jobs wait; start one that fits, or ask for less "
            "(`dmap workers` shows who is there)",
        ),
        (
            NoWorkers(CLOSURES, 2, ("3.11", "3.12"), ("big", "cloudpickle-3", "gpu")),
            "no worker at sammy, kenny runs closures under Python 3.11 and cloudpickle 3 with the "
            "label gpu; there are 2 with Python 3.11 or 3.12, cloudpickle 3, the labels big, gpu, "
            "but none with all of that: the jobs wait; start one that fits, or ask for less "
            "(`dmap workers` shows who is there)",
        ),
        (
            NoWorkers(Terms("resize", labels=("big", "gpu")), 2, ("",), ()),
            "no worker at sammy, kenny runs the function 'resize' with the labels big, gpu; "
            "there are 2, but none with the label big or the label gpu: the jobs wait; start one "
            "that fits, or ask for less (`dmap workers` shows who is there)",
        ),
        (
            NoWorkers(CLOSURES, None, (), ()),
            "no worker at sammy, kenny runs closures under Python 3.11 and cloudpickle 3 with the "
            "label gpu: the jobs wait; start one that fits, or ask for less "
            "(`dmap workers` shows who is there)",
        ),
    ],
)
def test_who_is_missing_and_who_is_there_is_described(event: NoWorkers, expected: str) -> None:
    assert describe_no_workers(event, ["sammy", "kenny"]) == expected


def test_what_follows_from_it_is_said_in_its_place() -> None:
    event = NoWorkers(CLOSURES, 0, (), ())
    said = describe_no_workers(event, ["sammy"], "the map's 4.0 s are over")
    assert said.startswith("no worker at sammy can run closures: the map's 4.0 s are over; start")
