"""What the user's function raised, brought home as what it was.

An exception is arbitrary code: its ``__reduce__``, ``__init__``, ``__str__`` may raise anything,
and many cannot be loaded again because their ``__init__`` wants other arguments than it stored.
That would show only where it arrives, too late. So the worker packs it, *opens its own parcel* as
the client will, and takes the first of these that comes out right:

1. the exception as it pickles itself;
2. its class, its ``args`` and every attribute, put together without its ``__init__``;
3. its class, or the nearest base that travels, and the attributes that do: what arrives is of both
   that class and `RemoteError`;
4. nothing but the summary (type, message, traceback): a `RemoteError`.

The server sees the summary and opaque bytes. What is no `Exception` (SystemExit,
KeyboardInterrupt, asyncio's CancelledError ...) and the StopIterations are orders to the program
that raises them; raised again in the client they would end it, or cut an iteration short without
a word. They always arrive as 4.
"""

from __future__ import annotations

import pickle
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeGuard, TypeVar

from dmap import pickling
from dmap.errors import RemoteError

__all__ = ["RemoteTraceback", "Summary", "annotate", "describe", "keep_results", "restore"]

TRACEBACK_NBYTES: Final = 64 * 1024
MESSAGE_NBYTES: Final = 8 * 1024
TYPE_NAME_NBYTES: Final = 256

PICKLED_NBYTES: Final = 8 * 2**20
"""A larger exception (say, with a data frame on it) goes without what is large on it."""

PART_NBYTES: Final = PICKLED_NBYTES // 4
"""Of such a one go the args, if no larger, and as many attributes as fit in as much again."""

_T = TypeVar("_T")

_ORDERS: Final = (StopIteration, StopAsyncIteration)
_HEAPTYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made at run time, not in C
_NOT_CARRIED: Final = vars(AttributeError)["obj"]

# Past any property or `__setattr__` of the user's class.
_set_args: Final = vars(BaseException)["args"].__set__
_set_cause: Final = vars(BaseException)["__cause__"].__set__


class Summary(NamedTuple):
    """An exception as text: what the wire, logs and other languages can read."""

    type_name: str
    message: str
    traceback_text: str


class RemoteTraceback(Exception):
    """The ``__cause__`` of an exception that came from a worker; ``str()`` is what was there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def describe(error: BaseException, tb_skip: int = 0) -> tuple[Summary, bytes]:
    """Make an exception ready to travel. Whatever the exception's own code does, this returns.

    Even SystemExit and KeyboardInterrupt from its methods are swallowed; only a method that never
    returns is a hang, which a time limit ends.

    Args:
        error: What the function raised.
        tb_skip: How many outer frames of the traceback are ours and not worth showing.

    Returns:
        The text, bounded and valid UTF-8, and at most `PICKLED_NBYTES` for `restore`, empty if
        only the text can travel.
    """
    summary = Summary(
        _bounded(_guarded(lambda: type_name(type(error)), "an exception"), TYPE_NAME_NBYTES),
        _bounded(_guarded(lambda: str(error), "<its __str__ raised>"), MESSAGE_NBYTES),
        _bounded(_guarded(lambda: _traceback_text(error, tb_skip), ""), TRACEBACK_NBYTES),
    )
    if not _may_be_raised(error):
        return summary, b""
    return summary, _guarded(lambda: _pack(error, summary), b"")


def restore(summary: Summary, pickled: bytes | memoryview) -> BaseException:
    """Return the exception that `describe` saw, with the remote traceback as its ``__cause__``.

    Runs the exception's own code, as unpickling does; if that fails here, what arrives is a
    `RemoteError`.
    """
    opened: object = None
    if pickled:
        try:
            opened = _open(pickled, summary)
        except KeyboardInterrupt:  # the user's, at this very moment
            raise
        except BaseException:
            opened = None
    error = opened if _may_be_raised(opened) else RemoteError(*summary)
    _set_cause(error, RemoteTraceback(summary.traceback_text))
    return error


def annotate(error: BaseException, index: int | None, host: str, attempt: int = 1) -> None:
    """Note on an exception where it comes from: ``item 17, on papag (attempt 2)``.

    Args:
        error: What goes to the user.
        index: Which item of the map; None for a job that is no item.
        host: Where it ran.
        attempt: Which attempt it was; the first is not mentioned.
    """
    note = f"on {host}" if index is None else f"item {index}, on {host}"
    if attempt > 1:
        note += f" (attempt {attempt})"
    try:
        error.add_note(note)
    except Exception:  # `__notes__` is no list, or the class forbids setting attributes
        _set_attribute(error, "__notes__", [note])


def keep_results(error: BaseException, results: Mapping[int, object]) -> None:
    """Hang the finished results (index -> value) on the exception that ends their map."""
    _set_attribute(error, "results", results)


def type_name(cls: type) -> str:
    """Return the dotted name of a class, as a traceback prints it."""
    if cls.__module__ in ("builtins", "__main__"):
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def _may_be_raised(error: object) -> TypeGuard[Exception]:
    """Return whether raising it in the client tells something and steers nothing."""
    return isinstance(error, Exception) and not isinstance(error, _ORDERS)


def _guarded(make: Callable[[], _T], otherwise: _T) -> _T:
    """Call code that may run the user's methods; they may raise what they like."""
    try:
        return make()
    except BaseException:
        return otherwise


def _traceback_text(error: BaseException, tb_skip: int) -> str:
    tb = error.__traceback__
    for _ in range(tb_skip):
        if tb is not None:
            tb = tb.tb_next
    # With causes, contexts, groups and notes.
    return "".join(traceback.format_exception(type(error), error, tb))


def _bounded(text: str, nbytes: int) -> str:
    """Cut the middle out of a text that is too long, and what UTF-8 cannot say."""
    encoded = str.encode(text, "utf-8", "backslashreplace")
    if len(encoded) > nbytes:
        mark = b" ... (%d bytes left out) ... " % len(encoded)
        half = max(0, nbytes - len(mark)) // 2
        mark = b" ... (%d bytes left out) ... " % (len(encoded) - 2 * half)
        encoded = encoded[:half] + mark + encoded[len(encoded) - half :]
    return encoded.decode("utf-8", "ignore")


def _pack(error: Exception, summary: Summary) -> bytes:
    """Return the best parcel that opens here as what it should, or nothing."""
    for cls, make in _parcels(error):
        parcel = _guarded(make, b"")
        if not 0 < len(parcel) <= PICKLED_NBYTES:
            continue
        copy = _guarded(partial(_open, parcel, summary), None)
        if type(copy) is cls or (isinstance(copy, RemoteError) and isinstance(copy, cls)):
            return parcel
    return b""


def _parcels(error: Exception) -> Iterator[tuple[type, Callable[[], bytes]]]:
    """Yield ways to pack an exception, best first, each with the class that it brings along."""
    cls = type(error)
    yield cls, partial(_pack_whole, error)
    args = _pickle(error.args)
    attributes = _attributes(error)
    pickled = _pickle_each(attributes)
    if args is not None and len(pickled) == len(attributes):
        yield cls, partial(_pack_parts, cls, args, pickled, True)
    for base in cls.__mro__:
        if base is Exception:
            break
        if issubclass(base, Exception):
            yield base, partial(_pack_parts, base, args, pickled, False)


def _pack_whole(error: Exception) -> bytes:
    pickled = _to_bytes(error)
    copy = pickling.loads(pickled)
    # BaseException's own pickle forgets what is in slots, and many a __reduce__ the notes.
    kept = _attributes(copy)
    forgotten = {
        name: value
        for name, value in _attributes(error).items()
        if name not in kept and (name not in vars(error) or name == "__notes__")
    }
    return pickle.dumps(("whole", pickled, _pickle_each(forgotten)))


def _pack_parts(
    cls: type[BaseException], args: bytes | None, attributes: dict[str, bytes], complete: bool
) -> bytes:
    return pickle.dumps(("parts", _to_bytes(cls), args, attributes, complete))


def _open(parcel: bytes | memoryview, summary: Summary) -> object:
    """Unpack what `_pack_whole` or `_pack_parts` made; the user's code runs and may raise.

    Each part was pickled by itself, so that one that fails takes no other along.
    """
    match pickle.loads(parcel):
        case ("whole", pickled, forgotten):
            copy = pickling.loads(pickled)
            for name, value in forgotten.items():
                _set_attribute(copy, name, pickling.loads(value))
            return copy
        case ("parts", pickled_cls, pickled_args, pickled_attributes, complete):
            cls = pickling.loads(pickled_cls)
            args = (summary.message,) if pickled_args is None else pickling.loads(pickled_args)
            attributes: dict[str, object] = {}
            for name, value in pickled_attributes.items():
                try:
                    attributes[name] = pickling.loads(value)
                except Exception:  # it could be loaded on the worker, so it wants a module there
                    complete = False
            if complete:
                return _put_together(cls, args, attributes)
            return _put_together(
                _of_both(cls),
                args,
                {**_remote(summary), **attributes, "_remote_text": summary.message},
            )
        case _:
            return None


def _put_together(
    cls: type[BaseException], args: tuple[object, ...], attributes: Mapping[str, object]
) -> BaseException:
    """Make an exception without its ``__init__`` (and its Python ``__new__``)."""
    in_c: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAPTYPE)
    error: BaseException = in_c.__new__(cls, *args)  # a group refuses to be made without them
    _set_args(error, args)
    for name, value in attributes.items():
        _set_attribute(error, name, value)
    return error


# their class -> the class of both; an entry lives as long as such an exception
_both: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def _of_both(cls: type[BaseException]) -> type[BaseException]:
    """Return the class that is both ``cls`` and `RemoteError`, and looks like ``cls``."""
    both = _both.get(cls)
    if both is None:

        def fill(namespace: dict[str, object]) -> None:
            namespace["__module__"] = cls.__module__
            namespace["__qualname__"] = cls.__qualname__
            namespace["__doc__"] = cls.__doc__
            namespace["__str__"] = lambda self: self._remote_text
            # The class of both cannot be found by name where this goes next.
            namespace["__reduce__"] = lambda self: (
                _put_both_together,
                (cls, self.args, _attributes(self)),
            )

        both = types.new_class(cls.__name__, (RemoteError, cls), exec_body=fill)
        _both[cls] = both
    return both


def _put_both_together(
    cls: type[BaseException], args: tuple[object, ...], attributes: Mapping[str, object]
) -> BaseException:
    return _put_together(_of_both(cls), args, attributes)


def _remote(summary: Summary) -> dict[str, object]:
    """Return the attributes of a `RemoteError`."""
    return vars(RemoteError(*summary))


def _attributes(error: BaseException) -> dict[str, object]:
    """Return what is set on an exception: its ``__dict__``, slots, and members of C classes."""
    found: dict[str, object] = {}
    for base in type(error).__mro__:
        in_c = not base.__flags__ & _HEAPTYPE
        for name, member in vars(base).items():
            # `AttributeError.obj` is whatever lacked the attribute, of any size.
            if isinstance(member, types.MemberDescriptorType) and member is not _NOT_CARRIED:
                with suppress(AttributeError):
                    value = member.__get__(error)
                    # Members of C classes read as None when unset, and set to None they are set.
                    if value is not None or not in_c:
                        found[name] = value
    found.update(vars(error))
    return found


def _set_attribute(error: object, name: str, value: object) -> None:
    # Not by setattr: a frozen dataclass refuses it. Some members of C classes cannot be set.
    with suppress(AttributeError, TypeError):
        object.__setattr__(error, name, value)


def _to_bytes(value: object) -> bytes:
    body = pickling.dump(value)
    return body if isinstance(body, bytes) else b"".join(body)


def _pickle(value: object) -> bytes | None:
    """Pickle a value if it can also be loaded again and is of a size to be sent along."""
    try:
        pickled = _to_bytes(value)
        pickling.loads(pickled)
    except BaseException:  # the value's own code runs
        return None
    return pickled if len(pickled) <= PART_NBYTES else None


def _pickle_each(values: Mapping[str, object]) -> dict[str, bytes]:
    """Pickle those values that travel, the smallest first, as far as there is room."""
    room = PART_NBYTES
    pickled: dict[str, bytes] = {}
    candidates = [(name, _pickle(value)) for name, value in values.items()]
    for name, each in sorted(candidates, key=lambda pair: len(pair[1] or b"")):
        if each is not None and len(each) <= room:
            pickled[name] = each
            room -= len(each)
    return pickled
