"""Large bodies pass a link whole, small messages overtake them, and no order of events jams it."""

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobserver.pieces import (
    MAX_OFFERED,
    MAX_TEXT,
    MIN_PIECE_NBYTES,
    WINDOW_NBYTES,
    Budget,
    Frames,
    Link,
    Returned,
    cut,
)
from jobserver.protocol import (
    BODY_NBYTES,
    MAX_FRAME_NBYTES,
    PIECE_NBYTES,
    Body,
    Declined,
    Grant,
    JobData,
    JobException,
    Malformed,
    Message,
    Offer,
    Piece,
    Pieced,
    WorkData,
    decode_to_peer,
    decode_to_server,
    encode,
    nbytes_of,
)

MIB = 2**20
PLENTY = 2**40


def as_bytes(body: Body) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body)


def pattern(nbytes: int) -> bytes:
    """Return bytes of which no two pieces are equal."""
    block = bytes(range(251))
    return (block * (nbytes // len(block) + 1))[:nbytes]


class Wire:
    """Two ends of a connection and what is between them. The left end is the server's."""

    def __init__(self, left: Link | None = None, right: Link | None = None) -> None:
        self.left = left or Link(PLENTY, decode=decode_to_server)
        self.right = right or Link(PLENTY)
        self.to_left: deque[Frames] = deque()
        self.to_right: deque[Frames] = deque()
        self.at_left: list[tuple[Message, tuple[Body, ...]]] = []
        self.at_right: list[tuple[Message, tuple[Body, ...]]] = []
        self.most_under_way = 0

    def step_left(self) -> None:
        """Let the left end take in one message."""
        message, bodies = opened(self.to_left.popleft(), decode_to_server)
        whole, answers = self.left.incoming(message, bodies)
        self.at_left += whole
        self.to_right += answers

    def step_right(self) -> None:
        message, bodies = opened(self.to_right.popleft(), decode_to_peer)
        whole, answers = self.right.incoming(message, bodies)
        self.at_right += whole
        self.to_left += answers

    def settle(self) -> None:
        while self.to_left or self.to_right:
            if self.to_left:
                self.step_left()
            if self.to_right:
                self.step_right()
            under_way = sum(sum(map(len, frames)) for frames in self.to_left)
            self.most_under_way = max(self.most_under_way, under_way)


def opened(frames: Frames, decode) -> tuple[Message, tuple[Body, ...]]:  # type: ignore[no-untyped-def]
    """Read frames as a socket would hand them over: copied, and of a lawful size."""
    assert 1 <= len(frames) <= 3
    assert all(len(frame) <= MAX_FRAME_NBYTES for frame in frames)
    return decode(bytes(frames[0])), tuple(map(bytes, frames[1:]))


def test_a_small_message_passes_at_once() -> None:
    wire = Wire()
    wire.to_left += wire.right.outgoing(WorkData(7), (b"x" * BODY_NBYTES,))
    assert len(wire.to_left) == 1
    wire.step_left()
    assert wire.at_left == [(WorkData(7), (b"x" * BODY_NBYTES,))]
    assert wire.left.idle
    assert wire.right.idle


def test_a_large_body_arrives_whole_and_nothing_stays_behind() -> None:
    wire = Wire()
    body = pattern(2 * PIECE_NBYTES + 5)
    wire.to_left += wire.right.outgoing(WorkData(7), (body,))
    wire.settle()
    [(message, (received,))] = wire.at_left
    assert message == WorkData(7)
    assert [len(part) for part in received] == [PIECE_NBYTES, PIECE_NBYTES, 5]  # type: ignore[arg-type]
    assert as_bytes(received) == body
    assert wire.left.idle
    assert wire.right.idle


def test_a_body_of_one_piece_arrives_as_bytes() -> None:
    wire = Wire()
    wire.to_right += wire.left.outgoing(JobData(7), (pattern(PIECE_NBYTES),))
    wire.settle()
    assert wire.at_right == [(JobData(7), (pattern(PIECE_NBYTES),))]


def test_a_small_message_overtakes_a_large_one() -> None:
    wire = Wire()
    wire.to_left += wire.right.outgoing(WorkData(1), (bytes(3 * PIECE_NBYTES),))
    wire.to_left += wire.right.outgoing(WorkData(2), (b"small",))
    wire.settle()
    assert [message for message, _ in wire.at_left] == [WorkData(2), WorkData(1)]


@pytest.mark.parametrize("sizes", [(3, 2 * MIB), (2 * MIB, 3), (2 * MIB, 9 * MIB)])
def test_two_bodies_keep_their_places(sizes: tuple[int, int]) -> None:
    wire = Wire()
    message = JobException(1, "E", "m", "t", 0, 1, "host", 1, 0.0)
    first, second = map(pattern, sizes)
    wire.to_right += wire.left.outgoing(message, (first, second))
    wire.settle()
    [(received, bodies)] = wire.at_right
    assert received == message
    assert list(map(as_bytes, bodies)) == [first, second]


def test_a_link_is_never_more_than_its_window_behind() -> None:
    wire = Wire()
    for ticket in range(3):
        wire.to_left += wire.right.outgoing(WorkData(ticket), (bytes(30 * MIB),))
    wire.settle()
    assert len(wire.at_left) == 3
    assert wire.most_under_way <= WINDOW_NBYTES + 1000


def test_a_sender_offers_a_bounded_number_of_messages_at_a_time() -> None:
    wire = Wire()
    n = 2 * MAX_OFFERED + 1
    for ticket in range(n):
        wire.to_left += wire.right.outgoing(WorkData(ticket), (bytes(2 * MIB),))
    assert len(wire.to_left) == MAX_OFFERED
    wire.settle()
    assert [message for message, _ in wire.at_left] == [WorkData(ticket) for ticket in range(n)]


def test_what_is_forgotten_is_not_sent() -> None:
    wire = Wire()
    wire.to_left += wire.right.outgoing(WorkData(1), (bytes(2 * MIB),))
    wire.right.forget()
    assert wire.right.idle
    wire.step_left()
    with pytest.raises(Malformed, match="no transfer 2"):
        wire.step_right()


def test_a_link_that_forgot_offers_as_much_as_before() -> None:
    link = Link(PLENTY)
    for _ in range(2):
        offers = [link.outgoing(WorkData(1), (bytes(2 * MIB),)) for _ in range(MAX_OFFERED)]
        assert all(offers)
        link.forget()


@pytest.mark.parametrize(
    ("parts", "pieces"),
    [
        ((20 * MIB,), (8 * MIB, 8 * MIB, 4 * MIB)),
        ((16 * MIB + 1,), (8 * MIB, 8 * MIB, 1)),
        ((8 * MIB, 8 * MIB, 4 * MIB), (8 * MIB, 8 * MIB, 4 * MIB)),
        ((100, 9 * MIB), (MIB, 8 * MIB, 100)),
        ((MIB // 2,) * 5, (MIB, MIB, MIB // 2)),
        ((8 * MIB + 7, 0, 8 * MIB), (8 * MIB, MIB, 7 * MIB + 7)),
    ],
)
def test_a_body_is_cut_into_pieces(parts: tuple[int, ...], pieces: tuple[int, ...]) -> None:
    body = tuple(map(pattern, parts))
    found = list(cut(body))
    assert tuple(map(len, found)) == pieces
    assert b"".join(found) == b"".join(body)


@given(st.lists(st.integers(0, 3 * MIB), min_size=1, max_size=8))
def test_all_pieces_but_the_last_have_the_least_size(parts: list[int]) -> None:
    pieces = list(cut(tuple(map(bytes, parts))))
    assert sum(map(len, pieces)) == sum(parts)
    assert all(MIN_PIECE_NBYTES <= len(piece) <= PIECE_NBYTES for piece in pieces[:-1])
    assert all(0 < len(piece) <= PIECE_NBYTES for piece in pieces[-1:])


def test_nothing_is_copied_of_one_large_body() -> None:
    body = bytes(20 * MIB)
    assert all(isinstance(piece, memoryview) and piece.obj is body for piece in cut(body))


# What the other end does not take.


def test_a_body_over_the_limit_is_declined_when_it_is_offered() -> None:
    link = Link(10 * MIB)
    whole, [[answer]] = link.incoming(Offer(2, 10 * MIB + 1), ())
    assert not whole
    text = "a body of 10485761 bytes; at most 10485760 are taken"
    assert decode_to_peer(bytes(answer)) == Declined(2, text)
    assert link.incoming(Offer(4, 10 * MIB), ())[1] == [[encode(Grant(4, 10 * MIB))]]


def test_a_declined_message_comes_back_to_its_sender() -> None:
    wire = Wire(Link(10 * MIB, decode=decode_to_server))
    wire.to_left += wire.right.outgoing(WorkData(1), (bytes(11 * MIB),))
    wire.settle()
    [(message, text)] = wire.right.take_returned()
    assert message == WorkData(1)
    assert "at most 10485760" in text
    assert wire.right.take_returned() == []
    assert wire.right.idle
    assert not wire.at_left


def test_other_messages_pass_those_that_are_declined() -> None:
    wire = Wire(Link(10 * MIB, decode=decode_to_server))
    for _ in range(2 * MAX_OFFERED):
        wire.to_left += wire.right.outgoing(WorkData(1), (bytes(11 * MIB),))
    wire.to_left += wire.right.outgoing(WorkData(2), (bytes(2 * MIB),))
    wire.settle()
    assert [message for message, _ in wire.at_left] == [WorkData(2)]
    assert len(wire.right.take_returned()) == 2 * MAX_OFFERED


@pytest.mark.parametrize("sizes", [(11, 9), (9, 11), (11, 11)])
def test_both_bodies_of_a_message_are_declined_together(sizes: tuple[int, int]) -> None:
    budget = Budget(20 * MIB)
    wire = Wire(Link(10 * MIB, decode=decode_to_server, budget=budget))
    first, second = (bytes(size * MIB) for size in sizes)
    wire.to_left += wire.right.outgoing(WorkData(1), (first, second))
    wire.settle()
    assert len(wire.right.take_returned()) == 1
    assert wire.right.idle
    assert budget.nbytes == 0
    wire.to_left += wire.right.outgoing(WorkData(2), (bytes(2 * MIB), bytes(2 * MIB)))
    wire.settle()
    assert [message for message, _ in wire.at_left] == [WorkData(2)]


def test_a_decline_makes_room_for_what_waits() -> None:
    link = Link(20 * MIB)
    link.incoming(Offer(2, WINDOW_NBYTES), ())
    assert link.incoming(Offer(4, MIB), ())[1] == []
    _, [_, grant] = link.incoming(Offer(3, 21 * MIB), ())
    assert grant == [encode(Grant(4, MIB))]


def test_a_link_that_forgot_remembers_no_decline() -> None:
    link = Link(10 * MIB)
    link.incoming(Offer(2, 11 * MIB), ())
    assert not link.idle  # or its owner would not keep it
    link.forget()
    assert link.idle
    assert link.incoming(Offer(3, MIB), ())[1] == [[encode(Grant(3, MIB))]]


def test_of_a_long_answer_only_the_beginning_is_kept() -> None:
    link = Link(PLENTY)
    link.outgoing(WorkData(1), (bytes(2 * MIB),))
    link.incoming(Declined(2, "x" * 65_536), ())
    assert link.take_returned() == [Returned(WorkData(1), "x" * MAX_TEXT)]


# What a peer may not do.


def refuse(link: Link, message: Message, *bodies: bytes) -> str:
    with pytest.raises(Malformed) as caught:
        link.incoming(message, bodies)
    return caught.value.code


@pytest.mark.parametrize("offer", [Offer(0, 5), Offer(2, 0), Offer(4, 5)])
def test_an_offer_that_is_none_is_refused(offer: Offer) -> None:
    link = Link(PLENTY)
    link.incoming(Offer(4, MIB), ())
    assert refuse(link, offer) == "bad_frame"


def test_more_offers_than_a_sender_may_have_are_refused() -> None:
    link = Link(PLENTY)
    for number in range(2, 2 + 2 * MAX_OFFERED):
        link.incoming(Offer(number, MIB), ())
    assert refuse(link, Offer(99, MIB)) == "limit"


@pytest.mark.parametrize(
    "bodies", [(), (b"",), (b"x",), (bytes(2 * MIB), b""), (bytes(2 * MIB + 1),)]
)
def test_a_piece_that_does_not_fit_ends_its_transfer(bodies: tuple[bytes, ...]) -> None:
    link = Link(PLENTY)
    link.incoming(Offer(2, 2 * MIB), ())
    assert refuse(link, Piece(2), *bodies) in ("bad_frame", "limit")
    assert link.idle


def test_a_piece_beyond_what_was_granted_is_refused() -> None:
    budget = Budget(MIB)
    waiting = Link(PLENTY, budget=budget)
    link = Link(PLENTY, budget=budget)
    link.incoming(Offer(2, MIB), ())
    assert waiting.incoming(Offer(2, MIB), ()) == ([], [])
    assert refuse(waiting, Piece(2), bytes(MIB)) == "limit"


def test_a_piece_of_no_transfer_is_refused() -> None:
    assert refuse(Link(PLENTY), Piece(2), bytes(MIB)) == "bad_frame"


def test_a_grant_of_no_transfer_is_refused() -> None:
    assert refuse(Link(PLENTY), Grant(2, MIB)) == "bad_frame"


def test_no_transfer_can_be_declined_that_is_not_under_way() -> None:
    assert refuse(Link(PLENTY), Declined(2, "no")) == "bad_frame"


def test_a_message_ahead_of_its_body_is_refused_and_its_transfer_ended() -> None:
    link = Link(PLENTY)
    link.incoming(Offer(2, 2 * MIB), ())
    link.incoming(Piece(2), (bytes(MIB),))
    assert refuse(link, Pieced(encode(JobData(1)), (2,))) == "bad_frame"
    assert link.idle


@pytest.mark.parametrize("own", [(), (b"one", b"two")])
def test_a_pieced_message_has_as_many_bodies_as_it_says(own: tuple[bytes, ...]) -> None:
    assert refuse(Link(PLENTY), Pieced(encode(JobData(1)), (0,)), *own) == "bad_frame"


@pytest.mark.parametrize("header", [b"\xff", encode(Offer(2, 5)), encode(Pieced(b"", (1,)))])
def test_what_is_no_message_does_not_come_in_pieces(header: bytes) -> None:
    assert refuse(Link(PLENTY), Pieced(header, (0,)), b"body") == "bad_header"


# The budget.


def receive(link: Link, number: int, nbytes: int) -> None:
    """Let a link receive the rest of a transfer of at most one piece, and its message."""
    link.incoming(Piece(number), (bytes(nbytes),))
    link.incoming(Pieced(encode(JobData(1)), (number,)), ())


def test_a_transfer_waits_until_the_budget_has_room_for_all_of_it() -> None:
    budget = Budget(5 * MIB)
    first, second = Link(PLENTY, budget=budget), Link(PLENTY, budget=budget)
    first.incoming(Offer(2, 3 * MIB), ())
    assert second.incoming(Offer(2, 3 * MIB), ())[1] == []
    assert budget.first_waiting() is second
    assert second.grant() == []
    receive(first, 2, 3 * MIB)
    assert second.grant() == [[encode(Grant(2, 3 * MIB))]]
    assert budget.first_waiting() is None
    assert budget.nbytes == 3 * MIB


def test_a_small_transfer_does_not_pass_a_large_one_that_waits() -> None:
    budget = Budget(5 * MIB)
    first, large, small = (Link(PLENTY, budget=budget) for _ in range(3))
    first.incoming(Offer(2, 3 * MIB), ())
    large.incoming(Offer(2, 5 * MIB), ())
    assert small.incoming(Offer(2, MIB), ())[1] == []


def test_a_transfer_beyond_the_whole_budget_has_its_turn_alone() -> None:
    budget = Budget(5 * MIB)
    first, huge = Link(PLENTY, budget=budget), Link(PLENTY, budget=budget)
    first.incoming(Offer(2, MIB), ())
    assert huge.incoming(Offer(2, 7 * MIB), ())[1] == []
    receive(first, 2, MIB)
    assert huge.grant() == [[encode(Grant(2, 7 * MIB))]]


def test_the_second_body_of_a_message_does_not_wait_for_the_first() -> None:
    budget = Budget(5 * MIB)
    link = Link(PLENTY, budget=budget)
    link.incoming(Offer(2, 4 * MIB), ())
    assert link.incoming(Offer(3, 4 * MIB), ())[1] == [[encode(Grant(3, 4 * MIB))]]
    assert link.incoming(Offer(4, MIB), ())[1] == []


def test_a_forgotten_link_gives_its_bytes_back_and_leaves_the_line() -> None:
    budget = Budget(5 * MIB)
    first, second = Link(PLENTY, budget=budget), Link(PLENTY, budget=budget)
    first.incoming(Offer(2, 5 * MIB), ())
    second.incoming(Offer(2, 5 * MIB), ())
    second.forget()
    assert budget.first_waiting() is None
    first.forget()
    assert budget.nbytes == 0


def test_a_refused_transfer_leaves_the_line() -> None:
    budget = Budget(MIB)
    first, second = Link(PLENTY, budget=budget), Link(PLENTY, budget=budget)
    first.incoming(Offer(2, MIB), ())
    second.incoming(Offer(2, MIB), ())
    refuse(second, Piece(2), bytes(MIB))
    assert budget.first_waiting() is None


@given(st.data())
def test_in_any_order_of_events_all_messages_arrive_whole_or_come_back(
    data: st.DataObject,
) -> None:
    """Three links share a budget; each step one end of one of them takes in one message."""
    budget = Budget(data.draw(st.integers(1, 40 * MIB), label="budget"))
    limit = 15 * MIB
    wires = [Wire(Link(limit, decode=decode_to_server, budget=budget)) for _ in range(3)]
    sizes = st.lists(st.integers(0, 20 * MIB), min_size=1, max_size=2)
    plans = data.draw(
        st.lists(st.tuples(st.sampled_from(wires), sizes), max_size=6), label="messages"
    )
    sent: dict[int, list[int]] = {}
    while True:
        ready = [wire.step_left for wire in wires if wire.to_left]
        ready += [wire.step_right for wire in wires if wire.to_right]
        if plans and (not ready or data.draw(st.booleans())):
            wire, nbytes = plans.pop()
            sent[len(sent)] = nbytes
            wire.to_left += wire.right.outgoing(WorkData(len(sent) - 1), tuple(map(bytes, nbytes)))
        elif ready:
            data.draw(st.sampled_from(ready))()
        else:
            break
        while (waiting := budget.first_waiting()) and (grants := waiting.grant()):
            next(wire for wire in wires if wire.left is waiting).to_right += grants
    returned = {wire: wire.right.take_returned() for wire in wires}
    for message, _ in itertools.chain.from_iterable(returned.values()):
        assert isinstance(message, WorkData)
        assert max(sent.pop(message.handle)) > limit
    received = [entry for wire in wires for entry in wire.at_left]
    assert len(received) == len(sent)
    for message, bodies in received:
        assert isinstance(message, WorkData)
        assert list(map(nbytes_of, bodies)) == sent[message.handle]
    assert budget.nbytes == 0
    assert all(wire.right.idle for wire in wires)
    assert all(wire.left.idle for wire in wires if not returned[wire])
