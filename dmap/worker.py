"""A worker process: it has links to its servers and runs what they give it.

A supervisor starts it, with settings, a page of memory that they share (``page``) and a socket to
ask for closures (``buffers``). What it says to the servers is decided in ``worker_state``; here are
the sockets, the page and the jobs themselves.

One thread does everything. While a job runs nobody reads the sockets, and nobody needs to: libzmq
answers heartbeats by itself, and whatever must reach a busy worker goes to its supervisor, which
has the page and signals::

    SIGUSR2   look at ``page.cancelled``: is it a job that runs now? Then it is interrupted by an
              exception that is no ``Exception``. Else: this job takes long, send what waits for it
    SIGTERM   finish the running item, take nothing new, leave

The exception may come between any two steps of the user's code, but never of ours: a worker is
*interruptible* only while user code runs, and is not when that calls back into it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import io
import itertools
import logging
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import zmq
from msgspec.structs import replace

from dmap import namespaces, raised, registry, seeds, shared, sources, work
from dmap.buffers import ChildBlobs
from dmap.errors import ClosureError
from dmap.functions import Function, FunctionCache
from dmap.link import Connected, Disconnected, Event, Received, ServerLink
from dmap.page import (
    CANCEL_SIGNAL,
    CANNOT_START,
    MAX_DEPTH,
    Key,
    Page,
    Settings,
    boot_key,
    python_version,
    read_settings,
)
from dmap.references import Opened
from dmap.versions import with_cloudpickle
from dmap.worker_state import Held, Send, WorkerState
from jobserver.machine import machine_id
from jobserver.pieces import Returned
from jobserver.protocol import (
    MAJOR,
    MINOR,
    Assigned,
    Body,
    Error,
    Hello,
    LaneId,
    Malformed,
    WorkAccepted,
    WorkData,
    WorkStatus,
    WorkWarning,
)

if TYPE_CHECKING:
    from zmq.sugar.socket import Socket

logger = logging.getLogger(__name__)

SLICE: Final = 0.001
"""Seconds that the items between two looks at the page should take."""
FLUSH_AFTER: Final = 0.0005
"""Seconds; an older result goes out before the next job starts."""
MANY_ENDED: Final = 128
"""Of the jobs on the page, so many that have ended are kept there without a look at them."""
LEAVE_WITHIN: Final = 5.0
"""Seconds that a draining worker waits for its last results to be accepted."""
NESTED_PAUSE: Final = 0.05
"""Seconds between two grabs of a job that waits for jobs, if nothing happens in between."""
FIRST_PAUSE: Final = 0.001
"""The first ones are shorter: a grab may overtake the submit, which goes by another link."""
MAX_NESTED: Final = MAX_DEPTH - 4
"""Jobs that wait one inside the other, in one process."""
NESTED_FRAMES: Final = 100
"""Frames that one more of them may need for what is ours."""
GOODBYE_WITHIN: Final = 1.0
"""Seconds that the clients of interrupted jobs may take to leave their servers."""
PR_SET_PDEATHSIG: Final = 1


class _Stop(BaseException):
    """The supervisor wants this job, or one around it, to end."""

    def __init__(self, key: Key) -> None:
        super().__init__("this job was cancelled, or ran out of its time")
        self.key = key


_Outcome: TypeAlias = tuple[Body, int]
"""The result of the first so many items."""


class Worker:
    """One worker process. It is the ``registry.Host`` of the jobs that it runs.

    Attributes:
        is_broken: a job was interrupted that may have been in the middle of dmap's own client:
            whatever of that is in this process is not to be used any more.
    """

    def __init__(self, settings: Settings, page: Page) -> None:
        self.name = settings.name
        self.is_broken = False
        self._settings = settings
        self._page = page
        hello = Hello(
            MAJOR,
            MINOR,
            "worker",
            settings.session,
            python=python_version(),
            name=settings.name,
            host=settings.host,
            pid=os.getpid(),
            child=settings.child,
            labels=with_cloudpickle(settings.labels),
            machine=machine_id(),
            together=True,
        )
        abilities = registry.abilities(settings.only)
        self._state = WorkerState(hello, len(settings.servers), abilities)
        self._functions = FunctionCache()
        self._latest_blobs: tuple[bytes, ...] | None = None
        self._latest: Function  # of those blobs
        # ids of a closure's blobs -> items that take some SLICE seconds
        self._pace: dict[tuple[bytes, ...], int] = {}
        self._blobs = ChildBlobs(settings.blobs_fd)
        self._boot_keys: dict[str, int] = {}  # boot id -> its key in the page
        self._later: list[tuple[int, Event]] = []  # came while a message waited for room
        self._has_ended_claim = False  # the innermost claim is of a job that has ended
        self._oldest_result = 0.0  # monotonic() of the first result that was not sent
        self._ended_at = 0.0  # monotonic() when the last job ended
        self._interruptible = False
        # Held by the main thread but while user code runs: that may have threads that speak too.
        self._lock = threading.RLock()

        self._context: zmq.Context[Socket[bytes]] = zmq.Context()
        self._links = [ServerLink(self._context, server) for server in settings.servers]
        self._poller = zmq.Poller()
        self._has_registered = False  # the links, as they are registered when nothing waits to go
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        for fd in (self._wake, self._blobs.fd):
            self._poller.register(fd, zmq.POLLIN)

    def run(self) -> None:
        """Work until the supervisor, or a SIGTERM, says to leave."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(CANCEL_SIGNAL, self._on_cancel)
        _leave_forks_alone()
        registry.set_host(self)
        state = self._state
        leave_at = math.inf
        with self._lock:
            self._page.set_ready()
            self._notify()
            while True:
                now = time.monotonic()
                if self._page.draining and not state.draining:
                    leave_at = now + LEAVE_WITHIN
                    self._report()
                    self._withdraw(self._page.unhold())
                    self._send(state.drain())
                if state.held:
                    self._run_next()
                    continue
                if state.n_lent:
                    state.forget_lent(now)
                self._report(())
                if state.draining and (state.drained or now > leave_at):
                    break
                deadline = min(state.next_deadline() or math.inf, now + 1.0, leave_at)
                # What comes goes together. Only one message a turn: that there is no other one
                # would cost as much to find out as the turn.
                if not self._drive(deadline - now, 1) and os.getppid() != self._settings.parent:
                    os._exit(1)
            self._leave()
        registry.set_host(None)
        if "dmap.factories" in sys.modules:
            sys.modules["dmap.factories"].close_all()

    def _leave(self) -> None:
        self._send(self._state.goodbye())
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not all(link.idle for link in self._links):
            self._drive(0.05)
        for link in self._links:
            link.close(linger=1.0)
        self._context.term()

    # --- signals ------------------------------------------------------------------------------

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._page.set_draining()
        with suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    def _on_cancel(self, number: int, frame: FrameType | None) -> None:
        if self._interruptible:
            self._check_stop()
            with self._undisturbed():
                self._report()

    def _check_stop(self) -> None:
        """Raise ``_Stop`` if a running job should end."""
        key = self._page.cancelled
        if key is not None and any(self._key(held) == key for held in self._state.running):
            self._interruptible = False
            raise _Stop(key)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Do the worker's own work in a call from user code, on whichever of its threads."""
        is_job = threading.current_thread() is threading.main_thread()
        was_interruptible = self._interruptible
        if is_job:
            self._interruptible = False
        try:
            with self._lock:
                yield
        finally:
            if is_job:
                self._interruptible = was_interruptible
        if is_job and was_interruptible:
            self._check_stop()  # its signal may have come meanwhile

    # --- links --------------------------------------------------------------------------------

    def _drive(self, timeout: float, max_messages: int = 500) -> bool:
        """Wait at most so many seconds until something happens, and take in what did.

        Args:
            timeout: Seconds to wait.
            max_messages: How many to take in of each server; the next call takes the others.

        Returns:
            Whether anything happened.
        """
        later, self._later = self._later, []
        for server, event in later:
            self._on_event(server, event)
        waiting = False
        for link in self._links:
            if later or link.has_events:
                timeout = 0
            if not link.idle:
                waiting = True
        if waiting or not self._has_registered:
            for link in self._links:
                link.register(self._poller)
            self._has_registered = not waiting
        ready = dict(self._poller.poll(max(0, math.ceil(timeout * 1000))))
        if self._wake in ready:
            os.read(self._wake, 1024)
        if self._blobs.fd in ready and not self._blobs.receive():
            os._exit(1)  # the supervisor has ended
        for server, link in enumerate(self._links):
            if link.has_events or link.socket in ready or link.monitor in ready:
                for event in link.receive(max_messages):
                    self._on_event(server, event)
        return bool(later or ready)

    def _on_event(self, server: int, event: Event) -> None:
        now = time.monotonic()
        state = self._state
        match event:
            case Received(message, bodies):
                n_held = len(state.held)
                try:
                    sends = state.on_message(server, message, bodies, now)
                except Malformed as error:
                    logger.warning("%s: %s", self._links[server].endpoint, error)
                    return
                if len(state.held) != n_held:
                    self._on_held(n_held)
                elif type(message) is WorkAccepted:
                    if state.all_accepted:
                        self._page.reported()
                elif type(message) is Error and message.code != "hello_first":
                    logger.warning("%s: %s", self._links[server].endpoint, message.text)
                if sends:
                    self._send(sends)
            case Connected():
                self._hold()  # so that what the supervisor has given back is not said to be here
                self._send(state.on_connected(server))
            case Disconnected():
                self._send(state.on_disconnected(server, now))
            case Returned(message, text):
                kind = type(message).__name__
                logger.warning("%s declined %s: %s", self._links[server].endpoint, kind, text)
                self._send(state.on_declined(server, message, text, now))

    def _send(self, sends: Sequence[Send], together: bool = False) -> None:
        """Hand over what is to be said; ``together``, in as few messages as may be."""
        more = together and len(sends) > 1
        for server, message, bodies in sends:
            link = self._links[server]
            # A full outbox empties, or its connection breaks, which the state learns in its turn.
            while (
                not link.send(message, bodies, more=more) and link.connected and not link.has_events
            ):
                poller = zmq.Poller()
                link.register(poller)
                poller.poll(100)
                self._later += [(server, event) for event in link.receive()]
        if more:
            for link in self._links:
                link.flush()

    def _report(self, lanes: Sequence[LaneId] | None = None) -> None:
        """Send the results that wait, and say on the page that the last of their jobs ended.

        If ``lanes`` are given, ask for a job of them (of any if there are none), in one message
        with the results where it can be.
        """
        if self._has_ended_claim:
            self._has_ended_claim = False
            self._page.release()
        self._oldest_result = 0.0
        sends = self._state.flush()
        if lanes is not None:
            sends += self._state.seek(time.monotonic(), lanes)
        self._send(sends, together=True)

    # --- the page -----------------------------------------------------------------------------

    def _key(self, held: Held) -> Key:
        boot = self._boot_keys.get(held.boot)
        if boot is None:
            boot = self._boot_keys[held.boot] = boot_key(held.boot)
        return Key(held.job.handle, boot, held.server)

    def _hold(self) -> None:
        """Write what is held on the page, and drop what the supervisor has taken of it."""
        held = self._state.held
        unreported = None
        if self._page.n_ended > MANY_ENDED:
            # Or no room would be left: with several servers there is always one that has not said
            # yet that it knows.
            unreported = {self._key(one) for one in self._state.unreported()}
        keys = list(map(self._key, held))
        self._withdraw(self._page.hold(keys, [one.job for one in held], unreported))

    def _on_held(self, n_before: int) -> None:
        """See to the page after what is held has changed from so many jobs."""
        held = self._state.held
        # A single job is claimed at once: nobody could take it.
        if n_before or len(held) > 1:
            self._hold()
        if self._page.watched:
            return
        if len(held) > 1 or any(one.job.timeout or one.job.item_timeout for one in held):
            self._notify()

    def _notify(self) -> None:
        """Have the supervisor look at the page."""
        with suppress(BlockingIOError):
            os.write(self._settings.notify_fd, b"\0")

    def _withdraw(self, taken: set[Key]) -> None:
        if taken:
            self._state.withdraw({(key.server, key.handle) for key in taken})

    # --- jobs ---------------------------------------------------------------------------------

    def _run_next(self) -> None:
        """Run the first job that is held, or drop it."""
        state = self._state
        held = state.held[0]
        if held.job.referred and type(held.argument) is not Opened:
            if not self._open(held):
                return
            held = state.held[0]
        job = held.job
        closure: list[bytes | memoryview] | None = None
        if (
            job.function == work.FUNCTION
            and job.blobs != self._latest_blobs
            and job.blobs
            and job.blobs not in self._functions
        ):
            closure = self._fetch(held)
            if closure is None:
                return
        instead, self._has_ended_claim = self._has_ended_claim, False
        now = time.monotonic()
        claimed = self._page.claim_next(job, now, instead=instead)
        if claimed is None:
            claimed = self._page.claim(self._key(held), job, now, instead=instead)
        if not claimed:
            state.withdraw({(held.server, job.handle)})
            return
        state.start()
        around = namespaces.current()
        stop = self._execute(held, closure, now)
        if state.running:
            namespaces.become(around)
        self._has_ended_claim = True
        is_old = self._oldest_result and self._ended_at - self._oldest_result > FLUSH_AFTER
        if stop is not None or (is_old and state.held):
            self._report()  # the last results go with the grab that follows
        if stop is not None:
            raise stop

    def _open(self, held: Held) -> bool:
        """Open the memory that the argument of the next job lies in, or let go of the job."""
        try:
            opened = shared.open_reference(held.argument)
        except shared.CannotOpen as error:
            self._send(self._state.cannot_open(str(error)))
            self._hold()
            return False
        self._state.held[0] = replace(held, argument=opened)
        return True

    def _fetch(self, held: Held) -> list[bytes | memoryview] | None:
        """Get what a held job's closure is made of, in the order in which the job names it.

        None: the job is no longer the next to run, or it was failed since that is not to be had.
        """
        state, blobs = self._state, self._blobs
        blobs.want(held.server, held.boot, held.job.blobs)
        bodies = blobs.take()
        if bodies is None:
            self._report()
        while bodies is None and not blobs.refusal:
            self._drive(0.1)
            # In a drain it is given back, but not what a running job waits for.
            is_leaving = self._page.draining and not state.running
            if not state.held or state.held[0] is not held or is_leaving:
                break
            blobs.flush()
            bodies = blobs.take()
        if blobs.refusal and state.held and state.held[0] is held:
            state.start()
            self._send(state.fail(blobs.refusal))
            self._hold()
        blobs.forget()
        return bodies

    def _execute(
        self, held: Held, closure: list[bytes | memoryview] | None, started: float
    ) -> _Stop | None:
        """Run the job that was just started, to whatever end.

        Returns:
            What stopped a job *around* this one, to be raised again when this one is put away.
        """
        state = self._state
        values: list[Any] = []  # of a chunk's items, as far as it came
        outcome: _Outcome | None = None
        error: BaseException | None = None
        job = held.job
        run = self._run_closure if job.function == work.FUNCTION else self._run_named
        self._lock.release()
        try:
            try:
                self._interruptible = True
                if self._page.is_cancelling:
                    self._check_stop()
                outcome = run(job, held.argument, closure, values)
            finally:
                self._interruptible = False
        except _Stop as stop:
            if "dmap.connection" in sys.modules:
                self.is_broken = True
                self._page.set_draining()
            if stop.key == self._key(held):
                state.abandon()
                return None
            # It is innocent: another one has to start it again.
            self._send(state.return_running())
            return stop
        except BaseException as caught:
            error = caught
        finally:
            self._lock.acquire()
        self._ended_at = now = time.monotonic()
        seconds = now - started
        if outcome is None:
            assert error is not None
            self._report_error(error, values, seconds, self._lines_of(job))
            return None
        result, n_items = outcome
        if n_items:
            if job.shared:
                result = shared.refer(result) or result
            state.complete(result, n_items, seconds)
            self._oldest_result = self._oldest_result or now
        else:
            self._send(state.return_running())
        return None

    def _report_error(
        self,
        error: BaseException,
        values: list[Any],
        seconds: float,
        lines: sources.Lines,
    ) -> None:
        """Say that a job ended with an exception behind the items that have values.

        Args:
            error: What was raised.
            values: Of the items that are done.
            seconds: That all of it took.
            lines: Source lines that came with the function.
        """
        results: Body | None = None
        while results is None:
            try:
                results = work.dump_results(values)
            except ClosureError as unpicklable:  # of an earlier item, which is told first
                error, values = unpicklable, values[: unpicklable.index or 0]
        raised.advise(error)
        summary, pickled = raised.describe(error, _n_own_frames(error), lines)
        bodies = (pickled, results)
        self._oldest_result = 0.0
        self._send(self._state.raised(*summary, bodies, len(values), seconds))

    def _lines_of(self, job: Assigned) -> sources.Lines:
        """Return the source lines that came with a job's function."""
        loaded = self._functions.get(job.blobs) if job.function == work.FUNCTION else None
        return loaded.sources if loaded is not None else {}

    def _run_named(
        self,
        job: Assigned,
        argument: Body,
        closure: list[bytes | memoryview] | None,
        values: list[Any],
    ) -> _Outcome:
        """Call a function by its name; whatever user code raises comes out."""
        namespaces.become(None)
        function = registry.find(job.function)
        if function is None:
            raise LookupError(f"{self.name} has no function {job.function!r}")
        if job.encoding == "raw":
            result = function(b"".join(_parts(argument)))
            if not isinstance(result, (bytes, bytearray, memoryview)):
                raise TypeError(
                    f"{job.function!r} was called with raw bytes and must return bytes, "
                    f"not {type(result).__qualname__}"
                )
            return bytes(result), 1
        call = work.load_named(argument)
        return work.dump_result(function(*call.args, **call.kwargs)), 1

    def _run_closure(
        self,
        job: Assigned,
        argument: Body,
        closure: list[bytes | memoryview] | None,
        values: list[Any],
    ) -> _Outcome:
        """Call a closure, once or on items; whatever user code raises comes out."""
        if job.blobs == self._latest_blobs:
            loaded = self._latest
        else:
            loaded = self._load(job.blobs, closure)
        # Also while the argument is loaded and the results, or an exception, are pickled.
        namespaces.become(loaded.namespace)
        function = loaded.call
        work_for_it = work.load_argument(argument)
        if isinstance(work_for_it, work.Call):
            return work.dump_result(function(*work_for_it.args, **work_for_it.kwargs)), 1
        if work_for_it.seeding is None:
            self._run_chunk(job, function, work_for_it, values)
        else:
            with seeds.seeded(function, *work_for_it.seeding) as function:
                self._run_chunk(job, function, work_for_it, values)
        return work.dump_results(values) if values else b"", len(values)

    def _load(self, blobs: tuple[bytes, ...], closure: list[bytes | memoryview] | None) -> Function:
        if not blobs:
            raise LookupError("this job came without its closure")
        loaded = self._functions.get(blobs)
        if loaded is None:
            assert closure is not None
            loaded = self._functions.load(blobs, closure)
            sources.keep(loaded.sources)
        self._latest_blobs, self._latest = blobs, loaded
        return loaded

    def _run_chunk(
        self,
        job: Assigned,
        function: Callable[..., Any],
        chunk: work.Chunk,
        values: list[Any],
    ) -> None:
        """Call the function on items until all are done, or it overran, or a drain is wanted.

        The items between two looks at the page are one loop in C. What ``values`` has at the end
        are the items that are done.
        """
        apply: Callable[..., Iterator[Any]] = itertools.starmap if chunk.star else map
        items = chunk.items
        page, timeout = self._page, job.item_timeout
        n_slice = 1 if timeout else self._pace.get(job.blobs, 1)
        start, n_items = 0, len(items)
        now = time.monotonic()
        leave_at = now + (chunk.overrun or math.inf)
        while start < n_items:
            end = min(start + n_slice, n_items)
            page.at(start, end - start, now, now + timeout if timeout else 0.0)
            values.extend(apply(function, items[start:end]))
            if len(values) < end:
                # To a loop in C that is the end of the items; to the user it is a mistake.
                raise RuntimeError("the function raised StopIteration")
            began, now = now, time.monotonic()
            if not timeout:
                n_slice = _next_slice(end - start, now - began)
            start = end
            if now > leave_at or (page.draining and len(self._state.running) == 1):
                break
        if not timeout:
            if len(self._pace) > 4 * self._functions.max_functions:
                self._pace.clear()
            self._pace[job.blobs] = n_slice

    # --- for the jobs: registry.Host ----------------------------------------------------------

    def innermost(self) -> Assigned | None:
        """Return the job that runs now."""
        running = self._state.running
        return running[-1].job if running else None

    def text_handle(self, job: Assigned) -> str:
        """Return a job's handle as people write it."""
        return self._state.text_handle(self._running(job))

    def say_status(self, job: Assigned, numerator: int, denominator: int) -> None:
        """Tell a job's listeners how far it is; dropped while its server is away."""
        with self._undisturbed():
            held = self._running(job)
            if self._state.can_speak_of(held):
                status = WorkStatus(job.handle, numerator, denominator)
                self._links[held.server].send(status)

    def say_data(self, job: Assigned, value: object) -> None:
        """Send a job's listeners a partial result; dropped while its server is away."""
        if job.encoding == "pickle":
            body = work.dump_result(value)
        elif isinstance(value, (bytes, bytearray, memoryview)):
            body = bytes(value)
        else:
            raise TypeError(
                f"{job.function!r} was called with raw bytes: its data must be bytes, "
                f"not {type(value).__qualname__}"
            )
        self._say_body(job, WorkData(job.handle), body)

    def say_warning(self, job: Assigned, text: str) -> None:
        """Send a job's listeners a warning; dropped while its server is away."""
        self._say_body(job, WorkWarning(job.handle), str(text).encode("utf-8", "replace"))

    def _say_body(self, job: Assigned, message: WorkData | WorkWarning, body: Body) -> None:
        with self._undisturbed():
            held = self._running(job)
            if self._state.can_speak_of(held):
                self._send([Send(held.server, message, (body,))])

    def is_cancelled(self, job: Assigned) -> bool:
        """Tell whether a running job should stop."""
        return self._page.cancelled == self._key(self._running(job))

    def cant_do(self, function: str) -> None:
        """Own a function no longer."""
        with self._undisturbed():
            self._send(self._state.cant_do([function]))

    def run_nested(
        self,
        lanes: Sequence[LaneId],
        until: Callable[[], bool],
        wait: Callable[[float], None],
    ) -> None:
        """Run jobs of these lanes until what the running job waits for is there.

        Raises:
            RecursionError: too many jobs wait for one another.
        """
        # Without frames in the midst of our own work we would lose sight of a job.
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + NESTED_FRAMES)
        try:
            with self._undisturbed():
                self._wait_nested(lanes, until, wait)
        finally:
            if sys.getrecursionlimit() == limit + NESTED_FRAMES:  # else a job has set its own
                sys.setrecursionlimit(limit)

    def _wait_nested(
        self,
        lanes: Sequence[LaneId],
        until: Callable[[], bool],
        wait: Callable[[float], None],
    ) -> None:
        state = self._state
        depth = len(state.running)
        pause = FIRST_PAUSE
        self._give_back_held()
        while not until():
            self._check_stop()
            if lanes and depth >= MAX_NESTED:
                raise RecursionError(
                    f"{depth} jobs wait one inside the other in this process, and no more may: "
                    "does their recursion end? Let the last levels call the function itself"
                )
            if state.held:
                self._run_next()
                pause = FIRST_PAUSE
                continue
            self._report(lanes or None)
            if state.is_asking(time.monotonic()):
                self._drive(NESTED_PAUSE)
            else:
                self._drive(0)
                if not state.held:
                    self._wait_outside(wait, pause)
                    pause = min(2 * pause, NESTED_PAUSE)
        self._report()
        # An answer that is still to come would lie here for as long as the job runs on.
        deadline = time.monotonic() + NESTED_PAUSE
        while state.is_asking(now := time.monotonic()) and now < deadline:
            self._drive(deadline - now)
        self._give_back_held()

    def _wait_outside(self, wait: Callable[[float], None], seconds: float) -> None:
        self._lock.release()
        try:
            wait(seconds)
        finally:
            self._lock.acquire()

    def _give_back_held(self) -> None:
        self._withdraw(self._page.unhold())
        self._send(self._state.give_back())

    def _running(self, job: Assigned) -> Held:
        for held in self._state.running:
            if held.job is job:
                return held
        raise RuntimeError(f"this job of {job.function!r} has ended")


def _next_slice(n_items: int, seconds: float) -> int:
    """Return how many items should take some SLICE seconds, after so many took ``seconds``."""
    if seconds * 4 < SLICE:
        return n_items * 4
    return max(1, int(n_items * SLICE / seconds))


def _parts(body: Body) -> Sequence[Any]:
    return (body,) if isinstance(body, bytes) else body


def _n_own_frames(error: BaseException) -> int:
    """Count the frames at the outer end of a traceback that are dmap's."""
    n = 0
    traceback = error.__traceback__
    ours = os.path.join(os.path.dirname(__file__), "")
    while traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(ours):
        n += 1
        traceback = traceback.tb_next
    return n


def _leave_forks_alone() -> None:
    """Have processes that jobs fork not take signals for the worker's.

    They have its memory and its page, and must end by SIGTERM when, say, their Pool does. A signal
    on the way waits: Python drops those that come to a fork's child before this code.
    """
    ours = {signal.SIGTERM, CANCEL_SIGNAL}

    def forget() -> None:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ours),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, ours),
        after_in_child=forget,
    )


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its supervisor dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def _leave_as_client() -> None:
    """Say goodbye for the clients of jobs, as far as these can, within GOODBYE_WITHIN.

    What an interrupted job had submitted would else run on until its session is missed.
    """
    from dmap.calls import shutdown

    leaving = threading.Thread(target=shutdown, daemon=True)
    leaving.start()
    leaving.join(GOODBYE_WITHIN)


def main() -> int:
    """Run as the child of a supervisor, which says in argv[1] where the page is."""
    return run(int(sys.argv[1]))


def run(fd: int) -> int:
    """Be a worker until the supervisor, or a SIGTERM, says to leave; return the exit code.

    Args:
        fd: of the page, with the settings behind it.
    """
    settings = read_settings(fd)
    _die_with_parent(settings.parent)
    for own in (fd, settings.notify_fd, settings.blobs_fd):
        os.set_inheritable(own, False)  # programs that jobs start should not have them
    sys.argv = ["dmap-worker"]
    # What jobs print should be seen when they print it, also in a file.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    faulthandler.enable()
    logging.basicConfig(level=settings.log_level, format="%(levelname)s %(name)s: %(message)s")
    # Jobs that map use the same servers.
    os.environ["DMAP_SERVERS"] = ",".join(settings.servers)
    for module in settings.imports:
        try:
            importlib.import_module(module)
        except Exception:
            logger.exception(
                "cannot import %s (Python %s on %s, from %s)",
                module,
                platform.python_version(),
                settings.host,
                os.getcwd(),
            )
            return CANNOT_START
    try:
        worker = Worker(settings, Page(fd))
    except ValueError as error:  # --only names what there is not
        logger.error("%s", error)
        return CANNOT_START
    worker.run()
    if worker.is_broken:  # its exit handlers too
        _leave_as_client()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(0)
    return 0
