"""Values to bodies and back: cloudpickle where it must be, bare pickle where it may be.

A body is one of two things, told apart by its first byte::

    80 ...                                      a pickle: its own first opcode (PROTO) is the mark
    01 | n | nbytes of pickle | n x nbytes      a pickle with its n buffers out of band (PEP 574)
       | pickle | pad | buffer | pad | buffer ...

Each buffer starts at a multiple of 64 bytes, so that an array over it is as aligned as the body
itself is. Integers are little-endian, 64 bits but for ``n`` (32).

By reference or by value: bare pickle writes an instance of a class of ``__main__`` *without an
error*, as a reference that no worker can follow. So it is used only for what holds no class at
all: exact builtin scalars, and short containers of them. Everything else goes through a Pickler
(in C) whose ``reducer_override`` sees every class and function. Classes and functions that
can be imported go by reference, others by value.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import struct
import sys
from collections.abc import Callable, Collection, Sequence
from types import AsyncGeneratorType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeAlias, cast

from dmap.errors import ClosureError, ProtocolError

if TYPE_CHECKING:
    from jobserver.protocol import Body, Buffer

    Reduced: TypeAlias = str | tuple[Any, ...]

__all__ = ["dump", "dumps", "dumps_items", "loads"]

PROTOCOL: Final = 5
PROTO_OPCODE: Final = 0x80
WITH_BUFFERS: Final = 0x01
ALIGNMENT: Final = 64

INLINE_NBYTES: Final = 4096
"""Smaller buffers are copied into the pickle: up to here a copy costs less than a buffer of its own
(20 arrays of 4 KiB, both ways: 49 us inline, 56 us out of band; of 16 KiB: 210 us and 63 us)."""

JOINED_NBYTES: Final = 2**20
"""Shorter bodies are returned as one piece of memory; longer ones are not copied."""

_HEADER: Final = struct.Struct("<BxxxIQ")
_ZEROS: Final = bytes(ALIGNMENT)

_PLAIN: Final = frozenset((int, float, bool, type(None), str, complex, range))
_ONE_PASS: Final = (GeneratorType, AsyncGeneratorType, map, filter, zip)
_SHORT: Final = 8  # up to this length, looking at each element costs less than making a Pickler


class _Write(Protocol):
    """What a Pickler wants of a file."""

    def write(self, part: Any, /) -> object: ...


class _Parts:
    """What a Pickler writes, as it is: frames of some 64 KiB, larger bytes objects uncopied."""

    __slots__ = ("buffers", "inline_nbytes", "pickled", "write")

    def __init__(self, inline_nbytes: int) -> None:
        self.pickled: list[Buffer] = []
        self.write = self.pickled.append
        self.buffers: list[memoryview] = []
        self.inline_nbytes = inline_nbytes

    def take(self, buffer: pickle.PickleBuffer) -> bool:
        """Keep a buffer out of band, or return true to have it in the pickle."""
        raw = buffer.raw()
        if raw.nbytes < self.inline_nbytes:
            return True
        self.buffers.append(raw)
        return False


def dump(value: object, inline_nbytes: int = INLINE_NBYTES) -> Body:
    """Pickle a value, and let whatever its own code raises through.

    Args:
        value: What to pickle.
        inline_nbytes: Buffers shorter than this are copied into the pickle. 0 puts every array out
            of band, which `loads` needs in order to make all of them read-only.

    Returns:
        Bytes if it is short, else a tuple of parts in order. The parts may be the value's own
        memory: send them, or join them, before anyone changes the value.
    """
    if type(value) in _PLAIN or _is_plain(value):
        return pickle.dumps(value, PROTOCOL)
    file = _Parts(inline_nbytes)
    _pickler()(file, file.take).dump(value)
    parts = file.pickled
    if file.buffers:
        parts = _lay_out(parts, file.buffers)
    elif len(parts) == 1 and type(parts[0]) is bytes:
        return parts[0]
    if sum(memoryview(part).nbytes for part in parts) < JOINED_NBYTES:
        return b"".join(parts)
    return tuple(parts)


def dumps(value: object, what: str = "the value") -> Body:
    """Pickle a value for the other side; see `dump` for the shape and ownership of the body.

    Args:
        value: What to pickle.
        what: What the message of an error calls it.

    Raises:
        ClosureError: it cannot be pickled; the reason is chained.
    """
    try:
        return dump(value)
    except MemoryError:
        raise
    except Exception as error:  # the value's own code runs
        raise ClosureError(refusal(what, value, error)) from error


def dumps_items(
    items: Sequence[object], start: int = 0, what: str = "item", head: tuple[object, ...] = ()
) -> Body:
    """Pickle consecutive items, or their results, into one body.

    It loads as the sequence, or with ``head`` as the tuple ``(*head, items)``. A list, tuple or
    range is loaded as the same type, any other sequence as a list.

    Args:
        items: Consecutive ones of a map.
        start: Index of the first of them in the map, for errors.
        what: What the message of an error calls one of them.
        head: What goes before them.

    Raises:
        ClosureError: one cannot be pickled. Its ``index`` says which.
    """
    if type(items) not in (list, tuple, range):
        items = list(items)
    try:
        return dump((*head, items) if head else items)
    except MemoryError:
        raise
    except Exception as error:  # the items' own code runs
        for index, item in enumerate(items, start):
            try:
                dump(item)
            except Exception as own:
                raise ClosureError(refusal(f"{what} {index}", item, own), index) from own
        # Each goes alone: the list around it was the one level of nesting too many, say.
        raise ClosureError(refusal(f"the list from {what} {start} on", items, error)) from error


def loads(body: Body | Buffer, readonly: bool = False) -> Any:
    """Load what `dump` made.

    Args:
        body: Bytes, a contiguous view, or the parts of a body in order.
        readonly: If true, arrays are read-only views of the body and nothing is copied. Else they
            are writable. A long writable body is then not copied either: it may become the memory
            of the array that fills most of it, so the caller gives it away.

    Raises:
        ProtocolError: this is no body, or a part of one is missing.
        Exception: whatever the value's own code raises on loading.
    """
    if isinstance(body, tuple):
        body = bytearray().join(body)
    if body and body[0] == PROTO_OPCODE:
        return pickle.loads(body)

    view = memoryview(body)
    if view.nbytes < _HEADER.size or view[0] != WITH_BUFFERS:
        raise ProtocolError(f"a body of {view.nbytes} bytes starts with neither of its two marks")
    _, n_buffers, pickle_nbytes = _HEADER.unpack_from(view)
    start = _HEADER.size + 8 * n_buffers
    if view.nbytes < start:
        raise ProtocolError(f"a body of {view.nbytes} bytes is cut short in its header")
    lengths = struct.unpack_from(f"<{n_buffers}Q", view, _HEADER.size)
    end = start + pickle_nbytes
    pickled = view[start:end]
    buffers: list[Buffer] = []
    for nbytes in lengths:
        first = end + -end % ALIGNMENT
        end = first + nbytes
        buffer = view[first:end]
        if readonly:
            buffers.append(buffer.toreadonly())
        elif view.readonly or 2 * nbytes < view.nbytes:
            # Memory of its own: a small array that the user keeps must not keep the body alive.
            buffers.append(bytearray(buffer))
        else:
            buffers.append(buffer)
    if end != view.nbytes:
        raise ProtocolError(f"a body of {view.nbytes} bytes should have {end}")
    return pickle.loads(pickled, buffers=buffers)


def refusal(what: str, value: object, error: Exception) -> str:
    """Say that ``value`` cannot be pickled, why, and what its owner can do."""
    name = short_name(type(value).__qualname__)
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        return (
            f"{what} ({name}) is nested too deeply to be pickled: flatten it, or raise "
            f"sys.setrecursionlimit() (now {sys.getrecursionlimit()})"
        )
    if isinstance(value, _ONE_PASS):
        return f"{what} is a {name}, which cannot be pickled: make a list of it first"
    return (
        f"{what} ({name}) cannot be pickled: {reason(error)}; send what it is made from (a path, "
        "an address, plain values) and make it where it is used"
    )


def short_name(qualname: str) -> str:
    """Return a qualified name without the functions that it was defined in."""
    return qualname.rpartition("<locals>.")[2]


def reason(error: Exception) -> str:
    """Return the type and message of an error whose ``__str__`` may be the user's."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _is_plain(value: object, depth: int = 2) -> bool:
    """Return whether looking at a few elements is enough to know that no class is among them."""
    kind = type(value)
    if kind is dict:
        mapping = cast("dict[object, object]", value)
        if len(mapping) > _SHORT or not _PLAIN.issuperset(map(type, mapping)):
            return False
        elements: Collection[object] = mapping.values()
    elif kind is tuple or kind is list:
        elements = cast("Collection[object]", value)
        if len(elements) > _SHORT:
            return False
    else:
        return False
    if _PLAIN.issuperset(map(type, elements)):
        return True
    if depth == 1:
        return False
    # No all(): its generator would cost as much as is won.
    for element in elements:
        if type(element) not in _PLAIN and not _is_plain(element, depth - 1):
            return False
    return True


def _lay_out(pickled: list[Buffer], buffers: list[memoryview]) -> list[Buffer]:
    pickle_nbytes = sum(len(part) for part in pickled)
    lengths = [buffer.nbytes for buffer in buffers]
    head = _HEADER.pack(WITH_BUFFERS, len(buffers), pickle_nbytes)
    head += struct.pack(f"<{len(buffers)}Q", *lengths)
    parts: list[Buffer] = [head, *pickled]
    end = len(head) + pickle_nbytes
    for buffer in buffers:
        if pad := -end % ALIGNMENT:
            parts.append(_ZEROS[:pad])
        parts.append(buffer)
        end += pad + buffer.nbytes
    return parts


@functools.cache
def _pickler() -> Callable[[_Write, Callable[[pickle.PickleBuffer], bool]], pickle.Pickler]:
    """Make the Pickler class on first use: cloudpickle takes 15 ms to import."""
    import cloudpickle

    registered = copyreg.dispatch_table.get

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        """cloudpickle's, less its cost for objects that are neither class nor function.

        A list of 100 dates takes 35 us instead of 103 (bare pickle: 27).
        """

        # Theirs is a ChainMap with copyreg's table, searched in Python for each object.
        dispatch_table: ClassVar[dict[type, Callable[[Any], Any]]] = dict(
            cloudpickle.Pickler.dispatch_table.maps[0]
        )
        dispatch_table[type(functools.lru_cache(len))] = _reduce_cached

        def __init__(
            self, file: _Write, buffer_callback: Callable[[pickle.PickleBuffer], bool]
        ) -> None:
            super().__init__(file, PROTOCOL, buffer_callback)
            # Whoever holds an array has imported numpy; nobody else pays for it.
            ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
            if ndarray is not None:
                self.dispatch_table[ndarray] = _reduce_array

        def reducer_override(self, obj: object) -> Any:
            kind = type(obj)
            if kind is FunctionType or issubclass(kind, type):
                return super().reducer_override(obj)
            reduce = registered(kind)
            return NotImplemented if reduce is None else reduce(obj)

    return Pickler


def _reduce_array(array: Any) -> Reduced:
    # Out of band, a read-only array would be read-only where it arrives. A row of a captured array
    # is one, and the user who gets it as a result wants to write to it.
    reduced: Reduced = array.__reduce_ex__(PROTOCOL if array.flags.writeable else 4)
    return reduced


def _reduce_cached(cached: Any) -> Reduced:
    # Its own __reduce__ is a reference by name, also into __main__.
    name = getattr(cached, "__qualname__", "")
    found: object = sys.modules.get(cached.__module__)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is cached and cached.__module__ != "__main__":
        return str(name)
    return _cache_anew, (cached.__wrapped__, cached.cache_parameters())


def _cache_anew(func: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    cached: Callable[..., Any] = functools.lru_cache(**parameters)(func)
    return cached
