"""The loop of a job server: one thread, one ROUTER, and a state that thinks.

::

                .------------------- Server.turn --------------------.
    socket -----> what came (bounded) ---> State.on_message          |
                |                          State.on_tick   (when due)|
                |                                |                   |
                |                             coalesce               |
    parked -----> (when due) ------------------> send ---------------> socket
       ^        |                                |                   |
       |        '--------------------------------|-------------------'
       '------------- full (EAGAIN) -------------+-- gone (EHOSTUNREACH) --> State.on_gone

* No send ever blocks. What a peer's queue does not take is *parked* for that peer alone, in order,
  and tried again; a peer that lets more pile up than ``MAX_PARKED`` is cut: the state is told that
  it is gone, and the last that it will read is an ``Error`` that asks for a new Hello.
* A routing id is a connection. libzmq tells that one is gone only when something is sent to it.
  The state's heartbeats see to that; links with transfers under way are probed here.
* Bodies in pieces (``pieces``) are put together and cut here; the state sees whole messages. What
  a peer declines is replaced by something small, so that nobody waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import time
from collections import deque
from typing import Any, Final, NamedTuple, Protocol, Self

import zmq
from msgspec.structs import replace
from zmq.backend import zmq_poll

from jobserver import keys, shared
from jobserver.coalesce import coalesce
from jobserver.company import Company
from jobserver.jobs import Send
from jobserver.pieces import TRANSFERS, Budget, Frames, Link, Returned
from jobserver.protocol import (
    BODY_NBYTES,
    MAX_FRAME_NBYTES,
    MAX_FRAMES,
    Blob,
    BlobTaken,
    Body,
    Error,
    Heartbeat,
    Hello,
    JobAssign,
    JobComplete,
    JobException,
    JobFail,
    Malformed,
    Message,
    NoJob,
    Piece,
    PutBlob,
    Reference,
    Together,
    WorkFail,
    decode_to_server,
    encode,
)
from jobserver.sockets import receive, send
from jobserver.together import fold, unfold

log = logging.getLogger(__name__)

MAX_MESSAGES: Final = 500
"""Taken in one turn, so that what is due and what is parked has its turn too."""
TURN: Final = 0.005
"""Seconds after which a turn takes no more messages: what it has to send should not wait."""

MAX_HEADER_NBYTES: Final = 8 * 2**20
"""The largest lawful list takes half of this; it bounds what one message can cost to decode."""

MAX_PARKED: Final = 65_536
MAX_PARKED_NBYTES: Final = 256 * 2**20
"""Parked for one peer, beside the 1,000 messages that libzmq holds for it."""

RETRY: Final = 0.002
MAX_RETRY: Final = 0.05
"""Seconds until parked messages are tried again; doubled while none of them goes."""

_POLLIN: Final = int(zmq.POLLIN)

PROBE: Final = 1.0
"""Seconds between the probes of links that have transfers under way."""

LEAVE: Final = 5.0
"""Seconds that a drained server waits for peers that read slowly."""

_OPTIONS: Final = (
    (zmq.ROUTER_MANDATORY, 1),  # tells of full and gone peers instead of dropping messages
    (zmq.LINGER, 0),
    (zmq.BACKLOG, 4096),
    (zmq.SNDHWM, 1000),
    (zmq.RCVHWM, 1000),
    (zmq.MAXMSGSIZE, MAX_FRAME_NBYTES),
    (zmq.HANDSHAKE_IVL, 5000),
    # Both ends must say these: the one that does not never notices a half-open link.
    (zmq.HEARTBEAT_IVL, 5000),
    (zmq.HEARTBEAT_TIMEOUT, 15_000),
    (zmq.HEARTBEAT_TTL, 20_000),
    (zmq.TCP_KEEPALIVE, 1),
    (zmq.TCP_KEEPALIVE_IDLE, 30),
    (zmq.TCP_KEEPALIVE_INTVL, 10),
    (zmq.TCP_KEEPALIVE_CNT, 3),
)


class Thinker(Protocol):
    """What the loop needs of a state: ``jobserver.state.State`` is one."""

    @property
    def drained(self) -> bool:
        """Tell whether a draining server may leave."""

    def on_message(
        self, peer: bytes, message: Message, bodies: tuple[Body, ...], now: float
    ) -> list[Send]:
        """Take in a message. A Heartbeat is answered only if the peer has not said Hello."""

    def on_malformed(self, peer: bytes, error: Malformed, now: float) -> list[Send]:
        """Answer what was no message."""

    def on_gone(self, peer: bytes, now: float) -> list[Send]:
        """Note that a link is gone. May be told more than once."""

    def on_undelivered(self, peer: bytes, message: Message, now: float) -> list[Send]:
        """Note that a link is gone, and this message was not sent."""

    def on_tick(self, now: float) -> list[Send]:
        """Do what is due."""

    def next_deadline(self) -> float | None:
        """Return when ``on_tick`` is to be called."""

    def takes_together(self, peer: bytes) -> bool:
        """Tell whether a peer understands several messages in one."""

    def drain(self, now: float) -> list[Send]:
        """Take nothing new."""


class Server:
    """A ROUTER and the loop around it.

    ``stop`` and ``drain`` may be called from any thread and from signal handlers; everything else
    belongs to the one thread that runs the loop.

    Args:
        state: thinks.
        max_nbytes: a larger body is declined when a peer offers it. A quarter of this is what the
            transfers that are under way may hold together, unless it is a single one.
        lifeline: a file descriptor; the server stops at once when its other end is closed.

    Attributes:
        longest_turn: seconds of the longest turn so far.
    """

    def __init__(
        self, state: Thinker, *, max_nbytes: int = 4 * 2**30, lifeline: int | None = None
    ) -> None:
        self.longest_turn = 0.0
        self._state = state
        self._max_nbytes = max_nbytes
        self._budget = Budget(max_nbytes // 4)
        self._links: dict[bytes, Link] = {}  # peer -> link; only those with transfers under way
        self._parked: dict[bytes, _Parked] = {}  # peer -> what waits for it; never empty
        self._lost: deque[tuple[bytes, tuple[Message, ...]]] = (
            deque()
        )  # whom, and what, nothing reached
        self._company = Company()
        self._retry = RETRY
        self._retry_at = self._probe_at = math.inf
        self._peer_log = PeerLog()
        self._stopping = self._draining = self._drain_told = False
        self._lifeline = lifeline
        self._wakes, self._wake = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._wake, False)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in _OPTIONS:
            self._socket.setsockopt(option, value)
        self._sources: list[tuple[Any, int]] = [(self._socket, _POLLIN), (self._wakes, _POLLIN)]
        if lifeline is not None:
            self._sources.append((lifeline, _POLLIN))

    def bind(self, endpoint: str, *, insecure: bool = False) -> str:
        """Listen on an endpoint, as ``keys.endpoint`` returns it. Returns it with its real port.

        Raises:
            InsecureBind: strangers could reach it, and it is not said to be ``insecure``.
            OSError: the system will not have it.
        """
        if not insecure:
            keys.require_private(endpoint)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot listen on {endpoint}: {error.strerror}") from None
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return bound.rstrip(b"\0").decode()

    def run(self) -> bool:
        """Serve until the server has drained (then True) or was stopped."""
        leave_at = math.inf
        while not self._stopping:
            something_came = self.turn(None)
            if self._drain_told and self._state.drained:
                now = time.monotonic()
                leave_at = min(leave_at, now + LEAVE)
                if now >= leave_at or not (something_came or self._parked):
                    break
        self._deliver([replace(one, patient=False) for one in self._company.overdue()], 0.0)
        log.debug("longest turn: %.1f ms", 1000 * self.longest_turn)
        return not self._stopping

    def turn(self, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds (None: until something comes) and do what there is.

        Returns whether messages came.
        """
        came = False
        for source, _ in zmq_poll(self._sources, self._patience(timeout)):
            if source is self._socket:
                came = True
            else:
                self._heed(source)
        now = began = time.monotonic()
        sends: list[Send] = []
        if self._draining and not self._drain_told:
            self._drain_told = True
            sends += self._state.drain(now)
        if came:
            now = self._take(sends, now)
        deadline = self._state.next_deadline()
        if deadline is not None and deadline <= now:
            sends += self._state.on_tick(now)
        if self._retry_at <= now:
            self._try_parked(now)
        if self._probe_at <= now:
            self._probe(now)
        if self._company.due <= now:
            sends = self._company.overdue(now) + sends
            self._deliver([replace(one, patient=False) for one in sends], now)
        elif sends or self._lost:
            self._deliver(sends, now)
        self.longest_turn = max(self.longest_turn, time.monotonic() - began)
        return came

    def drain(self) -> None:
        """Have the server finish what it has, take nothing new, and leave."""
        self._draining = True
        self._wake_up()

    def stop(self) -> None:
        """Have ``run`` return at once."""
        self._stopping = True
        self._wake_up()

    def close(self, linger: float = 0.0) -> None:
        """Close the socket, after at most ``linger`` seconds in which sent messages still go."""
        self._socket.close(int(1000 * linger))
        self._context.term()
        os.close(self._wakes)
        os.close(self._wake)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what wakes the loop ----------------------------------------------------------------

    def _patience(self, timeout: float | None) -> int:
        """Return the milliseconds to wait for messages; -1 for any time."""
        due = min(self._retry_at, self._probe_at, self._company.due)
        deadline = self._state.next_deadline()
        if deadline is not None and deadline < due:
            due = deadline
        if timeout is not None:
            due = min(due, time.monotonic() + timeout)
        elif self._drain_told and self._state.drained:
            due = min(due, time.monotonic() + MAX_RETRY)
        if due == math.inf:
            return -1
        return max(0, math.ceil(1000 * (due - time.monotonic())))

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake up all the same
            os.write(self._wake, b"!")

    def _heed(self, source: object) -> None:
        if source == self._wakes:
            os.read(self._wakes, 4096)
        elif self._lifeline is not None and not os.read(self._lifeline, 4096):
            log.info("the other end of the lifeline is gone: I end")
            self._stopping = True

    # --- in ---------------------------------------------------------------------------------

    def _take(self, sends: list[Send], now: float) -> float:
        """Take in what has come. Returns the time."""
        until = now + TURN
        sources = [(self._socket, _POLLIN)]
        for _ in range(MAX_MESSAGES):
            try:
                frames = receive(self._socket)
            except zmq.Again:  # said to be readable, it had but a part of a message
                break
            sends += self._on_frames(frames, now)
            now = time.monotonic()
            # To be told that there is nothing by an exception takes three times as long.
            if now >= until or not zmq_poll(sources, 0):
                break
        return now

    def _on_frames(self, frames: list[bytes], now: float) -> list[Send]:
        peer = frames[0]
        try:
            if not 2 <= len(frames) <= 1 + MAX_FRAMES:
                raise Malformed("bad_frame", f"{len(frames) - 1} frames; 1 to {MAX_FRAMES} are one")
            if len(frames[1]) > MAX_HEADER_NBYTES:
                raise Malformed("limit", f"a header of {len(frames[1])} bytes")
            message = decode_to_server(frames[1])
            bodies = tuple(frames[2:])
            if type(message) is not Together:
                return self._on_message(peer, message, bodies, now)
        except Malformed as error:
            return self._on_malformed(peer, error, now)
        sends: list[Send] = []
        try:
            for inner, inner_bodies in unfold(message, bodies, decode_to_server):
                sends += self._on_message(peer, inner, inner_bodies, now)
        except Malformed as error:
            sends += self._on_malformed(peer, error, now)
        return sends

    def _on_malformed(self, peer: bytes, error: Malformed, now: float) -> list[Send]:
        self._peer_log.warn(now, peer, "sent no message (%s): %s", error.code, str(error))
        return self._state.on_malformed(peer, error, now)

    def _on_message(
        self, peer: bytes, message: Message, bodies: tuple[Body, ...], now: float
    ) -> list[Send]:
        for body in bodies:
            if len(body) > BODY_NBYTES and type(message) is not Piece:
                raise Malformed("limit", f"a body of {len(body)} bytes comes in pieces")
        if type(message) in TRANSFERS:
            return self._on_transfer(peer, message, bodies, now)
        if type(message) is PutBlob and message.memory is not None:
            return self._on_named(peer, message, message.memory, now)
        if type(message) is Hello and peer in self._links:
            self._forget_link(peer, now)
        return self._state.on_message(peer, message, bodies, now)

    def _on_transfer(
        self, peer: bytes, message: Message, bodies: tuple[Body, ...], now: float
    ) -> list[Send]:
        # To the state this is a sign of life, and of a stranger there is nothing to be taken.
        sends = self._state.on_message(peer, Heartbeat(), (), now)
        if sends:
            return sends
        link = self._require_link(peer, now)
        try:
            whole, answers = link.incoming(message, bodies)
        except Malformed:
            self._post(link, link.grant(), now)
            raise
        for inner, inner_bodies in whole:
            sends += self._state.on_message(peer, inner, inner_bodies, now)
        for returned in link.take_returned():
            sends += self._on_returned(peer, returned, now)
        self._post(link, answers, now)
        self._grant_waiting(now)
        return sends

    def _on_named(self, peer: bytes, message: PutBlob, memory: Reference, now: float) -> list[Send]:
        """Open what a client named instead of sending it, and hold it: the client may end."""
        # For a stranger nothing is opened, and it is told that it is one.
        sends = self._state.on_message(peer, Heartbeat(), (), now)
        if sends:
            return sends
        try:
            body = shared.hold(shared.open(memory))
        except OSError as error:
            return [Send(peer, BlobTaken(message.blob, str(error), send=True), ())]
        return self._state.on_message(peer, PutBlob(message.blob), (body,), now)

    def _on_returned(self, peer: bytes, returned: Returned, now: float) -> list[Send]:
        """Fail what a peer declined, since it would decline it again."""
        message, text = returned
        self._peer_log.warn(now, peer, "declined %s: %s", type(message).__name__, text)
        match message:
            case JobComplete():
                # The state forgets the result when its client says that it has this end instead.
                text = f"its client did not take the result: {text}"
                return [
                    Send(peer, JobFail(job.ticket, "failed", text, host=message.host))
                    for job in message.jobs
                ]
            case JobException():
                text = f"its client did not take the exception: {text}"
                return [Send(peer, JobFail(message.ticket, "failed", text, host=message.host))]
            case JobAssign():
                text = f"the worker did not take the argument: {text}"
                sends: list[Send] = []
                for job in message.jobs:
                    fail = WorkFail(0, job.handle, "failed", text)
                    sends += self._state.on_message(peer, fail, (), now)
                return [*sends, Send(peer, NoJob())]  # which answers its grab
            case Blob(blob):
                return [Send(peer, Blob(blob, False))]
            case _:
                return []  # a word about a running job, or an answer for people

    # --- out --------------------------------------------------------------------------------

    def _deliver(self, sends: list[Send], now: float) -> None:
        """Send all, and tell the state of those who turn out to be gone."""
        while True:
            sends = self._company.take(sends, now)
            waiting: dict[bytes, list[_Entry]] = {}  # peer -> what it gets
            for one in coalesce(sends) if len(sends) > 1 else sends:
                peer, message, bodies = one.peer, one.message, one.bodies
                frames: Frames = [encode(message)]
                for body in bodies:
                    if not isinstance(body, bytes) or len(body) > BODY_NBYTES:
                        self._put_all(peer, waiting.pop(peer, []), now)
                        link = self._require_link(peer, now)
                        self._post(link, link.outgoing(message, bodies), now)
                        break
                    frames.append(body)
                else:
                    entries = waiting.get(peer)
                    if entries is None:
                        waiting[peer] = [_Entry(frames, (message,))]
                    else:
                        entries.append(_Entry(frames, (message,)))
            for peer, entries in waiting.items():
                self._put_all(peer, entries, now)
            if not self._lost:
                break
            sends = []
            while self._lost:
                sends += self._on_lost(*self._lost.popleft(), now)

    def _put_all(self, peer: bytes, entries: list[_Entry], now: float) -> None:
        """Send what one peer gets, in as few messages as it understands."""
        if len(entries) > 1 and self._state.takes_together(peer):
            while entries:
                frames, n = fold(entry.frames for entry in entries)
                said = tuple([entry.said[0] for entry in entries[:n]])
                self._put(peer, [peer, *frames], said, now)
                del entries[:n]
        for entry in entries:
            self._put(peer, [peer, *entry.frames], entry.said, now)

    def _post(self, link: Link, messages: list[Frames], now: float) -> None:
        """Send what a link returned."""
        for frames in messages:
            self._put(link.peer, [link.peer, *frames], (), now)
        if link.idle:
            self._links.pop(link.peer, None)

    def _put(self, peer: bytes, frames: Frames, said: tuple[Message, ...], now: float) -> None:
        parked = self._parked.get(peer)
        if parked is None:
            try:
                send(self._socket, frames)
                return
            except zmq.Again:
                pass
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                self._lost.append((peer, said))
                return
        if len(said) == 1 and type(said[0]) is Heartbeat:
            return  # one that is late says nothing
        if parked is None:
            parked = self._parked[peer] = _Parked()
            self._retry_at = min(self._retry_at, now + self._retry)
        parked.append(frames, said)
        if parked.is_full:
            self._cut(peer, parked, now)

    def _try_parked(self, now: float) -> None:
        """Send of the parked messages what goes."""
        n_sent = 0
        for peer, parked in list(self._parked.items()):
            try:
                while parked.entries:
                    send(self._socket, parked.entries[0].frames)
                    parked.popleft()
                    n_sent += 1
                del self._parked[peer]
            except zmq.Again:
                pass
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                del self._parked[peer]
                # The newest first: what a state puts back in front keeps its order.
                self._lost += ((peer, entry.said) for entry in reversed(parked.entries))
        self._retry = RETRY if n_sent else min(2 * self._retry, MAX_RETRY)
        self._retry_at = now + self._retry if self._parked else math.inf

    def _cut(self, peer: bytes, parked: _Parked, now: float) -> None:
        """Give up on a peer that does not read."""
        n, nbytes = len(parked.entries), parked.nbytes
        self._peer_log.warn(
            now, peer, "does not read: I drop %d messages (%d bytes) for it", n, nbytes
        )
        text = "you did not read what I had for you, and I dropped it: say Hello again"
        parked.clear()
        parked.append([peer, encode(Error("hello_first", text))], ())
        self._forget_link(peer, now)
        self._lost.append((peer, ()))

    def _on_lost(self, peer: bytes, said: tuple[Message, ...], now: float) -> list[Send]:
        self._forget_link(peer, now)
        if not said:
            return self._state.on_gone(peer, now)
        sends: list[Send] = []
        for message in reversed(said):  # as above
            sends += self._state.on_undelivered(peer, message, now)
        return sends

    # --- transfers --------------------------------------------------------------------------

    def _require_link(self, peer: bytes, now: float) -> Link:
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(
                self._max_nbytes, decode=decode_to_server, budget=self._budget, peer=peer
            )
            self._probe_at = min(self._probe_at, now + PROBE)
        return link

    def _forget_link(self, peer: bytes, now: float) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            link.forget()
            self._grant_waiting(now)

    def _grant_waiting(self, now: float) -> None:
        """Let links that found no room in the budget have what is free again."""
        while (link := self._budget.first_waiting()) is not None:
            grants = link.grant()
            if not grants:
                break
            self._post(link, grants, now)

    def _probe(self, now: float) -> None:
        """Find out which links with transfers under way are gone: most peers get no heartbeats."""
        for peer in list(self._links):
            self._put(peer, [peer, encode(Heartbeat())], (Heartbeat(),), now)
        self._probe_at = now + PROBE if self._links else math.inf


class _Entry(NamedTuple):
    """A message for a socket, and what it says: one message or several, none of a transfer's."""

    frames: Frames
    said: tuple[Message, ...]


class _Parked:
    """What waits until one peer reads."""

    def __init__(self) -> None:
        self.entries: deque[_Entry] = deque()
        self.nbytes = 0

    @property
    def is_full(self) -> bool:
        return len(self.entries) > MAX_PARKED or self.nbytes > MAX_PARKED_NBYTES

    def append(self, frames: Frames, said: tuple[Message, ...]) -> None:
        self.entries.append(_Entry(frames, said))
        self.nbytes += sum(map(len, frames))

    def popleft(self) -> None:
        self.nbytes -= sum(map(len, self.entries.popleft().frames))

    def clear(self) -> None:
        self.entries.clear()
        self.nbytes = 0


class PeerLog:
    """Log lines about peers: one a second for each, and for at most twenty of them."""

    def __init__(self) -> None:
        self._told: set[bytes] = set()
        self._clear_at = 0.0

    def warn(self, now: float, peer: bytes, text: str, *arguments: object) -> None:
        """Log what a peer did. Strings are escaped, since they may be the peer's own."""
        if now >= self._clear_at:
            self._told.clear()
            self._clear_at = now + 1.0
        if peer in self._told or len(self._told) >= 20:
            return
        self._told.add(peer)
        safe = (ascii(a) if isinstance(a, str) else a for a in arguments)
        log.warning("peer %s " + text, peer.hex(), *safe)
