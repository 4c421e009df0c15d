"""A network, servers and time in memory, for the simulation of a whole cluster.

Everything happens on one clock, event after event, and chance comes from one seed, so that a run
can be repeated. A ``Wire`` is one connection. It breaks as TCP does: of what is under way only a
first part arrives, and each end learns of it at a time of its own, perhaps long afterwards.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from jobserver import protocol as wire
from jobserver.coalesce import coalesce
from jobserver.jobs import Limits
from jobserver.protocol import Body, Message
from jobserver.state import Send, State

NAMES = ("sammy", "kenny", "papag")
DELAY = 0.0005
"""Seconds: a message takes so long on the average."""
TURN = 500
"""Messages that a server takes in before it answers."""


class Connected:
    """A new connection stands."""


class Disconnected:
    """The connection is gone."""


class Said(Protocol):
    @property
    def server(self) -> int: ...
    @property
    def message(self) -> Message: ...
    @property
    def bodies(self) -> tuple[Body, ...]: ...


class Simulation:
    """The clock, what will happen, chance, and three servers.

    Args:
        seed: of chance.
        check_every: so many turns of one state from one check() of it to the next; a worker is
            looked at 20 times as often.
    """

    def __init__(self, seed: int, *, check_every: int = 1, limits: Limits | None = None) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.check_every = check_every
        self.check_workers_every = max(1, check_every // 20)
        self.limits = limits or Limits()
        self.counts: Counter[str] = Counter()  # of what happened
        self.runs: Counter[str] = Counter()  # argument -> runs begun
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._n_events = 0
        self._n_wires = 0
        self.servers = [Server(self, name) for name in NAMES]

    def at(self, when: float, call: Callable[..., object], *arguments: Any) -> None:
        """Let something happen at a time."""
        self._n_events += 1
        heapq.heappush(self._events, (when, self._n_events, call, arguments))

    def after(self, seconds: float, call: Callable[..., object], *arguments: Any) -> None:
        self.at(self.now + seconds, call, *arguments)

    def soon(self, most: float, call: Callable[..., object], *arguments: Any) -> None:
        """Let something happen within so many seconds."""
        self.after(most * self.random.random(), call, *arguments)

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> None:
        """Let time pass, until something holds (looked at now and then)."""
        end = self.now + seconds
        n = 0
        while self._events and self._events[0][0] <= end:
            self.now, _, call, arguments = heapq.heappop(self._events)
            call(*arguments)
            n += 1
            if until is not None and n % 256 == 0 and until():
                return
        self.now = end

    def next_routing_id(self) -> bytes:
        self._n_wires += 1
        return self._n_wires.to_bytes(5, "big")


class Server:
    """One job server and its driver."""

    def __init__(self, sim: Simulation, name: str) -> None:
        self.sim = sim
        self.name = name
        self.n_boots = 0
        self.up = False
        self.wires: dict[bytes, Wire] = {}  # those that it believes to stand
        self.start()

    def start(self) -> None:
        """Begin a new life."""
        self.n_boots += 1
        self.up = True
        self.wires = {}
        self.state = State(self.name, f"b{self.n_boots}", limits=self.sim.limits)
        self._inbox: deque[tuple[bytes, bytes, tuple[Body, ...]]] = deque()
        self._is_awake = False
        self._wakes_at = float("inf")
        self._n_turns = 0

    def kill(self, restart_after: float, notices: float | None = 0.02) -> None:
        """End, with all that was known here. Peers notice as with ``Wire.cut``."""
        if not self.up:
            return
        self.sim.counts["server killed"] += 1
        self.up = False
        for link in list(self.wires.values()):
            link.cut(notices)
        self.wires = {}
        self.state = State(self.name, "none")
        self.sim.after(restart_after, self.start)

    def drain(self) -> None:
        """Leave in order, and come back."""
        if self.up and not self.state.draining:
            self.sim.counts["server drained"] += 1
            self._deliver(self.state.drain(self.sim.now))
            self._turn(self.n_boots)

    def receive(self, life: int, peer: bytes, header: bytes, bodies: tuple[Body, ...]) -> None:
        if self.up and life == self.n_boots:
            self._inbox.append((peer, header, bodies))
            if not self._is_awake:
                self._is_awake = True
                self.sim.soon(DELAY / 10, self._turn, life)

    def notice(self, link: Wire) -> None:
        """Learn that a link is gone, at the next try to say something."""
        if self.wires.pop(link.id, None) is not None:
            self.sim.soon(1.0, self._probe, self.n_boots, link.id)

    def _probe(self, life: int, peer: bytes) -> None:
        if self.up and life == self.n_boots:
            self._deliver([Send(peer, wire.Heartbeat())])
            self._plan()

    def _turn(self, life: int) -> None:
        if not self.up or life != self.n_boots:
            return
        self._is_awake = False
        state, now, inbox = self.state, self.sim.now, self._inbox
        sends: list[Send] = []
        for _ in range(min(TURN, len(inbox))):
            peer, header, bodies = inbox.popleft()
            sends += state.on_message(peer, wire.decode_to_server(header), bodies, now)
        if (due := state.next_deadline()) is not None and due <= now:
            sends += state.on_tick(now)
        self._deliver(sends)
        if inbox:
            self._is_awake = True
            self.sim.soon(DELAY / 10, self._turn, life)
        self._n_turns += 1
        if self._n_turns % self.sim.check_every == 0:
            state.check()
        if state.drained:
            self.kill(0.5)
        else:
            self._plan()

    def _plan(self) -> None:
        """Have a turn at the next deadline."""
        due = self.state.next_deadline()
        if due is not None and (due < self._wakes_at or self._wakes_at <= self.sim.now):
            self._wakes_at = max(due, self.sim.now)
            self.sim.at(self._wakes_at, self._wake_up, self.n_boots, self._wakes_at)

    def _wake_up(self, life: int, planned: float) -> None:
        if self.up and life == self.n_boots and planned == self._wakes_at:
            self._wakes_at = float("inf")
            self._turn(life)

    def _deliver(self, sends: list[Send]) -> None:
        while True:
            lost: list[tuple[bytes, Message]] = []
            for send in coalesce(sends):
                peer, message, bodies = send.peer, send.message, send.bodies
                link = self.wires.get(peer)
                if link is None:
                    lost.append((peer, message))
                else:
                    link.down(message, bodies)
            if not lost:
                return
            sends = []
            for peer, message in lost:
                self.sim.counts["undelivered"] += 1
                sends += self.state.on_undelivered(peer, message, self.sim.now)


class Peer:
    """What has a link to each server and reads them in turns."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.alive = True
        self.wires: list[Wire | None] = [None] * len(sim.servers)
        self.inbox: deque[tuple[int, Any, tuple[Body, ...]]] = deque()
        self._told: list[Wire | None] = [None] * len(sim.servers)  # what was noticed in a turn
        self._is_awake = False
        for index in range(len(sim.servers)):
            sim.soon(0.05, self.connect, index)

    def connect(self, index: int) -> None:
        if not self.alive or self.wires[index] is not None:
            return
        if not self.sim.servers[index].up:
            self.sim.after(0.1 + 0.9 * self.sim.random.random(), self.connect, index)
            return
        self.wires[index] = Wire(self, index)
        self.receive(index, self.wires[index], ())

    def lose(self, link: Wire) -> None:
        """Learn that a link is gone."""
        if self.alive and self.wires[link.index] is link:
            self.wires[link.index] = None
            self.receive(link.index, Disconnected, ())
            self.sim.after(0.1 + 0.1 * self.sim.random.random(), self.connect, link.index)

    def receive(self, index: int, what: Any, bodies: tuple[Body, ...]) -> None:
        self.inbox.append((index, what, bodies))
        self.wake()

    def wake(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            self.sim.soon(DELAY / 10, self._run)

    def _run(self) -> None:
        self._is_awake = False
        if self.alive:
            self.turn()

    def turn(self) -> None:
        raise NotImplementedError

    def take(self) -> list[tuple[int, Any, tuple[Body, ...]]]:
        """Take what has come, in order; connections are said as the class that they are."""
        taken = []
        while self.inbox:
            index, what, bodies = self.inbox.popleft()
            if isinstance(what, Wire):
                self._told[index] = what
                what = Connected
            elif what is Disconnected:
                self._told[index] = None
            taken.append((index, what, bodies))
        return taken

    def send(self, index: int, message: Message, bodies: tuple[Body, ...] = ()) -> None:
        """Say something, if there is a connection."""
        link = self._told[index]
        if link is not None and link is self.wires[index]:
            link.up(message, bodies)

    def send_all(self, sends: Iterable[Said]) -> None:
        for one in sends:
            self.send(one.server, one.message, one.bodies)

    def replace(self, index: int) -> None:
        """Break a link and make a new one before this end has heard of it."""
        old = self.wires[index]
        server = self.sim.servers[index]
        if old is None or not server.up or self._told[index] is not old:
            return
        self.sim.counts["replaced"] += 1
        self.wires[index] = None  # it will not hear of this
        old.cut()
        new = self.wires[index] = self._told[index] = Wire(self, index)
        self.sim.soon(0.2, self._hear_late, new)

    def _hear_late(self, link: Wire) -> None:
        if self.alive and self.wires[link.index] is link:
            self.receive(link.index, Disconnected, ())
            self.receive(link.index, link, ())

    def vanish(self, notices: float | None = None) -> None:
        """End without a word."""
        self.alive = False
        for link in self.wires:
            if link is not None:
                link.cut(notices)
        self.wires = [None] * len(self.wires)


class Wire:
    """One connection of a peer to a server."""

    __slots__ = (
        "_down_at",
        "_last_down",
        "_last_up",
        "_life",
        "_n_down",
        "_n_up",
        "_said_down",
        "_said_up",
        "_up_at",
        "id",
        "index",
        "is_cut",
        "peer",
        "sim",
    )

    def __init__(self, peer: Peer, index: int) -> None:
        self.sim = peer.sim
        self.peer = peer
        self.index = index
        self.id = self.sim.next_routing_id()
        self.is_cut = False
        self._life = self.server.n_boots
        self._said_up = self._said_down = 0  # messages said
        self._n_up = self._n_down = 0  # of these, how many have arrived
        self._last_up = self._last_down = 1 << 60  # the last one that arrives
        self._up_at = self._down_at = 0.0  # when the last one arrives: none overtakes another
        self.server.wires[self.id] = self

    @property
    def server(self) -> Server:
        return self.sim.servers[self.index]

    def up(self, message: Message, bodies: tuple[Body, ...]) -> None:
        """Carry a message to the server."""
        self._said_up += 1
        if not self.is_cut:
            self._up_at = max(self._up_at, self.sim.now + 2 * DELAY * self.sim.random.random())
            self.sim.at(self._up_at, self._arrive_up, self._said_up, wire.encode(message), bodies)

    def down(self, message: Message, bodies: tuple[Body, ...]) -> None:
        """Carry a message to the peer."""
        self._said_down += 1
        if not self.is_cut:
            delay = 2 * DELAY * self.sim.random.random()
            self._down_at = max(self._down_at, self.sim.now + delay)
            header = wire.encode(message)
            self.sim.at(self._down_at, self._arrive_down, self._said_down, header, bodies)

    def _arrive_up(self, n: int, header: bytes, bodies: tuple[Body, ...]) -> None:
        if n <= self._last_up:
            self._n_up = n
            self.server.receive(self._life, self.id, header, bodies)

    def _arrive_down(self, n: int, header: bytes, bodies: tuple[Body, ...]) -> None:
        if n <= self._last_down and self.peer.wires[self.index] is self:
            self._n_down = n
            self.peer.receive(self.index, wire.decode_to_peer(header), bodies)

    def cut(self, notices: float | None = None) -> None:
        """Break. Each end learns of it within that time: without one, soon in most cases."""
        if self.is_cut:
            return
        self.sim.counts["cut"] += 1
        self.is_cut = True
        chance = self.sim.random
        self._last_up = chance.randint(self._n_up, self._said_up)
        self._last_down = chance.randint(self._n_down, self._said_down)
        for hears in (self.peer.lose, self.server.notice):
            most = notices
            if most is None:
                most = 15.0 if chance.random() < 0.1 else 0.02
            self.sim.soon(most, hears, self)


def chosen(sim: Simulation, some: Sequence[Any]) -> Any:
    """Choose one by chance."""
    return some[sim.random.randrange(len(some))]
