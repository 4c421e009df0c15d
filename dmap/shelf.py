"""What a supervisor keeps of blobs, for its children: each comes to the host once.

It is the one end of the conversations that `buffers` describes. What a child wants and is not here
is fetched from the server that gave the child its job, however many children want it meanwhile.
What came stays for the next who asks, until there is no more room for it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import selectors
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from dmap.buffers import FD, INLINE_NBYTES, Answer, Ask, Sealed, encode
from jobserver import shared
from jobserver.machine import machine_id
from jobserver.protocol import Body, Buffer, Reference, nbytes_of

logger = logging.getLogger(__name__)

MAX_NBYTES: Final = 2**30
MAX_BLOBS: Final = 1024
MAX_SEALED: Final = 256
"""What is kept, least recently used out first. A process may often have 1024 descriptors only."""
MAX_FETCHING: Final = 16
"""Blobs that are asked of a server at a time: those below a megabyte come without credit."""
PATIENCE: Final = 30.0
"""Seconds of silence after which a server that owes a blob is not waited for."""

_ASK_NBYTES: Final = 16 * 2**10
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_read_ask: Final = msgspec.msgpack.Decoder(Ask).decode


class _Fetch:
    """A blob that a server should send."""

    __slots__ = ("since", "state")

    def __init__(self, now: float) -> None:
        self.since = now  # when it was wanted, or when its server last said Welcome
        self.state: Literal["waiting", "asked", "unknown"] = "waiting"


class _Server:
    """What is wanted of one server."""

    def __init__(self) -> None:
        self.fed_at = 0.0  # when anything of a blob last came
        self.is_named = bool(machine_id())  # the memory that it names can be opened here
        self.fetches: dict[bytes, _Fetch] = {}  # blob -> its fetch, in the order of asking


class _Child:
    """A child, and what is left of its last ask."""

    def __init__(self, number: int, end: socket.socket) -> None:
        self.number = number
        self.socket = end
        self.ask = Ask(0, 0, "", [])
        self.wanted: dict[bytes, int] = {}  # blob -> how many bytes of it went in pieces
        self.refusal = ""  # still to be said


class _Arriving:
    """A blob that is here, on its way into sealed memory: some milliseconds of work a piece."""

    def __init__(self, body: Body) -> None:
        self.sealing = shared.Sealing()
        self.parts: deque[Buffer] = deque((body,) if isinstance(body, bytes) else body)


class Shelf:
    """The blobs that a supervisor keeps, and its children who want some. Nothing blocks.

    It has a descriptor, ``fileno``, for a poller: when that can be read, or ``next_deadline`` has
    come, it wants a ``turn``.

    Args:
        n_servers: how many there are.
        fetch: asks the server of that index for a blob, or for the name of its memory if the last
            argument is true; False: it cannot be asked now.
        max_nbytes: what is kept at most, but for the last one, however large.
        max_blobs: how many of them.

    Attributes:
        nbytes: what is kept now.
    """

    def __init__(
        self,
        n_servers: int,
        fetch: Callable[[int, bytes, bool], bool],
        *,
        max_nbytes: int = MAX_NBYTES,
        max_blobs: int = MAX_BLOBS,
    ) -> None:
        self.nbytes = 0
        self._fetch = fetch
        self._max_nbytes = max_nbytes
        self._max_blobs = max_blobs
        self._servers = [_Server() for _ in range(n_servers)]
        self._children: dict[int, _Child] = {}  # child number -> child
        self._kept: dict[bytes, bytes | Sealed] = {}  # least recently used first
        self._n_sealed = 0
        self._arriving: dict[bytes, _Arriving] = {}
        self._selector = selectors.DefaultSelector()

    def fileno(self) -> int:
        """Return the descriptor for a poller."""
        return self._selector.fileno()

    def close(self) -> None:
        """Give up everything. What children have mapped stays theirs."""
        for number in list(self._children):
            self.remove(number)
        for blob in list(self._kept):
            self._evict(blob)
        for arriving in self._arriving.values():
            arriving.sealing.close()
        self._arriving.clear()
        self._selector.close()

    def next_deadline(self) -> float:
        """Return when there is something to do if nothing happens."""
        if self._arriving:
            return 0.0
        ends = [
            max(fetch.since, server.fed_at) + PATIENCE
            for server in self._servers
            for fetch in server.fetches.values()
        ]
        return min(ends, default=math.inf)

    def turn(self, now: float) -> None:
        """Do what is due."""
        for key, events in self._selector.select(0):
            child: _Child = key.data
            if events & _READ:
                self._on_readable(child, now)
            if events & _WRITE and child.number in self._children:
                self._selector.modify(child.socket, _READ, child)
                self._serve(child, now)
        if self._arriving:
            self._seal_some(now)
        for index, server in enumerate(self._servers):
            for blob, fetch in list(server.fetches.items()):
                if now >= max(fetch.since, server.fed_at) + PATIENCE:
                    server.fetches.pop(blob, None)
                    text = f"the server owes the closure, and was silent for {PATIENCE:g} seconds"
                    for child in self._who_wants(blob, index):
                        self._refuse(child, text, now)
            self._ask_server(index)

    # --- children -----------------------------------------------------------------------------

    def add(self, number: int, end: socket.socket) -> None:
        """Answer a child from now on; ``end`` is the supervisor's of `make_pair`, owned by this."""
        child = self._children[number] = _Child(number, end)
        self._selector.register(end, _READ, child)

    def remove(self, number: int) -> None:
        """Forget a child, if it is known, and all that it wanted."""
        child = self._children.pop(number, None)
        if child is not None:
            self._selector.unregister(child.socket)
            child.socket.close()
            self._drop_wanted(child)

    def _on_readable(self, child: _Child, now: float) -> None:
        try:
            packed = child.socket.recv(_ASK_NBYTES)
            if not packed:
                raise ConnectionResetError
            ask = _read_ask(packed)
            if not 0 <= ask.server < len(self._servers):
                raise msgspec.ValidationError(f"there is no server {ask.server}")
        except BlockingIOError:
            return
        except ConnectionError:
            self.remove(child.number)
        except msgspec.MsgspecError as error:
            logger.warning("child %d asked for what makes no sense: %s", child.number, error)
            self.remove(child.number)
        else:
            self._drop_wanted(child)
            child.ask, child.refusal = ask, ""
            child.wanted = dict.fromkeys(ask.blobs, 0)
            fetches = self._servers[ask.server].fetches
            for blob in ask.blobs:
                if blob in fetches and fetches[blob].state == "unknown":
                    fetches[blob].state = "waiting"
            self._serve(child, now)

    def _drop_wanted(self, child: _Child) -> None:
        """Have a child want nothing any more, and fetch nothing for it that is not on its way."""
        for blob in list(child.wanted):
            self._unwant(child, blob)

    def _unwant(self, child: _Child, blob: bytes) -> None:
        del child.wanted[blob]
        fetches = self._servers[child.ask.server].fetches
        fetch = fetches.get(blob)
        if fetch and fetch.state != "asked" and not self._who_wants(blob, child.ask.server):
            del fetches[blob]

    def _refuse(self, child: _Child, text: str, now: float) -> None:
        """Say to a child that what it wants is not to be had."""
        self._drop_wanted(child)
        child.refusal = text
        self._serve(child, now)

    def _who_wants(self, blob: bytes, server: int | None = None) -> list[_Child]:
        """Return the children that want a blob, of that server or of any."""
        return [
            child
            for child in self._children.values()
            if blob in child.wanted and server in (None, child.ask.server)
        ]

    def _serve(self, child: _Child, now: float) -> None:
        """Give a child what it wants and is here, and see to it that the rest comes."""
        if child.refusal:
            if self._say(child, Answer(child.ask.number, b"", refusal=child.refusal)):
                child.refusal = ""
            return
        for blob in list(child.wanted):
            if blob in self._kept:
                if not self._give(child, blob):
                    return  # it goes on when the child has read, if it still lives
            elif blob not in self._arriving:
                self._servers[child.ask.server].fetches.setdefault(blob, _Fetch(now))

    def _give(self, child: _Child, blob: bytes) -> bool:
        """Give a child what it wants; False: its socket did not take all of it."""
        body = self._kept[blob] = self._kept.pop(blob)
        if isinstance(body, bytes):
            return self._give_pieces(child, blob, len(body), body.__getitem__)
        nbytes, fd = body.nbytes, body.fd
        try:
            if not self._say(child, Answer(child.ask.number, blob, nbytes, is_sealed=True), fd):
                return False
        except OSError as error:  # too many descriptors are under way
            logger.debug("child %d gets a copy of %d bytes: %s", child.number, nbytes, error)
            return self._give_pieces(
                child, blob, nbytes, lambda part: os.pread(fd, part.stop - part.start, part.start)
            )
        self._unwant(child, blob)
        return True

    def _give_pieces(
        self, child: _Child, blob: bytes, nbytes: int, read: Callable[[slice], bytes]
    ) -> bool:
        while True:
            start = child.wanted[blob]
            end = min(start + INLINE_NBYTES, nbytes)
            answer = Answer(child.ask.number, blob, nbytes, piece=read(slice(start, end)))
            if not self._say(child, answer):
                return False
            child.wanted[blob] = end
            if end == nbytes:
                self._unwant(child, blob)
                return True

    def _say(self, child: _Child, answer: Answer, *fds: int) -> bool:
        """Send an answer; False: the child must read first, or is gone.

        Raises:
            OSError: the descriptors cannot go along.
        """
        controls = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, FD.pack(fd)) for fd in fds]
        try:
            child.socket.sendmsg([encode(answer)], controls)
        except ConnectionError:
            self.remove(child.number)
            return False
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                raise
            self._selector.modify(child.socket, _READ | _WRITE, child)
            return False
        return True

    # --- servers ------------------------------------------------------------------------------

    def on_welcome(self, server: int, now: float) -> None:
        """Ask a server that is there (again) for all that is wanted of it."""
        there = self._servers[server]
        there.is_named = bool(machine_id())
        there.fetches = {
            blob: _Fetch(now) for blob in there.fetches if self._who_wants(blob, server)
        }
        self._ask_server(server)

    def on_heard(self, server: int, at: float) -> None:
        """Note that a part of a large blob may have come."""
        self._servers[server].fed_at = at

    def on_blob(
        self,
        server: int,
        boot: str,
        blob: bytes,
        body: Body | Reference | None,
        now: float,
    ) -> None:
        """Take in a blob, or where it lies, or that the server has none in this life (None).

        That the bytes have the digest that names them is taken on trust: the server has checked it.
        """
        there = self._servers[server]
        there.fed_at = now
        fetch = there.fetches.get(blob)
        if fetch is None:
            return
        if body is None:
            # A child whose job is of another life has not heard of this one yet, and will drop the
            # job; or we have not heard of that one, and ask again at its Welcome.
            fetch.state = "unknown"
            text = f"the server does not have the closure's blob {blob.hex()[:16]}"
            for child in self._who_wants(blob, server):
                if child.ask.boot == boot:
                    self._refuse(child, text, now)
            if not self._who_wants(blob, server):
                there.fetches.pop(blob, None)
            return
        if isinstance(body, Reference):
            try:
                sealed = Sealed(shared.open(body), body.nbytes)
            except OSError as error:
                logger.info("a server's memory is not to be had, so its bytes come: %s", error)
                there.is_named = False
                fetch.state = "waiting"
                return
            del there.fetches[blob]
            if blob in self._kept or blob in self._arriving:
                sealed.close()
            else:
                self._keep(blob, sealed, now)
            return
        del there.fetches[blob]
        if blob in self._kept or blob in self._arriving:
            return  # from another server
        if nbytes_of(body) >= INLINE_NBYTES:
            try:
                self._arriving[blob] = _Arriving(body)
            except OSError as error:
                logger.info("each worker gets its own copy of large blobs: %s", error)
            else:
                return
        self._keep(blob, body if isinstance(body, bytes) else b"".join(body), now)

    def _ask_server(self, index: int) -> None:
        """Ask for what is wanted, as much at a time as is good for the server."""
        fetches = self._servers[index].fetches
        room = MAX_FETCHING - sum(fetch.state == "asked" for fetch in fetches.values())
        for blob, fetch in fetches.items():
            if room > 0 and fetch.state == "waiting":
                if not self._fetch(index, blob, self._servers[index].is_named):
                    return
                fetch.state = "asked"
                room -= 1

    # --- what is kept -------------------------------------------------------------------------

    def _seal_some(self, now: float) -> None:
        """Write the next piece of what arrives: no more, since others wait meanwhile."""
        blob, arriving = next(iter(self._arriving.items()))
        try:
            arriving.sealing.write(arriving.parts.popleft())
            sealed = None
            if not arriving.parts:
                sealed = Sealed(arriving.sealing.seal(), arriving.sealing.nbytes)
        except OSError as error:
            del self._arriving[blob]
            arriving.sealing.close()
            logger.warning("a blob is lost for want of memory: %s", error)
            for child in self._who_wants(blob):
                self._refuse(child, f"its host has no memory for the closure: {error}", now)
            return
        if sealed is not None:
            del self._arriving[blob]
            self._keep(blob, sealed, now)

    def _keep(self, blob: bytes, body: bytes | Sealed, now: float) -> None:
        """Keep a blob, give it to who wants it, and drop others to make room."""
        self._kept[blob] = body
        self.nbytes += _nbytes(body)
        self._n_sealed += isinstance(body, Sealed)
        while len(self._kept) > 1 and (
            self.nbytes > self._max_nbytes
            or len(self._kept) > self._max_blobs
            or self._n_sealed > MAX_SEALED
        ):
            self._evict(next(iter(self._kept)))
        for child in self._who_wants(blob):
            self._serve(child, now)

    def _evict(self, blob: bytes) -> None:
        body = self._kept.pop(blob)
        self.nbytes -= _nbytes(body)
        if isinstance(body, Sealed):
            self._n_sealed -= 1
            body.close()

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        assert self.nbytes == sum(map(_nbytes, self._kept.values())), "the bytes are counted"
        n_sealed = sum(isinstance(body, Sealed) for body in self._kept.values())
        assert self._n_sealed == n_sealed, "the descriptors are counted"
        assert not self._kept.keys() & self._arriving.keys(), "a blob arrives once"
        for index, server in enumerate(self._servers):
            for blob, fetch in server.fetches.items():
                wanted = fetch.state == "asked" or self._who_wants(blob, index)
                assert wanted, "only what is wanted is asked for"
        for child in self._children.values():
            assert not (child.wanted and child.refusal), "a refused ask is over"
            fetches = self._servers[child.ask.server].fetches
            is_blocked = bool(self._selector.get_key(child.socket).events & _WRITE)
            for blob in child.wanted:
                assert is_blocked or blob in fetches or blob in self._arriving, (
                    "what a child waits for is on its way"
                )


def _nbytes(body: bytes | Sealed) -> int:
    return body.nbytes if isinstance(body, Sealed) else len(body)
