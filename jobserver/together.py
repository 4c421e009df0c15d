"""Several messages in one, where they go the same way at the same time.

Between two threads that sleep, a message costs some tens of microseconds, whatever it says: to
hand it to libzmq, to wake the other end, to poll and to receive. So a result goes out with the
grab for the next job behind it, and an acknowledgement with whatever goes its way. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

import msgspec

from jobserver.pieces import Frames
from jobserver.protocol import MAX_TOGETHER, Body, Buffer, Malformed, Message, Together, encode

M = TypeVar("M", bound=Message)

MAX_NBYTES: Final = 65_536
"""Of the headers together; longer ones cost more to copy than a message of their own."""


def fold(waiting: Iterable[Frames]) -> tuple[Frames, int]:
    """Return the one message that says as many of these as may go together, and how many.

    They are the first of those that wait, of which there is at least one. At most one of them has
    bodies.
    """
    folded: list[Frames] = []
    bodied = -1
    nbytes = 0
    for frames in waiting:
        nbytes += len(frames[0])
        if folded and (nbytes > MAX_NBYTES or (bodied >= 0 and len(frames) > 1)):
            break
        if len(frames) > 1:
            bodied = len(folded)
        folded.append(frames)
        if len(folded) == MAX_TOGETHER:
            break
    if len(folded) == 1:
        return folded[0], 1
    bodied = max(bodied, 0)
    headers = [msgspec.Raw(frames[0]) for frames in folded]
    return [encode(Together(headers, bodied)), *folded[bodied][1:]], len(folded)


def unfold(
    together: Together, bodies: tuple[Body, ...], decode: Callable[[Buffer], M | Together]
) -> Iterator[tuple[M, tuple[Body, ...]]]:
    """Yield the messages that came as one, each decoded when its turn has come.

    Raises:
        Malformed: the next one is no message, or several again. Those before it have been yielded.
    """
    if bodies and together.bodied >= len(together.headers):
        raise Malformed("bad_frame", "these bodies belong to none of the messages")
    for number, header in enumerate(together.headers):
        message = decode(header)
        if isinstance(message, Together):
            raise Malformed("bad_header", "a Together inside a Together")
        yield message, bodies if number == together.bodied else ()
