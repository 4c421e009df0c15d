"""Functions as bytes: with what they close over, loaded anywhere, kept by the digest of the bytes.

A function that can be imported goes by reference, and its module must be where it runs. A lambda,
a local function, and all of ``__main__`` go by value: code, defaults, captured variables and the
globals that they use. The bytes are a body of `dmap.pickling` with every buffer out of band, so
captured arrays are loaded as read-only views of the blob and cost no copy.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any, Final

from dmap import pickling
from dmap.errors import ClosureError

__all__ = ["FunctionCache", "blob_id", "check_callable", "dump_function", "load_function"]

MAX_FUNCTIONS: Final = 256
MAX_NBYTES: Final = 2**30

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
                f"{_name(func)} is an async function: a worker would make its coroutine and await "
                "nothing; pass a plain function that calls asyncio.run() on it"
            )


def dump_function(func: Callable[..., Any]) -> bytes:
    """Return a function, class or other callable as bytes, with what it closes over.

    Equal functions give equal bytes in one process as far as cloudpickle does; across processes
    the order of sets makes them differ.

    Raises:
        ClosureError: something in it cannot be pickled. The message names the captured variable if
            one level of looking finds it; the reason is chained.
    """
    try:
        body = pickling.dump(func, inline_nbytes=0)
    except MemoryError:
        raise
    except Exception as error:  # code of captured objects runs
        for what, value in _captures(func):
            try:
                pickling.dump(value)
            except Exception as own:
                what = f"{what} of {_name(func)}"
                raise ClosureError(pickling.refusal(what, value, own)) from own
        raise ClosureError(pickling.refusal(f"the function {_name(func)}", func, error)) from error
    return body if isinstance(body, bytes) else b"".join(body)


def load_function(blob: bytes | memoryview) -> Callable[..., Any]:
    """Load what `dump_function` made. Captured arrays are read-only views that keep the blob.

    Raises:
        ClosureError: it cannot be loaded here. The message names this host, and the module if one
            is missing.
    """
    try:
        func: Callable[..., Any] = pickling.loads(blob, readonly=True)
    except MemoryError:
        raise
    except Exception as error:  # imports the user's modules
        here = f"{os.uname().nodename} (Python {platform.python_version()})"
        if isinstance(error, ModuleNotFoundError):
            raise ClosureError(
                f"the function needs the module {error.name!r}, which {here} does not have: "
                "install it there, or define the function where it goes by value (in __main__)"
            ) from error
        raise ClosureError(
            f"the function cannot be loaded on {here}: {pickling.reason(error)}; "
            "are the versions of Python, cloudpickle and its modules those of the client?"
        ) from error
    return func


def blob_id(blob: bytes | memoryview) -> bytes:
    """Return the name of a blob: the 32 bytes of its sha256."""
    return hashlib.sha256(blob).digest()


class FunctionCache:
    """The functions that a worker has loaded, by blob id, least recently used out first.

    The last one stays, however large. Not for several threads.

    Args:
        max_functions: How many at most.
        max_nbytes: How many bytes their blobs may have together.
    """

    def __init__(self, max_functions: int = MAX_FUNCTIONS, max_nbytes: int = MAX_NBYTES) -> None:
        self.max_functions = max_functions
        self.max_nbytes = max_nbytes
        self.nbytes = 0
        # blob id -> function and the nbytes of its blob, least recently used first
        self._functions: dict[bytes, tuple[Callable[..., Any], int]] = {}

    def get(self, blob_id: bytes) -> Callable[..., Any] | None:
        """Return the function, now the most recently used, or None if it is not here."""
        entry = self._functions.pop(blob_id, None)
        if entry is None:
            return None
        self._functions[blob_id] = entry
        return entry[0]

    def load(self, blob_id: bytes, blob: bytes | memoryview) -> Callable[..., Any]:
        """Load a function and keep it, dropping others to make room.

        The id is taken on trust: the server that sent the blob checked it.

        Raises:
            ClosureError: it cannot be loaded here; nothing changes.
        """
        func = load_function(blob)
        nbytes = memoryview(blob).nbytes
        self._drop(blob_id)
        self._functions[blob_id] = (func, nbytes)
        self.nbytes += nbytes
        while len(self._functions) > 1 and (
            len(self._functions) > self.max_functions or self.nbytes > self.max_nbytes
        ):
            self._drop(next(iter(self._functions)))
        return func

    def __len__(self) -> int:
        return len(self._functions)

    def __contains__(self, blob_id: bytes) -> bool:
        return blob_id in self._functions

    def _drop(self, blob_id: bytes) -> None:
        entry = self._functions.pop(blob_id, None)
        if entry is not None:
            self.nbytes -= entry[1]


def _captures(func: object) -> Iterator[tuple[str, object]]:
    """Yield what a callable takes along, each with the words to call it by."""
    match func:
        case functools.partial():
            yield "the function", func.func
            for n, value in enumerate(func.args):
                yield f"argument {n}", value
            for name, value in func.keywords.items():
                yield f"argument {name!r}", value
        case MethodType():
            yield "the object", func.__self__
        case FunctionType():
            for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
                try:
                    yield f"captured variable {name!r}", cell.cell_contents
                except ValueError:  # not assigned yet
                    continue
            for name in sorted(_global_names(func.__code__) & func.__globals__.keys()):
                yield f"global {name!r}", func.__globals__[name]
            for value in func.__defaults__ or ():
                yield "a default", value
            for name, value in (func.__kwdefaults__ or {}).items():
                yield f"the default of {name!r}", value
        case _:
            for name, value in getattr(func, "__dict__", {}).items():
                yield f"attribute {name!r}", value


def _global_names(code: CodeType) -> set[str]:
    """Return the globals that code uses, that of its inner functions included."""
    import dis  # slow to import, and wanted on failure only

    names = {
        str(instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname == "LOAD_GLOBAL"
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return names


def _name(func: object) -> str:
    """Return what a person calls a callable: its own name, or that of its class."""
    name = getattr(func, "__qualname__", None)
    return pickling.short_name(name if isinstance(name, str) else type(func).__qualname__)


def _short_repr(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        return "no repr"
    return text if len(text) <= 60 else f"{text[:57]}..."
