"""A call that failed, as it is known where it was made: how people read it, and how to run it here.

What a worker sends of a failure says neither what the item was nor how to look into it. The client
has the item and the function. It notes on the error which call it was, and hangs a `Replay` on it:
``error.replay()`` runs that one call in this process, where a debugger reaches it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from dmap import closures, functions, pickling, raised, registry, seeds, work
from jobserver.protocol import Assigned, LaneId, Origin

if TYPE_CHECKING:
    from dmap.tickets import Blob, Ticket
    from jobserver.protocol import Body

__all__ = ["Call", "ItemCall", "JobCall", "Replay", "attach", "of_ticket", "short_repr"]

TEXT_LENGTH: Final = 120
"""Characters of a note that show what a function was called with."""
PART_LENGTH: Final = 60
"""Characters of one text, or of one object, among them."""
PARTS: Final = 6
"""Elements of one container that are shown."""
LEVELS: Final = 3
REPR_NBYTES: Final = 16 * 2**20
"""The ``__repr__`` of an object that may be larger than this, pickled, is not asked."""
LOAD_NBYTES: Final = 2**20
"""A job's pickled function or argument up to this size is loaded to say what it was."""
PAUSE: Final = 0.05
"""Seconds between two looks whether what a replay waits for is there."""
MAX_NAMES: Final = 256

_BRACKETS: Final[dict[type, tuple[str, str]]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
    dict: ("{", "}"),
}
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")
_names: dict[bytes, str] = {}  # blob id -> the name of its function


class Replay:
    """Runs a call that failed once more, in this process.

    It is the attribute ``replay`` of errors. As it goes to another process it forgets the call.
    """

    __slots__ = ("_call",)

    def __init__(self, call: Call | None = None) -> None:
        self._call = call

    def __call__(self) -> Any:
        """Call the function that failed, with what it was given, and return what it returns.

        The function of a map is the caller's own, as is the item; a job's are loaded from what
        was sent. In a map with a seed the random numbers are those that the item had.
        ``current_job()`` works, but what is said there is heard by nobody.

        Behind a `WorkerLost` or `JobTimeout` this may do here what it did there: end this process
        by a crash, or run for ever.

        Raises:
            RuntimeError: this error came from another process, or the job is somebody else's.
            Exception: what the function raises here.
        """
        if self._call is None:
            raise RuntimeError(
                "this error can be replayed only in the process that made its map or job: "
                "what was called is there"
            )
        return self._call.run()

    def __reduce__(self) -> tuple[Any, ...]:
        return Replay, ()

    def __copy__(self) -> Replay:
        return self

    def __deepcopy__(self, memo: object) -> Replay:
        return self


class Call(Protocol):
    """A call that failed."""

    def text(self) -> str:
        """Return how people read it."""

    def run(self) -> Any:
        """Call it here."""


class ItemCall:
    """The call of a map's function with one item.

    Args:
        func: The function.
        item: The item.
        star: Whether it is a tuple of arguments.
        seeding: The map's seed and the item's index, if it has a seed.
        nbytes: How large the item is at most, pickled, as far as that is known.
    """

    __slots__ = ("_func", "_item", "_nbytes", "_seeding", "_star")

    def __init__(
        self,
        func: Callable[..., Any],
        item: Any,
        star: bool = False,
        seeding: tuple[int, int] | None = None,
        nbytes: int = 0,
    ) -> None:
        self._func = func
        self._item = item
        self._star = star
        self._seeding = seeding
        self._nbytes = nbytes

    def text(self) -> str:
        """Return what the function was called with, in brackets."""
        return f"({_arguments_text(self._arguments(), {}, self._nbytes)})"

    def run(self) -> Any:
        """Call the function."""
        with _inside_a_job(work.FUNCTION):
            if self._seeding is None:
                return self._func(*self._arguments())
            with seeds.seeded(self._func, *self._seeding) as func:
                return func(*self._arguments())

    def _arguments(self) -> Sequence[Any]:
        return self._item if self._star else (self._item,)


class JobCall:
    """The call of a single job, as its ticket has it."""

    __slots__ = ("_argument", "_blobs", "_function", "_is_raw", "_nbytes")

    def __init__(self, ticket: Ticket) -> None:
        terms = ticket.terms
        self._function = terms.function
        self._is_raw = terms.encoding == "raw"
        self._blobs = terms.blobs
        self._argument = ticket.argument
        self._nbytes = ticket.nbytes

    def text(self) -> str:
        """Return the name of the function, and what it was called with in brackets."""
        name = self._function if self._function != work.FUNCTION else _name_of(self._blobs)
        if self._nbytes > LOAD_NBYTES:
            return f"{name}(...)"
        try:
            args, kwargs = self._arguments()
        except Exception:  # the arguments' own code runs
            return f"{name}(...)"
        return f"{name}({_arguments_text(args, kwargs, self._nbytes)})"

    def run(self) -> Any:
        """Load the function and its arguments, and call it.

        Raises:
            LookupError: no function of that name is registered in this process.
        """
        if self._function != work.FUNCTION:
            func = registry.find(self._function)
            if func is None:
                raise LookupError(
                    f"no function {self._function!r} is registered in this process: import the "
                    "module that has it, then replay"
                )
            args, kwargs = self._arguments()
            with _inside_a_job(self._function):
                return func(*args, **kwargs)
        func = functions.load_function(_without_modules(self._blobs)).call
        args, kwargs = self._arguments()
        with _inside_a_job(self._function):
            return func(*args, **kwargs)

    def _arguments(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        if self._is_raw:
            return (_whole(self._argument),), {}
        if self._function != work.FUNCTION:
            call = work.load_named(self._argument)
        else:
            argument = work.load_argument(self._argument)
            assert isinstance(argument, work.Call), "a single job is no chunk"
            call = argument
        return call.args, call.kwargs


def of_ticket(ticket: Ticket) -> JobCall | None:
    """Return the call of a single job; None if it was submitted by somebody else."""
    return JobCall(ticket) if ticket.terms.function else None


def attach(
    error: BaseException,
    call: Call | None,
    index: int | None = None,
    where: str = "",
) -> None:
    """Note on an error which call failed and where, and have it replay that.

    Args:
        error: What goes to the user. Notes that it has are kept.
        call: What failed; None if that is not known here.
        index: Which item of its map it was; None for a single job.
        where: ``on papag (pid 4711), attempt 2``.
    """
    text = "" if call is None else call.text()
    if index is not None:
        text = f"item {index} {text}".rstrip()
    elif text:
        text = f"of {text}"
    note = ", ".join(filter(None, (text, where)))
    if note:
        raised.annotate(error, note)
    with suppress(Exception):  # its own code may run
        if isinstance(getattr(error, "replay", None), Replay | None):  # else it is the user's
            raised.set_attribute(error, "replay", Replay(call))


def short_repr(
    value: object, length: int = TEXT_LENGTH, nbytes: int = 0, levels: int = LEVELS
) -> str:
    """Return a representation of any object in one line, whatever its own code does.

    Args:
        value: An array or data frame is told by its shape.
        length: How many characters there are at most.
        nbytes: How large its pickle is at most; above `REPR_NBYTES` it is told by its type.
        levels: How deep containers in containers are shown.
    """
    try:
        return _cut(_shown(value, length, nbytes, levels), length)
    except KeyboardInterrupt:  # the user's, at this very moment
        raise
    except BaseException:  # its own code's
        return f"<{type(value).__name__}>"


def _shown(value: Any, length: int, nbytes: int, levels: int) -> str:
    kind = type(value)
    if kind in (str, bytes, bytearray):
        if len(value) <= length:
            return repr(value)
        # Cut before its repr is made, which may be four times as long.
        half = length // 2 - 2
        return f"{repr(value[:half])[:half]}...{repr(value[-half:])[-half:]}"
    if kind is int and value.bit_length() > 2 * length:
        return f"<int of {value.bit_length()} bits>"
    if kind in _BRACKETS:
        return _container(kind, value, nbytes, levels)
    shape = getattr(value, "shape", None) if hasattr(kind, "shape") else None
    if isinstance(shape, tuple) and shape and all(isinstance(n, int) for n in shape):
        dtype = getattr(value, "dtype", None)
        parts = (kind.__name__, None if dtype is None else str(dtype), str(tuple(shape)))
        return " ".join(filter(None, parts))
    if nbytes > REPR_NBYTES and kind not in (int, float, bool, type(None)):
        return f"<{kind.__name__}>"
    return " ".join(_ADDRESS.sub("", repr(value)).split())


def _container(kind: type, value: Any, nbytes: int, levels: int) -> str:
    opening, closing = _BRACKETS[kind]
    if not value:
        return repr(value)
    if not levels:
        return f"{opening}...{closing}"
    shown: list[str] = []
    for element in value:
        if len(shown) == PARTS:
            shown.append("...")
            break
        text = short_repr(element, PART_LENGTH, nbytes, levels - 1)
        if kind is dict:
            text += ": " + short_repr(value[element], PART_LENGTH, nbytes, levels - 1)
        shown.append(text)
    comma = "," if kind is tuple and len(value) == 1 else ""
    return f"{opening}{', '.join(shown)}{comma}{closing}"


def _cut(text: str, length: int) -> str:
    """Cut the middle out of a text that is too long."""
    if len(text) <= length:
        return text
    tail = (length - 3) // 3
    return f"{text[: length - 3 - tail]}...{text[len(text) - tail :]}"


def _arguments_text(args: Sequence[Any], kwargs: Mapping[str, Any], nbytes: int) -> str:
    """Return arguments as they stand in a call, the later ones left out if there is no room."""
    length = TEXT_LENGTH if len(args) + len(kwargs) == 1 else PART_LENGTH
    room = TEXT_LENGTH
    shown: list[str] = []
    for name, value in (*(("", value) for value in args), *kwargs.items()):
        text = f"{name}{'=' if name else ''}{short_repr(value, length, nbytes)}"
        if shown and len(text) + 2 > room:
            shown.append("...")
            break
        room -= len(text) + 2
        shown.append(text)
    return ", ".join(shown)


class _Stand:
    """Stands in for the worker that the job had, so that ``current_job()`` works in a replay.

    See `registry.Host`. What the job says is heard by nobody.
    """

    def __init__(self, function: str) -> None:
        self.name = os.uname().nodename
        nobody = bytes(16)
        self._job = Assigned(
            0,
            Origin(nobody, 0),
            function,
            0,
            n_items=1,
            attempt=1,
            encoding="pickle",
            uniq=b"",
            timeout=0.0,
            item_timeout=0.0,
            blobs=(),
            ancestors=(),
            lane=LaneId(nobody, 0),
        )

    def innermost(self) -> Assigned:
        return self._job

    def text_handle(self, job: Assigned) -> str:
        return "replay"

    def say_status(self, job: Assigned, numerator: int, denominator: int) -> None: ...

    def say_data(self, job: Assigned, value: object) -> None: ...

    def say_warning(self, job: Assigned, text: str) -> None: ...

    def cant_do(self, function: str) -> None: ...

    def is_cancelled(self, job: Assigned) -> bool:
        return False

    def run_nested(
        self,
        lanes: Sequence[LaneId],
        until: Callable[[], bool],
        wait: Callable[[float], None],
    ) -> None:
        while not until():
            wait(PAUSE)


@contextmanager
def _inside_a_job(function: str) -> Iterator[None]:
    if registry._host is not None:  # a worker's process, or a replay's
        yield
        return
    registry.set_host(_Stand(function))
    try:
        yield
    finally:
        registry.set_host(None)


def _name_of(blobs: Sequence[Blob]) -> str:
    """Return the name of a closure's function."""
    first = blobs[0]
    name = _names.get(first.id)
    if name is None:
        name = _loaded_name(blobs)
        if len(_names) >= MAX_NAMES:
            _names.clear()
        _names[first.id] = name
    return name


def _loaded_name(blobs: Sequence[Blob]) -> str:
    try:
        bodies = _without_modules(blobs)
        if len(bodies[0]) <= LOAD_NBYTES:
            return closures.name_of(functions.load_function(bodies).call)
    except Exception:  # code of what it captures runs
        pass
    return "a function"


def _without_modules(blobs: Sequence[Blob]) -> list[bytes]:
    """Return what a function is made of but for its local modules: here they are themselves."""
    first = _whole(blobs[0].body)
    buffers = blobs[len(blobs) - pickling.count_external(first) :]
    return [first, *(_whole(blob.body) for blob in buffers)]


def _whole(body: Body) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body)
