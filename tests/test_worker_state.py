"""What a worker says to its servers, and when. Time is an argument, the servers are fakes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmap.worker_state import MAX_UNACCEPTED_NBYTES, OVERDUE, Held, Send, WorkerState
from jobserver import protocol as wire
from jobserver.protocol import (
    Ability,
    Assigned,
    Awake,
    Body,
    CanDo,
    CantDo,
    GiveBack,
    Goodbye,
    GrabJobs,
    Hello,
    JobAssign,
    LaneId,
    Message,
    NoJob,
    Noop,
    Origin,
    PreSleep,
    Range,
    Welcome,
    WorkAccepted,
    WorkComplete,
    WorkData,
    WorkDone,
    WorkException,
    WorkFail,
)

CLIENT = b"c" * 16
LANE = LaneId(CLIENT, 1)
HELLO = Hello(1, 0, "worker", b"s" * 16, python="3.11", name="papag", child=2)


def a_worker(n_servers: int) -> WorkerState:
    return WorkerState(HELLO, n_servers, [Ability("dmap"), Ability("resize", 3.0, True)])


def welcome(boot: str = "boot1") -> Welcome:
    return Welcome(1, 0, "sammy", boot, False, 1.0, 1000, 2**20)


def a_job(handle: int, lane: LaneId = LANE, n_items: int = 1, function: str = "dmap") -> Assigned:
    return Assigned(
        handle,
        Origin(CLIENT, 1000 + handle),
        function,
        nbytes=1,
        n_items=n_items,
        attempt=1,
        encoding="pickle",
        uniq=b"",
        timeout=0.0,
        item_timeout=0.0,
        blobs=(),
        ancestors=(),
        lane=lane,
    )


def assign(*jobs: Assigned) -> tuple[JobAssign, tuple[Body, ...]]:
    return JobAssign(list(jobs)), (b"x" * len(jobs),)


def told(sends: Iterable[Send]) -> list[tuple[int, type[Message]]]:
    return [(send.server, type(send.message)) for send in sends]


def connect(worker: WorkerState, *servers: int, boot: str = "boot1") -> list[Send]:
    """Bring servers up; return what the worker said to the last welcome."""
    sends: list[Send] = []
    for server in servers:
        worker.on_connected(server)
        sends = worker.on_message(server, welcome(boot), (), 0.0)
    return sends


def a_worker_with(*jobs: Assigned, n_servers: int = 1) -> WorkerState:
    """Make a worker that holds these jobs of server 0."""
    worker = a_worker(n_servers)
    connect(worker, *range(n_servers))
    worker.on_message(0, *assign(*jobs), 0.0)
    return worker


def say(worker: WorkerState, server: int, message: Message) -> list[Send]:
    return worker.on_message(server, message, (), 0.0)


# --- coming and going -------------------------------------------------------------------------


def test_a_new_connection_begins_with_hello_and_what_the_worker_can_do() -> None:
    hello, can_do = a_worker(1).on_connected(0)
    assert hello.message == msgspec.structs.replace(HELLO, boot="", holding=[])
    assert can_do.message == CanDo([Ability("dmap"), Ability("resize", 3.0, True)])


def test_a_worker_grabs_as_soon_as_it_is_welcome() -> None:
    assert told(connect(a_worker(1), 0)) == [(0, GrabJobs)]


def test_a_hello_after_a_broken_link_says_what_the_worker_still_has() -> None:
    worker = a_worker_with(a_job(1), a_job(2), a_job(3))
    worker.start()
    worker.complete(b"r", 1, 0.1)
    worker.start()
    worker.on_disconnected(0, 0.0)
    hello = worker.on_connected(0)[0].message
    assert isinstance(hello, Hello)
    assert hello.boot == "boot1"
    assert sorted(hello.holding) == [1, 2, 3]


def test_a_hello_says_what_was_reported_and_not_accepted() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    worker.complete(b"r", 1, 0.1)
    worker.flush()
    worker.on_disconnected(0, 0.0)
    hello = worker.on_connected(0)[0].message
    assert isinstance(hello, Hello)
    assert hello.holding == [1]


def test_a_hello_does_not_claim_the_handles_of_an_earlier_boot() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    connect(worker, 0, boot="boot2")
    worker.on_disconnected(0, 0.0)
    hello = worker.on_connected(0)[0].message
    assert isinstance(hello, Hello)
    assert (hello.boot, hello.holding) == ("boot2", [])


def test_a_server_that_does_not_know_the_worker_is_told_again() -> None:
    worker = a_worker(1)
    connect(worker, 0)
    sends = say(worker, 0, wire.Error("hello_first", "say Hello"))
    assert told(sends) == [(0, Hello), (0, CanDo)]


def test_a_function_that_it_cannot_do_any_more_is_told_to_all_and_not_announced_again() -> None:
    worker = a_worker(2)
    connect(worker, 0, 1)
    assert told(worker.cant_do(["resize"])) == [(0, CantDo), (1, CantDo)]
    assert worker.on_connected(0)[1].message == CanDo([Ability("dmap")])


def test_only_servers_that_are_there_hear_the_goodbye() -> None:
    worker = a_worker(2)
    connect(worker, 1)
    assert told(worker.goodbye()) == [(1, Goodbye)]


# --- asking for work --------------------------------------------------------------------------


def test_with_one_configured_server_the_grab_stands() -> None:
    (grab,) = connect(a_worker(1), 0)
    assert isinstance(grab.message, GrabJobs)
    assert grab.message.wait


def test_with_several_configured_servers_no_grab_stands_however_many_are_there() -> None:
    (grab,) = connect(a_worker(2), 1)
    assert isinstance(grab.message, GrabJobs)
    assert not grab.message.wait


def test_servers_are_asked_one_after_the_other() -> None:
    worker = a_worker(3)
    connect(worker, 0, 1, 2)
    assert told(say(worker, 0, NoJob())) == [(1, GrabJobs)]
    assert told(say(worker, 1, NoJob())) == [(2, GrabJobs)]


def test_the_worker_goes_to_sleep_at_all_when_none_has_work() -> None:
    worker = a_worker(2)
    connect(worker, 0, 1)
    say(worker, 0, NoJob())
    assert told(say(worker, 1, NoJob())) == [(0, PreSleep), (1, PreSleep)]


def asleep(n_servers: int) -> WorkerState:
    worker = a_worker(n_servers)
    connect(worker, *range(n_servers))
    for server in range(n_servers):
        say(worker, server, NoJob())
    worker.check()
    return worker


def test_a_noop_is_answered_by_a_grab_there() -> None:
    assert told(say(asleep(3), 1, Noop())) == [(1, GrabJobs)]


def test_a_worker_that_finds_work_tells_those_who_believe_it_asleep() -> None:
    worker = asleep(3)
    say(worker, 1, Noop())
    assert told(worker.on_message(1, *assign(a_job(1)), 0.0)) == [(0, Awake), (2, Awake)]


def test_a_worker_that_two_have_woken_tells_the_one_where_it_does_not_come() -> None:
    worker = asleep(2)
    say(worker, 0, Noop())
    say(worker, 1, Noop())
    assert told(worker.on_message(0, *assign(a_job(1)), 0.0)) == [(1, Awake)]


def test_a_worker_that_two_have_woken_goes_to_the_second_when_the_first_has_nothing() -> None:
    worker = asleep(2)
    say(worker, 0, Noop())
    say(worker, 1, Noop())
    assert told(say(worker, 0, NoJob())) == [(1, GrabJobs)]


def test_a_worker_that_was_woken_in_vain_sleeps_again_there_only() -> None:
    worker = asleep(3)
    say(worker, 1, Noop())
    assert told(say(worker, 1, NoJob())) == [(1, PreSleep)]


def test_after_a_job_the_next_server_is_asked() -> None:
    worker = a_worker(3)
    connect(worker, 0, 1, 2)
    asked = []
    for _ in range(6):
        (server,) = (s for s in range(3) if worker.is_asking(0.0) and phase_asked(worker, s))
        asked.append(server)
        worker.on_message(server, *assign(a_job(1)), 0.0)
        worker.start()
        worker.complete(b"r", 1, 0.0)
        worker.flush()
        worker.seek(0.0)
    assert asked == [0, 1, 2, 0, 1, 2]


def phase_asked(worker: WorkerState, server: int) -> bool:
    return worker._servers[server].phase.name == "ASKED"


def test_a_server_that_does_not_answer_holds_the_others_up_for_a_bounded_time_only() -> None:
    worker = a_worker(2)
    connect(worker, 0, 1)
    assert worker.next_deadline() == OVERDUE
    assert worker.on_tick(OVERDUE - 0.01) == []
    assert told(worker.on_tick(OVERDUE)) == [(1, GrabJobs)]


def test_an_overdue_server_that_holds_nobody_up_is_no_reason_to_wake() -> None:
    worker = a_worker(2)
    connect(worker, 0, 1)
    worker.on_tick(OVERDUE)
    assert told(worker.on_message(1, NoJob(), (), OVERDUE)) == [(1, PreSleep)]
    assert worker.next_deadline() is None


def test_what_an_overdue_server_gives_is_taken() -> None:
    worker = a_worker(2)
    connect(worker, 0, 1)
    worker.on_tick(OVERDUE)
    worker.on_message(1, NoJob(), (), OVERDUE)
    sends = worker.on_message(0, *assign(a_job(1)), OVERDUE)
    assert told(sends) == [(1, Awake)]
    assert [held.job.handle for held in worker.held] == [1]


def test_a_grab_that_stands_is_never_overdue() -> None:
    worker = a_worker(1)
    connect(worker, 0)
    assert worker.next_deadline() is None
    assert worker.on_tick(1000.0) == []


def test_a_lost_server_makes_room_for_the_next() -> None:
    worker = a_worker(2)
    connect(worker, 0, 1)
    assert told(worker.on_disconnected(0, 0.0)) == [(1, GrabJobs)]


def test_no_more_work_is_asked_for_while_too_much_is_not_accepted() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    worker.complete((bytes(MAX_UNACCEPTED_NBYTES), b"x"), 1, 0.0)
    worker.flush()
    assert worker.seek(0.0) == []
    assert told(say(worker, 0, WorkAccepted([Range(1, 1)]))) == [(0, GrabJobs)]


# --- results ----------------------------------------------------------------------------------


def test_results_of_one_function_go_together() -> None:
    worker = a_worker_with(a_job(1), a_job(2))
    for result in (b"a", b"bc"):
        worker.start()
        worker.complete(result, 1, 0.25)
    (send,) = worker.flush()
    assert send.message == WorkComplete(1, [WorkDone(1, 1), WorkDone(2, 2)], 0.5)
    assert send.bodies == (b"abc",)


def test_results_of_two_functions_go_apart() -> None:
    worker = a_worker_with(a_job(1), a_job(2, function="resize"))
    for _ in range(2):
        worker.start()
        worker.complete(b"r", 1, 0.25)
    assert told(worker.flush()) == [(0, WorkComplete), (0, WorkComplete)]


def test_a_large_result_goes_alone() -> None:
    worker = a_worker_with(a_job(1), a_job(2), a_job(3))
    large = (b"x" * wire.BODY_NBYTES, b"y")
    for result in (b"a", large, b"b"):
        worker.start()
        worker.complete(result, 1, 0.0)
    sends = worker.flush()
    assert [send.bodies for send in sends] == [(b"a",), (large,), (b"b",)]


def test_a_result_of_some_items_says_of_how_many() -> None:
    worker = a_worker_with(a_job(1, n_items=5), a_job(2, n_items=5))
    for n_items in (3, 5):
        worker.start()
        worker.complete(b"r", n_items, 0.0)
    (send,) = worker.flush()
    assert isinstance(send.message, WorkComplete)
    assert [done.n_items for done in send.message.jobs] == [3, 0]


def test_an_exception_goes_behind_the_results_before_it() -> None:
    worker = a_worker_with(a_job(1), a_job(2))
    worker.start()
    worker.complete(b"r", 1, 0.0)
    worker.start()
    sends = worker.raised("ValueError", "no", "Traceback", (b"e", b""), 0, 0.1)
    assert told(sends) == [(0, WorkComplete), (0, WorkException)]
    assert [send.message.seq for send in sends] == [1, 2]  # type: ignore[attr-defined]


def test_what_was_not_accepted_is_said_again_to_the_same_server_as_it_was() -> None:
    worker = a_worker_with(a_job(1), a_job(2))
    worker.start()
    worker.complete(b"r", 1, 0.0)
    first = worker.flush()
    worker.start()
    second = worker.fail("no")
    say(worker, 0, WorkAccepted([Range(1, 1)]))
    worker.on_disconnected(0, 0.0)
    worker.on_connected(0)
    assert first
    assert say(worker, 0, welcome())[0] == second[0]


def test_what_ends_while_the_server_is_away_is_said_when_it_is_back() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    worker.on_disconnected(0, 0.0)
    worker.complete(b"r", 1, 0.0)
    assert worker.flush() == []
    assert told(connect(worker, 0)) == [(0, WorkComplete), (0, GrabJobs)]


def test_a_server_that_restarted_is_told_results_by_their_origin() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    worker.complete(b"r", 1, 0.0)
    worker.flush()
    again, _ = connect(worker, 0, boot="boot2")
    assert again.message == WorkComplete(
        1, [WorkDone(1, 1)], 0.0, boot="boot1", origins=[Origin(CLIENT, 1001)]
    )


def test_a_job_that_outlives_its_server_is_reported_by_its_origin() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    connect(worker, 0, boot="boot2")
    worker.raised("ValueError", "no", "", (b"e", b""), 0, 0.0)
    (send,) = (report for report in connect(worker, 0, boot="boot2")[:1])
    assert isinstance(send.message, WorkException)
    assert (send.message.boot, send.message.origin) == ("boot1", Origin(CLIENT, 1001))


def test_what_a_server_gave_before_it_restarted_is_not_started() -> None:
    worker = a_worker_with(a_job(1), a_job(2))
    worker.start()
    connect(worker, 0, boot="boot2")
    assert not worker.held
    assert len(worker.running) == 1


# --- what is too large for a server -----------------------------------------------------------


def test_a_result_that_is_declined_fails_its_job() -> None:
    worker = a_worker_with(a_job(7))
    worker.start()
    worker.complete(b"r", 1, 0.0)
    (send,) = worker.flush()
    (fail, grab) = worker.on_declined(0, send.message, "it has 1 byte", 0.0)
    text = "its result is too large for sammy: it has 1 byte"
    assert fail.message == WorkFail(2, 7, "failed", text)
    assert isinstance(grab.message, GrabJobs)


def test_an_exception_that_is_declined_fails_its_job() -> None:
    worker = a_worker_with(a_job(7))
    worker.start()
    (send,) = worker.raised("ValueError", "no", "", (b"e", b""), 0, 0.0)
    (fail, _) = worker.on_declined(0, send.message, "it has 1 byte", 0.0)
    text = "its exception (ValueError) is too large for sammy: it has 1 byte"
    assert fail.message == WorkFail(2, 7, "failed", text)


def declined_one() -> WorkerState:
    """Make a worker whose only result was declined."""
    worker = a_worker_with(a_job(1))
    worker.start()
    worker.complete(b"r", 1, 0.0)
    (send,) = worker.flush()
    worker.on_declined(0, send.message, "no", 0.0)
    worker.check()
    return worker


def test_what_is_said_in_place_of_a_declined_result_is_kept_until_it_is_accepted() -> None:
    worker = declined_one()
    assert not worker.all_accepted
    say(worker, 0, WorkAccepted([Range(2, 1)]))
    assert worker.all_accepted


def test_in_place_of_a_declined_result_a_restarted_server_is_told_the_origin() -> None:
    worker = declined_one()
    fail, _ = connect(worker, 0, boot="boot2")
    assert isinstance(fail.message, WorkFail)
    assert (fail.message.boot, fail.message.origin) == ("boot1", Origin(CLIENT, 1001))


def test_a_declined_result_makes_room_for_further_work() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    worker.complete((bytes(MAX_UNACCEPTED_NBYTES), b"x"), 1, 0.0)
    (send,) = worker.flush()
    assert worker.seek(0.0) == []
    assert told(worker.on_declined(0, send.message, "no", 0.0)) == [(0, WorkFail), (0, GrabJobs)]


def test_a_result_that_was_accepted_cannot_be_declined() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    worker.complete(b"r", 1, 0.0)
    (send,) = worker.flush()
    say(worker, 0, WorkAccepted([Range(1, 1)]))
    assert worker.on_declined(0, send.message, "no", 0.0) == []
    assert worker.all_accepted


def test_declined_data_of_a_job_is_dropped() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    assert worker.on_declined(0, WorkData(1), "no", 0.0) == []


# --- giving back, draining --------------------------------------------------------------------


def test_what_the_supervisor_has_taken_is_held_no_more() -> None:
    worker = a_worker_with(a_job(1), a_job(2))
    worker.withdraw({(0, 1)})
    assert [held.job.handle for held in worker.held] == [2]


def test_a_drain_gives_back_what_is_held_and_keeps_what_runs() -> None:
    worker = a_worker_with(a_job(1), a_job(2), a_job(3))
    worker.start()
    (send,) = worker.drain()
    assert send == Send(0, GiveBack([2, 3]))
    assert not worker.drained


def test_a_draining_worker_gives_back_what_comes() -> None:
    worker = a_worker(1)
    connect(worker, 0)
    worker.drain()
    assert worker.on_message(0, *assign(a_job(1)), 0.0) == [Send(0, GiveBack([1]))]


def test_a_worker_is_drained_when_its_last_result_is_accepted() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    worker.drain()
    worker.complete(b"r", 1, 0.0)
    assert not worker.drained
    worker.flush()
    assert not worker.drained
    assert say(worker, 0, WorkAccepted([Range(1, 1)])) == []
    assert worker.drained


def test_a_job_of_which_nothing_is_done_can_be_given_back() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    assert worker.return_running() == [Send(0, GiveBack([1]))]


def test_nothing_is_given_back_to_a_server_that_restarted() -> None:
    worker = a_worker_with(a_job(1))
    worker.start()
    connect(worker, 0, boot="boot2")
    assert worker.return_running() == []


def test_a_job_is_spoken_of_only_to_the_server_as_it_was() -> None:
    worker = a_worker_with(a_job(1))
    held = worker.start()
    assert worker.can_speak_of(held)
    worker.on_disconnected(0, 0.0)
    assert not worker.can_speak_of(held)
    connect(worker, 0, boot="boot2")
    assert not worker.can_speak_of(held)


# --- jobs that wait for jobs ------------------------------------------------------------------


def a_waiting_worker(n_servers: int = 2) -> WorkerState:
    worker = a_worker_with(a_job(1), n_servers=n_servers)
    worker.start()
    return worker


INNER = LaneId(CLIENT, 9)


def test_a_job_that_waits_grabs_from_its_own_lanes_only() -> None:
    (grab,) = a_waiting_worker().seek(0.0, [INNER])
    assert isinstance(grab.message, GrabJobs)
    assert (grab.message.lanes, grab.message.wait) == ([INNER], False)


def test_a_job_that_waits_asks_every_server_and_does_not_sleep() -> None:
    worker = a_waiting_worker()
    (first,) = worker.seek(0.0, [INNER])
    assert say(worker, first.server, NoJob()) == []
    (second,) = worker.seek(0.0, [INNER])
    assert {first.server, second.server} == {0, 1}
    say(worker, second.server, NoJob())
    assert worker.seek(0.0, [INNER]) == []
    assert told(worker.seek(0.0, [INNER])) == [(first.server, GrabJobs)]


def test_a_job_of_another_lane_that_comes_late_is_given_back() -> None:
    worker = a_waiting_worker()
    worker.seek(0.0, [INNER])
    sends = worker.on_message(1, *assign(a_job(5), a_job(6, INNER)), 0.0)
    assert sends == [Send(1, GiveBack([5]))]
    assert [held.job.handle for held in worker.held] == [6]


def test_a_job_that_waits_still_gets_its_jobs_in_a_drain() -> None:
    worker = a_waiting_worker()
    worker.drain()
    (grab,) = worker.seek(0.0, [INNER])
    assert worker.on_message(grab.server, *assign(a_job(6, INNER)), 0.0) == []
    assert [held.job.handle for held in worker.held] == [6]


@pytest.mark.parametrize("n_servers", [1, 2])
def test_after_a_job_that_waited_the_worker_looks_for_any_work(n_servers: int) -> None:
    worker = a_waiting_worker(n_servers)
    (grab,) = worker.seek(0.0, [INNER])
    worker.complete(b"r", 1, 0.0)
    worker.flush()
    sends = worker.seek(0.0) + say(worker, grab.server, NoJob())
    assert [type(send.message) for send in sends] == [GrabJobs]
    assert not sends[0].message.lanes  # type: ignore[attr-defined]


# --- any order of events ----------------------------------------------------------------------


class FakeServer:
    """A server with one worker. What it says and hears goes through the wire's code."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.n_boots = 0
        self.last_handle = 0
        self.up = False
        self.restart()

    def restart(self) -> None:
        self.n_boots += 1
        self.ready: deque[int] = deque()  # handles
        self.held: dict[int, None] = {}
        self.done: set[int] = set()
        self.disconnect()

    def disconnect(self) -> None:
        self.up = False
        self.asleep = self.waiting = self.known = False
        self.inbox: deque[bytes] = deque()
        self.outbox: deque[tuple[bytes, tuple[Body, ...]]] = deque()

    def say(self, message: Message, *bodies: Body) -> None:
        self.outbox.append((wire.encode(message), bodies))

    def submit(self) -> None:
        self.last_handle += 1
        self.ready.append(self.last_handle)
        self.wake()

    def wake(self) -> None:
        if self.ready and self.waiting:
            self.waiting = False
            self.assign()
        elif self.ready and self.asleep:
            self.asleep = False
            self.say(Noop())

    def assign(self) -> None:
        handles = [self.ready.popleft() for _ in range(min(2, len(self.ready)))]
        self.held.update(dict.fromkeys(handles))
        message, bodies = assign(*map(a_job, handles))
        self.say(message, *bodies)

    def hear(self) -> None:
        """Take in the next message of the worker."""
        message = wire.decode_to_server(self.inbox.popleft())
        match message:
            case Hello():
                self.known, self.asleep, self.waiting = True, False, False
                holding = message.holding if message.boot == self.boot else []
                self.give_back(handle for handle in list(self.held) if handle not in holding)
                self.say(welcome(self.boot))
            case GrabJobs():
                self.asleep = False
                if self.ready:
                    self.assign()
                elif message.wait:
                    self.waiting = True
                else:
                    self.say(NoJob())
            case PreSleep():
                self.asleep = True
                self.wake()
            case Awake():
                self.asleep = False
            case GiveBack():
                self.give_back(message.handles)
            case WorkComplete() | WorkException() | WorkFail():
                handles = (
                    [done.handle for done in message.jobs]
                    if isinstance(message, WorkComplete)
                    else [message.handle]
                )
                if not message.boot:
                    for handle in handles:
                        if handle in self.held:
                            del self.held[handle]
                            self.done.add(handle)
                self.say(WorkAccepted([Range(message.seq, 1)]))
            case CanDo() | Goodbye():
                pass
            case _:
                raise AssertionError(f"a worker said {message}")

    def give_back(self, handles: Iterable[int]) -> None:
        for handle in handles:
            if handle in self.held:
                del self.held[handle]
                self.ready.appendleft(handle)
        self.wake()

    @property
    def boot(self) -> str:
        return f"boot{self.index}-{self.n_boots}"


class World:
    """One worker, its servers, and links that carry what is said when the test says so."""

    def __init__(self, n_servers: int) -> None:
        self.worker = a_worker(n_servers)
        self.servers = [FakeServer(index) for index in range(n_servers)]
        self.now = 0.0
        self.current: Held | None = None

    def post(self, sends: Iterable[Send]) -> None:
        for index, message, _bodies in sends:
            if self.servers[index].up:
                self.servers[index].inbox.append(wire.encode(message))
        if self.current is None:
            self.worker.check()

    def connect(self, server: FakeServer) -> None:
        if not server.up:
            server.up = True
            self.post(self.worker.on_connected(server.index))

    def disconnect(self, server: FakeServer) -> None:
        if server.up:
            server.disconnect()
            self.post(self.worker.on_disconnected(server.index, self.now))

    def restart(self, server: FakeServer) -> None:
        self.disconnect(server)
        server.restart()

    def deliver(self, server: FakeServer) -> None:
        """Carry one message to the worker, which reads none while it runs a job."""
        if server.outbox and self.current is None:
            header, bodies = server.outbox.popleft()
            message = wire.decode_to_peer(header)
            self.post(self.worker.on_message(server.index, message, bodies, self.now))

    def hear(self, server: FakeServer) -> None:
        if server.inbox:
            server.hear()

    def decline(self, server: FakeServer) -> None:
        """Let the worker know that its next message is too large, if that may be so."""
        if server.inbox and self.current is None:
            message = wire.decode_to_server(server.inbox[0])
            if isinstance(message, WorkComplete | WorkException):
                server.inbox.popleft()
                self.post(self.worker.on_declined(server.index, message, "no", self.now))

    def start(self) -> None:
        if self.current is None and self.worker.held:
            self.current = self.worker.start()

    def finish(self, how: int) -> None:
        if self.current is None:
            return
        sends: list[Send] = []
        if how == 0:
            self.worker.complete(b"r", 1, 0.1)
        elif how == 1:
            sends = self.worker.raised("E", "", "", (b"e", b""), 0, 0.1)
        else:
            sends = self.worker.fail("no")
        self.current = None
        if not self.worker.held:
            sends += self.worker.flush() + self.worker.seek(self.now)
        self.post(sends)

    def pass_time(self) -> None:
        self.now += OVERDUE
        if self.current is None:
            self.post(self.worker.on_tick(self.now))

    def settle(self) -> None:
        """Let everything that can happen do so, on links that work."""
        for _ in range(2000):
            for server in self.servers:
                self.connect(server)
                self.hear(server)
                self.deliver(server)
            if not any(server.inbox or server.outbox for server in self.servers):
                if not self.worker.held and self.current is None:
                    return
                self.start()
                self.finish(0)
        raise AssertionError("it never comes to rest")


N_SERVERS = st.integers(1, 3)
WHAT = (
    *("submit", "submit", "hear", "hear", "hear", "deliver", "deliver", "deliver"),
    *("start", "finish", "connect", "disconnect", "restart", "pass_time", "decline"),
)
EVENTS = st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, 2)), max_size=120)


def play(world: World, events: list[tuple[str, int]]) -> None:
    for what, number in events:
        server = world.servers[number % len(world.servers)]
        match what:
            case "submit":
                server.submit()
            case "start":
                world.start()
            case "finish":
                world.finish(number)
            case "pass_time":
                world.pass_time()
            case _:
                getattr(world, what)(server)


@given(N_SERVERS, EVENTS)
def test_a_worker_sleeps_through_nothing(n_servers: int, events: list[tuple[str, int]]) -> None:
    """Whatever happened: once the links work, all that there is gets done, and once only."""
    world = World(n_servers)
    play(world, events)
    world.finish(0)
    world.settle()
    world.worker.check()
    for server in world.servers:
        assert not server.ready
        assert not server.held
        assert server.asleep or server.waiting
    assert world.worker.drained


@given(N_SERVERS, EVENTS)
def test_an_idle_worker_that_is_given_work_by_any_server_does_it(
    n_servers: int, events: list[tuple[str, int]]
) -> None:
    world = World(n_servers)
    play(world, events)
    world.finish(0)
    world.settle()
    for server in world.servers:
        server.submit()
        world.settle()
        assert server.last_handle in server.done


@given(N_SERVERS, EVENTS)
def test_a_worker_that_drains_at_any_time_leaves_nothing_behind(
    n_servers: int, events: list[tuple[str, int]]
) -> None:
    world = World(n_servers)
    play(world, events)
    world.post(world.worker.drain())
    world.finish(0)
    world.settle()
    assert world.worker.drained
    for server in world.servers:
        assert not server.held
