"""Values that each worker process makes once and keeps: connections, loaded models, caches.

::

    job --> factory of its closure --> key --> cell of this process --> value, made at first use
    job of another closure, with an equal factory --'

A factory's *key* is what the function is (``identity``), so the same factory in different closures,
or from two clients, finds the same cell. A process holds a cell as long as a factory with that key
is in it: a worker keeps the closures that it ran lately. When the last one goes, or the process
leaves, the value is closed.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Generator
from types import CodeType, FunctionType
from typing import Any, Final, Generic, TypeVar, cast, overload

__all__ = ["PerWorker", "close_all", "per_worker"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Of the flags of code: the inspect module would take 8 ms to import.
_GENERATOR: Final = 0x20
_ASYNC: Final = 0x80 | 0x200


class _Value:
    """A value that was made, and how it ends. It must not lead to its cell, whose end is its own.

    Attributes:
        uses: Cells whose values the factory asked for: they are to outlive this value.
    """

    __slots__ = ("generator", "is_open", "name", "uses", "value")

    def __init__(self, factory: Callable[[], Any], uses: list[_Cell]) -> None:
        self.name = _name(factory)
        self.uses = uses
        self.value = factory()
        self.generator: Generator[Any, Any, Any] | None = None
        if _flags(factory) & _GENERATOR:
            self.generator = self.value
            try:
                self.value = next(self.value)
            except StopIteration:
                raise RuntimeError(f"the per_worker factory {self.name} yields nothing") from None
        self.is_open = True

    def end(self, number: int) -> None:
        """Close the value. What its code raises is logged: nobody is there to be told."""
        _open.pop(number, None)
        self.is_open = False
        value, self.value = self.value, None
        generator, self.generator = self.generator, None
        try:
            if generator is None:
                close = getattr(value, "close", None)
                if callable(close):
                    close()
            elif next(generator, self) is not self:
                raise RuntimeError("it yields a second value")
        except Exception:  # the user's code
            logger.exception("closing the value of the per_worker factory %s failed", self.name)


class _Cell:
    """Where the value of one key is, in one process."""

    __slots__ = ("__weakref__", "_is_making", "_lock", "_made", "pid")

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.RLock()
        self._is_making = False
        self._made: _Value | None = None

    def get(self, factory: Callable[[], Any]) -> Any:
        """Return the value; make it if there is none. Whatever making it raises comes out."""
        made = self._made
        if made is not None and made.is_open:
            return made.value
        with self._lock:
            made = self._made
            if made is None or not made.is_open:
                made = self._made = self._make(factory)
            return made.value

    def _make(self, factory: Callable[[], Any]) -> _Value:
        if self._is_making:
            raise RuntimeError(
                f"the per_worker factory {_name(factory)} is called while it makes its value: by "
                "itself, or by a job of a map that it waits for"
            )
        uses: list[_Cell] = []
        self._is_making = True
        _making.stack.append(uses)
        try:
            made = _Value(factory, uses)
        finally:
            _making.stack.pop()
            self._is_making = False
        number = next(_numbers)
        _open[number] = weakref.finalize(self, made.end, number)
        return made


class _Making(threading.local):
    """What this thread makes at the moment."""

    def __init__(self) -> None:
        self.stack: list[list[_Cell]] = []  # what they use; the innermost is the last one


class PerWorker(Generic[T]):
    """A factory whose value is made once in each process; see `per_worker`."""

    _factory: Callable[[], Any]
    _key: bytes | None  # what it came with, if it came in a closure
    _token: bytes | None  # its key if it cannot be told what it is
    _cell: _Cell | None

    def __init__(self, factory: Callable[[], Any], key: bytes | None = None) -> None:
        # A class, say, has a dict that is no wrapper's business.
        updated = functools.WRAPPER_UPDATES if isinstance(factory, FunctionType) else ()
        functools.update_wrapper(self, factory, updated=updated)
        self._factory = factory
        self._key = key
        self._token = None
        self._asking: set[int] = set()
        # A closure that waits here for its next job keeps the value too.
        self._cell = None if key is None else _require_cell(key)

    def __call__(self) -> T:
        """Return this process's value, made now if there is none.

        Raises:
            BaseException: what the factory raised; the next call tries again.
        """
        cell = self._cell
        if cell is None or cell.pid != os.getpid():
            cell = self._settle()
        value = cell.get(self._factory)
        if _making.stack:
            _making.stack[-1].append(cell)
        return cast("T", value)

    def _settle(self) -> _Cell:
        """Choose this process's cell; of threads that come together the first one does."""
        cell = _require_cell(self.__dmap_identity__())
        with _lock:
            if self._cell is None or self._cell.pid != cell.pid:
                self._cell = cell
            return self._cell

    def __dmap_identity__(self) -> bytes:
        """Return what this factory is: equal for equal factories in all processes.

        One that cannot be told is itself, wherever it travels, and no other is.
        """
        if self._key is not None:
            return self._key
        from dmap import identity  # only who needs it pays for it

        thread = threading.get_ident()
        if thread in self._asking:
            return b"itself"
        self._asking.add(thread)
        try:
            return identity.closure_id(self._factory)
        except identity.Unidentifiable:
            with _lock:
                self._token = self._token or secrets.token_bytes(32)
                return self._token
        finally:
            self._asking.discard(thread)

    def __reduce__(self) -> tuple[Any, ...]:
        # The value stays here, and each process makes its own.
        from dmap import pickling  # who pickles has it

        by_name = pickling.reduce_by_name(self)
        return by_name or (PerWorker, (self._factory, self.__dmap_identity__()))

    def __repr__(self) -> str:
        return f"<per_worker {_name(self._factory)}>"


@overload
def per_worker(factory: Callable[[], Generator[T, Any, Any]]) -> PerWorker[T]: ...
@overload
def per_worker(factory: Callable[[], T]) -> PerWorker[T]: ...
def per_worker(factory: Callable[[], Any]) -> PerWorker[Any]:
    """Make the value of a factory once in each process, and keep it there between jobs.

    For what cannot travel, or takes long to make: a connection, a model, a cache.

    >>> @per_worker
    ... def connection():
    ...     import sqlite3
    ...     return sqlite3.connect(":memory:")
    >>> connection() is connection()
    True

    A job calls it like any function, ``connection().execute(...)``. The first call in a worker
    process makes the value, and all jobs there share it whose function uses the same factory:
    another closure, another map, another client. The same is a factory with the same code that
    captures the same values, as they are when the function is sent: another password is another
    factory, and so is each new state of a list that it fills. In your own process, too, there is
    one value.

    A value that has a method ``close`` is closed with it: when its worker leaves, at the end of the
    process, or when the worker has dropped all closures that use the factory, since it keeps those
    of late only. What is made last is closed first. A process that is killed closes nothing.

    A factory that yields its value says itself what happens at the end:

    >>> @per_worker
    ... def folder():
    ...     import tempfile
    ...     with tempfile.TemporaryDirectory() as name:
    ...         yield name

    Threads share the value; calls that come together make one. A process that a job forks makes its
    own, and leaves that of the worker alone.

    Args:
        factory: A function without arguments, or with defaults for all.

    Raises:
        TypeError: it is no function, needs arguments, or is async.
    """
    if not callable(factory):
        raise TypeError(
            f"@per_worker decorates a function that makes a value, not {type(factory).__qualname__}"
        )
    name = _name(factory)
    if _flags(factory) & _ASYNC:
        raise TypeError(
            f"the per_worker factory {name} is async, and nobody would await its value: make it "
            "a plain function"
        )
    if missing := _required(factory):
        raise TypeError(
            f"the per_worker factory {name} needs arguments ({', '.join(missing)}), but is called "
            "with none: give them defaults, or have it capture what it needs"
        )
    return PerWorker(factory)


def close_all() -> None:
    """Close all values of this process, those made last first. Later calls make them anew."""
    while _open:
        _, end = _open.popitem()
        end()


def _require_cell(key: bytes) -> _Cell:
    """Find or create the cell of a key."""
    new = _Cell()
    with _lock:
        return _cells.setdefault(key, new)


def _name(factory: Callable[..., Any]) -> str:
    name = getattr(factory, "__qualname__", None)
    name = name if isinstance(name, str) else type(factory).__qualname__
    return name.rpartition("<locals>.")[2]


def _flags(factory: Callable[..., Any]) -> int:
    """Return the flags of the code that a call runs first; 0 if that is not Python."""
    inner: Any = factory
    while isinstance(inner, functools.partial):
        inner = inner.func
    for each in (inner, type(inner).__call__):
        code = getattr(each, "__code__", None)
        if isinstance(code, CodeType):
            return code.co_flags
    return 0


def _required(factory: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that a call must give."""
    if isinstance(factory, FunctionType):
        code = factory.__code__
        n, n_defaults = code.co_argcount, len(factory.__defaults__ or ())
        keyword_only = code.co_varnames[n : n + code.co_kwonlyargcount]
        with_defaults = factory.__kwdefaults__ or {}
        return [
            *code.co_varnames[: n - n_defaults],
            *(name for name in keyword_only if name not in with_defaults),
        ]
    import inspect  # slow, and seldom wanted

    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a builtin that does not say
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    empty = inspect.Parameter.empty
    return [one.name for one in parameters if one.default is empty and one.kind not in kinds]


_lock = threading.RLock()  # re-entrant: a garbage collection in between may run the user's code
_cells: weakref.WeakValueDictionary[bytes, _Cell] = weakref.WeakValueDictionary()  # by key
_open: dict[int, weakref.finalize[[int], _Cell]] = {}  # number -> the end of a value, in order
_numbers = itertools.count(1)
_making = _Making()


def _after_fork() -> None:
    """Leave the values of the process that forked this one alone, to the end of this one too."""
    global _lock, _cells, _open
    _lock = threading.RLock()  # another thread may have held it
    _cells = weakref.WeakValueDictionary()
    inherited, _open = _open, {}
    values = [end.detach() for end in inherited.values()]
    if values:
        # An interpreter that ends would free them, and so close what is the parent's.
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(values))


os.register_at_fork(after_in_child=_after_fork)
