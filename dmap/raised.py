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

Its causes and contexts, and the members of a group, are packed each by itself, so that one that
does not travel takes no other along. A chain may end where it began; what arrives has the same
shape. It hangs behind the remote traceback, which is text and has all of it in print::

    error.__cause__                   the RemoteTraceback
    error.__cause__.__cause__         what the function's ``raise ... from`` named
    error.__cause__.__context__       what it was handling
    error.exceptions[0].__cause__     that of a group's first member

The server sees the summary and opaque bytes. What is no `Exception` (SystemExit,
KeyboardInterrupt, asyncio's CancelledError ...) and the StopIterations are orders to the program
that raises them; raised again in the client they would end it, or cut an iteration short without
a word. What was raised always arrives as 4 if it is one of these. Behind others they are what they
were, since nobody raises them.
"""

from __future__ import annotations

import pickle
import sys
import traceback
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeGuard, TypeVar

from dmap import namespaces, pickling, sources
from dmap.errors import RemoteError

__all__ = [
    "RemoteTraceback",
    "Summary",
    "advise",
    "annotate",
    "describe",
    "keep_results",
    "restore",
    "set_attribute",
]

TRACEBACK_NBYTES: Final = 64 * 1024
MESSAGE_NBYTES: Final = 8 * 1024
TYPE_NAME_NBYTES: Final = 256

PICKLED_NBYTES: Final = 8 * 2**20
"""A larger exception (say, with a data frame on it) goes without what is large on it."""

PART_NBYTES: Final = PICKLED_NBYTES // 4
"""Of such a one go the args, if no larger, and as many attributes as fit in as much again."""

MAX_LINKS: Final = 16
"""So many causes and contexts are followed from an exception, and from each member of a group."""
MAX_NESTED: Final = 16
"""So deep in groups are members packed by themselves."""
MAX_ERRORS: Final = 1024
"""So many exceptions are packed together. A group whose members are too many pickles itself."""

LINK_NBYTES: Final = 512
"""What each of them costs beside its parcel and its text, at most."""

READ_ONLY: Final = (
    "arrays that a function captures are shared by all workers of a host, and read-only: "
    "copy one in the function (a = a.copy()) before writing to it"
)

_T = TypeVar("_T")

_ORDERS: Final = (StopIteration, StopAsyncIteration)
_HEAPTYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made at run time, not in C
_NOT_CARRIED: Final = (
    vars(AttributeError)["obj"],  # whatever lacked the attribute, of any size
    vars(BaseExceptionGroup)["exceptions"],  # which it is made with
    vars(BaseExceptionGroup)["message"],
    vars(BaseException)["__suppress_context__"],  # which goes with the links
)

# Past any property or `__setattr__` of the user's class.
_args_of: Final = vars(BaseException)["args"]
_cause_of: Final = vars(BaseException)["__cause__"]
_context_of: Final = vars(BaseException)["__context__"]
_suppressed_of: Final = vars(BaseException)["__suppress_context__"]
_members_of: Final = vars(BaseExceptionGroup)["exceptions"]
_message_of: Final = vars(BaseExceptionGroup)["message"]


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


def describe(
    error: BaseException, tb_skip: int = 0, lines: sources.Lines | None = None
) -> tuple[Summary, bytes]:
    """Make an exception ready to travel. Whatever the exception's own code does, this returns.

    Even SystemExit and KeyboardInterrupt from its methods are swallowed; only a method that never
    returns is a hang, which a time limit ends.

    Args:
        error: What the function raised.
        tb_skip: How many outer frames of the traceback are ours and not worth showing.
        lines: Source lines of what travelled by value, for the traceback.

    Returns:
        The text, bounded and valid UTF-8, and at most `PICKLED_NBYTES` for `restore`, empty if
        only the text can travel.
    """
    summary = Summary(
        *_type_and_message(error),
        _bounded(_traceback_text(error, tb_skip, lines or {}), TRACEBACK_NBYTES),
    )
    return summary, _guarded(lambda: _pack_all(error, summary), b"")


def restore(summary: Summary, pickled: bytes | memoryview) -> BaseException:
    """Return the exception that `describe` saw, with the remote traceback as its ``__cause__``.

    What had caused it there hangs behind that. Runs the exceptions' own code, as unpickling does;
    where that fails here, what arrives is a `RemoteError`.
    """
    links: Sequence[_Link] = ()
    made: Sequence[BaseException] = ()
    if pickled:
        try:
            links, made = _open_all(pickled, summary)
        except KeyboardInterrupt:  # the user's, at this very moment
            raise
        except BaseException:
            links = made = ()
    error = made[0] if made and _may_be_raised(made[0]) else RemoteError(*summary)
    text = RemoteTraceback(summary.traceback_text)
    for link, one in zip(links, (text, *made[1:]), strict=False):
        _hang(one, link, (error, *made[1:]))
    _cause_of.__set__(error, text)
    return error


def advise(error: BaseException) -> None:
    """Note on what a function raised, as its worker sees it, what to do if we know."""
    if (
        type(error) is ValueError
        and "numpy" in sys.modules
        and "read-only" in _guarded(lambda: str(error), "")
    ):
        annotate(error, READ_ONLY)
    elif type(error) is ModuleNotFoundError and error.name:
        annotate(error, namespaces.missing(error))


def annotate(error: BaseException, note: str) -> None:
    """Add a note to an exception, behind those that it has."""
    try:
        error.add_note(note)
    except Exception:  # `__notes__` is no list, or the class forbids setting attributes
        notes: list[object] = _guarded(lambda: list(vars(error)["__notes__"]), [])
        set_attribute(error, "__notes__", [*notes, note])


def keep_results(error: BaseException, results: Mapping[int, object]) -> None:
    """Hang the finished results (index -> value) on the exception that ends their map."""
    set_attribute(error, "results", results)


def set_attribute(error: object, name: str, value: object) -> None:
    """Set an attribute of an exception, if that is possible at all."""
    # Not by setattr: a frozen dataclass refuses it. Some members of C classes cannot be set.
    with suppress(AttributeError, TypeError):
        object.__setattr__(error, name, value)


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


def _type_and_message(error: BaseException) -> tuple[str, str]:
    return (
        _bounded(_guarded(lambda: type_name(type(error)), "an exception"), TYPE_NAME_NBYTES),
        _bounded(_guarded(lambda: str(error), "<its __str__ raised>"), MESSAGE_NBYTES),
    )


def _traceback_text(error: BaseException, tb_skip: int, lines: sources.Lines) -> str:
    """Return the traceback with causes, contexts, groups and notes."""
    tb = error.__traceback__
    for _ in range(tb_skip):
        if tb is not None:
            tb = tb.tb_next

    def formatted() -> str:
        return "".join(traceback.format_exception(type(error), error, tb))

    def with_lines() -> str:
        with sources.show({**sources.of_bundles(error), **lines}):
            return formatted()

    # Some versions of Python fail on lines that are not those of the code.
    return _guarded(with_lines, "") or _guarded(formatted, "")


def _bounded(text: str, nbytes: int) -> str:
    """Cut the middle out of a text that is too long, and what UTF-8 cannot say."""
    encoded = str.encode(text, "utf-8", "backslashreplace")
    if len(encoded) > nbytes:
        mark = b" ... (%d bytes left out) ... " % len(encoded)
        half = max(0, nbytes - len(mark)) // 2
        mark = b" ... (%d bytes left out) ... " % (len(encoded) - 2 * half)
        encoded = encoded[:half] + mark + encoded[len(encoded) - half :]
    return encoded.decode("utf-8", "ignore")


class _Found(NamedTuple):
    """An exception that is to be packed, with what it is linked to.

    Attributes:
        error: The exception.
        members: Those of a group, if they are packed by themselves.
        cause: What its ``raise ... from`` named.
        context: What was being handled.
        is_suppressed: Whether the context is not to be shown.
    """

    error: BaseException
    members: Sequence[BaseException] = ()
    cause: BaseException | None = None
    context: BaseException | None = None
    is_suppressed: bool = False


class _Link(NamedTuple):
    """One of the exceptions that travel together; they name each other by their places.

    Attributes:
        parcel: The exception by itself; empty if only its text can travel.
        type_name: Dotted name of its class; of the first one it is in the summary.
        message: Its text; likewise.
        members: Those of a group, if they are packed by themselves.
        cause: -1 if it has none.
        context: -1 if it has none.
        is_suppressed: Whether the context is not to be shown.
    """

    parcel: bytes
    type_name: str
    message: str
    members: Sequence[int]
    cause: int
    context: int
    is_suppressed: bool


class _Members:
    """Stands for the members among the arguments of a group."""


def _reach(error: BaseException) -> list[_Found]:
    """Return an exception and what is behind it and in it, the nearest first, each once."""
    found: list[_Found] = []
    known = {id(error)}
    left = deque([(error, MAX_LINKS, MAX_NESTED)])
    while left:
        one, n_links, n_nested = left.popleft()
        members: Sequence[BaseException] = ()
        if isinstance(one, BaseExceptionGroup) and n_nested:
            members = _members_of.__get__(one)
            if len(known) + len(members) > MAX_ERRORS:
                members = ()
        behind = _behind(one) if n_links else ()
        found.append(_Found(one, members, *behind))
        further = [(other, n_links - 1, n_nested) for other in behind[:2] if other is not None]
        for each in (*((member, MAX_LINKS, n_nested - 1) for member in members), *further):
            if id(each[0]) not in known and len(known) < MAX_ERRORS:
                known.add(id(each[0]))
                left.append(each)
    return found


def _behind(error: BaseException) -> tuple[BaseException | None, BaseException | None, bool]:
    """Return the cause and the context of an exception, and whether that is suppressed.

    Where it came home from another worker before, they hang behind its remote traceback. That
    itself is left out: the text which is made now has it.
    """
    cause = _cause_of.__get__(error)
    for _ in range(MAX_LINKS):
        if not isinstance(cause, RemoteTraceback):
            break
        error, cause = cause, _cause_of.__get__(cause)
    return cause, _context_of.__get__(error), _suppressed_of.__get__(error)


def _pack_all(error: BaseException, summary: Summary) -> bytes:
    """Pack an exception with what is behind it and in it; nothing if only its text can travel."""
    for found in (_reach(error), [_Found(error)]):
        links = _links(found, summary)
        if not any(link.parcel for link in links):
            return b""
        packed = pickle.dumps([tuple(link) for link in links])
        if len(packed) <= PICKLED_NBYTES:
            return packed
    return b""


def _links(found: Sequence[_Found], summary: Summary) -> list[_Link]:
    places = {id(each.error): place for place, each in enumerate(found)}
    room = PICKLED_NBYTES
    links: list[_Link] = []
    for place, each in enumerate(found):
        texts = _type_and_message(each.error) if place else ("", "")
        room -= LINK_NBYTES + sum(len(text.encode()) for text in texts)
        parcel = b""
        if place and room > 0:
            parcel = _pack(each, Summary(*texts, ""), min(room, PART_NBYTES))
        elif not place and _may_be_raised(each.error):
            parcel = _pack(each, summary, room)
        room -= len(parcel)
        links.append(
            _Link(
                parcel,
                *texts,
                [places[id(member)] for member in each.members],
                places.get(id(each.cause), -1),
                places.get(id(each.context), -1),
                each.is_suppressed,
            )
        )
    return links


def _open_all(
    pickled: bytes | memoryview, summary: Summary
) -> tuple[Sequence[_Link], Sequence[BaseException]]:
    """Unpack what `_pack_all` made. What does not open is a `RemoteError`."""
    links = [_Link(*link) for link in pickle.loads(pickled)]
    made: dict[int, BaseException] = {}

    def make(place: int) -> BaseException:
        if place not in made:
            link = links[place]
            text = Summary(link.type_name, link.message, "") if place else summary
            made[place] = RemoteError(*text)
            members = [make(member) for member in link.members]
            try:
                opened = _open(link.parcel, text, members) if link.parcel else None
            except KeyboardInterrupt:  # the user's, at this very moment
                raise
            except BaseException:
                opened = None
            if isinstance(opened, BaseException):
                made[place] = opened
        return made[place]

    return links, [make(place) for place in range(len(links))]


def _hang(error: BaseException, link: _Link, made: Sequence[BaseException]) -> None:
    """Link an exception to its cause and context among those that were made with it."""
    cause, context = (
        made[place] if 0 <= place < len(made) else None for place in (link.cause, link.context)
    )
    _cause_of.__set__(error, cause)
    _context_of.__set__(error, context)
    _suppressed_of.__set__(error, link.is_suppressed)


def _pack(found: _Found, summary: Summary, room: int) -> bytes:
    """Return the best parcel that opens here as what it should, or nothing."""
    for cls, make in _parcels(found.error, found.members):
        parcel = _guarded(make, b"")
        if not 0 < len(parcel) <= room:
            continue
        copy = _guarded(partial(_open, parcel, summary, found.members), None)
        if type(copy) is cls or (isinstance(copy, RemoteError) and isinstance(copy, cls)):
            return parcel
    return b""


def _parcels(
    error: BaseException, members: Sequence[BaseException]
) -> Iterator[tuple[type, Callable[[], bytes]]]:
    """Yield ways to pack an exception, best first, each with the class that it brings along."""
    cls = type(error)
    if not members:
        yield cls, partial(_pack_whole, error)
    message = _message_of.__get__(error) if members else None
    args = _pickle(_args_without(error, members))
    attributes = _attributes(error)
    pickled = _pickle_each(attributes)
    if args is not None and len(pickled) == len(attributes):
        yield cls, partial(_pack_parts, cls, message, args, pickled, True)
    if members:
        yield cls, partial(_pack_whole, error)
    for base in cls.__mro__:
        if base is Exception:
            break
        if issubclass(base, Exception):
            yield base, partial(_pack_parts, base, message, args, pickled, False)


def _args_without(error: BaseException, members: Sequence[BaseException]) -> tuple[object, ...]:
    """Return the arguments of an exception, with a mark where its members are."""
    ids = [id(member) for member in members]

    def is_members(arg: object) -> bool:
        return isinstance(arg, (list, tuple)) and bool(arg) and [id(one) for one in arg] == ids

    return tuple(_Members if is_members(arg) else arg for arg in _args_of.__get__(error))


def _pack_whole(error: BaseException) -> bytes:
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
    cls: type[BaseException],
    message: str | None,
    args: bytes | None,
    attributes: dict[str, bytes],
    complete: bool,
) -> bytes:
    return pickle.dumps(("parts", _to_bytes(cls), message, args, attributes, complete))


def _open(
    parcel: bytes | memoryview, summary: Summary, members: Sequence[BaseException] = ()
) -> object:
    """Unpack what `_pack_whole` or `_pack_parts` made; the user's code runs and may raise.

    Each part was pickled by itself, so that one that fails takes no other along.
    """
    match pickle.loads(parcel):
        case ("whole", pickled, forgotten):
            copy = pickling.loads(pickled)
            for name, value in forgotten.items():
                set_attribute(copy, name, pickling.loads(value))
            return copy
        case ("parts", pickled_cls, message, pickled_args, pickled_attributes, complete):
            cls = pickling.loads(pickled_cls)
            attributes: dict[str, object] = {}
            for name, value in pickled_attributes.items():
                try:
                    attributes[name] = pickling.loads(value)
                except Exception:  # it could be loaded on the worker, so it wants a module there
                    complete = False
            made_of: tuple[object, ...] = () if message is None else (message, list(members))
            args: tuple[object, ...] = made_of or (summary.message,)
            if pickled_args is not None and (complete or not made_of):
                args = pickling.loads(pickled_args)
                args = tuple(list(members) if arg is _Members else arg for arg in args)
            if complete:
                return _put_together(cls, args, attributes, made_of)
            return _put_together(
                _of_both(cls),
                args,
                {**_remote(summary), **attributes, "_remote_text": summary.message},
                made_of,
            )
        case _:
            return None


def _put_together(
    cls: type[BaseException],
    args: tuple[object, ...],
    attributes: Mapping[str, object],
    made_of: tuple[object, ...] = (),
) -> BaseException:
    """Make an exception without its ``__init__`` (and its Python ``__new__``)."""
    in_c: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAPTYPE)
    # A group refuses to be made without its message and members, whatever else its args are.
    error: BaseException = in_c.__new__(cls, *(made_of or args))
    _args_of.__set__(error, args)
    for name, value in attributes.items():
        set_attribute(error, name, value)
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
            if isinstance(member, types.MemberDescriptorType) and member not in _NOT_CARRIED:
                with suppress(AttributeError):
                    value = member.__get__(error)
                    # Members of C classes read as None when unset, and set to None they are set.
                    if value is not None or not in_c:
                        found[name] = value
    found.update(vars(error))
    return found


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
