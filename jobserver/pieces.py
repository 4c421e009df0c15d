"""Large bodies on one link: cut into pieces by the one end, put together by the other.

Every connection has a ``Link`` at both of its ends. It turns messages into frames and back, and a
message whose bodies fit in one frame each passes straight through. Of any other it keeps the large
bodies, offers them, sends them piece by piece as they are granted, and sends the message itself
behind their last piece; meanwhile smaller messages overtake it::

    sender                                            receiver
    Offer(2, 20 MiB)      ------------------------>   reserves 20 MiB, or lets the offer wait
                          <------------------------   Grant(2, 16 MiB)
    Piece(2) + 8 MiB      ------------------------>
    Piece(2) + 8 MiB      ------------------------>
                          <------------------------   Grant(2, 20 MiB)
    Piece(2) + 4 MiB      ------------------------>
    Pieced(header, [2])   ------------------------>   the message and its body (8 + 8 + 4 MiB)

* Transfers are numbered by their sender. The ``k``-th large message (from 1) has ``2k`` for its
  first body and ``2k + 1`` for its second one; so the receiver knows the two of one message.
* A transfer is granted nothing until *all* its bytes are reserved, and then it needs nothing but
  its sender to come to its end: two half-done ones never wait for each other. Of one message's
  two bodies the second may go beyond the budget, or else it would wait for the first.
* What is granted and not received is at most ``WINDOW_NBYTES`` on a link: a heartbeat never waits
  behind more, and the receiver's socket never holds more.
* Every piece but a transfer's last has at least ``MIN_PIECE_NBYTES``, so that their number costs
  the receiver nothing beside their bytes.
* An offer of more than the receiver ever takes is answered by ``Declined``. That ends the whole
  message, and its sender's layer above is told so.
* Nothing here outlives the connection. At its end, and when a peer says Hello (again), both ends
  forget all transfers: the layers above repeat what was not acknowledged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias

from .protocol import (
    BODY_NBYTES,
    PIECE_NBYTES,
    Body,
    Buffer,
    Declined,
    Grant,
    Malformed,
    Message,
    Offer,
    Piece,
    Pieced,
    decode_to_peer,
    encode,
    nbytes_of,
)

WINDOW_NBYTES: Final = 2 * PIECE_NBYTES
MIN_PIECE_NBYTES: Final = BODY_NBYTES
MAX_OFFERED: Final = 8
"""Large messages that a sender has offered at a time; the others wait for their turn with it."""

MAX_TEXT: Final = 1000
"""Characters that are kept of what the other end says: owners put it into texts of theirs."""

TRANSFERS: Final[frozenset[type[Message]]] = frozenset((Offer, Grant, Piece, Pieced, Declined))
"""The messages that are the Link's own: no other layer sends or sees them."""

Frames: TypeAlias = list[Buffer]
"""One message for a socket, without the routing id."""


class Returned(NamedTuple):
    """The other end declined this message of ours, and said why."""

    message: Message
    text: str


class Budget:
    """The bytes that the incoming transfers of several links may hold together.

    Links that find no room are served in the order in which they came, each one transfer at a
    time. A transfer that is larger than the whole budget has its turn when there is no other.

    Attributes:
        max_nbytes: the limit.
        nbytes: what is reserved.
    """

    def __init__(self, max_nbytes: int) -> None:
        self.max_nbytes = max_nbytes
        self.nbytes = 0
        self._waiting: dict[Link, None] = {}

    def take(self, link: Link, nbytes: int) -> bool:
        """Reserve bytes, or else put the link in the line of those that wait."""
        first = next(iter(self._waiting), link)
        if first is link and (not self.nbytes or self.nbytes + nbytes <= self.max_nbytes):
            self._waiting.pop(link, None)
            self.nbytes += nbytes
            return True
        self._waiting.setdefault(link)
        return False

    def first_waiting(self) -> Link | None:
        """Return the link whose turn it is when bytes are given back."""
        return next(iter(self._waiting), None)

    def leave(self, link: Link) -> None:
        """Take a link out of the line."""
        self._waiting.pop(link, None)


class Link:
    """One end of a connection, for messages and bodies of any size.

    Pure: it returns the frames to send, in order, and never blocks. A Link costs nothing but
    itself while no large body is under way.

    Args:
        max_incoming_nbytes: a larger body is declined when it is offered.
        decode: reads the header of a message that comes in pieces.
        budget: what this link shares with others; without one, only its window bounds it.
        peer: the routing id of the other end, for an owner of many links.
    """

    def __init__(
        self,
        max_incoming_nbytes: int,
        *,
        decode: Callable[[Buffer], Message] = decode_to_peer,
        budget: Budget | None = None,
        peer: bytes = b"",
    ) -> None:
        self.peer = peer
        self._max_incoming_nbytes = max_incoming_nbytes
        self._decode = decode
        self._budget = budget
        self._n_large = 0
        self._unoffered: deque[_Large] = deque()
        self._n_offered = 0
        self._sources: dict[int, _Source] = {}  # transfer -> the body that we send
        self._sinks: dict[int, _Sink] = {}  # transfer -> the body that we receive
        # Of transfers. While their sender does not know it, it may offer and send the other body
        # of the same message: at most those of what it offers in two rounds.
        self._declined: deque[int] = deque(maxlen=2 * MAX_OFFERED)
        self._returned: list[Returned] = []

    @property
    def idle(self) -> bool:
        """Is nothing under way in either direction?"""
        return not (self._sources or self._sinks or self._unoffered or self._declined)

    def outgoing(self, message: Message, bodies: tuple[Body, ...] = ()) -> list[Frames]:
        """Return what to send now for this message: itself, or offers of its large bodies.

        Large bodies are kept, and must not change, until their last piece was returned.
        """
        header = encode(message)
        large = tuple(nbytes_of(body) > BODY_NBYTES for body in bodies)
        if not any(large):
            return [[header, *map(_one_buffer, bodies)]]
        self._n_large += 1
        numbers = [
            2 * self._n_large + place if is_large else 0 for place, is_large in enumerate(large)
        ]
        self._unoffered.append(_Large(message, header, numbers, bodies))
        return self._offer()

    def incoming(
        self, message: Message, bodies: tuple[Body, ...]
    ) -> tuple[list[tuple[Message, tuple[Body, ...]]], list[Frames]]:
        """Take in a message; return what is for the layer above (0 or 1), and what to send.

        Bodies of a message that came in pieces are ``bytes`` or, of more than one piece, tuples.

        Raises:
            Malformed: it is against the rules of transfers; the transfer is forgotten.
        """
        match message:
            case Offer():
                return [], self._on_offer(message)
            case Grant():
                return [], self._on_grant(message)
            case Piece():
                return [], self._on_piece(message, bodies)
            case Pieced():
                return [self._on_pieced(message, bodies)], self.grant()
            case Declined():
                return [], self._on_declined(message)
            case _:
                return [(message, bodies)], []

    def take_returned(self) -> list[Returned]:
        """Return what of ours the other end has declined since the last call."""
        returned, self._returned = self._returned, []
        return returned

    def grant(self) -> list[Frames]:
        """Return grants for as much as there is room for.

        To be called when the budget has room again and this link is the first that waits.
        """
        frames: list[Frames] = []
        room = WINDOW_NBYTES - sum(sink.granted - sink.received for sink in self._sinks.values())
        for number, sink in self._sinks.items():
            if room <= 0 or not (sink.reserved or self._reserve(number, sink)):
                break
            more = min(room, sink.nbytes - sink.granted)
            if more:
                sink.granted += more
                room -= more
                frames.append([encode(Grant(number, sink.granted))])
        return frames

    def forget(self) -> None:
        """Drop every transfer, and give back what was reserved."""
        for number in list(self._sinks):
            self._drop(number)
        self._sources.clear()
        self._unoffered.clear()
        self._n_offered = 0
        self._declined.clear()

    # What we send.

    def _offer(self) -> list[Frames]:
        frames: list[Frames] = []
        while self._unoffered and self._n_offered < MAX_OFFERED:
            large = self._unoffered.popleft()
            self._n_offered += 1
            for number, body in zip(large.numbers, large.bodies, strict=True):
                if number:
                    self._sources[number] = _Source(large, body)
                    frames.append([encode(Offer(number, nbytes_of(body)))])
        return frames

    def _on_grant(self, grant: Grant) -> list[Frames]:
        source = self._sources.get(grant.transfer)
        if source is None:
            raise Malformed("bad_frame", f"no transfer {grant.transfer} is under way")
        header = encode(Piece(grant.transfer))
        frames: list[Frames] = [[header, piece] for piece in source.take(grant.upto)]
        if source.ended:
            del self._sources[grant.transfer]
            large = source.large
            large.n_unsent -= 1
            if not large.n_unsent:
                self._n_offered -= 1
                frames.append(large.frames())
                frames += self._offer()
        return frames

    def _on_declined(self, declined: Declined) -> list[Frames]:
        source = self._sources.get(declined.transfer)
        if source is None:
            raise Malformed("bad_frame", f"no transfer {declined.transfer} is under way")
        for number in source.large.numbers:
            self._sources.pop(number, None)
        self._n_offered -= 1
        self._returned.append(Returned(source.large.message, declined.text[:MAX_TEXT]))
        return self._offer()

    # What we receive.

    def _on_offer(self, offer: Offer) -> list[Frames]:
        if not offer.transfer or not offer.nbytes or offer.transfer in self._sinks:
            raise Malformed("bad_frame", f"not a new transfer: {offer.transfer}")
        if offer.transfer ^ 1 in self._declined:
            return []
        if offer.nbytes > self._max_incoming_nbytes:
            self._declined.append(offer.transfer)
            self._drop(offer.transfer ^ 1)
            text = f"a body of {offer.nbytes} bytes; at most {self._max_incoming_nbytes} are taken"
            return [[encode(Declined(offer.transfer, text))], *self.grant()]
        if len(self._sinks) >= 2 * MAX_OFFERED:
            raise Malformed("limit", f"more than {2 * MAX_OFFERED} transfers at a time")
        self._sinks[offer.transfer] = _Sink(offer.nbytes)
        return self.grant()

    def _on_piece(self, piece: Piece, bodies: tuple[Body, ...]) -> list[Frames]:
        sink = self._sinks.get(piece.transfer)
        if sink is None:
            if piece.transfer ^ 1 in self._declined:
                return []
            raise Malformed("bad_frame", f"a piece of an unknown transfer: {piece.transfer}")
        try:
            sink.add(bodies)
        except Malformed:
            self._drop(piece.transfer)
            raise
        return self.grant()

    def _on_pieced(
        self, pieced: Pieced, bodies: tuple[Body, ...]
    ) -> tuple[Message, tuple[Body, ...]]:
        own = iter(bodies)
        whole: list[Body | None] = [
            self._drop(number) if number else next(own, None) for number in pieced.transfers
        ]
        if next(own, None) is not None or None in whole:
            raise Malformed("bad_frame", "a message in pieces without all of its bodies")
        message = self._decode(pieced.header)
        if type(message) in TRANSFERS:
            raise Malformed("bad_header", "a transfer inside a transfer")
        return message, tuple(body for body in whole if body is not None)

    def _reserve(self, number: int, sink: _Sink) -> bool:
        if self._budget is not None:
            twin = self._sinks.get(number ^ 1)
            if twin is not None and twin.reserved:
                self._budget.nbytes += sink.nbytes
            elif not self._budget.take(self, sink.nbytes):
                return False
        sink.reserved = True
        return True

    def _drop(self, number: int) -> Body | None:
        """End an incoming transfer; return its body if it is whole."""
        sink = self._sinks.pop(number, None)
        if sink is None:
            return None
        if self._budget is not None:
            if sink.reserved:
                self._budget.nbytes -= sink.nbytes
            else:
                self._budget.leave(self)  # or the line would wait for nobody
        return sink.body()


class _Large:
    """A message that goes in pieces, with its bodies; ``numbers`` has 0 for those that do not."""

    def __init__(
        self, message: Message, header: bytes, numbers: list[int], bodies: tuple[Body, ...]
    ) -> None:
        self.message = message
        self.numbers = numbers
        self.bodies = bodies
        self.n_unsent = sum(number > 0 for number in numbers)
        self._header = header

    def frames(self) -> Frames:
        """Return the message itself, which follows its last piece."""
        small = [
            _one_buffer(body)
            for number, body in zip(self.numbers, self.bodies, strict=True)
            if not number
        ]
        return [encode(Pieced(self._header, tuple(self.numbers))), *small]


class _Source:
    """A body that we send: how far it went, and its next piece."""

    def __init__(self, large: _Large, body: Body) -> None:
        self.large = large
        self._pieces = cut(body)
        self._next: Buffer | None = next(self._pieces)
        self._sent = 0

    @property
    def ended(self) -> bool:
        return self._next is None

    def take(self, upto: int) -> Iterator[Buffer]:
        """Yield the next pieces that lie within the first ``upto`` bytes."""
        while self._next is not None and self._sent + len(self._next) <= upto:
            piece = self._next
            self._sent += len(piece)
            self._next = next(self._pieces, None)
            yield piece


class _Sink:
    """A body that we receive: 0 <= received <= granted <= nbytes, and granted only if reserved."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.granted = 0
        self.received = 0
        self.reserved = False
        self._pieces: list[Buffer] = []

    def add(self, bodies: tuple[Body, ...]) -> None:
        """Append a piece."""
        if len(bodies) != 1 or isinstance(bodies[0], tuple):
            raise Malformed("bad_frame", "a piece has one body")
        received = self.received + len(bodies[0])
        least = min(MIN_PIECE_NBYTES, self.nbytes - self.received)
        if not least <= len(bodies[0]) <= PIECE_NBYTES or received > self.granted:
            raise Malformed("limit", f"a piece of {len(bodies[0])} bytes does not fit")
        self._pieces.append(bodies[0])
        self.received = received

    def body(self) -> Body | None:
        if self.received < self.nbytes:
            return None
        if len(self._pieces) == 1:
            return bytes(self._pieces[0])
        return tuple(self._pieces)


def cut(body: Body) -> Iterator[Buffer]:
    """Cut a body into pieces of ``MIN_PIECE_NBYTES`` (but the last) to ``PIECE_NBYTES``.

    Nothing is copied but where a part of the body is smaller than a piece may be.
    """
    small: list[memoryview] = []  # of parts that wait for more
    n_small = 0
    for part in (body,) if isinstance(body, bytes) else body:
        view = memoryview(part).cast("B")
        if small:
            missing = MIN_PIECE_NBYTES - n_small
            small.append(view[:missing])
            n_small += small[-1].nbytes
            view = view[missing:]
            if n_small < MIN_PIECE_NBYTES:
                continue
            yield b"".join(small)
            small, n_small = [], 0
        while view.nbytes >= MIN_PIECE_NBYTES:
            yield view[:PIECE_NBYTES]
            view = view[PIECE_NBYTES:]
        if view.nbytes:
            small, n_small = [view], view.nbytes
    if small:
        yield small[0] if len(small) == 1 else b"".join(small)


def _one_buffer(body: Body) -> Buffer:
    return body if isinstance(body, bytes) else b"".join(body)
