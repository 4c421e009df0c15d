"""Closures on a worker: loaded from their blobs, and kept by the blobs' names.

``closures`` has what the blobs are. Captured arrays are views of them, read-only, and cost no copy.
"""

from __future__ import annotations

import hashlib
import os
import platform
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from dmap import namespaces, pickling
from dmap.errors import ClosureError
from dmap.namespaces import Namespace

__all__ = ["Function", "FunctionCache", "blob_id", "load_function"]

MAX_FUNCTIONS: Final = 256
MAX_NBYTES: Final = 2**30


class Function(NamedTuple):
    """A function that was loaded, and what belongs to it.

    Attributes:
        call: The function.
        sources: The lines of what went by value, for tracebacks; see ``sources``.
        namespace: The local modules that came along; to be active while the function runs.
    """

    call: Callable[..., Any]
    sources: dict[str, Any]
    namespace: Namespace | None


# bundle's blob id -> its modules, which all functions share that came with it
_namespaces: weakref.WeakValueDictionary[bytes, Namespace] = weakref.WeakValueDictionary()


def load_function(bodies: Sequence[bytes | memoryview]) -> Function:
    """Load a closure's blobs. Captured arrays are read-only views that keep them.

    Raises:
        ClosureError: it cannot be loaded here. The message names this host, and the module if one
            is missing.
    """
    try:
        n_external = pickling.count_external(bodies[0])
        namespace = None
        if len(bodies) > 1 + n_external:
            bundle = blob_id(bodies[1])
            namespace = _namespaces.get(bundle)
            if namespace is None:
                namespace = _namespaces[bundle] = namespaces.Namespace(bodies[1])
        with namespaces.active(namespace):
            external = bodies[len(bodies) - n_external :]
            func, lines = pickling.loads(bodies[0], readonly=True, external=external)
    except MemoryError:
        raise
    except ModuleNotFoundError as error:
        raise ClosureError(f"the function needs a module: {namespaces.missing(error)}") from error
    except Exception as error:  # imports the user's modules
        here = f"{os.uname().nodename} (Python {platform.python_version()})"
        raise ClosureError(
            f"the function cannot be loaded on {here}: {pickling.reason(error)}; "
            "are the versions of Python, cloudpickle and its modules those of the client?"
        ) from error
    return Function(func, lines, namespace)


def blob_id(blob: bytes | memoryview) -> bytes:
    """Return the name of a blob: the 32 bytes of its sha256."""
    return hashlib.sha256(blob).digest()


class FunctionCache:
    """The functions that a worker has loaded, by the ids of their blobs, least used out first.

    The last one stays, however large. Not for several threads.

    Args:
        max_functions: How many at most.
        max_nbytes: How many bytes their blobs may have together.
    """

    def __init__(self, max_functions: int = MAX_FUNCTIONS, max_nbytes: int = MAX_NBYTES) -> None:
        self.max_functions = max_functions
        self.max_nbytes = max_nbytes
        self.nbytes = 0
        # blob ids -> function and the nbytes of its blobs, least recently used first
        self._functions: dict[tuple[bytes, ...], tuple[Function, int]] = {}

    def get(self, blobs: tuple[bytes, ...]) -> Function | None:
        """Return the function, now the most recently used, or None if it is not here."""
        entry = self._functions.pop(blobs, None)
        if entry is None:
            return None
        self._functions[blobs] = entry
        return entry[0]

    def load(self, blobs: tuple[bytes, ...], bodies: Sequence[bytes | memoryview]) -> Function:
        """Load a function and keep it, dropping others to make room.

        The ids are taken on trust: who sent the blobs checked them.

        Raises:
            ClosureError: it cannot be loaded here; nothing changes.
        """
        function = load_function(bodies)
        nbytes = sum(memoryview(body).nbytes for body in bodies)
        self._drop(blobs)
        self._functions[blobs] = (function, nbytes)
        self.nbytes += nbytes
        while len(self._functions) > 1 and (
            len(self._functions) > self.max_functions or self.nbytes > self.max_nbytes
        ):
            self._drop(next(iter(self._functions)))
        return function

    def __len__(self) -> int:
        return len(self._functions)

    def __contains__(self, blobs: tuple[bytes, ...]) -> bool:
        return blobs in self._functions

    def _drop(self, blobs: tuple[bytes, ...]) -> None:
        entry = self._functions.pop(blobs, None)
        if entry is not None:
            self.nbytes -= entry[1]
