"""A job as the caller holds it: a future with a handle, a status and events."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, cast

from dmap import raised, registry, replay, work
from dmap.errors import (
    AuthError,
    Busy,
    DmapError,
    JobCancelled,
    JobTimeout,
    NoServer,
    RemoteError,
    WorkerLost,
)
from dmap.tickets import NOBODY, Completed, Failed, Heard, InBackground, Refused
from jobserver.protocol import (
    Body,
    GetStatus,
    JobData,
    JobException,
    JobFail,
    JobStatus,
    LaneId,
    StatusIs,
)

if TYPE_CHECKING:
    from dmap.connection import Connection
    from dmap.tickets import Ticket

__all__ = ["Data", "Done", "Job", "JobEvent", "Status", "Warning", "as_completed", "wait"]

T = TypeVar("T")

ACCEPT_TIMEOUT: Final = 30.0
"""Seconds until a question about a job fails whose server does not answer."""
MAX_LANES: Final = 256
"""So many lanes go into one grab."""
MAX_EVENTS: Final = 10_000
"""Events of a job that nobody asks for are kept up to this many, the latest."""


@dataclass(frozen=True, slots=True)
class Status:
    """How far a job is.

    Attributes:
        numerator: What it last said itself; 0 before.
        denominator: Out of how much; 0 before.
        running: Whether a worker has it.
        ended: How it ended ("complete", "failed", "cancelled", ...); empty while it lives, and
            "unknown" if its server does not know it any more.
    """

    numerator: int = 0
    denominator: int = 0
    running: bool = True
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Data:
    """A partial result."""

    value: Any


@dataclass(frozen=True, slots=True)
class Warning:
    """What a running job warned of."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end: a result, or an error."""

    result: Any = None
    error: BaseException | None = None


JobEvent: TypeAlias = Status | Data | Warning | Done


_PENDING: Final = futures._base.PENDING
_FINISHED: Final = futures._base.FINISHED
_ENDED: Final = frozenset(
    (
        futures._base.CANCELLED,
        futures._base.CANCELLED_AND_NOTIFIED,
        _FINISHED,
    )
)
_cancelling = threading.RLock()  # to cancel takes two steps, which no other cancel may part


class Job(Future[T]):
    """A job that was submitted: a `concurrent.futures.Future`, which can be awaited too.

    A thread that waits for it (``result()``) moves the messages itself; otherwise a thread in the
    background does. Made by ``submit`` and ``attach``.
    """

    def __init__(self, connection: Connection, *, raw: bool = False) -> None:
        # As Future.__init__ does, but with a condition that is shared.
        self._condition = connection.condition
        self._state = _PENDING
        self._result = None
        self._exception = None
        self._waiters = []
        self._done_callbacks: list[Callable[[Future[Any]], object]] = []
        self._connection = connection
        self._raw = raw  # its result is bytes, as they are
        self._ticket: Ticket | None = None
        self._news: deque[JobEvent] | None = None  # what it said and nobody has read

    # --- what callers do ----------------------------------------------------------------------

    @property
    def handle(self) -> str:
        """The server's name for it, which ``attach`` understands: ``name:boot:n``.

        Waits until a server has accepted it, at most ACCEPT_TIMEOUT seconds.

        Raises:
            NoServer: none has.
        """
        ticket = self._require_ticket()
        self._connection.wait(lambda: bool(ticket.where) or self.done(), ACCEPT_TIMEOUT)
        if not ticket.where:
            raise NoServer(f"no server has accepted this job: {self._connection.why_no_server()}")
        return ticket.handle_text

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result and return it.

        Args:
            timeout: Seconds to wait; the job goes on after them. None waits as long as it takes.

        Raises:
            Exception: what the function raised; the remote traceback is its ``__cause__``.
            JobTimeout: the seconds are over.
            CancelledError: the job was cancelled.
        """
        if self._state not in _ENDED:
            self._wait(timeout)
        if self._state is _FINISHED and self._exception is None:
            return cast(T, self._result)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return the error, or None. Raises as ``result`` does."""
        self._wait(timeout)
        return super().exception(0)

    def done(self) -> bool:
        """Tell whether it has ended, in whichever way."""
        return self._state in _ENDED

    def cancel(self) -> bool:
        """Drop the job, also when it runs: then its worker is interrupted.

        Others who listen to the same merged job still get its result.

        Returns:
            False if it had ended before.
        """
        with _cancelling:
            if self.cancelled():
                return True
            if not super().cancel():
                return False
            self.set_running_or_notify_cancel()  # tells those who wait for it among others
        ticket = self._require_ticket()
        ticket.owner = NOBODY
        self._connection.cancel([ticket.number])
        return True

    def status(self) -> Status:
        """Ask its server how far it is. Waits for the answer.

        Raises:
            NoServer: there is none that could answer.
        """
        if self.done():
            return self._ended_status()
        ticket = self._require_ticket()
        if not ticket.where:
            return Status(running=False)
        return ask_status(self._connection, ticket.where, ticket.handle)

    def events(self, timeout: float | None = None) -> Iterator[JobEvent]:
        """Yield what the job says while it runs (Status, Data, Warning), and at last Done.

        Each event is yielded once. Of those that nobody read, the last MAX_EVENTS are kept.

        Args:
            timeout: Seconds to wait for all of it.

        Raises:
            JobTimeout: they are over.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        news = self._news
        if news is None:
            news = self._news = deque(maxlen=MAX_EVENTS)
        while True:
            while news:
                yield news.popleft()
            if self.done():
                if not news:
                    break
                continue
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._connection.wait(lambda: bool(news) or self.done(), left, self._lanes):
                raise JobTimeout(f"the job said nothing more in {timeout} s, and has not ended")
        if self.cancelled():
            yield Done(error=JobCancelled("the job was cancelled"))
            return
        error = super().exception(0)
        yield Done(error=error) if error is not None else Done(super().result(0))

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio

        self._connection.drive_in_background()
        return asyncio.wrap_future(self).__await__()

    # --- what the driver says -----------------------------------------------------------------

    def hear(self, event: Completed | Failed | Refused | Heard | InBackground) -> None:
        """Take an event of its ticket."""
        if isinstance(event, Completed):
            event.ticket.owner = NOBODY  # or the two would wait for the garbage collector
            if self._state in _ENDED:
                return
            try:
                value = _joined(event.result) if self._raw else work.load_result(event.result)
            except Exception as error:  # the result's own code runs
                self._fail(_unloadable(error, event.host))
            else:
                self._succeed(value)
        elif isinstance(event, Heard):
            self._hear_news(event)
        elif not isinstance(event, InBackground) and not self.done():
            event.ticket.owner = NOBODY
            self._fail(error_of(event))

    def _hear_news(self, event: Heard) -> None:
        if self._news is None:
            self._news = deque(maxlen=MAX_EVENTS)
        match event.message:
            case JobStatus(_, numerator, denominator):
                self._news.append(Status(numerator, denominator))
            case JobData():
                try:
                    value = _joined(event.body) if self._raw else work.load_result(event.body)
                except Exception as error:  # the value's own code runs
                    self._news.append(Warning(f"a partial result could not be loaded: {error!r}"))
                else:
                    self._news.append(Data(value))
            case _:
                self._news.append(Warning(_joined(event.body).decode(errors="replace")))

    def _succeed(self, value: Any) -> None:
        """Do as ``set_result`` does, which tells those who wait, without the cost if nobody does.

        Nobody sleeps on the condition but who calls a method of Future itself. Who does, and the
        callbacks, are private to the standard library, which has no other way to ask.
        """
        with self._connection.ending:
            if self._state in _ENDED:
                return  # it was cancelled at this very moment
            self._result = value
            self._state = _FINISHED
            for waiter in self._waiters:
                waiter.add_result(self)
            if self._condition._waiters:  # type: ignore[attr-defined]
                self._condition.notify_all()
        if self._done_callbacks:
            self._invoke_callbacks()  # type: ignore[attr-defined]

    def _fail(self, error: BaseException) -> None:
        try:
            self.set_exception(error)
        except futures.InvalidStateError:
            return

    # --- waiting ------------------------------------------------------------------------------

    @property
    def _lanes(self) -> tuple[LaneId, ...]:
        lane = 0 if self._ticket is None else self._ticket.terms.lane
        return (LaneId(self._connection.session, lane),)

    def _wait(self, timeout: float | None) -> None:
        if not self.done() and not self._connection.wait(self.done, timeout, self._lanes):
            raise JobTimeout(f"the job has not ended within {timeout} s; it goes on")

    def _require_ticket(self) -> Ticket:
        assert self._ticket is not None
        return self._ticket

    def _ended_status(self) -> Status:
        if self.cancelled():
            return Status(running=False, ended="cancelled")
        failed = super().exception(0) is not None
        return Status(running=False, ended="failed" if failed else "complete")


def ask_status(connection: Connection, where: str, handle: int) -> Status:
    """Ask the server of that ``name:boot`` for the status of one of its jobs.

    Raises:
        NoServer: it is not there.
    """
    answer = connection.ask(where, GetStatus(0, handle), ACCEPT_TIMEOUT)
    if answer is None or not isinstance(answer.message, StatusIs):
        why = connection.why_no_server()
        raise NoServer(f"the server {where} does not answer" + (f": {why}" if why else ""))
    known = answer.message
    ended = known.ended if known.known else "unknown"
    return Status(known.numerator, known.denominator, known.running, ended)


def error_of(event: Failed | Refused, index: int | None = None) -> BaseException:
    """Return the error that the owner of a ticket is to see.

    Args:
        event: How the ticket ended.
        index: Which item of the map it was about. None: a single job, whose error names the call
            in a note and can replay it.
    """
    if isinstance(event, Refused):
        return refusal_of(event)
    message = event.message
    if isinstance(message, JobException):
        error, where = exception_of(message, event.bodies), where_of(message)
    else:
        error, where = _failure_of(message, index), ""
    if index is None:
        replay.attach(error, replay.of_ticket(event.ticket), where=where)
    return error


def _failure_of(message: JobFail, index: int | None) -> DmapError:
    attempts = max(1, message.attempt)
    what = "the job" if index is None else f"item {index}"
    match message.code:
        case "lost":
            return WorkerLost(index, message.host or "?", attempts, message.exit or message.text)
        case "timeout":
            return JobTimeout(f"{what} ran out of its time on {message.host}: {message.text}")
        case "cancelled":
            return JobCancelled(f"{what} was cancelled: {message.text or 'by its handle'}")
        case "failed":
            return RemoteError("failed", f"{what} on {message.host}: {message.text}", "")
        case "unknown":
            return DmapError(f"the result of {what} is not to be had: {message.text}")


def exception_of(message: JobException, bodies: tuple[Body, ...]) -> BaseException:
    """Return the exception that a function raised."""
    summary = raised.Summary(message.type_name, message.message, message.traceback)
    return raised.restore(summary, _joined(bodies[0]) if bodies else b"")


def where_of(message: JobException, n_before: int = 0) -> str:
    """Return where a function raised: ``on papag (pid 4711), attempt 2``.

    Args:
        message: The server's word of it.
        n_before: Attempts that were made in other jobs.
    """
    where = f"on {message.host} (pid {message.pid})"
    attempt = message.attempt + n_before
    return f"{where}, attempt {attempt}" if attempt > 1 else where


def refusal_of(event: Refused) -> DmapError:
    """Return the error for a job that no server takes."""
    match event.trouble:
        case "no_server":
            return NoServer(
                f"no job server answers: {event.text}; start one there (`jobserver`), correct "
                "DMAP_SERVERS, set_job_servers() or servers=, or name none to work on this machine"
            )
        case "auth":
            return AuthError(f"no job server takes this client: {event.text}")
        case "blobs":
            return Busy(f"a server has no room for what the function carries: {event.text}")
        case "too_large":
            return Busy(f"a server does not take a job of this size: {event.text}")
        case "closed":
            return JobCancelled(event.text)


def _unloadable(error: Exception, host: str) -> BaseException:
    wrapped = RemoteError(
        f"{type(error).__module__}.{type(error).__qualname__}",
        f"the result, made on {host}, cannot be loaded here: {error}",
        "",
    )
    wrapped.__cause__ = error
    return wrapped


def _joined(body: Body) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body)


# --- many jobs --------------------------------------------------------------------------------


def wait(
    fs: Iterable[Future[Any]], timeout: float | None = None, return_when: str = ALL_COMPLETED
) -> futures._base.DoneAndNotDoneFutures[Any]:
    """Wait for some of these to end: `concurrent.futures.wait`, which may be called inside a job.

    Args:
        fs: Jobs, or any futures.
        timeout: Seconds.
        return_when: ALL_COMPLETED, FIRST_COMPLETED or FIRST_EXCEPTION.

    Returns:
        The two sets ``done`` and ``not_done``.
    """
    waited_for = set(fs)
    connection = _driven(waited_for)
    if connection is not None:
        ends = _Ends(waited_for)
        enough = {
            ALL_COMPLETED: lambda: len(ends.ended) == len(waited_for),
            FIRST_COMPLETED: lambda: bool(ends.ended),
            FIRST_EXCEPTION: lambda: ends.failed or len(ends.ended) == len(waited_for),
        }.get(return_when)
        if enough is not None:
            connection.wait(enough, timeout, _lanes(waited_for))
            timeout = 0
    return futures.wait(waited_for, timeout, return_when)


def as_completed(fs: Iterable[Future[T]], timeout: float | None = None) -> Iterator[Future[T]]:
    """Yield these as they end: `concurrent.futures.as_completed`, also inside a job.

    Args:
        fs: Jobs, or any futures.
        timeout: Seconds for all of them, from the call.

    Raises:
        JobTimeout: they are over (a TimeoutError).
    """
    waited_for = set(fs)
    deadline = None if timeout is None else time.monotonic() + timeout
    connection = _driven(waited_for)
    if connection is None:
        return futures.as_completed(waited_for, timeout)
    return _as_completed(waited_for, connection, timeout, deadline)


def _as_completed(
    waited_for: set[Future[T]],
    connection: Connection,
    timeout: float | None,
    deadline: float | None,
) -> Iterator[Future[T]]:
    ends = _Ends(waited_for)
    lanes = _lanes(waited_for)
    n_total = len(waited_for)
    del waited_for
    n_yielded = 0
    while n_yielded < n_total:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not ends.ended and not connection.wait(lambda: bool(ends.ended), left, lanes):
            raise JobTimeout(f"{n_total - n_yielded} of {n_total} jobs not ended in {timeout} s")
        n_yielded += 1
        yield cast("Future[T]", ends.ended.popleft())


class _Ends:
    """Which of some futures have ended, in that order. Any thread may end one."""

    def __init__(self, waited_for: Iterable[Future[Any]]) -> None:
        self.ended: deque[Future[Any]] = deque()
        self.failed = False
        for future in waited_for:
            future.add_done_callback(self._end)

    def _end(self, future: Future[Any]) -> None:
        self.failed = self.failed or future.cancelled() or Future.exception(future) is not None
        self.ended.append(future)


def _driven(waited_for: Iterable[Future[Any]]) -> Connection | None:
    """Return the connection whose driving brings all of these home, or any one inside a job."""
    connections = {f._connection if isinstance(f, Job) else None for f in waited_for}
    if len(connections) == 1:
        (only,) = connections
        if only is not None:
            return only
    connections.discard(None)
    if connections and registry.current_worker() is not None:
        return next(iter(connections))
    return None


def _lanes(waited_for: Iterable[Future[Any]]) -> list[LaneId]:
    lanes = {lane for future in waited_for if isinstance(future, Job) for lane in future._lanes}
    return list(lanes)[:MAX_LANES]
