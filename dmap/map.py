"""A map as an application of jobs: chunks go out, parts come home, in order or as they come.

::

                 cut (ChunkSizer)        submit              hear
    the input ------------------> chunks -------> servers --------> inbox
                  ^                                                   |
                  |  what came home undone: the rest of a chunk,      v
                  '-- an item to be tried again, suspects <------- parts --> the caller

A chunk may come home in part, and the rest is cut anew. That one mechanism serves everything that
can happen to it: an item raised; a worker was told to leave; the time of an item was up; a worker
died under it, and then the items that may have killed it go out alone, with that attempt counted,
and the others together, without.

All of this runs in the thread that wants the results, when it wants one. Nothing is pulled from
the input in between, and what is out, and what is home and not yet taken, is bounded in number and
in bytes. So both ends may be endless.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypedDict

from dmap import identity, pickling, work
from dmap.chunks import OVERRUN, ChunkSizer
from dmap.client_state import ClientState
from dmap.closures import Closure, Kind
from dmap.connection import Connection, describe_no_workers, python_version
from dmap.errors import ClosureError, DmapError, JobTimeout, NoServer, NoWorker, WorkerLost
from dmap.jobs import error_of, exception_of, refusal_of, where_of
from dmap.progress import Progress
from dmap.replay import ItemCall, attach
from dmap.tickets import (
    PATIENCE,
    Completed,
    Event,
    Failed,
    Heard,
    InBackground,
    NoWorkers,
    Refused,
    Terms,
    Ticket,
)
from jobserver.protocol import (
    HIGH,
    LOW,
    NORMAL,
    Body,
    JobException,
    JobFail,
    LaneId,
    OpenLane,
    Origin,
    nbytes_of,
)

logger = logging.getLogger(__name__)

CHUNK_NBYTES: Final = 8 * 2**20
"""A chunk's argument, or its result, should have no more bytes than this."""
WINDOW_NBYTES: Final = 256 * 2**20
"""Arguments that are out and results that nobody has taken have some so many bytes at most."""
WINDOW_ITEMS: Final = 2**20
"""Items of a lazy map that may be read and not taken. An int has 5 bytes on its way, 40 here."""
WINDOW_PARTS: Final = 16
"""Parts a worker that may be home and not taken."""
MERGE_AHEAD: Final = 1024
"""Jobs of a merged map that may be out. Many, since equal ones meet only while they are."""
BACKUP_AFTER: Final = 0.1
"""Seconds that a chunk must have been out before it is worth a copy."""
BACKUP_FACTOR: Final = 2.0
"""And so many times what chunks took so far."""

Priority: TypeAlias = Literal["high", "normal", "low"]
OnError: TypeAlias = Literal["raise", "return", "skip"]

PRIORITIES: Final[dict[str, int]] = {"high": HIGH, "normal": NORMAL, "low": LOW}


class MapOptions(TypedDict, total=False):
    """What may be said to a map. See `dmap.dmap`."""

    chunksize: int | Literal["auto"]
    timeout: float | None
    item_timeout: float | None
    retries: int
    attempts: int
    on_error: OnError
    merge: bool
    backup: bool
    priority: Priority
    seed: int | None
    labels: Sequence[str]
    progress: bool | None
    desc: str | None
    total: int | None
    servers: Sequence[str] | str | None


class ImapOptions(MapOptions, total=False):
    """What may be said to a lazy map. See `dmap.imap`."""

    ordered: bool
    buffersize: int | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a map, looked through.

    Raises:
        ValueError: one of them makes no sense; the message says which.
    """

    chunksize: int | Literal["auto"] = "auto"
    timeout: float | None = None
    item_timeout: float | None = None
    retries: int = 0
    attempts: int = 3
    on_error: OnError = "raise"
    merge: bool = False
    backup: bool = False
    priority: Priority = "normal"
    seed: int | None = None
    labels: Sequence[str] = ()
    progress: bool | None = None
    desc: str | None = None
    total: int | None = None
    ordered: bool = True
    buffersize: int | None = None
    not_before: float = 0.0

    def __post_init__(self) -> None:
        if self.chunksize != "auto" and (not isinstance(self.chunksize, int) or self.chunksize < 1):
            raise ValueError(f'chunksize is {self.chunksize!r}: say 1 or more, or "auto"')
        if self.merge and self.chunksize not in ("auto", 1):
            raise ValueError("with merge=True each item is a job of its own: leave chunksize out")
        if self.backup and self.merge:
            raise ValueError("with merge=True a second run would join the first: leave backup out")
        if self.backup and self.attempts == 1:
            raise ValueError("attempts=1 is at most one run, and backup=True asks for a second one")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}: say 0 or more")
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}: say 1 (at most one run) or more")
        if self.on_error not in ("raise", "return", "skip"):
            raise ValueError(f'on_error is {self.on_error!r}: say "raise", "return" or "skip"')
        if self.priority not in PRIORITIES:
            raise ValueError(f'priority is {self.priority!r}: say "high", "normal" or "low"')
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            raise ValueError(f"seed is {self.seed!r}: say a whole number from 0 on, or None")
        for name in ("timeout", "item_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is {seconds!r}: say seconds above 0, or None")
        if self.buffersize is not None and self.buffersize < 1:
            raise ValueError(f"buffersize is {self.buffersize}: say 1 or more, or None")
        if isinstance(self.labels, str):
            raise ValueError(f"labels is {self.labels!r}: say a list of them")


class Items:
    """The input of a map: one iterable, or several in step.

    Args:
        iterables: Read no faster than items are taken.
        star: Whether each item is a tuple of arguments.
        whole: Whether nobody can add to a list before all is done.

    Attributes:
        star: As above, or there are several iterables.
        total: How many there are, as far as that can be known.
        has_end: Whether they are all there, so that they can be taken from the end too.
    """

    def __init__(
        self, iterables: Sequence[Iterable[Any]], *, star: bool = False, whole: bool = False
    ) -> None:
        lengths = [_length(iterable) for iterable in iterables]
        known = [length for length in lengths if length is not None]
        self.total = min(known) if len(known) == len(lengths) else None
        self.star = star or len(iterables) > 1
        self._tuples = star
        # Others may have a length too, and ways of their own to slice.
        kinds = (list, tuple, range) if whole else (tuple, range)
        self.has_end = all(type(iterable) in kinds for iterable in iterables)
        self._sequences: Sequence[Any] = iterables if self.has_end else ()
        self._start, self._stop = 0, self.total or 0  # what was not taken of sequences
        if star:
            self._source: Iterator[Any] = map(tuple, iterables[0])
        elif len(iterables) == 1:
            self._source = iter(iterables[0])
        else:
            self._source = zip(*iterables, strict=False)
        self._peeked: list[Any] = []

    def is_empty(self) -> bool:
        """Look whether there is a first item; that may block, as the input does."""
        if self.total is not None:
            return not self.total
        self._peeked = list(itertools.islice(self._source, 1))
        return not self._peeked

    def take(self, n: int) -> Sequence[Any]:
        """Return the next ``n`` items, fewer at the end."""
        if self.has_end:
            start = self._start
            self._start = min(start + n, self._stop)
            return self._slice(start, self._start)
        if not self._peeked:
            return list(itertools.islice(self._source, n))
        first, self._peeked = self._peeked, []
        return first + list(itertools.islice(self._source, n - 1))

    def take_last(self, n: int) -> tuple[int, Sequence[Any]]:
        """Return the last ``n`` items that are left, or all, and the index of the first of them.

        Only where they have an end.
        """
        stop = self._stop
        self._stop = max(stop - n, self._start)
        return self._stop, self._slice(self._stop, stop)

    def _slice(self, start: int, stop: int) -> Sequence[Any]:
        parts = [sequence[start:stop] for sequence in self._sequences]
        if len(parts) > 1:
            return list(zip(*parts, strict=False))
        only: Sequence[Any] = parts[0]  # of a range it is one: short to send
        return [tuple(item) for item in only] if self._tuples else only


def _length(iterable: Iterable[Any]) -> int | None:
    try:
        return len(iterable)  # type: ignore[arg-type]
    except TypeError:
        return None


class _Run:
    """Consecutive items that wait to be cut (again). ``alone``: each goes as a chunk of its own."""

    __slots__ = ("alone", "from_end", "items", "n_cut", "start")

    def __init__(
        self, start: int, items: Sequence[Any], *, alone: bool = False, from_end: bool = False
    ) -> None:
        self.start = start
        self.items = items
        self.alone = alone
        self.from_end = from_end
        self.n_cut = 0

    def cut(self, n: int) -> _Run:
        """Return the next ``n`` items, or all that are left, as a run; in O(n)."""
        start, self.n_cut = self.n_cut, min(self.n_cut + n, len(self.items))
        items = self.items[start : self.n_cut]
        return _Run(self.start + start, items, alone=self.alone, from_end=self.from_end)


class _Chunk:
    """Consecutive items that are out in a job, or in a job and its copy."""

    __slots__ = ("from_end", "items", "sent_at", "start", "tickets")

    def __init__(self, run: _Run, now: float) -> None:
        self.start = run.start
        self.items = run.items
        self.from_end = run.from_end
        self.sent_at = now
        self.tickets: list[Ticket] = []


class _Part:
    """What came home of ``n`` consecutive items: their values, or none where one was skipped.

    ``error`` is set where a single item failed, whether its value is that error or nothing.
    """

    __slots__ = ("error", "n", "nbytes", "values")

    def __init__(
        self, n: int, values: list[Any], nbytes: int = 0, error: BaseException | None = None
    ) -> None:
        self.n = n
        self.values = values
        self.nbytes = nbytes
        self.error = error


class Map:
    """One map under way, for one thread. ``close`` it, whatever happened.

    Args:
        connection: Where its jobs go.
        closure: The function, ready to travel.
        items: The input.
        settings: What was said.
        name: What people are told the map is.
        ancestors: The jobs inside which it runs.
        keep: Whether the caller keeps all results, so that they need no bound.
    """

    def __init__(
        self,
        connection: Connection,
        closure: Closure,
        items: Items,
        settings: Settings,
        name: str,
        *,
        ancestors: tuple[Origin, ...] = (),
        keep: bool,
    ) -> None:
        self._connection = connection
        self._closure = closure
        self._items = items
        self._settings = settings
        self._ancestors = ancestors
        self._keep = keep
        self._name = settings.desc or name
        self._began = time.monotonic()
        timeout = settings.timeout
        self._deadline = math.inf if timeout is None else self._began + timeout
        total = items.total if settings.total is None else settings.total
        each_alone = settings.merge or settings.attempts == 1
        self._sizer = ChunkSizer(chunksize=1 if each_alone else settings.chunksize, total=total)
        # Who said how large chunks are meant their borders too; and lazy maps go from the front.
        self._has_end = keep and items.has_end and settings.chunksize == "auto" and not each_alone
        self._progress = Progress(settings.progress, settings.desc, total)
        self._lane = connection.next_lane()
        self._lanes = [LaneId(connection.session, self._lane)]
        self._seen = pickling.Seen()  # what the items count on
        self._definitions = identity.Definitions()  # of their classes
        # attempts and ids of the blobs that the items need -> terms
        self._terms: dict[tuple[int, tuple[bytes, ...]], Terms] = {}
        self._n_workers = 1

        self._inbox: deque[Event] = deque()  # appended to by whichever thread drives
        self._todo: deque[_Run] = deque()  # what came back, ahead of the rest of the input
        self._more = True  # there may be more in the input
        self._next = 0  # the index of the next item of the input
        self._n_begun = 0  # items of the input that were taken
        self._out: dict[int, _Chunk] = {}  # ticket's number -> chunk
        self._n_out = 0  # items
        self._n_chunks_out = 0
        self._nbytes_out = 0
        self._parts: dict[int, _Part] = {}  # start -> what is home and not taken
        self._values: list[Any] = []  # of the first items, where all are kept
        self._arrived: deque[int] = deque()  # starts, in the order of their coming
        self._next_home = 0  # the start of the part to take next, if order is wanted
        self._n_taken = 0  # items
        self._n_done = 0  # items that ended, well or not
        self._nbytes_home = 0
        self._nbytes_an_item = 1.0  # as it was lately, to the larger side
        self._seconds_a_chunk = 0.0  # in a worker; a running mean
        self._lost: dict[int, int] = {}  # index -> attempts that ended with their worker
        self._tries: dict[int, int] = {}  # index -> runs that raised and were forgiven
        self._error: BaseException | None = None  # of the item that failed first
        self._end: BaseException | None = None  # why the map as a whole cannot go on

        message = OpenLane(self._lane, self._name[:256], total or 0)

        def open_lane(state: ClientState, now: float) -> list[Event]:
            state.open_lane(message)
            return []

        connection.command(open_lane)

    # --- what the caller does -----------------------------------------------------------------

    def all(self) -> list[Any]:
        """Return all values in order. Raises as soon as an item has failed, if it is to raise."""
        raises = self._settings.on_error == "raise"
        goes_on = True
        while goes_on:
            goes_on = self._step()
            if self._error is not None and raises:
                raise self._error
            if raises:
                # Now, while they are in the caches; and each value has its index for a place.
                self._join()
            if goes_on:
                self._wait()
        values = self._values
        for start in sorted(self._parts):
            values += self._parts[start].values
        return values

    def _join(self) -> None:
        """Put the values of all that is home and next in order together."""
        while (part := self._parts.pop(self._next_home, None)) is not None:
            self._values += part.values
            self._next_home += part.n

    def parts(self) -> Iterator[list[Any]]:
        """Yield the values of consecutive items, in order or as they come home."""
        raises = self._settings.on_error == "raise"
        while True:
            goes_on = self._step()
            part = self._take_part()
            if part is not None:
                if part.error is not None and raises:
                    raise part.error
                yield part.values
                self._n_taken += part.n
            elif goes_on:
                self._wait()
            else:
                return

    def results(self) -> dict[int, Any]:
        """Return what is home and was not taken: index -> value."""
        found = dict(enumerate(self._values))
        for start, part in self._parts.items():
            if part.error is None:
                found.update(enumerate(part.values, start))
        return found

    def close(self) -> None:
        """Cancel what is out, and sum up."""
        shipped = self._shipped()
        self._progress.close(shipped)
        if logger.isEnabledFor(logging.INFO):
            seconds = time.monotonic() - self._began
            logger.info("%s: %d items in %.3g s; %s", self._name, self._n_done, seconds, shipped)
        numbers, lane = list(self._out), self._lane
        self._out.clear()

        def end(state: ClientState, now: float) -> list[Event]:
            state.cancel(numbers)
            state.close_lane(lane)
            return []

        self._connection.command(end)

    def _shipped(self) -> str:
        """Say what its function cost to send: of a second map with it, nothing."""
        by_server: dict[int, int] = {}
        for terms in self._terms.values():
            for server, nbytes in terms.shipped.items():
                by_server[server] = by_server.get(server, 0) + nbytes
        if not by_server:
            return "shipped nothing"
        size, n_servers = max(by_server.values()), len(by_server)
        text = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
        return f"shipped {text} once to {n_servers} server{'s' if n_servers > 1 else ''}"

    def hear(self, event: Event) -> None:
        """Take an event of one of its tickets; called by the driver."""
        self._inbox.append(event)

    # --- steps --------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Take in what has come and send out what may go; return whether anything is missing.

        Raises:
            BaseException: the map cannot go on; or what the input raised.
        """
        while self._inbox:
            self._take(self._inbox.popleft())
        if self._end is not None:
            raise self._end
        self._n_workers = self._heard_workers()
        self._sizer.n_workers = self._n_workers
        self._cut()
        return bool(self._out or self._todo or self._more)

    def _wait(self) -> None:
        seconds = self._deadline - time.monotonic()
        if self._settings.backup and not (self._more or self._todo):
            seconds = min(seconds, BACKUP_AFTER)
        timeout = None if seconds == math.inf else max(0.0, seconds)
        self._connection.wait(self._has_news, timeout, self._lanes)
        if not self._inbox and time.monotonic() >= self._deadline:
            self._end = self._too_late()

    def _has_news(self) -> bool:
        return bool(self._inbox) or self._heard_workers() != self._n_workers

    def _heard_workers(self) -> int:
        known = [terms.n_workers for terms in self._terms.values() if terms.n_workers is not None]
        return max(known, default=self._n_workers)

    def _too_late(self) -> DmapError:
        timeout = self._settings.timeout
        why = self._connection.why_no_server()
        if why:
            return NoServer(f"no job server answers, and the map's {timeout} s are over: {why}")
        if not self._heard_workers():
            over = f"the map's {timeout} s are over"
            return NoWorker(describe_no_workers(self._absence(), self._connection.servers, over))
        return JobTimeout(
            f"the map has not ended within {timeout} s: {self._n_out} items were out, "
            f"{self._n_begun} begun; those that are home are in .results"
        )

    def _absence(self) -> NoWorkers:
        """Return who there is instead of workers for this map, as far as the servers have said."""
        every = list(self._terms.values())
        found = [terms.absence for terms in every if terms.absence is not None]
        return found[-1] if found else NoWorkers(every[-1], None, (), ())

    # --- out ----------------------------------------------------------------------------------

    def _cut(self) -> None:
        tickets: list[Ticket] = []
        while self._end is None:
            from_end = self._todo[0].from_end if self._todo else self._is_from_end()
            size = self._size(from_end)
            run = self._next_run(size, from_end) if size else None
            if run is None:
                break
            self._send(run, tickets)
        if self._settings.backup and not (self._more or self._todo):
            self._send_copies(tickets)
        if tickets:
            self._connection.submit_all(tickets)

    def _is_from_end(self) -> bool:
        """Tell from which end of the input the next chunk should be."""
        return self._has_end and self._sizer.from_end()

    def _size(self, from_end: bool) -> int:
        """Return how many items the next chunk should have; 0 if none should go now."""
        if self._settings.merge:
            return 1 if self._n_out < MERGE_AHEAD else 0
        return self._sizer.next_size(self._n_out, self._n_chunks_out, from_end=from_end)

    def _next_run(self, size: int, from_end: bool) -> _Run | None:
        """Take the items of the next chunk, at most ``size``; None if there are none, or no room.

        What came back goes first and needs no room: it has some already.
        """
        size = min(size, max(1, int(CHUNK_NBYTES / self._nbytes_an_item)))
        if self._todo:
            run = self._todo[0]
            if run.alone:
                size = 1
            first = run.cut(size)
            if run.n_cut == len(run.items):
                self._todo.popleft()
            return first
        size = min(size, self._room())
        if not self._more or not size:
            return None
        if from_end:
            start, items = self._items.take_last(size)
        else:
            start, items = self._next, self._items.take(size)
            self._next += len(items)
        self._n_begun += len(items)
        self._more = len(items) == size
        return _Run(start, items, from_end=from_end) if items else None

    def _room(self) -> int:
        """Return how many more items of the input may be under way."""
        nbytes = self._nbytes_out + self._nbytes_home
        if nbytes >= WINDOW_NBYTES and (self._out or self._parts):
            return 0
        if self._keep:
            return 2**63
        if len(self._parts) >= WINDOW_PARTS * max(1, self._n_workers):
            return 0
        most = self._settings.buffersize or WINDOW_ITEMS
        return max(0, most - (self._n_begun - self._n_taken))

    def _send(self, run: _Run, tickets: list[Ticket]) -> None:
        """Make the job of a chunk. An item that cannot be pickled fails, and only that."""
        start, items = run.start, run.items
        try:
            overrun = OVERRUN if self._settings.chunksize == "auto" and len(items) > 1 else 0.0
            argument = work.dump_chunk(
                self._items.star,
                items,
                start,
                overrun=overrun,
                seed=self._settings.seed,
                seen=self._seen,
            )
        except ClosureError as error:
            if error.index is None and len(items) > 1:
                self._again(run, start, items, alone=True)
                return
            index = start if error.index is None else error.index
            error.index = index
            self._again(run, index + 1, items[index + 1 - start :])
            self._again(run, start, items[: index - start])
            self._fail(index, items[index - start], error)
            return
        chunk = _Chunk(run, time.monotonic())
        attempts = self._settings.attempts - self._lost.get(start, 0) if len(items) == 1 else 1
        uniq = self._uniq(start, items[0]) if self._settings.merge else b""
        number = self._connection.next_number()
        terms = self._require_terms(attempts)
        ticket = Ticket(number, terms, argument, self, uniq, len(items))
        chunk.tickets.append(ticket)
        tickets.append(ticket)
        self._out[number] = chunk
        self._n_out += len(items)
        self._n_chunks_out += 1
        self._nbytes_out += ticket.nbytes
        self._note_nbytes(ticket.nbytes, len(items))
        self._sizer.cut(len(items), from_end=run.from_end)

    def _require_terms(self, attempts: int) -> Terms:
        blobs = self._closure.blobs_for(self._seen)
        key = attempts, tuple([blob.id for blob in blobs])
        terms = self._terms.get(key)
        if terms is None:
            settings = self._settings
            terms = self._terms[key] = Terms(
                work.FUNCTION,
                lane=self._lane,
                priority=PRIORITIES[settings.priority],
                merge=settings.merge,
                python=python_version(),
                labels=(*settings.labels, *self._closure.labels),
                attempts=attempts,
                item_timeout=settings.item_timeout or 0.0,
                not_before=settings.not_before,
                blobs=blobs,
                ancestors=self._ancestors,
                by_uniq=settings.merge,
                once=settings.attempts == 1,
                patience=PATIENCE if settings.timeout is None else settings.timeout,
            )
        return terms

    def _uniq(self, index: int, item: object) -> bytes:
        seed = self._settings.seed
        kind: Kind = "star" if self._items.star else "map"
        seeding = None if seed is None else (seed, index)
        return self._closure.uniq(kind, item, seeding, self._definitions)

    def _note_nbytes(self, nbytes: int, n_items: int) -> None:
        self._nbytes_an_item = max(0.9 * self._nbytes_an_item, nbytes / max(1, n_items), 1.0)

    def _send_copies(self, tickets: list[Ticket]) -> None:
        """Give idle workers the chunks that have been out for longest; the first result wins."""
        n_idle = self._n_workers - len(self._out)
        now = time.monotonic()
        late = max(BACKUP_AFTER, BACKUP_FACTOR * self._seconds_a_chunk)
        for chunk in list(dict.fromkeys(self._out.values())):
            if n_idle <= 0 or now - chunk.sent_at < late:
                return
            if len(chunk.tickets) > 1:
                continue
            first = chunk.tickets[0]
            number = self._connection.next_number()
            # One attempt: what kills its workers should not do so twice as often.
            terms = self._require_terms(1)
            copy = Ticket(number, terms, first.argument, self, n_items=first.n_items)
            chunk.tickets.append(copy)
            self._out[number] = chunk
            tickets.append(copy)
            n_idle -= 1

    # --- home ---------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        assert isinstance(event, Completed | Failed | Refused | Heard | InBackground)
        if isinstance(event, Heard | InBackground):
            return
        number = event.ticket.number
        chunk = self._out.pop(number, None)
        if chunk is None:
            return  # a copy was first
        others = [ticket for ticket in chunk.tickets if ticket is not event.ticket]
        if others and not isinstance(event, Completed):
            chunk.tickets = others  # there is still one that runs
            if isinstance(event, Failed) and isinstance(event.message, JobFail):
                self._count_loss(chunk, event.message)
            return
        for other in others:
            del self._out[other.number]
            self._connection.cancel([other.number])
        self._n_out -= len(chunk.items)
        self._n_chunks_out -= 1
        self._nbytes_out -= event.ticket.nbytes
        match event:
            case Completed():
                self._on_completed(chunk, event)
            case Failed(message=JobException() as message):
                self._on_exception(chunk, message, event.bodies)
            case Failed(message=JobFail() as message):
                self._on_fail(chunk, message, event)
            case Refused():
                self._on_refused(chunk, event)

    def _on_completed(self, chunk: _Chunk, event: Completed) -> None:
        n = event.n_items
        self._seconds_a_chunk += 0.2 * (event.seconds - self._seconds_a_chunk)
        if self._bring_home(chunk, n, event.result, event.seconds):
            self._return(chunk, chunk.start + n, chunk.items[n:])

    def _bring_home(self, chunk: _Chunk, n: int, result: Body, seconds: float) -> bool:
        """Take in the values of a chunk's first items; return whether they could be loaded."""
        if not n:
            return True
        try:
            values = work.load_result(result)
        except Exception as error:  # the values' own code runs
            if len(chunk.items) > 1:  # which of them is it?
                self._return(chunk, chunk.start, chunk.items, alone=True)
            else:
                wrapped = DmapError(f"the result of item {chunk.start} cannot be loaded: {error}")
                wrapped.__cause__ = error
                self._fail(chunk.start, chunk.items[0], wrapped, chunk)
            return False
        nbytes = nbytes_of(result)
        self._note_nbytes(nbytes, n)
        self._sizer.done(n, seconds, from_end=chunk.from_end)
        self._put(chunk.start, _Part(n, values, nbytes))
        return True

    def _on_exception(self, chunk: _Chunk, message: JobException, bodies: tuple[Body, ...]) -> None:
        n = message.n_items
        index = chunk.start + n
        before = bodies[1] if len(bodies) > 1 else b""
        if not self._bring_home(chunk, n, before, message.seconds):
            return
        self._return(chunk, index + 1, chunk.items[n + 1 :])
        tries = self._tries.get(index, 0)
        if tries < self._settings.retries:
            self._tries[index] = tries + 1
            self._again(chunk, index, chunk.items[n : n + 1], alone=True)
            return
        where = where_of(message, self._lost.get(index, 0))
        self._fail(index, chunk.items[n], exception_of(message, bodies), chunk, where)

    def _on_fail(self, chunk: _Chunk, message: JobFail, event: Failed) -> None:
        items, start = chunk.items, chunk.start
        first = min(message.item, len(items) - 1)
        last = first + message.n_items
        if message.code == "timeout":
            last = first + 1
        elif message.code == "lost":
            if not message.n_items and self._settings.attempts == 1:
                # It ended well, and its results died with its worker: it may not run again.
                last = len(items)
        else:
            first, last = 0, len(items)
            if message.code == "failed" and len(items) > 1:  # for which of them?
                self._return(chunk, start, items, alone=True)
                return
        # What was before, or was to come after, is not to blame; perhaps none of it is.
        self._return(chunk, start + last, items[last:])
        blamed = items[first:last]
        for index in range(start + first + len(blamed) - 1, start + first - 1, -1):
            item = items[index - start]
            if message.code == "lost":
                lost = self._lost.get(index, 0) + max(1, message.attempt)
                if lost < self._settings.attempts:
                    self._lost[index] = lost
                    self._return(chunk, index, [item], alone=True)
                    continue
                exit = message.exit or message.text
                error = WorkerLost(index, message.host or "?", lost, exit)
                self._fail(index, item, error, chunk)
            else:
                self._fail(index, item, error_of(event, index), chunk)
        self._return(chunk, start, items[:first])

    def _count_loss(self, chunk: _Chunk, message: JobFail) -> None:
        """Count the attempt that one of two runs of a chunk was, if its worker was lost."""
        if message.code != "lost":
            return
        first = chunk.start + message.item
        for index in range(first, min(first + message.n_items, chunk.start + len(chunk.items))):
            self._lost[index] = self._lost.get(index, 0) + max(1, message.attempt)

    def _on_refused(self, chunk: _Chunk, event: Refused) -> None:
        items, start = chunk.items, chunk.start
        if event.trouble != "too_large":
            self._end = refusal_of(event)
        elif len(items) == 1:
            self._fail(start, items[0], refusal_of(event), chunk)
        else:
            half = len(items) // 2
            self._return(chunk, start + half, items[half:])
            self._return(chunk, start, items[:half])

    def _return(
        self, chunk: _Chunk, start: int, items: Sequence[Any], *, alone: bool = False
    ) -> None:
        """Put items that were out in this chunk back, in front of all others."""
        if items:
            self._sizer.returned(len(items), from_end=chunk.from_end)
            self._again(chunk, start, items, alone=alone)

    def _again(
        self, whole: _Chunk | _Run, start: int, items: Sequence[Any], *, alone: bool = False
    ) -> None:
        """Put items of this chunk, or of what was to be one, in front of all others."""
        if items:
            self._todo.appendleft(_Run(start, items, alone=alone, from_end=whole.from_end))

    def _fail(
        self,
        index: int,
        item: Any,
        error: BaseException,
        chunk: _Chunk | None = None,
        where: str = "",
    ) -> None:
        """An item has failed for good, in a chunk if it came so far."""
        seed = self._settings.seed
        nbytes = 0 if chunk is None else chunk.tickets[0].nbytes
        call = ItemCall(
            self._closure.func,
            item,
            self._items.star,
            None if seed is None else (seed, index),
            nbytes,
        )
        attach(error, call, index, where)
        if self._error is None:
            self._error = error
        values = [error] if self._settings.on_error == "return" else []
        self._put(index, _Part(1, values, error=error))

    def _put(self, start: int, part: _Part) -> None:
        self._parts[start] = part
        self._n_done += part.n
        self._nbytes_home += 0 if self._keep else part.nbytes
        self._progress.add(part.n)
        if not self._settings.ordered:
            self._arrived.append(start)

    def _take_part(self) -> _Part | None:
        if self._settings.ordered:
            start = self._next_home
        elif self._arrived:
            start = self._arrived.popleft()
        else:
            return None
        part = self._parts.pop(start, None)
        if part is not None:
            self._next_home = start + part.n
            self._nbytes_home -= part.nbytes
        return part
