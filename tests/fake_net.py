"""A network in memory between one server's state and its peers.

Every message is encoded and decoded on its way, as it would be over sockets. Peers keep what they
receive in ``inbox``; a test takes it with ``take``, and ``quiet`` fails on what nobody looked at.
"""

from __future__ import annotations

import itertools
from typing import TypeVar

from jobserver import protocol as wire
from jobserver.jobs import Limits, Send
from jobserver.protocol import Body, Message
from jobserver.state import State

M = TypeVar("M", bound=Message)

MACHINE = "the server's"


class Net:
    """One server, its peers, and a clock that the test turns."""

    def __init__(self, *, boot: str = "b1", limits: Limits | None = None) -> None:
        self.state = State("sammy", boot, limits=limits, machine=MACHINE)
        self.now = 1000.0
        self.peers: dict[bytes, Peer] = {}
        self._ids = itertools.count(1)
        self.undelivered: set[bytes] = set()  # links that are gone without the server's knowing

    def routing_id(self) -> bytes:
        return next(self._ids).to_bytes(5, "big")

    def deliver(self, peer: bytes, message: Message, *bodies: Body) -> None:
        """Hand a message to the server and its answers to the peers."""
        decoded = wire.decode_to_server(wire.encode(message))
        self.spread(self.state.on_message(peer, decoded, bodies, self.now))

    def spread(self, sends: list[Send]) -> None:
        for send in sends:
            peer = self.peers.get(send.peer)
            if peer is None:
                self.spread(self.state.on_undelivered(send.peer, send.message, self.now))
            else:
                peer.inbox.append((wire.decode_to_peer(wire.encode(send.message)), send.bodies))
        self.state.check()

    def tick(self, seconds: float = 0.0) -> None:
        """Let time pass."""
        until = self.now + seconds
        while (due := self.state.next_deadline()) is not None and due <= until:
            self.now = max(due, self.now)
            self.spread(self.state.on_tick(self.now))
        self.now = until
        self.spread(self.state.on_tick(self.now))

    def quiet(self) -> None:
        """Assert that everything that was sent has been looked at."""
        for peer in self.peers.values():
            left = [m for m, _ in peer.inbox if not isinstance(m, wire.Heartbeat)]
            assert not left, f"nobody looked at {left} sent to {peer}"


class Peer:
    """What a connection has received."""

    def __init__(self, net: Net, hello: wire.Hello) -> None:
        self.net = net
        self.id = net.routing_id()
        self.hello = hello
        self.inbox: list[tuple[Message, tuple[Body, ...]]] = []
        net.peers[self.id] = self
        self.say(hello)

    def say(self, message: Message, *bodies: Body) -> None:
        self.net.deliver(self.id, message, *bodies)

    def cut(self, *, noticed: bool = True) -> None:
        """Break the link. The server learns of it at once, or when it next sends."""
        del self.net.peers[self.id]
        if noticed:
            self.net.spread(self.net.state.on_gone(self.id, self.net.now))

    def reconnect(self, **changed: object) -> None:
        """Come back over a new link, as the same."""
        self.id = self.net.routing_id()
        self.net.peers[self.id] = self
        hello = wire.Hello(**{**{f: getattr(self.hello, f) for f in _FIELDS}, **changed})
        self.say(hello)

    def take(self, kind: type[M]) -> M:
        """Take the next message, which must be of this kind."""
        return self.take_with_bodies(kind)[0]

    def take_with_bodies(self, kind: type[M]) -> tuple[M, tuple[Body, ...]]:
        self.inbox = [entry for entry in self.inbox if not isinstance(entry[0], wire.Heartbeat)]
        assert self.inbox, f"nothing came, let alone a {kind.__name__}"
        message, bodies = self.inbox.pop(0)
        assert isinstance(message, kind), f"{message} is no {kind.__name__}"
        return message, bodies

    def nothing(self) -> None:
        """Assert that nothing came but heartbeats."""
        left = [m for m, _ in self.inbox if not isinstance(m, wire.Heartbeat)]
        assert not left, f"came {left}"


_FIELDS = wire.Hello.__struct_fields__


class Client(Peer):
    """A client's connection."""

    def __init__(self, net: Net, number: int = 1, **fields: object) -> None:
        session = b"client" + number.to_bytes(10, "big")
        super().__init__(net, wire.Hello(1, 0, "client", session, **fields))
        self.session = session
        self.take(wire.Welcome)
        self.tickets = itertools.count(1)

    def submit(
        self,
        function: str = "f",
        argument: bytes = b"x",
        *,
        uniq: bytes = b"",
        n_items: int = 1,
        ticket: int | None = None,
        **terms: object,
    ) -> int:
        """Submit one job; returns its ticket."""
        ticket = next(self.tickets) if ticket is None else ticket
        spec = wire.JobSpec(ticket, len(argument), uniq, n_items)
        self.say(wire.SubmitJobs(function, [spec], **terms), argument)
        return ticket

    def submitted(self, function: str = "f", argument: bytes = b"x", **terms: object) -> int:
        """Submit one job and see it accepted; returns its handle."""
        ticket = self.submit(function, argument, **terms)
        (accepted,) = self.take(wire.JobsAccepted).jobs
        assert (accepted.ticket, accepted.n) == (ticket, 1)
        return accepted.handle

    def result(self) -> tuple[int, Body]:
        """Take a result of one job and acknowledge it; returns ticket and result."""
        message, bodies = self.take_with_bodies(wire.JobComplete)
        (done,) = message.jobs
        self.taken(done.ticket)
        return done.ticket, bodies[0]

    def taken(self, ticket: int) -> None:
        self.say(wire.ResultsTaken([wire.Range(ticket, 1)]))


class Worker(Peer):
    """A worker's connection: a lone one, or a supervisor's child."""

    def __init__(
        self,
        net: Net,
        *abilities: str,
        number: int = 1,
        child: int = 0,
        merge: bool = False,
        **fields: object,
    ) -> None:
        session = b"host" + number.to_bytes(12, "big")
        super().__init__(net, wire.Hello(1, 0, "worker", session, child=child, **fields))
        self.take(wire.Welcome)
        self._seqs = itertools.count(1)
        if abilities:
            self.can_do(*abilities, merge=merge)

    def can_do(self, *functions: str, timeout: float = 0.0, merge: bool = False) -> None:
        self.say(wire.CanDo([wire.Ability(f, timeout, merge) for f in functions]))

    def grab(self, **fields: object) -> wire.Assigned:
        """Grab and expect one job."""
        self.say(wire.GrabJobs(**fields))
        (job,) = self.take(wire.JobAssign).jobs
        return job

    def grab_nothing(self) -> None:
        self.say(wire.GrabJobs())
        self.take(wire.NoJob)

    def sleep(self) -> None:
        self.grab_nothing()
        self.say(wire.PreSleep())

    def complete(
        self, handle: int, result: bytes = b"r", n_items: int = 0, **fields: object
    ) -> None:
        done = wire.WorkDone(handle, len(result), n_items)
        self.say(wire.WorkComplete(next(self._seqs), [done], **fields), result)
        self.take(wire.WorkAccepted)


class Supervisor(Peer):
    """A supervisor's connection."""

    def __init__(self, net: Net, number: int = 1, **fields: object) -> None:
        session = b"host" + number.to_bytes(12, "big")
        super().__init__(net, wire.Hello(1, 0, "supervisor", session, **fields))
        self.take(wire.Welcome)
