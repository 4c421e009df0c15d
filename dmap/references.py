"""How a body says that its large buffers lie in memory of its sender's machine.

Such a body, a *reference*, takes the place of one with all bytes in it::

    02 | n | n x (pid, fd, nbytes, device, inode) | pad | a body with n external buffers

The memory is what descriptor ``fd`` of process ``pid`` names. Device and inode tell it from what
may have those numbers later. Integers are little-endian, 64 bits but for ``n`` (32).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dmap.errors import ProtocolError

if TYPE_CHECKING:
    from jobserver.protocol import Body

MARK: Final = 0x02
ALIGNMENT: Final = 64
MAX_NAMED: Final = 64
"""Buffers that one body may refer to; a process may often have 1024 descriptors only."""

_HEAD: Final = struct.Struct("<BxxxI")
_NAMED: Final = struct.Struct("<5Q")


class Named(NamedTuple):
    """A buffer in memory of another process, and how that is found."""

    pid: int
    fd: int
    nbytes: int
    device: int
    inode: int


class Reference(bytes):
    """A reference as its sender keeps it.

    Attributes:
        whole: The body that it stands for: while that is kept, the memory is.
        shared: How many bytes of that it refers to.
    """

    whole: Body
    shared: int


class Opened(tuple[Any, ...]):
    """A reference as its receiver has it: a body, and its external buffers. To be loaded."""

    __slots__ = ()


def make(names: Sequence[Named], rest: Body, whole: Body) -> Reference:
    """Return the reference that stands for ``whole``: ``rest`` is that without what is named."""
    head = _HEAD.pack(MARK, len(names)) + b"".join(_NAMED.pack(*name) for name in names)
    head += bytes(-len(head) % ALIGNMENT)
    reference = Reference(b"".join((head, *((rest,) if isinstance(rest, bytes) else rest))))
    reference.whole = whole
    reference.shared = sum(name.nbytes for name in names)
    return reference


def read(body: Body) -> tuple[list[Named], memoryview]:
    """Return what a reference names, and the body that should want it as its external buffers.

    Raises:
        ProtocolError: this is no reference.
    """
    view = memoryview(body if isinstance(body, bytes) else b"".join(body))
    if view.nbytes < _HEAD.size or view[0] != MARK:
        raise ProtocolError(f"a body of {view.nbytes} bytes is no reference")
    n = _HEAD.unpack_from(view)[1]
    end = _HEAD.size + n * _NAMED.size
    if n > MAX_NAMED or view.nbytes < end:
        raise ProtocolError(f"a reference of {view.nbytes} bytes cannot name {n} buffers")
    names = [Named(*fields) for fields in _NAMED.iter_unpack(view[_HEAD.size : end])]
    return names, view[end + -end % ALIGNMENT :]
