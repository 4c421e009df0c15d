"""One link to one job server, as a client, a worker or a supervisor has it.

A ``ServerLink`` is a DEALER of its own (one that is connected to several servers deals its
messages round), the monitor that tells when the connection comes and goes, the transfers of large
bodies, and an outbox for what the socket does not take yet. It never blocks::

    link = ServerLink(context, "tcp://sammy:4731")
    poller = zmq.Poller()
    while True:
        link.register(poller)               # again in each turn: it wants POLLOUT only at times
        poller.poll(timeout)
        for event in link.receive():
            match event:
                case Connected():           # say Hello; what was not acknowledged goes again
                    link.send(hello)
                case Disconnected(): ...    # libzmq connects again by itself, in growing pauses
                case Received(message, bodies): ...
                case Returned(message, text): ...       # the server does not take what we sent

What holds:

* Nothing goes out but between ``Connected`` and ``Disconnected``; ``send`` returns False outside.
* Nothing that came on an earlier connection is told after its ``Disconnected``: at a Hello,
  what was not told is lost for good.
* What was sent shortly before a ``Disconnected`` may or may not have arrived.
* A connection may break and come back while nobody looks. ``send`` looks first, once in LOOK_PAUSE;
  in the gap that remains, a server answers what it gets ahead of a Hello with
  ``Error("hello_first")``: then say Hello, as on ``Connected``.

A link belongs to one thread at a time, and to the process that made it.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, cast

import zmq

from jobserver.pieces import TRANSFERS, Frames, Link, Returned
from jobserver.protocol import (
    MAX_FRAME_NBYTES,
    MAX_FRAMES,
    Body,
    Buffer,
    Hello,
    Malformed,
    Message,
    Together,
    decode_to_peer,
)
from jobserver.together import fold, unfold

if TYPE_CHECKING:
    from zmq.sugar.socket import Socket

logger = logging.getLogger(__name__)

MAX_INCOMING_NBYTES: Final = 2**40
"""The server bounds what it takes from one peer for another by its own budget."""

MAX_OUTBOX: Final = 4096
MAX_OUTBOX_NBYTES: Final = 64 * 2**20
"""What waits for the socket. libzmq holds as much again: it counts messages, not bytes."""

MAX_EVENTS: Final = 1000
"""Of the monitor, read in one turn."""

LOOK_PAUSE: Final = 0.005
"""Seconds between two looks of sends at the monitor, each of which asks the kernel."""

# Plain numbers and the methods below pyzmq's own: its enums and checks cost 3 us a message.
_POLLIN: Final = int(zmq.POLLIN)
_EVENTS: Final = int(zmq.EVENTS)
_RCVMORE: Final = int(zmq.RCVMORE)
_DONTWAIT: Final = int(zmq.DONTWAIT)
_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
_get: Final = cast("Callable[[Socket[bytes], int], int]", zmq.backend.Socket.get)
_send: Final[Callable[[Socket[bytes], Buffer, int], None]] = zmq.backend.Socket.send
_recv: Final[Callable[[Socket[bytes], int], bytes]] = zmq.backend.Socket.recv

_MONITORED: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_MONITOR_EVENT: Final = struct.Struct("=Hi")


class Connected(NamedTuple):
    """A new connection stands; the server knows nothing of it yet."""


class Disconnected(NamedTuple):
    """The connection is gone, with what was under way on it."""


class Received(NamedTuple):
    """The server said this."""

    message: Message
    bodies: tuple[Body, ...]


Event: TypeAlias = Connected | Disconnected | Received | Returned

CONNECTED: Final = Connected()
DISCONNECTED: Final = Disconnected()


class ServerLink:
    """A link to the server at one endpoint. See the module for its rules.

    Args:
        context: makes the sockets; the link does not end it.
        endpoint: as ``jobserver.keys.endpoint`` returns it. It need not be reachable yet.

    Attributes:
        endpoint: as above.
        socket: the DEALER, for a poller.
        monitor: the monitor's socket, for a poller.
        connected: whether, of these two, ``Connected`` was what ``receive`` told last.
        heard_at: ``time.monotonic()`` when something last came from the server (at first: when the
            link was made). To be judged only after ``receive`` returned less than it may.
    """

    def __init__(self, context: zmq.Context[Socket[bytes]], endpoint: str) -> None:
        self.endpoint = endpoint
        self.connected = False
        self.heard_at = time.monotonic()
        self._up = False  # what the monitor said last; ``connected`` follows when it is told
        self._looked_at = 0.0  # when a send last looked at the monitor
        self._transfers = Link(MAX_INCOMING_NBYTES)
        self._outbox: deque[Frames] = deque()
        self._outbox_nbytes = 0
        self._seen: deque[Event] = deque()  # by a send's look at the monitor, told by receive

        self.socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.IMMEDIATE, 1),  # nothing is queued for a server that is not there
            (zmq.LINGER, 0),
            (zmq.SNDTIMEO, 0),
            (zmq.RCVTIMEO, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME_NBYTES),
            (zmq.RECONNECT_IVL, 100),  # ms, to which libzmq adds chance
            (zmq.RECONNECT_IVL_MAX, 1000),
            (zmq.CONNECT_TIMEOUT, 3000),
            (zmq.HANDSHAKE_IVL, 5000),
            # Both ends must say them: the one that does not never notices a half-open link.
            (zmq.HEARTBEAT_IVL, 5000),
            (zmq.HEARTBEAT_TIMEOUT, 15_000),
            (zmq.HEARTBEAT_TTL, 20_000),
            (zmq.IPV6, int("[" in endpoint)),
        ):
            self.socket.setsockopt(option, value)

        # Not get_monitor_socket(): its limit of messages would stop libzmq's I/O thread when a
        # job runs for long and nobody reads the events of a link that comes and goes.
        name = f"inproc://dmap-link-{id(self)}"
        self.socket.monitor(name, _MONITORED)
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.setsockopt(zmq.LINGER, 0)
        self.monitor.setsockopt(zmq.RCVHWM, 0)
        self.monitor.connect(name)
        self.socket.connect(endpoint)

    def register(self, poller: zmq.Poller) -> None:
        """Say to a poller what this link waits for."""
        poller.register(self.socket, zmq.POLLIN | zmq.POLLOUT if self._outbox else zmq.POLLIN)
        poller.register(self.monitor, zmq.POLLIN)

    @property
    def idle(self) -> bool:
        """Is nothing of ours on its way to the socket, nor a large body in either direction?"""
        return not self._outbox and self._transfers.idle

    @property
    def has_events(self) -> bool:
        """Would ``receive`` return something that was noticed already, without waiting?"""
        return bool(self._seen)

    def send(self, message: Message, bodies: tuple[Body, ...] = (), *, more: bool = False) -> bool:
        """Send a message, now or as soon as the socket takes it. Bodies must not change any more.

        Args:
            message: What to say.
            bodies: Its bodies.
            more: It goes together with what is sent next; if nothing is, call ``flush``.

        Returns:
            False if it was not taken: there is no connection, ``receive`` has yet to tell of a
            new one, or the outbox is full (then ``connected`` is true and ``has_events`` false,
            and a later ``receive`` or ``flush`` makes room).
        """
        now = time.monotonic()
        if now - self._looked_at >= LOOK_PAUSE or not self.connected:
            self._looked_at = now
            self._watch()
        if not self.connected or self._seen:
            return False
        if self._full:
            self.flush()  # it may be full of what only waits for company
            if self._full:
                return False
        if type(message) is Hello:
            self._transfers.forget()  # as the server does; what was not acknowledged goes again
        messages = self._transfers.outgoing(message, bodies)
        if more or self._outbox or len(messages) != 1 or not self._send(messages[0]):
            self._post(messages)
            if not more:
                self.flush()
        return True

    def receive(self, max_messages: int = 500, *, look: bool = True) -> list[Event]:
        """Return what happened since the last call, and send what waited. Never blocks.

        It reads until the socket is empty, but at most about ``max_messages`` while the
        connection lasts. Who knows from a poller that the monitor has nothing to say may do
        without a look at it: nothing comes on a new connection ahead of our Hello.
        """
        if look:
            self._watch()
        events: list[Event] = self._read(max_messages)
        if self._seen:
            events[:0] = self._seen
            self._seen.clear()
        self.connected = self._up
        if self._outbox:
            self.flush()
        return events

    def flush(self) -> None:
        """Send of the outbox what the socket takes now: what lies there, together."""
        outbox = self._outbox
        while outbox:
            frames, n = (outbox[0], 1) if len(outbox) == 1 else fold(outbox)
            if not self._send(frames):
                return
            for _ in range(n):
                self._outbox_nbytes -= sum(map(len, outbox.popleft()))

    def close(self, linger: float = 0.0) -> None:
        """Close the link. For ``linger`` seconds libzmq goes on to send what it has taken.

        The call does not wait for that; the context's ``term`` does.
        """
        self.connected = self._up = False
        self.flush()
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close(int(linger * 1000))
        self._transfers.forget()
        self._outbox.clear()

    @property
    def _full(self) -> bool:
        return len(self._outbox) >= MAX_OUTBOX or self._outbox_nbytes >= MAX_OUTBOX_NBYTES

    def _watch(self) -> None:
        """Note in ``_seen`` that the connection came or went, behind what was received on it."""
        for _ in range(MAX_EVENTS):
            if not _get(self.monitor, _EVENTS) & _POLLIN:
                return
            event = self.monitor.recv_multipart(zmq.DONTWAIT)[0]
            is_up = _MONITOR_EVENT.unpack(event)[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self._up:
                self._up = False
                # What libzmq still has of the connection that is gone; there can be nothing of a
                # new one, where nothing comes ahead of our Hello.
                self._seen.extend(self._read(None))
                self._transfers.forget()
                self._outbox.clear()
                self._outbox_nbytes = 0
                self._seen.append(DISCONNECTED)
            if is_up:
                self._up = True
                self._seen.append(CONNECTED)

    def _send(self, frames: Frames) -> bool:
        """Hand one message to libzmq, if it takes it now."""
        socket = self.socket
        last = len(frames) - 1
        try:
            for number, frame in enumerate(frames):
                _send(socket, frame, _MORE if number < last else _DONTWAIT)
        except zmq.Again:
            return False  # at the first one: libzmq takes all of a message or none
        return True

    def _read(self, max_messages: int | None) -> list[Event]:
        """Return what lies in the socket, all of it (None) or some of it."""
        events: list[Event] = []
        socket = self.socket
        n_read = 0
        while max_messages is None or n_read < max_messages:
            # One is the rule, and to ask for another costs twice as much as to ask whether it is
            # there.
            if n_read == 1 and not _get(socket, _EVENTS) & _POLLIN:
                break
            try:
                frames = [_recv(socket, _DONTWAIT)]
                while _get(socket, _RCVMORE):
                    frames.append(_recv(socket, _DONTWAIT))
            except zmq.Again:
                break
            n_read += 1
            try:
                self._open(frames, events)
            except Malformed as error:
                logger.warning("%s sent what makes no sense: %s", self.endpoint, error)
        if n_read:
            self.heard_at = time.monotonic()
        return events

    def _open(self, frames: list[bytes], events: list[Event]) -> None:
        if len(frames) > MAX_FRAMES:
            raise Malformed("bad_frame", f"{len(frames)} frames")
        message = decode_to_peer(frames[0])
        bodies = tuple(frames[1:])
        if type(message) is not Together:
            self._take(message, bodies, events)
            return
        for inner, inner_bodies in unfold(message, bodies, decode_to_peer):
            self._take(inner, inner_bodies, events)

    def _take(self, message: Message, bodies: tuple[Body, ...], events: list[Event]) -> None:
        if type(message) not in TRANSFERS:
            events.append(Received(message, bodies))
            return
        whole, answers = self._transfers.incoming(message, bodies)
        if self._up:
            self._post(answers)
            self.flush()
        events += [Received(*one) for one in whole]
        events += self._transfers.take_returned()

    def _post(self, messages: list[Frames]) -> None:
        for frames in messages:
            self._outbox.append(frames)
            self._outbox_nbytes += sum(map(len, frames))
