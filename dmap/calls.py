"""The functions that users call. They use one client of the whole process.

To import them takes no time. What they need is imported at the first call, and when that is bound
to need a local cluster, this starts meanwhile: the two take about as long.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from typing import Unpack

    from dmap.client import Client
    from dmap.jobs import Job
    from dmap.map import ImapOptions, MapOptions

__all__ = [
    "attach",
    "background",
    "dmap",
    "imap",
    "set_job_servers",
    "shutdown",
    "starmap",
    "submit",
]

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
R = TypeVar("R")

_PLAIN: Final = frozenset({list, tuple, range, set, frozenset, dict, str, bytes})
"""Iterables of which one knows whether they are empty, and nothing happens when one asks."""

_default: Client | None = None
_of_servers: dict[tuple[str, ...], Client] = {}  # endpoints -> client of a map's ``servers``
_named: list[str] | None = None  # by set_job_servers
_lock = threading.RLock()


def parse(servers: Sequence[str] | str) -> list[str]:
    """Return servers' addresses as endpoints.

    Raises:
        ValueError: one of them is none.
    """
    from jobserver.keys import endpoints

    return endpoints(servers if isinstance(servers, str) else ",".join(servers))


def find_servers() -> list[str]:
    """Return the endpoints for a client that was told none; start a local cluster if need be."""
    if _named is not None:
        return _named
    from_environment = _servers_of_environment()
    if from_environment:
        return parse(from_environment)
    from dmap.local import require_cluster

    return [require_cluster().endpoint]


def _servers_of_environment() -> str:
    return os.environ.get("DMAP_SERVERS", "").strip()


def _client(servers: Sequence[str] | str | None = None) -> Client:
    global _default
    default = _default
    if servers is None and default is not None:
        return default  # which is the way of each submit in a loop
    from dmap.client import Client

    with _lock:
        if servers is not None:
            key = tuple(parse(servers))
            if key not in _of_servers:
                _of_servers[key] = Client(key)
            return _of_servers[key]
        if _default is None:
            _default = Client()
        return _default


def _begin(func: object, *iterables: object) -> None:
    """Have the local cluster start, while much is to be imported, if this call will need it."""
    if "dmap.client" in sys.modules or _named is not None or _servers_of_environment():
        return
    if callable(func) and all(type(items) in _PLAIN and items for items in iterables):
        from dmap.local import begin_cluster

        begin_cluster()


def set_job_servers(*servers: str) -> None:
    """Name the job servers for all calls of this process that name none.

    Args:
        servers: Addresses: ``sammy``, ``kenny:4731``, ``ipc:///path``. None at all goes back to
            DMAP_SERVERS or the local cluster.

    Raises:
        ValueError: one of them is no address.
    """
    global _default, _named
    named = parse(servers) if servers else None
    with _lock:
        old, _default, _named = _default, None, named
    if old is not None:
        old.close()


def shutdown() -> None:
    """Close this process's clients and end its local cluster. The next call starts anew."""
    global _default
    with _lock:
        _default = None
        _of_servers.clear()
    if "dmap.client" in sys.modules:
        from dmap.client import close_all

        close_all()
    if "dmap.local" in sys.modules:
        from dmap.local import stop_cluster

        stop_cluster()


@overload
def submit(func: str, /, *args: Any, **kwargs: Any) -> Job[Any]: ...


@overload
def submit(func: Callable[..., R], /, *args: Any, **kwargs: Any) -> Job[R]: ...


def submit(func: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Job[Any]:
    """Submit one call, and return at once with its job: a future. See `Client.submit`."""
    _begin(func)
    return _client().submit(func, *args, **kwargs)


def background(func: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> str:
    """Submit a job that lives without its caller; return its handle. See `Client.background`."""
    _begin(func)
    return _client().background(func, *args, **kwargs)


def attach(handle: str) -> Job[Any]:
    """Return a job that listens to the one with this handle. See `Client.attach`."""
    return _client().attach(handle)


@overload
def dmap(func: Callable[[A], R], a: Iterable[A], /, **options: Unpack[MapOptions]) -> list[R]: ...
@overload
def dmap(
    func: Callable[[A, B], R], a: Iterable[A], b: Iterable[B], /, **options: Unpack[MapOptions]
) -> list[R]: ...
@overload
def dmap(
    func: Callable[[A, B, C], R],
    a: Iterable[A],
    b: Iterable[B],
    c: Iterable[C],
    /,
    **options: Unpack[MapOptions],
) -> list[R]: ...
@overload
def dmap(
    func: Callable[[A, B, C, D], R],
    a: Iterable[A],
    b: Iterable[B],
    c: Iterable[C],
    d: Iterable[D],
    /,
    **options: Unpack[MapOptions],
) -> list[R]: ...
@overload
def dmap(
    func: Callable[..., R],
    a: Iterable[Any],
    b: Iterable[Any],
    c: Iterable[Any],
    d: Iterable[Any],
    e: Iterable[Any],
    /,
    *more: Iterable[Any],
    **options: Unpack[MapOptions],
) -> list[R]: ...
def dmap(
    func: Callable[..., Any], /, *iterables: Iterable[Any], **options: Unpack[MapOptions]
) -> list[Any]:
    """Return what a function returns for every item, like ``list(map(func, *iterables))``.

    The calls are spread over all workers of the job servers that are named (`set_job_servers`,
    DMAP_SERVERS, ``servers``), or of a private cluster on this machine. The function goes with all
    that it closes over. Each value comes back exactly once and in order, also when workers and
    servers are lost on the way.

    Args:
        func: Any function that can be pickled by cloudpickle, lambdas and closures included.
        iterables: The items; with several, the function gets one of each, and the shortest ends
            the map. Read in the calling thread, no faster than needed.
        options: any of

            * ``chunksize="auto"``: items in one job, by measured time unless said.
            * ``timeout=None``: seconds for the whole call; then JobTimeout.
            * ``item_timeout=None``: seconds for one item; then JobTimeout for that item.
            * ``retries=0``: further runs of an item that raised.
            * ``attempts=3``: runs of an item that may end by the loss of a worker or server; 1 is
              at most one run.
            * ``on_error="raise"``: or "return" (the exception takes the value's place) or "skip".
            * ``merge=False``: join equal items of equal functions that wait or run anywhere.
            * ``backup=False``: towards the end, run what takes long a second time on idle workers;
              the first result counts and the other run is interrupted, or killed if it does not
              let itself be. For functions that may run twice at once. It costs that much work,
              and saves time only where a worker is slow or stuck, not where an item is long.
              Not with ``merge`` or ``attempts=1``.
            * ``backup=False``: towards the end, run what takes long a second time on idle workers.
            * ``priority="normal"``: or "high" or "low".
            * ``seed=None``: a whole number. ``random``, NumPy's legacy functions and
              ``current_job().rng`` then give each item numbers that depend on the seed and the
              item's index, and on nothing else. What was seeded otherwise is not.
            * ``labels=()``: what a worker must have been given.
            * ``progress=None``: a bar; None shows one on a terminal after half a second.
            * ``desc=None``: what people see this map called.
            * ``total=None``: how many items there are, if the iterables cannot say.
            * ``servers=None``: job servers for this call.

    Returns:
        The values, in the order of the items.

    Raises:
        Exception: what the function raised, with its own type. The remote traceback is its
            ``__cause__``, a note says which item and where, and ``results`` has what was finished
            (index -> value), as on all of these.
        WorkerLost: an item's workers died under it, ``attempts`` times.
        JobTimeout, NoServer, NoWorker, ClosureError: as they say.
        TypeError: there is no iterable.
    """
    servers = options.pop("servers", None)
    if servers is None and iterables:
        _begin(func, *iterables)
    return _client(servers).dmap(func, *iterables, **options)


@overload
def imap(
    func: Callable[[A], R], a: Iterable[A], /, **options: Unpack[ImapOptions]
) -> Generator[R, None, None]: ...
@overload
def imap(
    func: Callable[[A, B], R], a: Iterable[A], b: Iterable[B], /, **options: Unpack[ImapOptions]
) -> Generator[R, None, None]: ...
@overload
def imap(
    func: Callable[[A, B, C], R],
    a: Iterable[A],
    b: Iterable[B],
    c: Iterable[C],
    /,
    **options: Unpack[ImapOptions],
) -> Generator[R, None, None]: ...
@overload
def imap(
    func: Callable[[A, B, C, D], R],
    a: Iterable[A],
    b: Iterable[B],
    c: Iterable[C],
    d: Iterable[D],
    /,
    **options: Unpack[ImapOptions],
) -> Generator[R, None, None]: ...
@overload
def imap(
    func: Callable[..., R],
    a: Iterable[Any],
    b: Iterable[Any],
    c: Iterable[Any],
    d: Iterable[Any],
    e: Iterable[Any],
    /,
    *more: Iterable[Any],
    **options: Unpack[ImapOptions],
) -> Generator[R, None, None]: ...
def imap(
    func: Callable[..., Any], /, *iterables: Iterable[Any], **options: Unpack[ImapOptions]
) -> Generator[Any, None, None]:
    """Yield what a function returns for every item, while further ones are under way.

    Lazy at both ends: items are read, and jobs sent, as values are taken; both may be endless.
    Closing the iterator, or dropping it, cancels what is under way.

    Args:
        func: As for `dmap`.
        iterables: As for `dmap`.
        options: those of `dmap` (``backup`` begins when the input has ended), and

            * ``ordered=True``: False yields values as they come.
            * ``buffersize=None``: how many items may be read ahead of what was taken; None bounds
              them by memory and by what keeps the workers busy.

    Raises:
        Exception: as `dmap`, when the item's turn comes; ``results`` are those not yet yielded.
    """
    servers = options.pop("servers", None)
    if servers is None and iterables:
        _begin(func, *iterables)
    return _client(servers).imap(func, *iterables, **options)


def starmap(
    func: Callable[..., R], tuples: Iterable[Iterable[Any]], /, **options: Unpack[MapOptions]
) -> list[R]:
    """Return what a function returns for every tuple of arguments, like `itertools.starmap`.

    Args:
        func: As for `dmap`.
        tuples: The items; each is unpacked into arguments.
        options: Those of `dmap`, ``backup`` included.
    """
    servers = options.pop("servers", None)
    if servers is None:
        _begin(func, tuples)
    return _client(servers).starmap(func, tuples, **options)


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork)
atexit.register(shutdown)
