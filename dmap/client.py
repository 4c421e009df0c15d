"""`Client`: a session with some job servers, and what can be asked of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self, TypedDict, TypeVar, Unpack, overload

from dmap import calls, closures, identity, overlay, pickling, raised, registry, work, writes
from dmap.closures import Closure
from dmap.connection import Connection, python_version
from dmap.errors import Busy, NoServer
from dmap.jobs import Job, error_of
from dmap.map import PRIORITIES, ImapOptions, Items, Map, MapOptions, Priority, Settings
from dmap.tickets import Attached, Blob, Event, Failed, InBackground, Refused, Terms, Ticket
from dmap.warn import warn, warn_once
from jobserver.protocol import Body, Origin

__all__ = ["Client", "Jobs"]

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
R = TypeVar("R")

ACCEPT_TIMEOUT: Final = 30.0
"""Seconds that a background job may wait until a server has accepted it."""
MAX_KNOWN: Final = 64
"""Functions whose pickle is kept for the next submit."""


class JobOptions(TypedDict, total=False):
    """What may be said of jobs. See `Jobs.options`."""

    priority: Priority
    uniq: str | bytes | None
    merge: bool
    not_before: float
    timeout: float | None
    attempts: int
    labels: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The options of jobs, looked through."""

    priority: Priority = "normal"
    uniq: bytes | None = None
    merge: bool = False
    not_before: float = 0.0
    timeout: float | None = None
    attempts: int = 3
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.priority not in PRIORITIES:
            raise ValueError(f'priority is {self.priority!r}: say "high", "normal" or "low"')
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}: say 1 (at most one run) or more")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout!r}: say seconds above 0, or None")
        if self.not_before < 0:
            raise ValueError(f"not_before is {self.not_before}: say seconds from now")
        if self.uniq is not None and not 0 < len(self.uniq) <= 256:
            raise ValueError(f"a uniq has 1 to 256 bytes, not {len(self.uniq)}")


class _Known:
    """A function that was pickled, and what that pickle depends on."""

    __slots__ = ("closure", "extended", "fingerprint", "func", "terms", "watch")

    def __init__(
        self, closure: Closure, fingerprint: identity.Fingerprint | None, terms: Terms
    ) -> None:
        self.closure = closure
        self.func = closure.func  # keeps its id
        self.fingerprint = fingerprint  # None: it is good for one call
        self.terms = terms
        self.watch = closure.watch()
        # id of a bundle, for arguments that need more modules -> terms
        self.extended: dict[bytes, Terms] = {}


class Jobs:
    """Ways to have work done, all with the same options. A `Client` is one, `options` returns one.

    For any number of threads.
    """

    def __init__(self, client: Client, options: _Options) -> None:
        self._client = client
        self._options = options
        self._known: dict[int, _Known] = {}  # id of a function -> its terms
        self._named: dict[str, Terms] = {}  # name of a function -> its terms

    def options(self, **options: Unpack[JobOptions]) -> Jobs:
        """Return the same methods with these options, beside those that hold already.

        Args:
            options: any of

                * ``priority``: "high", "normal" or "low"; across all functions.
                * ``uniq``: what makes two calls of a function the same; at most 256 bytes. Named
                  functions have the digest of their argument by default.
                * ``merge``: join a job of the same function and uniq that waits or runs, and share
                  its result, even where the function itself does not allow it.
                * ``not_before``: seconds from now before which the job does not run.
                * ``timeout``: seconds that one run may take.
                * ``attempts``: runs that may end by the loss of their worker; 1 is at most once.
                * ``labels``: what a worker must have been given (``dmap-worker --labels``).

        Raises:
            ValueError: one of them makes no sense.
        """
        changed: dict[str, Any] = dict(options)
        uniq = changed.get("uniq")
        if isinstance(uniq, str):
            changed["uniq"] = uniq.encode()
        if isinstance(changed.get("labels"), str):
            raise ValueError(f"labels is {changed['labels']!r}: say a list of them")
        if "labels" in changed:
            changed["labels"] = tuple(changed["labels"])
        return Jobs(self._client, replace(self._options, **changed))

    # --- single jobs --------------------------------------------------------------------------

    @overload
    def submit(self, func: str, /, *args: Any, **kwargs: Any) -> Job[Any]: ...

    @overload
    def submit(self, func: Callable[..., R], /, *args: Any, **kwargs: Any) -> Job[R]: ...

    def submit(self, func: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Job[Any]:
        """Submit one call, and return at once with its job.

        Args:
            func: What to call: any function, with what it closes over; or the name of one that
                workers have registered (`job`), which need not exist here.
            args: Its arguments; pickled now.
            kwargs: Its keyword arguments.

        Raises:
            ClosureError: the function or an argument cannot be pickled.
        """
        argument: Body
        uniq = self._options.uniq or b""
        if isinstance(func, str):
            terms = self._terms_of_name(func)
            argument = work.dump_named(args, kwargs)
            uniq = uniq or _argument_uniq(args, kwargs)
        else:
            known = self._require_known(func)
            terms = known.terms
            plain = work.dump_plain_call(args, kwargs)
            if plain is not None:
                argument = plain
            else:
                seen = pickling.Seen()
                argument = work.dump_call(args, kwargs, seen)
                if seen.modules:
                    terms = self._terms_for(known, seen)
            if self._options.merge and not uniq:
                uniq = known.closure.uniq("call", (args, kwargs))
        connection = self._client._require_connection()
        job: Job[Any] = Job(connection)
        ticket = Ticket(connection.next_number(), terms, argument, job, uniq)
        job._ticket = ticket
        connection.submit(ticket)
        return job

    def background(self, func: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> str:
        """Submit a job that lives without its caller, and return its handle.

        It has been accepted then: it is in the memory of one server, and is not submitted again
        if that is lost. Its status can be asked and its result waited for with `attach`.

        Args:
            func: As for `submit`.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Raises:
            Busy: no server had room within ACCEPT_TIMEOUT seconds.
            NoServer: none answered.
            ClosureError: the function or an argument cannot be pickled.
        """
        argument: Body
        uniq = self._options.uniq or b""
        if isinstance(func, str):
            argument = work.dump_named(args, kwargs)
            uniq = uniq or _argument_uniq(args, kwargs)
            terms = self._make_terms(func, background=True)
        else:
            closure = _prepare(func)
            seen = pickling.Seen()
            argument = work.dump_call(args, kwargs, seen)
            if self._options.merge and not uniq:
                uniq = closure.uniq("call", (args, kwargs))
            blobs = closure.blobs_for(seen)
            terms = self._make_terms(None, blobs, closure.labels, background=True)
        connection = self._client._require_connection()
        acceptance = _Acceptance()
        ticket = Ticket(connection.next_number(), terms, argument, acceptance, uniq)
        connection.submit(ticket)
        connection.wait(lambda: acceptance.event is not None, ACCEPT_TIMEOUT)
        match acceptance.event:
            case InBackground():
                return ticket.handle_text
            case None:
                connection.cancel([ticket.number])
                why = connection.why_no_server()
                if why:
                    raise NoServer(f"no job server answers: {why}")
                raise Busy(
                    f"no server has accepted the job within {ACCEPT_TIMEOUT:.0f} s: they are at "
                    "their limits; try again later"
                )
            case event:
                raise error_of(event)

    def attach(self, handle: str) -> Job[Any]:
        """Return a job that listens to the one with this handle.

        It gets the status, data and warnings from now on, and the result. If the job is not known
        any more, or never was, its result is a `DmapError` that says so.

        Args:
            handle: ``name:boot:n``, from `background` or `Job.handle`.

        Raises:
            ValueError: it is no handle.
        """
        where, _, number = handle.rpartition(":")
        if ":" not in where or not (number.isascii() and number.isdigit()):
            raise ValueError(f"{handle!r} is no handle: they read name:boot:number")
        connection = self._client._require_connection()
        job: Job[Any] = Job(connection)
        ticket = Attached(connection.next_number(), where, int(number), job)
        job._ticket = ticket
        connection.submit(ticket)
        return job

    # --- maps ---------------------------------------------------------------------------------

    @overload
    def dmap(
        self, func: Callable[[A], R], a: Iterable[A], /, **options: Unpack[MapOptions]
    ) -> list[R]: ...
    @overload
    def dmap(
        self,
        func: Callable[[A, B], R],
        a: Iterable[A],
        b: Iterable[B],
        /,
        **options: Unpack[MapOptions],
    ) -> list[R]: ...
    @overload
    def dmap(
        self,
        func: Callable[[A, B, C], R],
        a: Iterable[A],
        b: Iterable[B],
        c: Iterable[C],
        /,
        **options: Unpack[MapOptions],
    ) -> list[R]: ...
    @overload
    def dmap(
        self,
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
        self,
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
        self,
        func: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        **options: Unpack[MapOptions],
    ) -> list[Any]:
        """Call a function on every item, spread over the workers; see the function `dmap`."""
        closures.check_callable(func)  # before what may be its place is taken for the items
        return self._map_all(func, Items(_required(iterables), whole=True), options)

    @overload
    def imap(
        self, func: Callable[[A], R], a: Iterable[A], /, **options: Unpack[ImapOptions]
    ) -> Generator[R, None, None]: ...
    @overload
    def imap(
        self,
        func: Callable[[A, B], R],
        a: Iterable[A],
        b: Iterable[B],
        /,
        **options: Unpack[ImapOptions],
    ) -> Generator[R, None, None]: ...
    @overload
    def imap(
        self,
        func: Callable[[A, B, C], R],
        a: Iterable[A],
        b: Iterable[B],
        c: Iterable[C],
        /,
        **options: Unpack[ImapOptions],
    ) -> Generator[R, None, None]: ...
    @overload
    def imap(
        self,
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
        self,
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
        self,
        func: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        **options: Unpack[ImapOptions],
    ) -> Generator[Any, None, None]:
        """Call a function on every item, lazily; see the function `imap`."""
        settings = self._settings(options)
        closures.check_callable(func)
        return self._iterate(func, Items(_required(iterables)), settings)

    def starmap(
        self,
        func: Callable[..., R],
        tuples: Iterable[Iterable[Any]],
        /,
        **options: Unpack[MapOptions],
    ) -> list[R]:
        """Call a function on the elements of every tuple; see the function `starmap`."""
        closures.check_callable(func)
        return self._map_all(func, Items([tuples], star=True, whole=True), options)

    def _map_all(self, func: Callable[..., Any], items: Items, options: MapOptions) -> list[Any]:
        settings = self._settings(options)
        if items.is_empty():
            return []
        run = self._start_map(func, items, settings, keep=True)
        try:
            return run.all()
        except BaseException as error:
            raised.keep_results(error, run.results())
            raise
        finally:
            run.close()

    def _iterate(
        self, func: Callable[..., Any], items: Items, settings: Settings
    ) -> Generator[Any, None, None]:
        if items.is_empty():
            return
        run = self._start_map(func, items, settings, keep=False)
        try:
            for values in run.parts():
                yield from values
        except GeneratorExit:
            raise
        except BaseException as error:
            raised.keep_results(error, run.results())
            raise
        finally:
            run.close()

    def _settings(self, options: MapOptions | ImapOptions) -> Settings:
        said: dict[str, Any] = dict(options)
        known = ImapOptions.__optional_keys__ - {"servers"}
        for name in said.keys() - known:
            raise TypeError(f"a map has no option {name!r}; it has {', '.join(sorted(known))}")
        own = self._options
        said.setdefault("priority", own.priority)
        said.setdefault("merge", own.merge)
        said.setdefault("attempts", own.attempts)
        said.setdefault("labels", own.labels)
        return Settings(not_before=own.not_before, **said)

    def _start_map(
        self, func: Callable[..., Any], items: Items, settings: Settings, *, keep: bool
    ) -> Map:
        # Before a connection is made: what cannot travel is said at once.
        closure = _prepare(func)
        connection = self._client._require_connection()
        name = getattr(func, "__qualname__", type(func).__qualname__)
        return Map(connection, closure, items, settings, name, ancestors=_ancestors(), keep=keep)

    # --- terms --------------------------------------------------------------------------------

    def _require_known(self, func: Callable[..., Any]) -> _Known:
        """Return a function with its pickle of now and the terms of its calls."""
        known = self._known.get(id(func))
        nested = registry.current_worker() is not None
        if (
            known is not None
            and known.func is func
            and not nested
            and known.fingerprint is not None
            and known.fingerprint.holds()
            and (known.watch is None or known.watch.holds())
        ):
            return known
        fingerprint = identity.fingerprint(func)  # first: what changes from now on is seen
        closure = _prepare(func)
        known = _Known(closure, fingerprint, self._make_closure_terms(closure.blobs, closure))
        if fingerprint is not None and not nested:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[id(func)] = known
        return known

    def _terms_for(self, known: _Known, seen: pickling.Seen) -> Terms:
        """Return the terms of calls whose arguments count on these modules too."""
        blobs = known.closure.blobs_for(seen)
        if blobs is known.closure.blobs:
            return known.terms
        terms = known.extended.get(blobs[1].id)
        if terms is None:
            terms = self._make_closure_terms(blobs, known.closure)
            known.extended[blobs[1].id] = terms
        return terms

    def _make_closure_terms(self, blobs: tuple[Blob, ...], closure: Closure) -> Terms:
        return self._make_terms(None, blobs, closure.labels)

    def _terms_of_name(self, name: str) -> Terms:
        if registry.current_worker() is not None:
            return self._make_terms(name)
        terms = self._named.get(name)
        if terms is None:
            if not 1 <= len(name) <= 256 or not name.isprintable():
                raise ValueError(f"{name!r} is no name of a function")
            terms = self._named[name] = self._make_terms(name)
        return terms

    def _lane(self) -> int:
        """Return the lane of single jobs: inside a job that job's own, else 0."""
        ancestors = _ancestors()
        return self._client._require_connection().lane_of(ancestors[-1]) if ancestors else 0

    def _make_terms(
        self,
        name: str | None,
        blobs: tuple[Blob, ...] = (),
        labels: tuple[str, ...] = (),
        *,
        background: bool = False,
    ) -> Terms:
        """Make the terms of a named function's calls, or of a closure's."""
        options = self._options
        return Terms(
            work.FUNCTION if name is None else name,
            # A job that waits has no use for background jobs.
            lane=0 if background else self._lane(),
            priority=PRIORITIES[options.priority],
            background=background,
            merge=options.merge,
            python=python_version() if name is None else "",
            labels=(*options.labels, *labels),
            attempts=options.attempts,
            timeout=options.timeout or 0.0,
            not_before=options.not_before,
            blobs=blobs,
            ancestors=_ancestors(),
            by_uniq=options.merge or name is not None,
            once=options.attempts == 1,
        )


class Client(Jobs):
    """A session with some job servers. It connects at its first use.

    As a context manager it closes itself. After a fork, the child's use of it makes a connection
    of its own.

    Args:
        servers: Addresses (``sammy``, ``kenny:4731``, ``ipc:///path``), in a list or with commas
            between them. None: those of the worker, inside a job; else those that
            `set_job_servers` named; else DMAP_SERVERS; else a cluster of this process's own.

    Raises:
        ValueError: a server's address is none.
    """

    def __init__(self, servers: Sequence[str] | str | None = None) -> None:
        super().__init__(self, _Options())
        self._servers = None if servers is None else calls.parse(servers)
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._closed = False
        _clients.append(self)

    def close(self) -> None:
        """Cancel the foreground jobs that have not ended, and leave the servers."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self in _clients:
            _clients.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {', '.join(self._servers or ['whom it finds'])}>"

    def _require_connection(self) -> Connection:
        connection = self._connection
        if connection is not None and connection.usable:
            return connection
        with self._lock:
            if self._closed:
                raise RuntimeError("this client was closed")
            connection = self._connection
            if connection is None or not connection.usable:
                connection = self._connection = Connection(self._servers or calls.find_servers())
            return connection


class _Acceptance:
    """Waits for a server to accept a background job."""

    def __init__(self) -> None:
        self.event: InBackground | Failed | Refused | None = None

    def hear(self, event: Event) -> None:
        if isinstance(event, InBackground | Failed | Refused):
            self.event = event


def _argument_uniq(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return what makes a named function's call equal to others; its own if that cannot be told."""
    try:
        return identity.argument_uniq(args, kwargs)
    except identity.Unidentifiable:
        return os.urandom(32)


def _prepare(func: Callable[..., Any]) -> Closure:
    """Make a function ready to travel, and tell the caller of what would surprise him."""
    closure = Closure(func)
    for text in writes.lost_writes(func):
        warn(text)
    stale = overlay.stale(func) if closure.modules else None
    if stale:
        warn_once(stale)
    return closure


def _ancestors() -> tuple[Origin, ...]:
    """Return the jobs inside which this code runs."""
    worker = registry.current_worker()
    running = None if worker is None else worker.innermost()
    return () if running is None else (*running.ancestors, running.origin)


def _required(iterables: Sequence[Iterable[Any]]) -> Sequence[Iterable[Any]]:
    if not iterables:
        raise TypeError("a map needs at least one iterable: dmap(func, items)")
    return iterables


# --- all of them ------------------------------------------------------------------------------

_clients: list[Client] = []  # open ones


def close_all() -> None:
    """Close the clients of this process."""
    for client in list(_clients):
        client.close()


def _after_fork() -> None:
    # Another thread may have held them. Connections know themselves that they were inherited.
    for client in _clients:
        client._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
