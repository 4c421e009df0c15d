"""Large buffers of arguments and results, in memory that other processes here can open.

Who makes a body copies each large buffer once, which is due in any case: into a file that lies
nowhere but in memory (a memfd) instead of bytes. It *keeps* that as it would keep the bytes, and
can send it by the socket like any other. To a process on the same machine it sends a *reference*
(`references`) instead, and that process maps the same pages, found by way of ``/proc``::

    sender                                          receiver
      keep: write, seal, map (the kept body) ...
      refer -------- pid, fd, nbytes, inode ------>   open_reference: look, map privately
      ... drop the body: close, unmap    <-- acknowledged, by way of the server

Nothing has a name that could stay behind: the kernel frees the memory when the sender has closed
its descriptor (or has died) and the receiver has dropped its last array over it.

A receiver may write to what it mapped; the pages that it writes to become its own. It asks for
seals before it maps anything: a file that could be shortened would kill who reads it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
import weakref
from typing import Any, Final

from dmap import pickling, references
from dmap.errors import ProtocolError
from dmap.references import MAX_NAMED, Named, Opened, Reference
from jobserver.machine import machine_id
from jobserver.protocol import Body, Buffer
from jobserver.shared import libc

SHARED_NBYTES: Final = 2**20
"""Smaller buffers go by the socket: there a copy of each costs less than a file."""
MAX_KEPT: Final = 256
"""Files that a process keeps for others; beyond these, buffers are bytes as ever."""

_SEALS: Final = sum(
    getattr(fcntl, name, 0) for name in ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW")
)

# Address of a mapping -> the descriptor that it is of, and its name but for the process.
_kept: Final[dict[int, tuple[int, int, int]]] = {}


class CannotOpen(Exception):
    """The memory that a reference names is not there, or not what it should be."""


def own(body: Body) -> Body:
    """Return a body that shares no memory with what it was made from. At most one copy."""
    if isinstance(body, bytes):
        return body
    return tuple(part if type(part) is bytes else _copy(part) for part in body)


def refer(body: Body) -> Reference | None:
    """Return what to send instead of a body of `own` to a process on this machine.

    None: there is no large buffer in it. It is good for as long as the body, which it keeps.
    """
    if not isinstance(body, tuple) or not machine_id():
        return None
    rest, buffers = pickling.split_off(body, _is_kept, MAX_NAMED)
    if not buffers:
        return None
    pid = os.getpid()
    names: list[Named] = []
    for buffer in buffers:
        fd, device, inode = _kept[_address(buffer)]
        names.append(Named(pid, fd, buffer.nbytes, device, inode))
    return references.make(names, rest, body)


def open_reference(body: Body) -> Opened:
    """Return what a reference refers to, without a copy. The arrays over it are writable.

    The memory lives for as long as they do, whatever becomes of the sender.

    Raises:
        CannotOpen: it is not there any more, or this process may not have it.
    """
    try:
        if not machine_id():
            raise CannotOpen("this process shares no memory")
        names, rest = references.read(body)
        if pickling.count_external(rest) != len(names):
            raise CannotOpen(f"it names {len(names)} buffers, and its body wants others")
        return Opened((rest, *(_open(name) for name in names)))
    except (ProtocolError, OSError, OverflowError) as error:
        raise CannotOpen(str(error)) from error


def _copy(part: Buffer) -> Buffer:
    """Return a copy of a buffer, in shared memory if it is large and there is some."""
    view = memoryview(part)
    if view.nbytes >= SHARED_NBYTES and machine_id() and len(_kept) < MAX_KEPT:
        try:
            return _keep(view.cast("B"))
        except OSError:
            pass  # no memory of this kind is left, or no descriptor
    return bytes(view)


def _keep(view: memoryview) -> memoryview:
    nbytes = view.nbytes
    fd = os.memfd_create("dmap-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Not by a mapping: that takes twice as long, since each page is filled with zeros first.
        while view.nbytes:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        found = os.fstat(fd)
        array = _map(fd, nbytes, mmap.PROT_READ)
    except BaseException:
        os.close(fd)
        raise
    _kept[ctypes.addressof(array)] = (fd, found.st_dev, found.st_ino)
    return memoryview(array).cast("B").toreadonly()


def _is_kept(part: Buffer) -> bool:
    return isinstance(part, memoryview) and _address(part) in _kept


def _address(view: Any) -> int:
    """Return where the memory of a view of `_keep` lies; 0 for others."""
    return ctypes.addressof(view.obj) if isinstance(view.obj, ctypes.Array) else 0


def _open(name: Named) -> memoryview:
    path = f"/proc/{name.pid}/fd/{name.fd}"
    # Ahead of the opening, which may block or do something where this is another file by now.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CannotOpen(f"{path} is no memory")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if (found.st_size, found.st_dev, found.st_ino) != name[2:]:
            raise CannotOpen(f"{path} is other memory")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0  # it is a file of another kind
        if seals & _SEALS != _SEALS:
            raise CannotOpen(f"{path} is not sealed")
        array = _map(fd, name.nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
    return memoryview(array).cast("B")


def _map(fd: int, nbytes: int, protection: int) -> Any:
    """Map a file privately; it stays mapped for as long as there is a view of the array.

    If it is kept, its descriptor is closed then.
    """
    address = libc().mmap(None, nbytes, protection, mmap.MAP_PRIVATE, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {nbytes} bytes: {os.strerror(number)}")
    array = (ctypes.c_ubyte * nbytes).from_address(address)
    # At exit somebody may still read it.
    weakref.finalize(array, _unmap, address, nbytes).atexit = False
    return array


def _unmap(address: int, nbytes: int) -> None:
    # In this order: what is unmapped may be mapped, and kept, anew by another thread.
    kept = _kept.pop(address, None)
    if kept is not None:
        os.close(kept[0])
    libc().munmap(address, nbytes)
