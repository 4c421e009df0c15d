"""Jobs that wait for jobs, over the states of servers, workers and clients, without processes.

A program is some functions, each of which calls later ones and adds their values up, so it ends
when it is run in order by one process. Here it is run by 1 to 3 workers of 1 to 3 servers instead,
where calls are jobs: a map's or single ones, merged or not. Messages arrive in any order that links
allow, and workers go on whenever they like. Whatever happens then, the values are those of the
sequential run.

A search is a program that ends for another reason: its functions may call each other in a circle,
but what was called before calls nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import pytest
from fake_net import Client as FakeClient
from fake_net import Net
from fake_net import Worker as FakeWorker
from hypothesis import given, settings
from hypothesis import strategies as st

from dmap.client_state import ClientState
from dmap.tickets import Completed, Event, Terms, Ticket
from dmap.worker_state import OVERDUE, Held, WorkerState
from dmap.worker_state import Send as WorkerSend
from jobserver import protocol as wire
from jobserver.jobs import Send as ServerSend
from jobserver.protocol import Body, LaneId, Message, Origin
from jobserver.state import State

# --- programs -------------------------------------------------------------------------------------


class Calls(NamedTuple):
    """What a function does at one place: it calls others, all together."""

    callees: tuple[int, ...]
    is_map: bool = True  # else single jobs
    merge: bool = False
    at_once: bool = True  # else it waits for these when it has made all its calls


Program = Sequence[Sequence[Calls]]
"""The functions by their numbers. Each calls only those with greater ones, so it ends."""

MOST = 60
"""Calls of a program in all, when nothing is merged."""
MOST_PAUSES = 3
"""So long may all stand still, and nobody is taken for lost."""
PATIENCE = 40
"""Turns of everybody in which no job began or ended: from then on none will."""


def value(program: Program, function: int) -> int:
    """Return what a function's value is in the end."""
    calls = program[function]
    return function + 1 + sum(value(program, n) for some in calls for n in some.callees)


def reachable(program: Program) -> set[int]:
    """Return the functions that the first one calls, also by way of others, and itself."""
    found: set[int] = set()
    todo = [0]
    while todo:
        function = todo.pop()
        if function not in found:
            found.add(function)
            todo += [n for some in program[function] for n in some.callees]
    return found


def depth(program: Program, function: int) -> int:
    """Return how deep the calls of a function go, itself included."""
    callees = {n for some in program[function] for n in some.callees}
    return 1 + max((depth(program, n) for n in callees), default=0)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    n_functions = draw(st.integers(1, 6))
    found: list[list[Calls]] = [[] for _ in range(n_functions)]
    size = [1] * n_functions
    for function in range(n_functions - 2, -1, -1):
        callees = st.lists(st.integers(function + 1, n_functions - 1), min_size=1, max_size=4)
        calls = st.builds(Calls, callees.map(tuple), st.booleans(), st.booleans(), st.booleans())
        for some in draw(st.lists(calls, min_size=1, max_size=3)):
            n_more = sum(size[n] for n in some.callees)
            if size[function] + n_more <= MOST:
                found[function].append(some)
                size[function] += n_more
    return found


@st.composite
def searches(draw: st.DrawFn) -> Program:
    """Return a program that may go in circles, all of whose calls are merged."""
    n_functions = draw(st.integers(1, 6))
    callees = st.lists(st.integers(0, n_functions - 1), min_size=1, max_size=4)
    calls = st.builds(Calls, callees.map(tuple), st.booleans(), st.just(True), st.booleans())
    some = st.lists(calls, max_size=3)
    return draw(st.lists(some, min_size=n_functions, max_size=n_functions))


# --- the world in which they run ------------------------------------------------------------------


class Stuck(AssertionError):
    """Nothing goes on any more."""


class Link:
    """What is on its way between a peer and a server, in order."""

    def __init__(self) -> None:
        self.to_server: deque[tuple[Message, tuple[Body, ...]]] = deque()
        self.to_peer: deque[tuple[Message, tuple[Body, ...]]] = deque()


class World:
    """Servers, workers and clients, a clock, and who has to do with whom.

    Args:
        merge: whether the clients' own calls, of the first function, may merge.
        shared_lane: whether single jobs stand in one lane of their session, whoever submits them.
        is_search: whether a function calls others the first time only.
    """

    def __init__(
        self,
        program: Program,
        *,
        n_servers: int = 1,
        n_workers: int = 1,
        n_clients: int = 1,
        n_roots: int = 1,
        merge: bool = False,
        shared_lane: bool = False,
        is_search: bool = False,
    ) -> None:
        self.program = program
        self.shared_lane = shared_lane
        self.is_search = is_search
        self.called: set[int] = set()
        self.now = 1000.0
        self.servers = [State(name, "b") for name in ("sammy", "kenny", "papag")[:n_servers]]
        self.links: dict[tuple[int, bytes], Link] = {}  # (server, peer) -> link
        self.live: Counter[bytes] = Counter()  # uniq -> merged runs of it under way
        self.n_pauses = 0
        self.n_steps = 0  # jobs begun and jobs ended
        self.n_runs = 0  # of merged jobs
        self.n_requests = 0  # for merged jobs
        self.clients = [Client(self) for _ in range(n_clients)]
        self.workers = [Worker(self, number) for number in range(n_workers)]
        self.everyone: dict[bytes, Client | Worker] = {
            peer.id: peer for one in self.workers for peer in (one, one.client)
        }
        self.everyone.update((client.id, client) for client in self.clients)
        for peer in self.everyone.values():
            peer.connect()
        # Who has not heard of all servers yet may choose another one for what could merge.
        while any(link.to_server or link.to_peer for link in self.links.values()):
            for what in [one for one in self._possible() if one[0].startswith("to ")]:
                self._do(*what)
        self.roots = [
            (client, client.submit(0, lane=0, merge=merge, ancestors=()))
            for client in self.clients
            for _ in range(n_roots)
        ]

    def link(self, server: int, peer: bytes) -> Link:
        return self.links.setdefault((server, peer), Link())

    def send(self, server: int, peer: bytes, message: Message, bodies: tuple[Body, ...]) -> None:
        """Have a peer say something to a server."""
        decoded = wire.decode_to_server(wire.encode(message))
        self.link(server, peer).to_server.append((decoded, bodies))

    # --- what can happen next ---------------------------------------------------------------------

    def run(self, schedule: Sequence[int]) -> None:
        """Let things happen in this order, and then in turns, until every client has its value."""
        for choice in schedule:
            possible = [*self._possible(), *[("pause", 0, b"")] * (self.n_pauses < MOST_PAUSES)]
            self._do(*possible[choice % len(possible)])
        progress, n_turns = -1, 0
        while not all(number in client.values for client, number in self.roots):
            n_turns = n_turns + 1 if progress == self.n_steps else 0
            progress = self.n_steps
            if n_turns > PATIENCE:
                raise Stuck("; ".join(f"{worker}" for worker in self.workers))
            for what in list(self._possible()):
                self._do(*what)
        self._check_end()

    def _possible(self) -> Iterator[tuple[str, int, bytes]]:
        for (server, peer), link in self.links.items():
            if link.to_server:
                yield "to server", server, peer
            if link.to_peer:
                yield "to peer", server, peer
        for number in range(len(self.workers)):
            yield "go on", number, b""
        yield "time", 0, b""

    def _do(self, what: str, which: int, peer: bytes) -> None:
        if what == "to server":
            message, bodies = self.links[which, peer].to_server.popleft()
            server = self.servers[which]
            self._spread(which, server.on_message(peer, message, bodies, self.now))
            server.check()
        elif what == "to peer":
            self.everyone[peer].read(which, *self.links[which, peer].to_peer.popleft())
        elif what == "go on":
            next(self.workers[which].going_on)
            self.workers[which].state.check()
        else:
            self.n_pauses += what == "pause"
            self.now += OVERDUE if what == "pause" else 0.06
            for number, server in enumerate(self.servers):
                self._spread(number, server.on_tick(self.now))
                server.check()
            for one in self.everyone.values():
                one.tick()

    def _spread(self, server: int, sends: Sequence[ServerSend]) -> None:
        for send in sends:
            peer, message, bodies = send.peer, send.message, send.bodies
            decoded = wire.decode_to_peer(wire.encode(message))
            self.link(server, peer).to_peer.append((decoded, bodies))

    def _check_end(self) -> None:
        assert all(not server.counters["malformed"] for server in self.servers)
        if self.is_search:
            assert self.called == reachable(self.program)
            return
        for client, number in self.roots:
            assert client.values[number] == value(self.program, 0)
        n_joined = sum(server.counters["merged"] for server in self.servers)
        assert self.n_runs + n_joined == self.n_requests, "each merged call runs, or joins a run"


class Client:
    """A client's state: that of a program, or the one inside a worker process."""

    numbers = itertools.count(1)

    def __init__(self, world: World) -> None:
        self.world = world
        session = next(self.numbers).to_bytes(16, "big")
        self.id = b"c" + session[-4:]
        hello = wire.Hello(wire.MAJOR, wire.MINOR, "client", session)
        addresses = [server.name for server in world.servers]
        self.state = ClientState(session, addresses, world.now, hello)
        self.values: dict[int, int] = {}  # ticket's number -> value
        self._tickets = itertools.count(1)
        self._lanes = itertools.count(1)

    def connect(self) -> None:
        for server in range(len(self.world.servers)):
            self._hear(self.state.on_connected(server, self.world.now))

    def next_lane(self) -> int:
        return next(self._lanes)

    def submit(
        self, function: int, *, lane: int, merge: bool, ancestors: tuple[Origin, ...]
    ) -> int:
        number = next(self._tickets)
        self.world.n_requests += merge
        name = "odd" if function % 2 else "even"
        terms = Terms(name, lane=lane, merge=merge, ancestors=ancestors, by_uniq=merge)
        argument = bytes([function])
        ticket = Ticket(number, terms, argument, self, argument if merge else b"")
        self.state.submit(ticket, self.world.now)
        self._hear([])
        return number

    def hear(self, event: Event) -> None:
        assert isinstance(event, Completed), event
        assert event.ticket.number not in self.values, "a ticket ends once"
        assert isinstance(event.result, bytes)
        self.values[event.ticket.number] = int(event.result)

    def read(self, server: int, message: Message, bodies: tuple[Body, ...]) -> None:
        self._hear(self.state.on_message(server, message, bodies, self.world.now))  # type: ignore[arg-type]

    def tick(self) -> None:
        self._hear(self.state.on_tick(self.world.now))

    def _hear(self, events: Sequence[Event]) -> None:
        for event in events:
            event.owner.hear(event)  # type: ignore[union-attr]
        for send in self.state.flush(self.world.now):
            self.world.send(send.server, self.id, send.message, send.bodies)


class Worker:
    """A worker process. It goes on until it would read its sockets, as ``dmap.worker`` does."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.client = Client(world)
        self.id = b"w" + bytes([number])
        hello = wire.Hello(wire.MAJOR, wire.MINOR, "worker", b"host" + number.to_bytes(12, "big"))
        abilities = [wire.Ability("even"), wire.Ability("odd")]
        self.state = WorkerState(hello, len(world.servers), abilities)
        self.going_on = self._work()

    def __repr__(self) -> str:
        inside = [held.job.origin.ticket for held in self.state.running]
        return f"worker {self.id[1]} is at {inside} and holds {len(self.state.held)}"

    def connect(self) -> None:
        for server in range(len(self.world.servers)):
            self._say(self.state.on_connected(server))

    def read(self, server: int, message: Message, bodies: tuple[Body, ...]) -> None:
        self._say(self.state.on_message(server, message, bodies, self.world.now))
        self.state.check()

    def tick(self) -> None:
        self._say(self.state.on_tick(self.world.now))

    def _say(self, sends: Sequence[WorkerSend]) -> None:
        for server, message, bodies in sends:
            self.world.send(server, self.id, message, bodies)

    def _work(self) -> Iterator[None]:
        while True:
            if self.state.held:
                yield from self._run_next(())
                continue
            self._say(self.state.flush())
            self._say(self.state.seek(self.world.now))
            yield

    def _run_next(self, lanes: Sequence[LaneId]) -> Iterator[None]:
        world, state = self.world, self.state
        around = state.running[-1] if state.running else None
        held = state.start()
        job = held.job
        function = _function(held)
        if around is not None:
            assert job.lane in lanes, "inside a job it runs only what that waits for"
            called = {n for some in world.program[_function(around)] for n in some.callees}
            assert function in called, "inside a job it runs only what that has called"
        if not world.is_search:
            assert len(state.running) <= depth(world.program, 0), "deeper than the program itself"
        if job.uniq:
            world.n_runs += 1
            world.live[job.uniq] += 1
            assert world.live[job.uniq] == 1, "equal merged jobs share one run"
        world.n_steps += 1
        result = yield from self._call(held, function)
        world.n_steps += 1
        if job.uniq:
            world.live[job.uniq] -= 1
        assert state.running[-1] is held, "a job ends after those inside it"
        state.complete(b"%d" % result, 1, 0.0001)
        if not state.held:
            self._say(state.flush())

    def _call(self, held: Held, function: int) -> Generator[None, None, int]:
        """Run the user's code."""
        client, total = self.client, function + 1
        if self.world.is_search and function in self.world.called:
            return 0
        self.world.called.add(function)
        ancestors = (*held.job.ancestors, held.job.origin)
        own = 0 if self.world.shared_lane else client.next_lane()
        later: list[int] = []
        lanes: set[LaneId] = set()
        for some in self.world.program[function]:
            lane = client.next_lane() if some.is_map else own
            numbers = [
                client.submit(n, lane=lane, merge=some.merge, ancestors=ancestors)
                for n in some.callees
            ]
            lanes.add(LaneId(client.state.session, lane))
            if some.at_once:
                yield from self._wait([LaneId(client.state.session, lane)], numbers)
                total += sum(client.values[number] for number in numbers)
            else:
                later += numbers
        if later:
            yield from self._wait(sorted(lanes), later)
        return total + sum(client.values[number] for number in later)

    def _wait(self, lanes: Sequence[LaneId], numbers: Sequence[int]) -> Iterator[None]:
        """Wait inside a job, as ``dmap.worker.Worker.run_nested`` does."""
        world, state = self.world, self.state
        self._say(state.give_back())
        while not all(number in self.client.values for number in numbers):
            if state.held:
                yield from self._run_next(lanes)
                continue
            self._say(state.flush())
            self._say(state.seek(world.now, lanes))
            yield
        self._say(state.flush())
        if state.is_asking(world.now):
            yield
        self._say(state.give_back())


def _function(held: Held) -> int:
    assert isinstance(held.argument, bytes)
    return held.argument[0]


# --- properties -----------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    program=programs(),
    n_servers=st.integers(1, 3),
    n_workers=st.integers(1, 3),
    n_clients=st.integers(1, 2),
    n_roots=st.integers(1, 4),
    merge=st.booleans(),
    schedule=st.lists(st.integers(0, 30), max_size=300),
)
def test_a_program_that_ends_alone_ends_in_any_order_with_the_same_values(
    program: Program,
    n_servers: int,
    n_workers: int,
    n_clients: int,
    n_roots: int,
    merge: bool,
    schedule: list[int],
) -> None:
    world = World(
        program,
        n_servers=n_servers,
        n_workers=n_workers,
        n_clients=n_clients,
        n_roots=n_roots,
        merge=merge,
    )
    world.run(schedule)


@settings(max_examples=60)
@given(
    program=searches(),
    n_workers=st.integers(1, 3),
    n_roots=st.integers(1, 3),
    merge=st.booleans(),
    schedule=st.lists(st.integers(0, 30), max_size=200),
)
def test_a_search_ends_in_any_order_on_one_server(
    program: Program, n_workers: int, n_roots: int, merge: bool, schedule: list[int]
) -> None:
    world = World(program, n_workers=n_workers, n_roots=n_roots, merge=merge, is_search=True)
    world.run(schedule)


@settings(max_examples=40)
@given(
    program=searches(),
    n_roots=st.integers(1, 3),
    merge=st.booleans(),
    schedule=st.lists(st.integers(0, 20), max_size=200),
)
def test_a_search_ends_in_any_order_on_one_process(
    program: Program, n_roots: int, merge: bool, schedule: list[int]
) -> None:
    World(program, n_servers=3, n_roots=n_roots, merge=merge, is_search=True).run(schedule)


# --- the rules on which that rests ----------------------------------------------------------------

EACH_WAITS: Program = [[Calls((1,) * 12, is_map=False)], [Calls((2,), is_map=False)], []]


def test_single_jobs_stand_in_a_lane_of_the_job_that_submits_them() -> None:
    World(EACH_WAITS).run([])
    # Were there one lane for all, each of the twelve would run the next while it waits.
    with pytest.raises(AssertionError, match="what that has called"):
        World(EACH_WAITS, shared_lane=True).run([])


def test_a_merged_job_comes_in_the_lane_where_it_was_asked_for() -> None:
    net = Net()
    client, worker = FakeClient(net), FakeWorker(net, "f")
    handle = client.submitted(uniq=b"u", merge=True, lane=1)
    assert client.submitted(uniq=b"u", merge=True, lane=2) == handle
    job = worker.grab(lanes=[LaneId(client.session, 2)])
    assert (job.handle, job.lane) == (handle, LaneId(client.session, 2))
    worker.say(wire.GiveBack([handle]))
    assert worker.grab(lanes=[LaneId(client.session, 1)]).lane == LaneId(client.session, 1)
    net.quiet()


def test_a_merged_job_that_comes_back_stands_in_every_joiners_lane() -> None:
    net = Net()
    client, worker = FakeClient(net), FakeWorker(net, "f")
    handle = client.submitted(uniq=b"u", merge=True, lane=1)
    worker.grab()
    assert client.submitted(uniq=b"u", merge=True, lane=2) == handle
    worker.say(wire.GiveBack([handle]))
    assert worker.grab(lanes=[LaneId(client.session, 2)]).handle == handle
    net.quiet()


def test_a_job_that_another_one_has_joined_does_not_join_that_one() -> None:
    net = Net()
    client, workers = FakeClient(net), [FakeWorker(net, "f", number=n) for n in (1, 2)]
    first = client.submitted(uniq=b"a", merge=True)
    assert client.submitted(uniq=b"b", merge=True) != first
    a, b = (worker.grab() for worker in workers)
    inside_a = client.submitted(uniq=b"b", merge=True, ancestors=(a.origin,))
    assert inside_a == b.handle
    inside_b = client.submitted(uniq=b"a", merge=True, ancestors=(b.origin,))
    assert inside_b != a.handle  # a waits for b
    assert client.submitted(uniq=b"a", merge=True) == a.handle
    net.quiet()


def test_a_job_inside_another_is_not_merged_with_it_later_either() -> None:
    net = Net()
    client, worker = FakeClient(net), FakeWorker(net, "f")
    outer = client.submitted(uniq=b"u")
    origin = worker.grab().origin
    inner = client.submitted(uniq=b"u", ancestors=(origin,))
    worker.say(wire.GiveBack([outer]))
    worker.can_do("f", merge=True)
    assert {worker.grab().handle for _ in range(2)} == {outer, inner}
    net.quiet()


def nested(n_ancestors: int) -> WorkerState:
    """Return a worker that holds two jobs, each submitted inside so many others."""
    state = WorkerState(wire.Hello(wire.MAJOR, wire.MINOR, "worker", b"w" * 16), 1, [])
    state.on_connected(0)
    welcome = wire.Welcome(wire.MAJOR, wire.MINOR, "sammy", "b", True, 1.0, 1, 1)
    state.on_message(0, welcome, (), 0.0)
    jobs: list[wire.Assigned] = []
    for name in (b"a" * 16, b"b" * 16):
        ancestors = tuple([Origin(name, n) for n in range(1, n_ancestors + 1)])
        job = wire.Assigned(
            len(jobs) + 1, Origin(name, 0), "f", 0, 1, 1, "raw", b"", 0.0, 0.0, (), ancestors,
            LaneId(name, 0),
        )  # fmt: skip
        jobs.append(job)
    state.on_message(0, wire.JobAssign(jobs), (b"",), 0.0)
    return state


def test_what_runs_inside_a_job_is_inside_it_whoever_submitted_it() -> None:
    state = nested(1)
    outer, inner = state.start().job, state.start().job
    a, b = b"a" * 16, b"b" * 16
    assert outer.ancestors == (Origin(a, 1),)
    assert inner.ancestors == (Origin(a, 1), Origin(a, 0), Origin(b, 1))


def test_what_a_job_submits_never_names_more_jobs_around_it_than_a_server_reads() -> None:
    state = nested(200)
    for _ in range(2):
        job = state.start().job
        spec = wire.JobSpec(1, 0)
        submit = wire.SubmitJobs("f", [spec], ancestors=(*job.ancestors, job.origin))
        wire.decode_to_server(wire.encode(submit))
    assert job.ancestors[-1] == Origin(b"b" * 16, 200)
