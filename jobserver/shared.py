"""Memory that the processes of one machine share by naming it.

A *sealed* memfd is a file that lies nowhere but in memory, and that nobody, its maker included, can
write to, shorten, lengthen or unseal any more. Its holder names it to a peer, who opens it by way
of the holder's entry in ``/proc``: no byte of it goes through a socket, and no file has to be
cleaned up after anybody::

    holder                                            peer on the same machine
    make(parts) -> fd
    name(fd)    -> Reference  --- in some message -->  open(reference) -> fd of its own
                                                       map_private(fd) -> the bytes
    close(fd)                                          close(fd)

The kernel frees the memory with the last descriptor and the last mapping of it, however their
processes end. A peer that has opened it needs its holder no more.

A reference is what a stranger says, so ``open`` believes none of it. The token lies in the name
that the memory was made with, which is looked at before anything is opened, and once more behind
it: another file that has that number by now, in a process that has that pid by now, is not even
touched.

All of it is calls of the system; nothing here knows of messages or jobs.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import mmap
import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from jobserver.protocol import Buffer, Reference, SharedBody

if TYPE_CHECKING:
    from queue import SimpleQueue

__all__ = [
    "Reference",
    "Sealing",
    "hold",
    "make",
    "map_private",
    "name",
    "open",
    "require",
    "share",
]

TOKEN_NBYTES: Final = 16
MAX_HELD: Final = 256
"""Bodies that one process holds so. It may often have 1024 descriptors only."""
STEP_NBYTES: Final = 4 * 2**20
"""Written and hashed at a time: smaller, and the two threads wait for each other more often."""

_SEALS: Final = sum(
    getattr(fcntl, one, 0)
    for one in ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")
)
_NAME: Final = "dmap-"
_LINK: Final = f"/memfd:{_NAME}"
_DELETED: Final = " (deleted)"  # what the kernel adds to the name of a file without a directory


class Sealing:
    """Memory that is written from front to back, and then sealed.

    Raises:
        OSError: this system has no such memory, or no descriptor is left.

    Attributes:
        fd: Its descriptor, until ``close``, or until the caller of ``seal`` closes it.
        nbytes: What was written.
    """

    __slots__ = ("fd", "nbytes")

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError(errno.ENOSYS, "this system has no memory that can be sealed")
        name = _NAME + os.urandom(TOKEN_NBYTES).hex()
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.nbytes = 0

    def write(self, part: Buffer) -> None:
        """Append a copy of these bytes.

        Raises:
            OSError: there is no memory for them.
        """
        view = memoryview(part).cast("B")
        while view.nbytes:
            n = os.write(self.fd, view)
            self.nbytes += n
            view = view[n:]

    def seal(self) -> int:
        """Return the descriptor of the memory, which nobody can change any more; it is yours."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        return self.fd

    def close(self) -> None:
        """Give up what was written; not after ``seal``."""
        os.close(self.fd)


def make(parts: Iterable[Buffer]) -> int:
    """Return a descriptor of sealed memory with a copy of these parts, end to end.

    It is the caller's to close.

    Raises:
        OSError: there is no such memory here, or not as much.
    """
    sealing = Sealing()
    try:
        for part in parts:
            sealing.write(part)
        return sealing.seal()
    except BaseException:
        sealing.close()
        raise


def name(fd: int) -> Reference:
    """Return how a peer on this machine can open memory that ``make`` made, or ``open`` opened.

    It holds for as long as this process has the descriptor.

    Raises:
        OSError: this is no such memory, or this system cannot tell.
    """
    link = os.readlink(f"/proc/self/fd/{fd}")
    if not (link.startswith(_LINK) and link.endswith(_DELETED)):
        raise OSError(errno.EINVAL, f"descriptor {fd} is of no memory that can be shared")
    token = bytes.fromhex(link[len(_LINK) : -len(_DELETED)])
    return Reference(os.getpid(), fd, os.fstat(fd).st_size, token)


def open(reference: Reference) -> int:
    """Return a descriptor of one's own of the memory that a peer named: to read, and to close.

    What comes back is sealed and has the size and the token that the reference says. Whether its
    bytes are the right ones is for the caller to find out.

    Raises:
        OSError: it cannot be opened from here, or is not what the reference says. The text says
            which.
    """
    path = f"/proc/{reference.pid}/fd/{reference.fd}"
    try:
        _require_token(path, reference)
        # Not to wait, and not to be given a terminal: the number may have changed hands just now.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        what = f"the memory of process {reference.pid} cannot be opened: {error.strerror}"
        raise OSError(error.errno, what) from error
    try:
        _require_token(f"/proc/self/fd/{fd}", reference)
        require(fd, reference.nbytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_token(path: str, reference: Reference) -> None:
    if os.readlink(path) != f"{_LINK}{reference.token.hex()}{_DELETED}":
        raise OSError(errno.ESTALE, f"its descriptor {reference.fd} is of something else")


def require(fd: int, nbytes: int) -> None:
    """Refuse a descriptor of what is not sealed, or not of this size.

    Whoever sent it could change or shorten the memory under one's hands.

    Raises:
        OSError: it is one of these.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0  # not a memfd at all
    if seals & _SEALS != _SEALS:
        raise OSError(errno.EINVAL, "this memory is not sealed")
    size = os.fstat(fd).st_size
    if size != nbytes:
        raise OSError(errno.EINVAL, f"this memory has {size} bytes and should have {nbytes}")


def map_private(fd: int, *, writable: bool = False) -> memoryview:
    """Return sealed memory as a view; the descriptor stays the caller's and may be closed.

    The memory stays for as long as there is a view of it, or an array over one. Its ``obj`` is
    the same for all of them, and may be referred to weakly. No page is copied before it is
    written to.

    Args:
        fd: Of memory that is sealed, so that nobody can shorten it.
        writable: Whether one may write to the view; what is written is one's own.

    Raises:
        OSError: it cannot be mapped; nothing of no bytes can.
    """
    import ctypes  # who maps nothing does not need it

    nbytes = os.fstat(fd).st_size
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    # Not mmap.mmap, which keeps a descriptor for each. Not MAP_SHARED: kernels before 6.7 refuse
    # that of memory sealed against writing. Unwritten private pages are shared as well.
    address = libc().mmap(None, nbytes, access, mmap.MAP_PRIVATE, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {nbytes} bytes: {os.strerror(number)}")
    array = (ctypes.c_ubyte * nbytes).from_address(address)
    # At exit somebody may still read it.
    weakref.finalize(array, libc().munmap, address, nbytes).atexit = False
    view = memoryview(array).cast("B")
    return view if writable else view.toreadonly()


def hold(fd: int, view: memoryview | None = None) -> SharedBody:
    """Return sealed memory as a body, which holds the descriptor from now on.

    A view that there is of all of it need not be made again.

    It is closed, and the memory unmapped, when nobody has a view of it any more.

    Raises:
        OSError: this process holds too many, or it cannot be mapped or named. The descriptor is
            closed.
    """
    try:
        _require_room()
        view = map_private(fd) if view is None else view
        body = SharedBody((view,))
        body.memory = name(fd)
    except BaseException:
        os.close(fd)
        raise
    _held.add(fd)
    weakref.finalize(view.obj, _let_go, fd).atexit = False
    return body


_held: Final[set[int]] = set()  # descriptors


def _require_room() -> None:
    if len(_held) >= MAX_HELD:
        raise OSError(errno.EMFILE, f"this process holds {MAX_HELD} such memories already")


def _let_go(fd: int) -> None:
    _held.discard(fd)  # first: another thread may be given the number as soon as it is closed
    os.close(fd)


def share(part: Buffer) -> tuple[SharedBody, bytes]:
    """Return a copy of these bytes in sealed memory, and the sha256 of that copy.

    Both are made at once where there are two cores, since neither needs the GIL. The digest is of
    what lies in the memory: another thread may write to the bytes meanwhile.

    Raises:
        OSError: there is no such memory here, or not as much, or this process holds too many.
    """
    import queue  # who only opens what others share does not need these
    import threading

    _require_room()
    total = hashlib.sha256()
    written: SimpleQueue[int] = queue.SimpleQueue()
    view = memoryview(part).cast("B")
    sealing = Sealing()
    try:
        os.ftruncate(sealing.fd, view.nbytes)
        memory = map_private(sealing.fd)
        hashing = threading.Thread(target=_hash, args=(memory, total, written), daemon=True)
        hashing.start()
        try:
            for start in range(0, view.nbytes, STEP_NBYTES):
                sealing.write(view[start : start + STEP_NBYTES])
                written.put(sealing.nbytes)
        finally:
            written.put(-1)
            hashing.join()
        fd = sealing.seal()
    except BaseException:
        sealing.close()
        raise
    return hold(fd, memory), total.digest()


def _hash(memory: memoryview, total: hashlib._Hash, written: SimpleQueue[int]) -> None:
    """Take in what lies in memory, as far as it was written, until that is -1."""
    start = 0
    while (end := written.get()) >= 0:
        total.update(memory[start:end])
        start = end


@functools.cache
def libc() -> Any:
    """Return the C library, with the two functions that map and unmap memory."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,  # off_t, where there are no options for large files
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
