"""Several messages in one: what goes together, and what comes out at the other end."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobserver.pieces import Frames
from jobserver.protocol import (
    MAX_TOGETHER,
    GrabJobs,
    Heartbeat,
    Malformed,
    Message,
    Noop,
    PutBlob,
    Together,
    WorkAccepted,
    WorkComplete,
    WorkDone,
    decode_to_peer,
    decode_to_server,
    encode,
)
from jobserver.together import MAX_NBYTES, fold, unfold

RESULT = WorkComplete(1, [WorkDone(7, 2)])


def folded(*entries: Frames) -> list[Frames]:
    """Fold all that waits, message by message."""
    waiting = deque(entries)
    messages: list[Frames] = []
    while waiting:
        frames, n = fold(waiting)
        messages.append(frames)
        for _ in range(n):
            waiting.popleft()
    return messages


def unfolded(frames: Frames) -> list[tuple[Message, tuple[bytes, ...]]]:
    """Read a message as a server does."""
    message = decode_to_server(frames[0])
    bodies = tuple(map(bytes, frames[1:]))
    if isinstance(message, Together):
        return list(unfold(message, bodies, decode_to_server))
    return [(message, bodies)]


def test_a_result_and_a_grab_go_together() -> None:
    (frames,) = folded([encode(RESULT), b"ok"], [encode(GrabJobs(4))])
    assert unfolded(frames) == [(RESULT, (b"ok",)), (GrabJobs(4), ())]


def test_the_bodies_are_those_of_the_message_that_has_them() -> None:
    (frames,) = folded([encode(Heartbeat())], [encode(RESULT), b"one", b"two"], [encode(Noop())])
    assert frames[1:] == [b"one", b"two"]
    assert decode_to_peer(frames[0]).bodied == 1


def test_a_message_by_itself_stays_as_it_is() -> None:
    frames = [encode(RESULT), b"ok"]
    assert fold([frames]) == (frames, 1)


def test_two_messages_with_bodies_do_not_go_together() -> None:
    first, second = folded([encode(RESULT), b"ok"], [encode(RESULT), b"ok"])
    assert unfolded(first) == unfolded(second) == [(RESULT, (b"ok",))]


def test_long_headers_do_not_go_together() -> None:
    long = WorkComplete(1, [WorkDone(n, 0) for n in range(MAX_NBYTES // 4)])
    assert len(folded([encode(long)], [encode(Noop())], [encode(Noop())])) == 2


def test_no_more_than_the_limit_go_together() -> None:
    messages = folded(*[[encode(Heartbeat())]] * (MAX_TOGETHER + 1))
    assert [len(unfolded(frames)) for frames in messages] == [MAX_TOGETHER, 1]


@given(
    st.lists(
        st.sampled_from(
            [
                (GrabJobs(3),),
                (Heartbeat(1.0),),
                (RESULT, b"ab"),
                (PutBlob(bytes(32)), b"blob"),
            ]
        ),
        min_size=1,
        max_size=200,
    )
)
def test_what_is_folded_comes_out_in_its_order(entries: list[tuple[Message, bytes]]) -> None:
    messages = folded(*[[encode(message), *bodies] for message, *bodies in entries])
    found = [entry for frames in messages for entry in unfolded(frames)]
    assert found == [(message, tuple(bodies)) for message, *bodies in entries]


def test_a_together_inside_a_together_is_refused() -> None:
    (inner,) = folded([encode(Noop())], [encode(Noop())])
    (outer,) = folded([encode(Noop())], inner)
    message = decode_to_peer(outer[0])
    assert isinstance(message, Together)
    with pytest.raises(Malformed, match="inside"):
        list(unfold(message, (), decode_to_peer))


def test_bodies_that_belong_to_none_of_the_messages_are_refused() -> None:
    (frames,) = folded([encode(Noop())], [encode(WorkAccepted([]))])
    message = decode_to_peer(frames[0])
    assert isinstance(message, Together)
    message.bodied = 2
    with pytest.raises(Malformed, match="none"):
        list(unfold(message, (b"body",), decode_to_peer))
