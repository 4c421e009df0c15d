"""The blobs of one host: they come to it once, and its processes share the memory of large ones.

A child asks its supervisor, over a socket that only the two have, for what its job names and it
does not have. The supervisor fetches from the job's server what is not on this host yet, and keeps
it for the next who asks::

    child                                supervisor                              server
      | Ask(number, server, boot, blobs)     |                                      |
      | -----------------------------------> | FetchBlob, once a blob               |
      |                                      | -----------------------------------> |
      | Answer(number, blob, ...)            | <----------------------------------- |
      | <----------------------------------- |                                 Blob |

A small blob lies in the answer itself. For a larger one a descriptor of *sealed* memory comes
along: a file that lies nowhere but in memory (a memfd), and that nobody, its maker included, can
write to, shorten or unseal any more. So all children map the same pages. A child keeps them for as
long as it has views of them, whatever becomes of the supervisor; they are gone with the last who
has them.

Where there is no such memory (macOS), or no descriptor is left, an answer comes in pieces and each
child has a copy of its own.

Neither end ever blocks. What a child does not read costs the supervisor a few names.
"""

from __future__ import annotations

import _socket  # the module around it takes a child 2.5 ms to import
import os
import struct
import sys
import weakref
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

from jobserver import shared
from jobserver.protocol import BlobId

if TYPE_CHECKING:
    import socket

INLINE_NBYTES: Final = 64 * 2**10
"""Smaller blobs, and pieces of others, lie in the answer: a socket holds some 200 KB."""
SMALL_NBYTES: Final = 4 * 2**20
"""What a child keeps of small blobs. Of large ones it keeps those that somebody uses."""
MAX_WANTED: Final = 64
"""Blobs that a job may name."""


# --- sealed memory ----------------------------------------------------------------------------


class Sealed:
    """Bytes in memory that nobody can change any more.

    Attributes:
        fd: its descriptor, until ``close``.
        nbytes: its size.
    """

    __slots__ = ("fd", "nbytes")

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes

    def close(self) -> None:
        """Give the descriptor up. Who has mapped the memory keeps it."""
        os.close(self.fd)


def open_sealed(fd: int, nbytes: int) -> memoryview:
    """Return sealed memory as a read-only view, and close the descriptor in any case.

    `jobserver.shared.map_private` says how long the memory stays.

    Raises:
        OSError: it is not sealed, or not of this size, or it cannot be mapped.
    """
    try:
        shared.require(fd, nbytes)
        return shared.map_private(fd)
    finally:
        os.close(fd)


# --- what the two ends say --------------------------------------------------------------------


class Ask(msgspec.Struct, array_like=True):
    """child > supervisor: I need these for a job that this life of a server gave me.

    It takes the place of the child's earlier one.
    """

    number: int
    server: int  # its index
    boot: str
    blobs: Annotated[list[BlobId], Meta(min_length=1, max_length=MAX_WANTED)]


class Answer(msgspec.Struct, array_like=True):
    """supervisor > child: here is one of them, or its next piece; or why it is not to be had."""

    number: int  # of the ask
    blob: bytes
    nbytes: int = 0  # of the whole
    is_sealed: bool = False  # a descriptor comes along
    piece: bytes = b""
    refusal: str = ""


FD: Final = struct.Struct("i")
_CLOEXEC: Final = getattr(_socket, "MSG_CMSG_CLOEXEC", 0)
ANSWER_NBYTES: Final = INLINE_NBYTES + 4096
encode: Final = msgspec.msgpack.Encoder().encode
_read_answer: Final = msgspec.msgpack.Decoder(Answer).decode


def make_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a socket that keeps messages whole: the supervisor's, the child's."""
    import socket

    kind = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
    pair = socket.socketpair(socket.AF_UNIX, kind)
    for end in pair:
        end.setblocking(False)
        if sys.platform != "linux":  # where a datagram may have 2 KB, unless one says so
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * ANSWER_NBYTES)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * ANSWER_NBYTES)
    return pair


# --- a child's end ----------------------------------------------------------------------------


class ChildBlobs:
    """The blobs that one child has, and how it gets those that it has not.

    Args:
        fd: the child's end of `make_pair`, which this owns.

    Attributes:
        fd: as above, for a poller: there is something to ``receive`` when it can be read.
        refusal: why what was wanted last is not to be had; empty if it may still come.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.refusal = ""
        self._socket = _socket.socket(fileno=fd)
        self._number = 0
        self._ask: bytes | None = None  # still to be sent
        self._wanted: tuple[bytes, ...] = ()
        self._found: dict[bytes, bytes | memoryview] = {}  # of what is wanted
        self._pieces: dict[bytes, bytearray] = {}  # of what is wanted: as far as it came
        self._small: dict[bytes, bytes] = {}  # least recently used first
        self._small_nbytes = 0
        # blob -> the array that all views of it are of, while there are any
        self._mapped: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()

    def want(self, server: int, boot: str, blobs: tuple[bytes, ...]) -> None:
        """Say what is needed from now on, for a job of that life of the server.

        What is not here is asked for. What was wanted before no longer is.
        """
        self.forget()
        self._wanted = blobs
        for blob in blobs:
            if (body := self._get(blob)) is not None:
                self._found[blob] = body
        missing = [blob for blob in dict.fromkeys(blobs) if blob not in self._found]
        if missing:
            self._ask = encode(Ask(self._number, server, boot, missing))
            self.flush()

    def flush(self) -> None:
        """Send the ask, if the socket did not take it before."""
        if self._ask is not None:
            try:
                self._socket.send(self._ask)
            except BlockingIOError:
                return
            self._ask = None

    def take(self) -> list[bytes | memoryview] | None:
        """Return all that is wanted, in order, once it is here."""
        if not all(blob in self._found for blob in self._wanted):
            return None
        bodies = [self._found[blob] for blob in self._wanted]
        self.forget()
        return bodies

    def forget(self) -> None:
        """Want nothing any more."""
        self._number += 1
        self._ask = None
        self._wanted = ()
        self._found.clear()
        self._pieces.clear()
        self.refusal = ""

    def receive(self) -> bool:
        """Take in what came; return whether the supervisor is still there."""
        while True:
            try:
                packed, controls, _, _ = self._socket.recvmsg(
                    ANSWER_NBYTES, _socket.CMSG_SPACE(FD.size), _CLOEXEC
                )
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if not packed:
                return False
            fds = [FD.unpack(control[2])[0] for control in controls]
            answer = _read_answer(packed)
            if answer.number == self._number:
                self._on_answer(answer, fds)
            for fd in fds:  # of an answer that came too late, say
                os.close(fd)

    def close(self) -> None:
        """Close the socket. What was taken stays."""
        self._socket.close()

    def _on_answer(self, answer: Answer, fds: list[int]) -> None:
        blob, nbytes = answer.blob, answer.nbytes
        if answer.refusal:
            self.refusal = answer.refusal
        elif answer.is_sealed and not fds:
            self.refusal = "this process has too many open files to take a blob"
        elif answer.is_sealed:
            try:
                view = open_sealed(fds.pop(), nbytes)
            except OSError as error:
                self.refusal = f"a blob of {nbytes} bytes is not to be had: {error}"
            else:
                self._mapped[blob] = view.obj
                self._found[blob] = view
        elif len(answer.piece) == nbytes:
            self._found[blob] = answer.piece
            self._keep_small(blob, answer.piece)
        else:
            body = self._pieces.setdefault(blob, bytearray())
            body += answer.piece
            if len(body) == nbytes:
                self._found[blob] = memoryview(self._pieces.pop(blob)).toreadonly()

    def _keep_small(self, blob: bytes, body: bytes) -> None:
        self._small[blob] = body
        self._small_nbytes += len(body)
        while self._small_nbytes > SMALL_NBYTES:
            self._small_nbytes -= len(self._small.pop(next(iter(self._small))))

    def _get(self, blob: bytes) -> bytes | memoryview | None:
        """Return a blob that is here."""
        small = self._small.pop(blob, None)
        if small is not None:
            self._small[blob] = small
            return small
        mapped = self._mapped.get(blob)
        return None if mapped is None else memoryview(mapped).cast("B").toreadonly()
