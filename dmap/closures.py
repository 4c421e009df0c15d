"""Functions as blobs: with all that they need, loaded anywhere, kept by their names.

A function that can be imported goes by reference. A lambda, a local function, and all of
``__main__`` go by value: code, defaults, captured variables and the globals that they use. *Local
code* (``local_code``), modules that only this machine can be expected to have, goes along as
source. So a closure is one to MAX_BLOBS blobs::

    the function | the sources of local modules, if any | captured buffers from 1 MiB up, if any

The first is a body of `dmap.pickling` with every buffer out of band. Large ones are blobs of their
own: they are the same blob while they do not change, whatever else does, and the workers of one
host share their memory. ``functions`` loads all of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from dmap import identity, local_code, overlay, pickling, sources, versions
from dmap.errors import ClosureError
from dmap.functions import blob_id
from dmap.tickets import Blob
from dmap.warn import warn_once
from jobserver import shared

if TYPE_CHECKING:
    from jobserver.protocol import Body, Buffer

__all__ = ["Closure", "Kind", "check_callable", "name_of"]

Kind: TypeAlias = Literal["map", "star", "call"]

MAX_BLOBS: Final = 64
"""What a job may name."""

# CO_COROUTINE | CO_ASYNC_GENERATOR: the inspect module would take 8 ms to import.
_ASYNC: Final = 0x80 | 0x200


def check_callable(func: object) -> None:
    """Refuse what a map cannot call.

    Raises:
        TypeError: it is not callable; first the function, then the items.
        ClosureError: it is an async function, which would only make a coroutine on the worker.
    """
    if not callable(func):
        raise TypeError(
            f"the first argument must be a function, not {type(func).__qualname__} "
            f"({_short_repr(func)}): dmap(func, items)"
        )
    inner: Any = func
    while isinstance(inner, functools.partial):
        inner = inner.func
    for method in (inner, type(inner).__call__):
        code = getattr(method, "__code__", None)
        if isinstance(code, CodeType) and code.co_flags & _ASYNC:
            raise ClosureError(
                f"{name_of(func)} is an async function: a worker would make its coroutine and "
                "await nothing; pass a plain function that calls asyncio.run() on it"
            )


class Closure:
    """A function that is ready to travel, as it was when this was made.

    Raises:
        TypeError: it is no function.
        ClosureError: it cannot travel. The message has the path to what is in the way; the reason
            is chained.

    Attributes:
        func: The function itself.
        blobs: What goes to the servers; the first is the function.
        labels: What a worker needs beside its Python to load it.
        modules: The local modules that go along.
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        check_callable(func)
        seen = pickling.Seen()
        self.func = func
        try:
            # In this order: the functions that went by value are known when the sources' turn is.
            value = (func, _Sources(seen))
            body, external = pickling.dump_function(value, seen, MAX_BLOBS - 2)
        except MemoryError:
            raise
        except Exception as error:  # code of captured objects runs
            from dmap import culprit  # where all goes well, nobody needs it

            name = name_of(func)
            why = culprit.explain(f"the function {name}", name, func, error)
            raise ClosureError(why) from error
        self.labels = versions.with_cloudpickle(()) if seen.by_value else ()
        self.modules = local_code.needed(seen.modules)
        self._functions = (func, *seen.functions)
        self._counts_on = seen.modules
        # module -> name -> what the functions read there that is not as its source makes it
        self._constants = overlay.constants(self._functions) if self.modules else {}
        self._function = _blob(body)
        self._buffers = tuple(map(_captured, external))
        self.blobs = self._blobs_with(self.modules)
        self._extended: dict[frozenset[str], tuple[Blob, ...]] = {}

    def watch(self) -> overlay.Watch | None:
        """Return what tells from now on whether its local modules are still the same, if any."""
        return overlay.Watch(self._functions, self._counts_on) if self.modules else None

    def blobs_for(self, seen: pickling.Seen) -> tuple[Blob, ...]:
        """Return the blobs for jobs whose arguments count on these modules too."""
        if not seen.modules or seen.modules <= self.modules:
            return self.blobs
        names = frozenset(seen.modules)
        blobs = self._extended.get(names)
        if blobs is None:
            modules = self.modules | local_code.needed(names)
            same = modules == self.modules
            blobs = self._extended[names] = self.blobs if same else self._blobs_with(modules)
        return blobs

    @functools.cached_property
    def id(self) -> bytes | None:
        """What the function *is*: equal for equal functions in all processes; None: not to be told.

        The second is warned of.
        """
        try:
            return identity.closure_id(self.func)
        except identity.Unidentifiable as error:
            _warn_unmerged(f"the function {name_of(self.func)}", error)
            return None

    def uniq(
        self,
        kind: Kind,
        item: object,
        seeding: tuple[int, int] | None = None,
        definitions: identity.Definitions | None = None,
    ) -> bytes:
        """Return the uniq under which equal items of equal functions meet.

        What cannot be told stably gets a uniq of its own, so that it meets nothing.

        Args:
            kind: How the function is called with it: equal items are not the same job otherwise.
            item: The item, or the arguments of a "call".
            seeding: The map's seed and the item's index, if it has a seed.
            definitions: What is known of the classes of items, for who has many.
        """
        closure = self.id
        if closure is not None:
            try:
                item_id = identity.item_id(item, definitions)
            except identity.Unidentifiable as error:
                _warn_unmerged(f"an item of {name_of(self.func)}", error)
            else:
                return identity.item_uniq(closure + kind.encode(), item_id, seeding)
        return os.urandom(32)

    def _blobs_with(self, modules: frozenset[str]) -> tuple[Blob, ...]:
        if not modules:
            return (self._function, *self._buffers)
        bundle = _blob(local_code.bundle(modules, self._constants))
        return (self._function, bundle, *self._buffers)


def _warn_unmerged(what: str, error: identity.Unidentifiable) -> None:
    warn_once(
        f"{what} cannot be told from others in a way that holds in every process, so it is not "
        f"merged: {error} (docs/closures.md#identity)"
    )


class _Sources:
    """Pickles as the source lines of the functions that went by value before it."""

    def __init__(self, seen: pickling.Seen) -> None:
        self._seen = seen

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (sources.collect(func.__code__ for func in self._seen.functions),)


def _blob(body: Body | Buffer) -> Blob:
    """Make a blob, whose bytes are its own: the user may write to an array at any time."""
    if not isinstance(body, bytes):
        body = b"".join(body) if isinstance(body, tuple) else bytes(body)
    return Blob(blob_id(body), body)


def _captured(buffer: Buffer) -> Blob:
    """Make a blob of a captured buffer, in memory that this machine's processes can share."""
    try:
        body, digest = shared.share(buffer)
    except OSError:  # no such memory, or no descriptor
        return _blob(buffer)
    return Blob(digest, body)


def name_of(func: object) -> str:
    """Return what a person calls a callable: its own name, or that of its class."""
    name = getattr(func, "__qualname__", None)
    return pickling.short_name(name if isinstance(name, str) else type(func).__qualname__)


def _short_repr(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        return "no repr"
    return text if len(text) <= 60 else f"{text[:57]}..."
