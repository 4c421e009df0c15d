"""The client's state against the real server's state, over a network in memory."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, deque
from typing import Any

import hypothesis.strategies as st
import pytest
from fake_net import Net, Peer, Worker
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from dmap import client_state
from dmap.client_state import ClientState, rank
from dmap.tickets import (
    QUIET,
    Attached,
    Blob,
    Complaint,
    Completed,
    Event,
    Failed,
    InBackground,
    NoWorkers,
    Refused,
    Terms,
    Ticket,
)
from jobserver import protocol as wire
from jobserver.jobs import Job, Limits, Session
from jobserver.protocol import Body, Message
from jobserver.state import State

NAMES = ("sammy", "kenny", "papag")
SESSION = b"client of a test"
HELLO = wire.Hello(1, 0, "client", SESSION, "3.11", "me", "here", 1)


class Owner:
    """Counts what it hears; the driver of a real client calls ``hear`` as this world does."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def hear(self, event: Event) -> None:
        self.events.append(event)

    @property
    def ends(self) -> list[Event]:
        ends = (Completed, Failed, Refused, InBackground)
        return [event for event in self.events if isinstance(event, ends)]

    def end(self, kind: type[Any]) -> Any:
        (end,) = self.ends
        assert isinstance(end, kind), end
        return end


class Line:
    """The link between the client and one server; messages lie in it until someone moves them."""

    def __init__(self, world: World, index: int, limits: Limits) -> None:
        self.world = world
        self.index = index
        self.limits = limits
        self.peer: LinePeer | None = None  # None: no connection
        self.up: deque[tuple[Message, tuple[Body, ...]]] = deque()
        self.boots = itertools.count(1)
        self.workers: list[Worker] = []
        self.muted = False
        self.start()

    def start(self, n_workers: int = 1) -> None:
        boot = f"b{next(self.boots)}"
        self.net = Net(boot=boot)
        self.net.state = State(NAMES[self.index], boot, limits=self.limits)
        self.net.now = self.world.now
        self.workers = [
            Worker(self.net, "f", "g", number=n, python="3.11") for n in range(n_workers)
        ]

    @property
    def jobs(self) -> dict[int, Job]:
        return self.net.state.book.jobs

    @property
    def session(self) -> Session:
        """What the server has of the client."""
        return self.net.state.book.sessions[SESSION]

    def connect(self) -> None:
        """Make a connection; the client greets, which starts the server's end of it."""
        self.peer = LinePeer(self.net)
        self.world.hear(self.world.state.on_connected(self.index, self.world.now))

    def cut(self, *, noticed: bool = True) -> None:
        if self.peer is not None:
            if self.peer.id in self.net.peers:
                self.peer.cut(noticed=noticed)
            self.peer = None
            self.up.clear()
            self.world.hear(self.world.state.on_disconnected(self.index, self.world.now))

    def kill(self) -> None:
        self.cut()
        self.start()

    def push(self, n: int = 1_000_000) -> int:
        """Let the server have what the client said."""
        moved = 0
        while self.up and self.peer is not None and moved < n:
            message, bodies = self.up.popleft()
            self.net.now = self.world.now
            self.peer.say(message, *bodies)
            moved += 1
        return moved

    def pull(self, n: int = 1_000_000) -> int:
        """Let the client have what the server said."""
        moved = 0
        while self.peer is not None and self.peer.inbox and moved < n and not self.muted:
            message, bodies = self.peer.inbox.pop(0)
            self.peer.told.append((message, bodies))
            self.world.hear(
                self.world.state.on_message(self.index, message, bodies, self.world.now)  # type: ignore[arg-type]
            )
            moved += 1
        return moved

    def decline(self, *kinds: type[Message]) -> bool:
        """Let the client know that the next it says is too large, if it is of such a kind."""
        if not self.up or not isinstance(self.up[0][0], kinds):
            return False
        message, _ = self.up.popleft()
        self.world.hear(self.world.state.on_declined(self.index, message, "no", self.world.now))
        return True

    def work(self, how: str = "complete") -> bool:
        """Let each worker do what it can get; return whether there was any."""
        found = False
        self.net.now = self.world.now
        for worker in self.workers:
            worker.say(wire.GrabJobs())
            for message, bodies in worker.inbox:
                if isinstance(message, wire.JobAssign):
                    parts = wire.split(
                        bodies[0] if bodies else b"", [j.nbytes for j in message.jobs]
                    )
                    for job, argument in zip(message.jobs, parts, strict=True):
                        found = True
                        self.world.runs[job.origin.ticket] += 1
                        self._end(worker, job, argument, how)
            worker.inbox.clear()
        return found

    def _end(self, worker: Worker, job: wire.Assigned, argument: Body, how: str) -> None:
        assert isinstance(argument, bytes)
        seq = next(worker._seqs)
        if how == "complete":
            result = b"<" + argument + b">"
            worker.say(wire.WorkComplete(seq, [wire.WorkDone(job.handle, len(result))]), result)
        elif how == "raise":
            worker.say(wire.WorkException(seq, job.handle, "E", "m", "t"), b"", b"")
        else:
            worker.say(wire.GiveBack([job.handle]))


class LinePeer(Peer):
    """The server's end of the client's connection; the client says its own Hello."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.id = net.routing_id()
        self.inbox: list[tuple[Message, tuple[Body, ...]]] = []
        self.told: list[tuple[Message, tuple[Body, ...]]] = []
        net.peers[self.id] = self


class World:
    """A client, its servers, and a clock."""

    def __init__(self, n_servers: int = 1, *, limits: Limits | None = None) -> None:
        self.now = 100.0
        self.state = ClientState(SESSION, NAMES[:n_servers], self.now, HELLO)
        self.numbers = itertools.count(1)
        self.owners: dict[int, Owner] = {}
        self.runs: Counter[int] = Counter()
        self.notes: list[Event] = []
        self.said: list[tuple[int, Message]] = []
        self.lines = [Line(self, n, limits or Limits()) for n in range(n_servers)]

    def submit(self, terms: Terms, argument: bytes = b"x", uniq: bytes = b"") -> Owner:
        number = next(self.numbers)
        owner = self.owners[number] = Owner()
        self.state.submit(Ticket(number, terms, argument, owner, uniq), self.now)
        return owner

    def attach(self, handle: str) -> Owner:
        where, _, n = handle.rpartition(":")
        number = next(self.numbers)
        owner = self.owners[number] = Owner()
        self.state.submit(Attached(number, where, int(n), owner), self.now)
        return owner

    def hear(self, events: list[Event]) -> None:
        for event in events:
            owner = getattr(event, "owner", None)
            if owner is None:
                self.notes.append(event)
            else:
                owner.hear(event)
        self.state.check()

    def flush(self) -> None:
        for send in self.state.flush(self.now):
            message = wire.decode_to_server(wire.encode(send.message))
            self.said.append((send.server, message))
            line = self.lines[send.server]
            if line.peer is not None:
                line.up.append((message, send.bodies))
        self.state.check()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with what falls due on both sides."""
        until = self.now + seconds
        while True:
            due = self.state.next_deadline()
            if due is None or due > until:
                break
            self.now = max(due, self.now)
            self.turn()
        self.now = until
        self.turn()

    def turn(self) -> None:
        for line in self.lines:
            line.net.now = self.now
            line.net.spread(line.net.state.on_tick(self.now))
            line.pull()
        self.hear(self.state.on_tick(self.now))
        self.flush()

    def move(self) -> None:
        """Carry messages until all is said."""
        moved = 1
        while moved:
            self.flush()
            moved = sum(line.push() + line.pull() for line in self.lines)

    def connect(self) -> World:
        for line in self.lines:
            line.connect()
        self.move()
        return self

    def finish(self, seconds: float = 30.0) -> None:
        """Let everyone come back and work until nothing is left."""
        until = self.now + seconds
        for line in self.lines:
            if line.peer is None:
                line.connect()
            if not line.workers:
                line.workers = [Worker(line.net, "f", "g", number=9, python="3.11")]
        self.move()
        while self.state.tickets:
            assert self.now < until, f"never ended: {self.state.tickets}"
            for line in self.lines:
                if line.peer is None:
                    line.connect()
                line.work()
            self.move()
            self.pass_time(0.05)
        self.move()


def test_a_result_reaches_its_owner() -> None:
    world = World().connect()
    owner = world.submit(Terms("f"), b"a")
    world.move()
    world.lines[0].work()
    world.move()
    assert owner.end(Completed).result == b"<a>"


def test_a_result_is_acknowledged_and_the_server_forgets_it() -> None:
    world = World().connect()
    world.submit(Terms("f"))
    world.finish()
    session = world.lines[0].session
    assert not session.untaken


def test_what_is_submitted_together_goes_in_one_message() -> None:
    world = World().connect()
    terms = Terms("f")
    for n in range(100):
        world.submit(terms, b"%d" % n)
    world.flush()
    (submit,) = [m for _, m in world.said if isinstance(m, wire.SubmitJobs)]
    assert len(submit.jobs) == 100


def test_arguments_that_are_too_much_for_one_body_go_in_several() -> None:
    world = World().connect()
    terms = Terms("f")
    for _ in range(3):
        world.submit(terms, bytes(wire.BODY_NBYTES // 2))
    world.flush()
    sizes = [len(m.jobs) for _, m in world.said if isinstance(m, wire.SubmitJobs)]
    assert sizes == [2, 1]


def test_nothing_goes_beyond_the_credit() -> None:
    world = World(limits=Limits(session_jobs=3)).connect()
    terms = Terms("f")
    for _ in range(5):
        world.submit(terms)
    world.move()
    assert len(world.lines[0].jobs) == 3
    world.finish()
    assert all(len(owner.ends) == 1 for owner in world.owners.values())


def test_what_is_beyond_the_credit_is_not_said() -> None:
    world = World(limits=Limits(session_jobs=3)).connect()
    terms = Terms("f")
    for _ in range(5):
        world.submit(terms)
    world.move()
    submits = [m for _, m in world.said if isinstance(m, wire.SubmitJobs)]
    assert [len(submit.jobs) for submit in submits] == [3]


def test_what_a_busy_server_refused_goes_first_when_it_has_room() -> None:
    world = World(limits=Limits(max_jobs=1)).connect()
    terms = Terms("f")
    for _ in range(4):
        world.submit(terms)
    world.finish()
    assert list(world.runs) == [1, 2, 3, 4]


def test_a_blob_on_its_way_is_not_put_again() -> None:
    world = World().connect()
    terms = Terms("f", blobs=(blob(b"closure"),))
    for _ in range(3):
        world.submit(terms)
        world.flush()
    assert sum(isinstance(m, wire.PutBlob) for _, m in world.said) == 1


def test_the_jobs_of_a_broken_link_stay_for_a_while() -> None:
    world = World(2).connect()
    world.submit(Terms("f"))
    world.move()
    (at,) = {ticket.server for ticket in world.state.tickets.values()}
    assert at is not None
    world.lines[at.index].cut()
    world.pass_time(client_state.GRACE / 2)
    world.move()
    (ticket,) = world.state.tickets.values()
    assert ticket.server is at
    assert not ticket.resubmit


def test_a_job_is_submitted_under_its_functions_name() -> None:
    world = World().connect()
    world.submit(Terms("f"))
    world.move()
    assert [job.name for job in world.lines[0].jobs.values()] == ["f"]


def test_a_job_larger_than_the_whole_credit_goes_alone() -> None:
    world = World(limits=Limits(session_nbytes=10)).connect()
    terms = Terms("f")
    owners = [world.submit(terms, b"a" * n) for n in (4, 100, 4)]
    world.finish()
    assert [len(owner.end(Completed).result) for owner in owners] == [6, 102, 6]


def test_a_busy_server_is_tried_again() -> None:
    world = World(limits=Limits(max_jobs=1)).connect()
    terms = Terms("f")
    owners = [world.submit(terms) for _ in range(4)]
    world.move()
    assert len(world.lines[0].jobs) == 1
    world.finish()
    assert all(owner.end(Completed) for owner in owners)


def blob(text: bytes) -> Blob:
    return Blob(hashlib.sha256(text).digest(), text)


def test_a_blob_is_put_once_for_many_jobs() -> None:
    world = World().connect()
    terms = Terms("f", blobs=(blob(b"closure"),))
    for _ in range(3):
        world.submit(terms)
        world.move()
    assert sum(isinstance(m, wire.PutBlob) for _, m in world.said) == 1
    assert len(world.lines[0].jobs) == 3


def in_memory(text: bytes) -> Blob:
    body = wire.SharedBody((memoryview(text),))
    body.memory = wire.Reference(7, 8, len(text), bytes(16))
    return blob(text)._replace(body=body)


def puts(world: World) -> list[tuple[bytes, wire.Reference | None]]:
    return [(m.blob, m.memory) for _, m in world.said if isinstance(m, wire.PutBlob)]


def test_a_blob_that_lies_in_memory_is_named_and_its_bytes_stay_here() -> None:
    world = World().connect()
    large = in_memory(bytes(2 * wire.BODY_NBYTES))
    terms = Terms("f", blobs=(large,))
    world.submit(terms)
    world.state.flush(world.now)
    server = world.state.servers[0]
    assert server.putting == {large.id}
    world.hear(world.state.on_message(0, wire.BlobTaken(large.id), (), world.now))
    sends = world.state.flush(world.now)
    assert [type(send.message) for send in sends] == [wire.SubmitJobs]
    assert terms.shipped == {0: 2 * wire.BODY_NBYTES}


def test_bytes_go_to_a_server_that_cannot_open_the_memory_and_no_more_is_named_to_it() -> None:
    world = World().connect()
    first, second = in_memory(bytes(2 * wire.BODY_NBYTES)), in_memory(b"second")
    owner = world.submit(terms := Terms("f", blobs=(first,)))
    (send,) = world.state.flush(world.now)
    assert (send.message, send.bodies) == (wire.PutBlob(first.id, first.body.memory), ())  # type: ignore[union-attr]
    refusal = wire.BlobTaken(first.id, "it cannot be opened", send=True)
    world.hear(world.state.on_message(0, refusal, (), world.now))
    other = world.submit(Terms("f", blobs=(second,)))
    world.finish()
    assert owner.end(Completed)
    assert other.end(Completed)
    assert puts(world) == [(first.id, None), (second.id, None)]
    assert terms.shipped == {0: 2 * wire.BODY_NBYTES}, "it is counted once"


def test_jobs_wait_until_what_was_named_to_the_server_is_there() -> None:
    world = World().connect()
    large = in_memory(bytes(2 * wire.BODY_NBYTES))
    world.submit(Terms("f", blobs=(large,)))
    assert [type(send.message) for send in world.state.flush(world.now)] == [wire.PutBlob]
    world.submit(Terms("f", blobs=(large,)))
    assert world.state.flush(world.now) == [], "it is not named twice"


def test_a_blob_that_the_server_dropped_is_put_again() -> None:
    world = World(limits=Limits(blob_nbytes=10)).connect()
    terms = Terms("f", blobs=(blob(b"closure"),))
    world.submit(terms)
    world.finish()
    world.submit(Terms("f", blobs=(blob(b"another"),)))
    world.finish()
    last = world.submit(terms)
    world.finish()
    assert last.end(Completed)


def test_jobs_wait_for_a_large_blob() -> None:
    world = World().connect()
    terms = Terms("f", blobs=(blob(bytes(2 * wire.BODY_NBYTES)),))
    owner = world.submit(terms)
    world.flush()
    assert not any(isinstance(m, wire.SubmitJobs) for _, m in world.said)
    world.finish()
    assert owner.end(Completed)


def test_a_blob_that_never_fits_ends_its_jobs() -> None:
    world = World(limits=Limits(blob_nbytes=3)).connect()
    owner = world.submit(Terms("f", blobs=(blob(b"closure"),), patience=5))
    world.move()
    assert not owner.ends
    while not owner.ends:
        assert world.now < 110
        world.pass_time(0.5)
        world.move()
    assert owner.end(Refused).trouble == "blobs"


def test_the_job_of_a_submit_that_is_declined_is_refused() -> None:
    world = World().connect()
    large, other = world.submit(Terms("f"), b"xx"), world.submit(Terms("g"))
    world.flush()
    assert world.lines[0].decline(wire.SubmitJobs)
    refused = large.end(Refused)
    assert refused.trouble == "too_large"
    assert refused.text == "sammy: no"
    world.finish()
    assert other.end(Completed)


@pytest.mark.parametrize("told", [False, True])
def test_a_cancelled_job_whose_submit_is_declined_leaves_nothing_behind(told: bool) -> None:
    world = World().connect()
    owner = world.submit(Terms("f"), b"xx")
    world.flush()
    world.state.cancel([1])
    if told:
        world.flush()
    world.lines[0].decline(wire.SubmitJobs)
    assert not owner.ends
    server = world.state.servers[0]
    assert not server.cancels
    assert not server.cancelling


def test_what_a_server_has_accepted_is_not_ended_by_what_it_declines() -> None:
    world = World().connect()
    closure = blob(b"closure")
    owner = world.submit(Terms("f", blobs=(closure,)))
    world.move()
    submit = wire.SubmitJobs("f", [wire.JobSpec(1, 1)])
    for message in (submit, wire.PutBlob(closure.id)):
        world.hear(world.state.on_declined(0, message, "no", world.now))
    world.finish()
    assert owner.end(Completed)


def test_the_jobs_of_a_blob_that_is_declined_end() -> None:
    world = World().connect()
    large = blob(bytes(2 * wire.BODY_NBYTES))
    owners = [world.submit(Terms("f", blobs=(large,))) for _ in range(2)]
    other = world.submit(Terms("f"))
    world.flush()
    assert world.lines[0].decline(wire.PutBlob)
    assert [owner.end(Refused).trouble for owner in owners] == ["blobs", "blobs"]
    world.finish()
    assert other.end(Completed)


def test_a_blob_that_was_declined_is_offered_again_to_later_jobs() -> None:
    world = World().connect()
    terms = Terms("f", blobs=(blob(bytes(2 * wire.BODY_NBYTES)),))
    world.submit(terms)
    world.flush()
    world.lines[0].decline(wire.PutBlob)
    later = world.submit(terms)
    world.finish()
    assert later.end(Completed)


def test_anything_else_that_is_declined_is_complained_about() -> None:
    world = World().connect()
    world.hear(world.state.on_declined(0, wire.OpenLane(1), "no", world.now))
    assert world.notes == [Complaint("sammy", "it declined OpenLane: no")]


def test_a_link_that_comes_back_in_time_costs_no_run() -> None:
    world = World(2).connect()
    owners = [world.submit(Terms("f")) for _ in range(4)]
    world.move()
    world.lines[0].cut()
    world.lines[1].cut()
    world.pass_time(client_state.GRACE / 2)
    world.connect()
    world.finish()
    assert all(owner.end(Completed) for owner in owners)
    assert max(world.runs.values()) == 1


def test_a_submit_that_was_lost_with_its_link_is_said_again() -> None:
    world = World().connect()
    owner = world.submit(Terms("f"))
    world.flush()
    world.lines[0].cut()  # what was on its way is gone
    world.finish()
    assert owner.end(Completed)


def test_a_result_that_was_lost_with_its_link_comes_again() -> None:
    world = World().connect()
    owner = world.submit(Terms("f"))
    world.move()
    world.lines[0].work()
    world.lines[0].cut()
    world.finish()
    assert owner.end(Completed)
    assert world.runs[1] == 1


def test_the_jobs_of_a_lost_server_move() -> None:
    world = World(3).connect()
    terms = Terms("f")
    owners = [world.submit(terms) for _ in range(1000)]
    world.move()
    world.lines[1].cut()
    world.pass_time(client_state.GRACE)
    world.move()
    assert not any(t.server is world.state.servers[1] for t in world.state.tickets.values())
    for line in (world.lines[0], world.lines[2]):
        while line.work():
            pass
    world.move()
    assert all(owner.end(Completed) for owner in owners)


def test_what_moved_is_marked_as_a_resubmit() -> None:
    world = World(2).connect()
    world.submit(Terms("f"))
    world.move()
    (at,) = {ticket.server for ticket in world.state.tickets.values()}
    assert at is not None
    world.lines[at.index].cut()
    world.pass_time(client_state.GRACE)
    submits = [m for _, m in world.said if isinstance(m, wire.SubmitJobs)]
    assert [m.resubmit for m in submits] == [False, True]


def test_a_server_that_comes_back_is_told_what_has_moved() -> None:
    world = World(2).connect()
    owner = world.submit(Terms("f"))
    world.move()
    (at,) = {ticket.server for ticket in world.state.tickets.values()}
    assert at is not None
    line = world.lines[at.index]
    line.cut()
    world.pass_time(client_state.GRACE)
    world.move()
    line.connect()
    world.move()
    assert not line.jobs
    world.finish()
    assert owner.end(Completed)


def test_jobs_stay_with_a_lost_server_while_there_is_no_other() -> None:
    world = World().connect()
    world.submit(Terms("f"))
    world.move()
    world.lines[0].cut()
    world.pass_time(5)
    world.connect()
    world.finish()
    assert sum(isinstance(m, wire.SubmitJobs) for _, m in world.said) == 1


def test_a_restarted_server_is_submitted_everything_anew() -> None:
    world = World().connect()
    owner = world.submit(Terms("f"))
    world.move()
    world.lines[0].kill()
    world.finish()
    assert owner.end(Completed)


def test_what_may_merge_meets_again_whether_its_server_came_back_or_not() -> None:
    def moved(*, comes_back: bool) -> dict[int, int]:
        """Return ticket number -> the server to which it moved."""
        world = World(3).connect()
        for n in range(30):
            world.submit(Terms("f", by_uniq=True), uniq=b"u%d" % n)
        world.move()
        tickets = world.state.tickets.values()
        moving = [ticket for ticket in tickets if ticket.server is world.state.servers[0]]
        world.lines[0].kill()
        if comes_back:
            world.lines[0].connect()
            world.move()
        world.pass_time(client_state.GRACE)
        return {ticket.number: ticket.server.index for ticket in moving if ticket.server}

    assert moved(comes_back=True) == moved(comes_back=False) != {}


def test_a_silent_server_is_lost() -> None:
    world = World(2).connect()
    world.submit(Terms("f"))
    world.move()
    (at,) = {ticket.server for ticket in world.state.tickets.values()}
    assert at is not None
    world.lines[at.index].muted = True
    world.pass_time(client_state.SILENCE + 1.5)
    (now_at,) = {ticket.server for ticket in world.state.tickets.values()}
    assert now_at is not at


def test_an_at_most_once_job_fails_with_its_server() -> None:
    world = World(2).connect()
    owner = world.submit(Terms("f", once=True))
    world.move()
    for line in world.lines:
        line.kill()
    world.finish()
    assert owner.end(Failed).message.code == "lost"
    assert not world.runs


def test_an_at_most_once_job_that_was_never_sent_moves() -> None:
    world = World(2)
    owner = world.submit(Terms("f", once=True))
    world.lines[0].connect()
    world.pass_time(client_state.SETTLE)
    world.finish()
    assert owner.end(Completed)


def test_a_background_job_is_done_with_when_it_is_accepted() -> None:
    world = World().connect()
    owner = world.submit(Terms("f", background=True))
    world.move()
    assert owner.end(InBackground).ticket.handle_text == "sammy:b1:1"
    assert not world.state.tickets
    world.pass_time(client_state.TAKE_PAUSE)
    world.move()
    assert not world.lines[0].session.accepted


def test_results_are_acknowledged_together_and_soon() -> None:
    world = World().connect()
    untaken = world.lines[0].session.untaken
    n_most = 0
    for _ in range(client_state.MIN_TAKEN + 1):
        world.submit(Terms("f"))
        world.move()
        world.lines[0].work()
        world.lines[0].pull()
        world.flush()
        n_most = max(n_most, len(untaken))
    assert n_most == client_state.MIN_TAKEN, "there are not enough of them for less"
    assert len(untaken) == 1, "the others went with a submit"
    world.pass_time(client_state.TAKE_PAUSE)
    world.move()
    assert not world.lines[0].session.untaken


def test_an_attached_ticket_gets_the_result() -> None:
    world = World(2).connect()
    owner = world.submit(Terms("f", background=True), b"a")
    world.move()
    listener = world.attach(owner.end(InBackground).ticket.handle_text)
    world.move()
    world.finish()
    assert listener.end(Completed).result == b"<a>"


def test_an_attached_ticket_survives_its_link() -> None:
    world = World().connect()
    owner = world.submit(Terms("f", background=True))
    world.move()
    listener = world.attach(owner.end(InBackground).ticket.handle_text)
    world.flush()
    world.lines[0].cut()
    world.finish()
    assert listener.end(Completed)


def test_attaching_to_a_restarted_server_ends_as_unknown() -> None:
    world = World().connect()
    listener = world.attach("sammy:b1:1")
    world.flush()
    world.lines[0].kill()
    world.connect()
    assert listener.end(Failed).message.code == "unknown"


def test_attaching_to_a_stranger_ends_as_unknown() -> None:
    world = World().connect()
    listener = world.attach("nobody:b1:1")
    world.move()
    world.hear(world.state.on_tick(world.now))
    assert listener.end(Failed).message.code == "unknown"


def test_a_cancelled_ticket_ends_without_an_event() -> None:
    world = World().connect()
    owner = world.submit(Terms("f"))
    world.move()
    world.state.cancel([1])
    world.move()
    assert not owner.ends
    assert not world.lines[0].jobs


def test_a_cancel_that_was_lost_with_its_link_is_said_again() -> None:
    world = World().connect()
    world.submit(Terms("f"))
    world.move()
    world.state.cancel([1])
    world.flush()
    world.lines[0].cut()
    world.connect()
    assert not world.lines[0].jobs


def test_a_job_that_somebody_cancelled_by_its_handle_ends() -> None:
    world = World().connect()
    owner = world.submit(Terms("f"))
    world.move()
    stranger = Peer(world.lines[0].net, wire.Hello(1, 0, "client", b"s" * 16))
    stranger.say(wire.CancelHandle(1, 1))
    world.move()
    assert owner.end(Failed).message.code == "cancelled"


def test_a_job_that_returns_to_a_server_where_it_was_cancelled_runs() -> None:
    world = World(2).connect()
    owner = world.submit(Terms("f"))
    world.move()
    (at,) = {ticket.server for ticket in world.state.tickets.values()}
    assert at is not None
    first, second = world.lines[at.index], world.lines[1 - at.index]
    first.cut()
    world.pass_time(client_state.GRACE)  # it moves,
    world.move()
    first.connect()
    world.flush()
    first.push()
    first.pull()
    world.flush()  # the first is told to cancel it,
    second.cut()
    world.pass_time(client_state.GRACE)  # and it moves back before the answer
    world.finish()
    assert owner.end(Completed)


def test_a_draining_server_hands_over_what_has_not_started() -> None:
    world = World(2).connect()
    terms = Terms("f")
    owners = [world.submit(terms) for _ in range(300)]
    world.move()
    line = world.lines[0]
    line.net.spread(line.net.state.drain(world.now))
    world.move()
    assert not line.jobs
    world.finish()
    assert all(owner.end(Completed) for owner in owners)


def test_a_server_that_left_and_came_back_gets_jobs_again() -> None:
    world = World().connect()
    line = world.lines[0]
    line.net.spread(line.net.state.drain(world.now))
    world.move()
    line.kill()
    world.connect()
    owner = world.submit(Terms("f"))
    world.finish()
    assert owner.end(Completed)


def test_a_result_that_is_said_again_says_nothing_of_workers() -> None:
    world = World().connect()
    terms = Terms("f")
    world.submit(terms)
    world.submit(terms)
    world.move()
    again = wire.JobComplete([wire.Completed(1, 1, 1)], 0.1, "papag", 0)
    world.hear(world.state.on_message(0, again, (b"r",), world.now))
    assert terms.n_workers == 1


def test_what_waits_for_the_credit_of_a_lost_server_moves() -> None:
    world = World(2, limits=Limits(session_jobs=1)).connect()
    owners = [world.submit(Terms("f")) for _ in range(5)]
    world.move()
    lost = world.state.tickets[3].server
    assert lost is not None
    world.lines[lost.index].cut()
    world.pass_time(client_state.GRACE)
    line = world.lines[1 - lost.index]
    for _ in range(20):
        line.work()
        world.move()
        world.pass_time(0.05)
    assert all(owner.end(Completed) for owner in owners)


def test_equal_uniqs_meet_on_one_server() -> None:
    world = World(3).connect()
    terms = Terms("f", merge=True, by_uniq=True)
    for n in range(30):
        for _ in range(3):
            world.submit(terms, b"x", b"u%d" % n)
    world.move()
    sizes = [len(line.jobs) for line in world.lines]
    assert sum(sizes) == 30
    assert all(sizes), "and different ones are spread"
    world.finish()
    assert all(owner.end(Completed) for owner in world.owners.values())


def test_a_map_moves_as_a_whole() -> None:
    world = World(3).connect()
    world.state.open_lane(wire.OpenLane(1, "squares", 100))
    terms = Terms("f", lane=1)
    for n in range(200):
        world.submit(terms)
        if n % 50 == 0:
            world.move()
    world.move()
    (at,) = {ticket.server for ticket in world.state.tickets.values()}
    assert at is not None
    world.lines[at.index].kill()
    world.pass_time(client_state.GRACE)
    world.move()
    (now_at,) = {ticket.server for ticket in world.state.tickets.values()}
    assert now_at is not at


def test_maps_stay_where_they_are_when_a_server_comes() -> None:
    world = World(3)
    for line in world.lines[:2]:
        line.connect()
    world.move()
    world.pass_time(client_state.SETTLE)
    lanes = [Terms("f", lane=n) for n in range(1, 21)]
    for terms in lanes:
        world.state.open_lane(wire.OpenLane(terms.lane))
        world.submit(terms)
    world.move()
    world.lines[2].connect()
    world.move()
    for terms in lanes:
        world.submit(terms)
    world.move()
    assert not world.lines[2].jobs


def test_a_lane_is_made_known_where_its_jobs_are() -> None:
    world = World().connect()
    world.state.open_lane(wire.OpenLane(7, "squares", 100))
    world.submit(Terms("f", lane=7))
    world.move()
    session = world.lines[0].session
    assert session.lanes[7].description == "squares"
    world.lines[0].kill()
    world.connect()
    session = world.lines[0].session
    assert session.lanes[7].description == "squares"
    world.finish()
    world.state.close_lane(7)
    world.move()
    assert not session.lanes


def test_a_choice_waits_until_all_servers_have_spoken() -> None:
    world = World(2)
    terms = Terms("f", merge=True, by_uniq=True)
    for n in range(50):
        world.submit(terms, b"x", b"u%d" % n)
    world.lines[0].connect()
    world.move()
    assert not world.lines[0].jobs
    world.lines[1].connect()
    world.move()
    assert all(line.jobs for line in world.lines)


def test_a_server_that_says_nothing_at_first_is_not_waited_for_long() -> None:
    world = World(2)
    owner = world.submit(Terms("f"))
    world.lines[0].connect()
    world.move()
    world.pass_time(client_state.SETTLE)
    world.move()
    world.lines[0].work()
    world.move()
    assert owner.end(Completed)


def test_no_server_ends_a_ticket_within_the_bound() -> None:
    world = World(2)
    owner = world.submit(Terms("f"))
    world.pass_time(client_state.CONNECT_TIMEOUT - 0.1)
    assert not owner.ends
    world.pass_time(0.1)
    refused = owner.end(Refused)
    assert refused.trouble == "no_server"
    assert "sammy" in refused.text
    assert "kenny" in refused.text


def test_servers_that_were_there_are_waited_for_longer() -> None:
    world = World().connect()
    owner = world.submit(Terms("f", patience=20))
    world.move()
    world.lines[0].cut()
    world.pass_time(19)
    assert not owner.ends
    world.pass_time(1.1)
    assert owner.end(Refused).trouble == "no_server"


def test_a_refused_key_ends_tickets_at_once() -> None:
    world = World()
    owner = world.submit(Terms("f"))
    world.hear(world.state.on_refused(0, "the key is not known there", world.now))
    world.hear(world.state.on_tick(world.now))
    assert owner.end(Refused).trouble == "auth"


def absent_for(world: World, seconds: float) -> list[Event]:
    """Let time pass, and return what the client then has to say."""
    until = world.now + seconds
    while world.now < until:
        world.pass_time(0.1)
        world.move()
    return world.notes


def test_nobody_who_can_do_it_is_told_after_a_while() -> None:
    world = World(2).connect()
    world.submit(Terms("f", python="2.7"))
    (note,) = absent_for(world, QUIET + client_state.ABSENCE + 0.5)
    assert isinstance(note, NoWorkers)
    assert note.n_others == 2
    assert note.pythons == ("3.11",)


def test_that_nobody_can_do_it_is_asked_again_before_it_is_told() -> None:
    world = World().connect()
    world.lines[0].start(n_workers=0)
    world.lines[0].cut()
    world.connect()
    world.submit(Terms("f"))
    world.move()
    n_asked = 0
    while not n_asked:
        assert not absent_for(world, 0.1)
        n_asked = sum(isinstance(message, wire.CountWorkers) for _, message in world.said)
    world.lines[0].workers = [Worker(world.lines[0].net, "f", python="3.11")]
    assert not absent_for(world, client_state.MOST_QUIET)


def test_who_is_there_instead_is_known_as_soon_as_they_were_asked() -> None:
    world = World().connect()
    terms = Terms("f", python="2.7")
    world.submit(terms)
    assert not absent_for(world, QUIET + 0.2)
    assert terms.absence == NoWorkers(terms, 1, ("3.11",), ())


def without_its_worker(world: World, terms: Terms) -> Line:
    """Have jobs that a server's only worker is there for, and end that worker's process."""
    world.connect()
    world.submit(terms)
    world.move()
    (line,) = world.lines
    line.workers.pop().say(wire.Goodbye())
    world.move()
    return line


def test_the_only_worker_is_not_missed_while_the_next_one_starts() -> None:
    world = World()
    line = without_its_worker(world, Terms("f"))
    assert not absent_for(world, client_state.RESTART)
    line.workers = [Worker(line.net, "f", python="3.11")]
    assert not absent_for(world, client_state.MOST_QUIET)


def test_jobs_that_come_while_a_worker_starts_anew_do_not_miss_it_either() -> None:
    world = World()
    line = without_its_worker(world, Terms("f"))
    world.submit(Terms("f", attempts=1))  # its needs are those of the others
    assert not absent_for(world, client_state.RESTART)
    line.workers = [Worker(line.net, "f", python="3.11")]
    assert not absent_for(world, client_state.MOST_QUIET)


@pytest.mark.parametrize("how", ["complete", "raise"])
def test_a_worker_that_was_heard_of_by_what_it_did_is_not_missed_while_it_restarts(
    how: str,
) -> None:
    world = World()
    (line,) = world.lines
    line.start(n_workers=0)
    world.connect().submit(Terms("f"))
    world.move()
    line.workers = [Worker(line.net, "f", python="3.11", host="papag")]
    line.work(how)
    line.workers.pop().say(wire.Goodbye())
    world.submit(Terms("f"))
    world.move()
    assert not absent_for(world, client_state.RESTART)


def test_a_worker_that_is_lost_again_and_again_is_not_missed() -> None:
    world = World()
    line = without_its_worker(world, Terms("f"))
    for _ in range(5):
        assert not absent_for(world, 0.8 * client_state.RESTART)
        line.workers = [Worker(line.net, "f", python="3.11")]
        assert not absent_for(world, client_state.ASK_AGAIN + 0.2)
        line.workers.pop().say(wire.Goodbye())


def test_a_worker_that_stays_away_is_missed_in_the_end() -> None:
    world = World()
    terms = Terms("f")
    without_its_worker(world, terms)
    notes = absent_for(world, QUIET + client_state.RESTART + 1)
    assert notes == [NoWorkers(terms, 0, (), ())]
    assert terms.n_workers == 0


def test_a_word_of_a_job_ends_the_absence_of_its_workers() -> None:
    world = World().connect()
    terms = Terms("f", python="2.7")
    world.submit(terms)
    absent_for(world, QUIET + 0.2)
    status = wire.JobStatus(1, 1, 2)
    world.hear(world.state.on_message(0, status, (), world.now))
    assert terms.absence is None


def test_jobs_leave_a_server_without_workers_for_one_that_has_some() -> None:
    world = World(2)
    world.lines[0].start(n_workers=0)
    world.connect()
    terms = Terms("f")
    owners = [world.submit(terms) for _ in range(200)]
    for _ in range(60):
        world.lines[1].work()
        world.move()
        world.pass_time(0.1)
    while world.lines[1].work():
        world.move()
    assert all(owner.end(Completed) for owner in owners)
    assert not world.lines[0].jobs


def test_a_question_is_answered_once_also_when_the_link_breaks() -> None:
    world = World().connect()
    owner = Owner()
    world.hear(world.state.ask("sammy:b1", wire.GetStatus(0, 77), owner))
    world.flush()
    world.lines[0].cut()
    world.connect()
    (answer,) = owner.events
    assert isinstance(answer.message, wire.StatusIs)  # type: ignore[union-attr]
    assert not answer.message.known  # type: ignore[union-attr]


def test_a_question_to_a_lost_server_is_answered_with_nothing() -> None:
    world = World().connect()
    owner = Owner()
    world.hear(world.state.ask("sammy:b1", wire.GetStatus(0, 77), owner))
    world.lines[0].cut()
    world.pass_time(client_state.GRACE)
    (answer,) = owner.events
    assert answer.message is None  # type: ignore[union-attr]


def test_a_replaced_connection_is_greeted_again() -> None:
    world = World().connect()
    owner = world.submit(Terms("f"))
    world.move()
    line = world.lines[0]
    line.peer.cut()  # type: ignore[union-attr]
    line.peer = LinePeer(line.net)  # libzmq connected anew before anyone noticed
    world.submit(Terms("f"))
    world.move()
    world.finish()
    assert owner.end(Completed)
    assert all(len(owner.ends) == 1 for owner in world.owners.values())


def test_a_key_chooses_anew_only_when_its_server_is_gone() -> None:
    keys = [b"%d" % n for n in range(300)]
    of_three = {key: NAMES[rank(key, NAMES)] for key in keys}
    of_two = {key: NAMES[rank(key, NAMES[:2])] for key in keys}
    assert set(of_three.values()) == set(NAMES)
    assert all(of_two[key] == name for key, name in of_three.items() if name != "papag")


class Client(RuleBasedStateMachine):
    """Any lawful life: each foreground ticket ends exactly once."""

    @initialize(
        n=st.integers(1, 3),
        session_jobs=st.sampled_from([2, 5, 1000]),
        max_jobs=st.sampled_from([3, 1000]),
        blob_nbytes=st.sampled_from([8, 1000]),
    )
    def begin(self, n: int, session_jobs: int, max_jobs: int, blob_nbytes: int) -> None:
        limits = Limits(
            session_jobs=session_jobs, max_jobs=max_jobs, blob_nbytes=blob_nbytes, session_ttl=2.0
        )
        self.world = World(n, limits=limits)
        self.cancelled: set[int] = set()
        self.declined: set[int] = set()
        world = self.world
        world.state.open_lane(wire.OpenLane(1))
        self.terms = [
            Terms("f"),
            Terms("g", lane=1, attempts=1),
            Terms("f", merge=True, by_uniq=True),
            Terms("f", blobs=(blob(b"closure"),)),
            Terms("g", blobs=(blob(b"another"),)),
            Terms("f", once=True),
            Terms("g", background=True),
        ]

    def line(self, n: int) -> Line:
        return self.world.lines[n % len(self.world.lines)]

    servers = st.integers(0, 2)

    @rule(which=st.integers(0, 6), n=st.integers(1, 4), uniq=st.sampled_from([b"u", b"v"]))
    def submit(self, which: int, n: int, uniq: bytes) -> None:
        for _ in range(n):
            self.world.submit(self.terms[which], b"x", uniq)

    @rule(n=st.integers(0, 30))
    def cancel(self, n: int) -> None:
        if n in self.world.state.tickets:
            self.cancelled.add(n)
            self.world.state.cancel([n])

    @rule()
    def flush(self) -> None:
        self.world.flush()

    @rule(n=servers, k=st.integers(1, 3))
    def push(self, n: int, k: int) -> None:
        self.line(n).push(k)

    @rule(n=servers, k=st.integers(1, 3))
    def pull(self, n: int, k: int) -> None:
        self.line(n).pull(k)

    @rule(n=servers)
    def decline(self, n: int) -> None:
        if self.line(n).decline(wire.SubmitJobs, wire.PutBlob):
            for number, owner in self.world.owners.items():
                if any(isinstance(end, Refused) for end in owner.ends):
                    self.declined.add(number)

    @rule()
    def move(self) -> None:
        self.world.move()

    @rule(n=servers)
    def connect(self, n: int) -> None:
        if self.line(n).peer is None:
            self.line(n).connect()

    @rule(n=servers, noticed=st.booleans())
    def cut(self, n: int, noticed: bool) -> None:
        self.line(n).cut(noticed=noticed)

    @rule(n=servers)
    def kill(self, n: int) -> None:
        self.line(n).kill()

    @rule(n=servers, how=st.sampled_from(["complete", "complete", "raise", "give back"]))
    def work(self, n: int, how: str) -> None:
        self.line(n).work(how)

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.5, 3.0]))
    def pass_time(self, seconds: float) -> None:
        # Tickets may give up on servers that never were there; that is another test's fact.
        if any(server.status == "up" for server in self.world.state.servers):
            self.world.pass_time(seconds)

    @precondition(lambda self: any(line.peer and line.peer.told for line in self.world.lines))
    @rule(n=servers, k=st.integers(0, 20))
    def say_again(self, n: int, k: int) -> None:
        line = self.line(n)
        if line.peer is None or not line.peer.told:
            return
        message, bodies = line.peer.told[k % len(line.peer.told)]
        if isinstance(message, wire.JobComplete | wire.JobException):
            world = self.world
            world.hear(world.state.on_message(line.index, message, bodies, world.now))

    @invariant()
    def nobody_hears_two_ends(self) -> None:
        for number, owner in self.world.owners.items():
            assert len(owner.ends) <= 1
            assert number not in self.cancelled or not owner.ends

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.finish()
        for number, owner in world.owners.items():
            if number in self.cancelled:
                assert not owner.ends
            else:
                assert len(owner.ends) == 1
                assert not isinstance(owner.ends[0], Refused) or number in self.declined
        for server in world.state.servers:
            assert not server.n_out
            assert not server.nbytes_out
            assert not any(server.queues.values())


TestClient = Client.TestCase
TestClient.settings = settings(max_examples=100, stateful_step_count=40)
