"""What lies in the bodies of jobs, as client and worker write it. The server never looks inside.

==================  ==========================================  =================================
a job of            argument                                    result
==================  ==========================================  =================================
``FUNCTION``        ``("call", args, kwargs)``                  the value
``FUNCTION``        ``("map", star, overrun, seeding, items)``  those of its first ``n_items``
a name, "pickle"    ``(args, kwargs)``                          the value
a name, "raw"       bytes, as they are                          bytes, as they are
==================  ==========================================  =================================

All but "raw" are pickled. A closure comes beside its argument, as the job's first blob. With
``star`` each item is a tuple of arguments. Where an item raises, the exception is body 1 and the
list of the values before it is body 2.

Bodies made here share no memory that could change with what they were made from: they are kept
until the other side has acknowledged them, and the user's arrays are the user's. Their large
buffers lie in memory to which another process of this machine can be referred (`shared`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from msgspec import Struct

from dmap import pickling, shared
from dmap.errors import ClosureError
from dmap.references import Opened
from jobserver.protocol import Body

FUNCTION: Final = "dmap"
"""The function that runs closures; every worker can do it unless told otherwise."""


class Call(Struct):
    """One call, of the closure or of a named function."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class Chunk(NamedTuple):
    """Consecutive items of a map. With ``star`` each is a tuple of arguments.

    A chunk that has taken ``overrun`` seconds (0: however many) comes home in part: it was cut
    for less, and others may be free to take the rest. ``seeding`` are the map's seed and the index
    of the first item, if it has a seed.
    """

    star: bool
    overrun: float
    seeding: tuple[int, int] | None
    items: Sequence[Any]


Argument: TypeAlias = Call | Chunk


def dump_call(
    args: Sequence[Any], kwargs: Mapping[str, Any], seen: pickling.Seen | None = None
) -> Body:
    """Pickle the argument of one call of a closure; ``seen`` is told what it counts on.

    Raises:
        ClosureError: it cannot be pickled.
    """
    return _dump_arguments(("call", args, kwargs), args, kwargs, seen)


def dump_plain_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    """Pickle the argument of a call as ``dump_call`` does, if it is a few scalars; else None."""
    return None if kwargs else pickling.dump_scalars(("call", args, kwargs), args)


def dump_chunk(
    star: bool,
    items: Sequence[Any],
    start: int = 0,
    *,
    overrun: float = 0.0,
    seed: int | None = None,
    seen: pickling.Seen | None = None,
) -> Body:
    """Pickle the argument of a chunk, whose first item has the index ``start`` in its map.

    ``seen`` is told what the items count on.

    Raises:
        ClosureError: an item cannot be pickled; its ``index`` says which.
    """
    seeding = None if seed is None else (seed, start)
    head = ("map", star, overrun, seeding)
    return shared.own(pickling.dumps_items(items, start, head=head, seen=seen))


def load_argument(body: Body) -> Argument:
    """Read the argument of a job that runs a closure. Raises what unpickling raises."""
    fields = _loads(body)
    return Call(fields[1], fields[2]) if fields[0] == "call" else Chunk(*fields[1:])


def dump_named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Body:
    """Pickle the argument of a named function.

    Raises:
        ClosureError: it cannot be pickled.
    """
    return _dump_arguments((args, kwargs), args, kwargs)


def _dump_arguments(
    value: tuple[Any, ...],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    seen: pickling.Seen | None = None,
) -> Body:
    try:
        return shared.own(pickling.dumps(value, "the arguments", seen))
    except ClosureError:
        # Which of them is it?
        for n, each in enumerate(args):
            pickling.dumps(each, f"argument {n}")
        for name, each in kwargs.items():
            pickling.dumps(each, f"argument {name!r}")
        raise


def load_named(body: Body) -> Call:
    """Read the pickled argument of a named function. Raises what unpickling raises."""
    return Call(*_loads(body))


def dump_result(value: Any) -> Body:
    """Pickle what one call returned.

    Raises:
        ClosureError: it cannot be pickled.
    """
    return shared.own(pickling.dumps(value, "the result"))


def dump_results(values: Sequence[Any]) -> Body:
    """Pickle what the first items of a chunk returned.

    Raises:
        ClosureError: one cannot be pickled; its ``index`` says which, within the chunk.
    """
    return shared.own(pickling.dumps_items(values, what="the result of item"))


def load_result(body: Body) -> Any:
    """Read what ``dump_result`` or ``dump_results`` wrote. Raises what unpickling raises."""
    return pickling.loads(body) if type(body) is bytes else _loads(body)


def _loads(body: Body) -> Any:
    if type(body) is Opened:
        return pickling.loads(body[0], external=body[1:])
    return pickling.loads(body)
