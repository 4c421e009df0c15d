"""Who drives a client's sockets.

One connection is one session with its servers. Whoever waits for a result drives: it alone moves
messages, under ``_lock``, and so a result needs no hand-over between threads::

    submit() ---- inbox ----.                                 .---> Job.hear
    cancel() ---------------+--> [ the driver: ClientState ] -+---> a map's inbox
                            |          |          ^           |
                            |       sends      events         '---> another thread that waits
                            |          v          |
                            |         links to the servers

* A thread that waits takes the lock if it is free and drives until what it waits for is there.
  Where there are cores to spare, it polls without sleeping for SPIN seconds at most, since a result
  that is on its way comes sooner than a thread wakes up; then it blocks.
* Other threads that wait meanwhile sleep. The driver wakes those whose results have come, and when
  it leaves, one more, to drive in its place.
* A submit drives for one turn if nobody else does, and not more often than PUSH_PAUSE: what is
  submitted in between goes together.
* A background thread drives when nobody waits, but only if nobody has driven for HAND_OVER
  seconds: a loop of submits and results never hands over to it. While there are turns it looks
  again after as long, and nobody has to wake it. It also says the heartbeats.

A driver may be interrupted (Ctrl-C) at any step. If that was between two steps that belong
together, the connection is torn: it ends, with all that was under way, and its client makes a new
one.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import platform
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import zmq

from dmap import registry, shared
from dmap.client_state import ClientState
from dmap.cores import n_cores
from dmap.errors import DmapError
from dmap.link import Connected, Disconnected, Received, ServerLink
from dmap.tickets import Answered, Complaint, Event, Needs, NoWorkers, Question, Send, Ticket
from dmap.versions import split_labels
from dmap.warn import warn
from jobserver import protocol as wire
from jobserver.machine import machine_id
from jobserver.pieces import Returned

if TYPE_CHECKING:
    from zmq.sugar.socket import Socket

logger = logging.getLogger(__name__)

SPIN: Final = 200e-6
"""Seconds without sleep: there and back takes some 120 us, and a thread wakes up in another 100."""
MIN_SPIN_CORES: Final = 4
"""With fewer, whoever polls without sleep takes a core from the server and the worker."""
MAX_SPIN_PAUSE: Final = 256
"""So many waits block at once after others polled in vain; doubled up to this each time."""
PUSH_PAUSE: Final = 0.001
HAND_OVER: Final = 0.002
LOOK_AGAIN: Final = 1.0
"""Seconds after which a thread that follows another one looks for itself. A signal that came just
before it slept would else be heard of at its end."""
LINGER: Final = 0.2
"""Seconds that the last messages may take at the end."""
MAX_LANES_OF: Final = 1024
"""Jobs of a worker process whose lanes are remembered."""
WARN_AGAIN: Final = 60.0
"""Seconds after which it is said again that nobody can do a job."""

_FROM_SERVER: Final = frozenset((*wire.ToClient.__args__, wire.Welcome, wire.Heartbeat, wire.Error))

Command: TypeAlias = Callable[[ClientState, float], list[Event]]


class Connection:
    """One session of this process with its servers; for any number of threads.

    Args:
        servers: Endpoints.

    Attributes:
        session: The 16 random bytes by which the servers know this client.
        usable: Whether new jobs may be submitted. False when it was closed, torn, or belongs to
            the process that forked this one.
    """

    def __init__(self, servers: Sequence[str]) -> None:
        self.session = os.urandom(16)
        self.usable = True
        self.servers = list(servers)
        self._pid = os.getpid()
        hello = wire.Hello(
            wire.MAJOR,
            wire.MINOR,
            "client",
            self.session,
            python_version(),
            os.path.basename(sys.argv[0] if sys.argv else "")[:200],
            socket.gethostname()[:256],
            self._pid,
            machine=machine_id(),
            together=True,
        )
        self._state = ClientState(self.session, self.servers, time.monotonic(), hello)
        self._context: zmq.Context[Socket[bytes]] = zmq.Context()
        self._links = [ServerLink(self._context, endpoint) for endpoint in self.servers]
        self._backlog: list[deque[tuple[wire.Message, tuple[wire.Body, ...]]]] = [
            deque() for _ in self._links
        ]
        self._poller = zmq.Poller()
        self._wake_fd, self._waker_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(self._waker_fd, False)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        for link in self._links:
            link.register(self._poller)

        self._numbers = itertools.count(1)
        self._lane_numbers = itertools.count(1)
        self._lanes_of: dict[wire.Origin, int] = {}  # job that runs, or did -> its lane
        self._lock = threading.Lock()  # whoever holds it drives
        # Of all jobs: a lock and a queue for each would cost as much as all else about a job.
        self.ending = threading.RLock()
        self.condition = threading.Condition(self.ending)
        self._driver = 0  # the thread that does; 0: none
        self._inbox: deque[Ticket | Command] = deque()
        self._events: deque[Event] = deque()  # to be told
        self._followers: dict[threading.Event, Callable[[], bool]] = {}  # who waits -> for what
        self._is_blocked = False  # the driver sleeps, or is about to
        self._ready: dict[Any, int] | None = None  # what the last sleep found
        self._tick_at = 0.0
        self._pushed_at = 0.0
        self._looked_at = 0.0
        self._is_registered = True  # the poller looks for nothing to send on any link
        self._n_turns = 0
        self._may_spin = n_cores() >= MIN_SPIN_CORES
        self._spin_pause = 0  # waits that do not poll first, after the last one that did in vain
        self._n_spinless = 0  # of these, how many are still to come
        self._warned: dict[Needs, float] = {}  # needs -> when
        self._closing = False
        self._alert = threading.Event()  # something is under way, and perhaps nobody drives
        self._hurry = False  # the background thread should drive at once
        self._is_sent_off = False  # it should leave
        _connections.add(self)
        self._background = threading.Thread(target=self._run_background, name="dmap", daemon=True)
        self._background.start()

    def __repr__(self) -> str:
        return f"<connection to {', '.join(self.servers)}>"

    # --- what callers do ----------------------------------------------------------------------

    def next_number(self) -> int:
        """Return a new ticket's number."""
        return next(self._numbers)

    def next_lane(self) -> int:
        """Return a new map's number."""
        return next(self._lane_numbers)

    def lane_of(self, job: wire.Origin) -> int:
        """Return the number of the lane for what this running job submits here one by one.

        While it waits it runs what stands in that lane. Were these jobs of others, they would
        run one inside the other for no reason, and could wait for one another.
        """
        lane = self._lanes_of.get(job)
        if lane is None:
            if len(self._lanes_of) >= MAX_LANES_OF:
                self._lanes_of.clear()  # a job that still runs gets a second lane
            lane = self._lanes_of[job] = self.next_lane()
        return lane

    def submit(self, ticket: Ticket) -> None:
        """Submit a job. What becomes of it is told to its owner."""
        self._inbox.append(ticket)
        if self._is_blocked or time.monotonic() - self._pushed_at >= PUSH_PAUSE:
            self._push()
        elif not self._alert.is_set():
            self._alert.set()

    def submit_all(self, tickets: Sequence[Ticket]) -> None:
        """Submit jobs that need not wait for others to go with them."""
        self._inbox.extend(tickets)
        self._push()

    def command(self, command: Command) -> None:
        """Have the driver do something to the state."""
        self._inbox.append(command)
        self._push()

    def cancel(self, numbers: Sequence[int]) -> None:
        """End tickets; their owners hear nothing more."""

        def cancel(state: ClientState, now: float) -> list[Event]:
            state.cancel(numbers)
            return []

        self.command(cancel)

    def ask(self, where: str, question: Question, timeout: float) -> Answered | None:
        """Put a question to the server of that ``name:boot``, and wait for the answer."""
        answer = _Answer()
        self.command(lambda state, now: state.ask(where, question, answer))
        self.wait(lambda: answer.event is not None, timeout)
        return answer.event

    def why_no_server(self) -> str:
        """Tell of each server why it is not there; empty if one is."""
        return self._state.why_no_server()

    def wait(
        self,
        done: Callable[[], bool],
        timeout: float | None = None,
        lanes: Sequence[wire.LaneId] = (),
    ) -> bool:
        """Block until something has happened, and drive meanwhile if nobody does.

        Inside a job, jobs of these lanes are run in the meantime.

        Args:
            done: Whether it has; asked often, by whichever thread drives.
            timeout: Seconds; None for any time.
            lanes: Where the jobs are that the caller waits for.

        Returns:
            What ``done`` said last.
        """
        if done():
            return True
        self._check_process()
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        worker = registry.current_worker()
        if worker is None:
            self._wait(done, deadline)
        else:
            worker.run_nested(
                lanes,
                lambda: done() or time.monotonic() >= deadline,
                lambda seconds: self._wait(done, min(deadline, time.monotonic() + seconds)),
            )
        return done()

    def drive_in_background(self) -> None:
        """Say that this thread will not wait here for what it has submitted."""
        if not self._driver:
            self._hurry = True
            self._alert.set()

    def close(self) -> None:
        """End all that is under way and leave the servers. Waits LINGER seconds at most."""
        if self._closing or self._pid != os.getpid():
            return
        self._closing = True
        self.usable = False
        _connections.discard(self)
        self.command(lambda state, now: state.end_all("closed", "this client was closed"))
        self._alert.set()
        if self._background is not threading.current_thread():
            self._background.join()
        is_driver = self._driver == threading.get_ident()
        if not is_driver:
            self._lock.acquire()
        try:
            self._end()
        finally:
            if not is_driver:
                self._lock.release()

    # --- driving ------------------------------------------------------------------------------

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        if self._driver == threading.get_ident():
            # A callback that runs inside a turn waits in its turn.
            self._drive(done, deadline, spin=False)
            return
        while not done() and self._links and time.monotonic() < deadline:
            if self._lock.acquire(blocking=False):
                self._drive_locked(done, deadline, spin=self._may_spin and self._is_spin_due())
            else:
                self._follow(done, deadline)
        if not self._links and not done():
            # Whoever ended the connection said so last, and a submit may have come behind that.
            with self._lock:
                self._driver = threading.get_ident()
                try:
                    self._end_all("closed", "this client was closed")
                finally:
                    self._driver = 0

    def _is_spin_due(self) -> bool:
        if self._n_spinless:
            self._n_spinless -= 1
            return False
        return True

    def _drive_locked(self, done: Callable[[], bool], deadline: float, *, spin: bool) -> None:
        """Drive, holding the lock, and give it up."""
        self._driver = threading.get_ident()
        try:
            self._drive(done, deadline, spin=spin)
        finally:
            self._driver = 0
            self._lock.release()
            self._leave()

    def _leave(self) -> None:
        """See to it that somebody goes on driving if there is need."""
        if self._followers:
            for event in list(self._followers):
                event.set()
                return
        if not self._alert.is_set() and (self._inbox or self._state.tickets):
            self._alert.set()

    def _follow(self, done: Callable[[], bool], deadline: float) -> None:
        """Sleep while another thread drives."""
        event = threading.Event()
        self._followers[event] = done
        try:
            if self._driver == self._background.ident:
                self._wake()
            # Whoever left between our try and our entry has not seen us.
            if self._lock.acquire(blocking=False):
                self._lock.release()
                return
            if not done():
                event.wait(max(0.0, min(LOOK_AGAIN, deadline - time.monotonic())))
        finally:
            del self._followers[event]

    def _drive(self, done: Callable[[], bool], deadline: float, *, spin: bool) -> None:
        """Take turns until something has happened, or the time is over."""
        now = time.monotonic()
        spin_until = now + SPIN if spin else 0.0
        # What there is to say goes out first; who goes to sleep then sees what has come.
        look = spin or now >= deadline or now >= self._tick_at
        while True:
            if self._turn(now, look) and self._followers:
                self._wake_followers()
            if done():
                if spin_until:
                    self._spin_pause = 0
                break
            if not self._links:
                return
            if look and now >= deadline:
                break
            if now >= spin_until:
                if spin_until:
                    spin_until = 0.0
                    self._spin_pause = min(2 * self._spin_pause or 1, MAX_SPIN_PAUSE)
                    self._n_spinless = self._spin_pause
                self._block(min(deadline, self._tick_at) - now)
            now = time.monotonic()
            look = True
        if self._inbox:  # from callbacks
            self._turn(now)

    def _wake_followers(self) -> None:
        for event, done in list(self._followers.items()):
            if done():
                event.set()

    def _push(self) -> None:
        """Let what lies in the inbox go, if nobody else drives."""
        if self._lock.acquire(blocking=False):
            self._driver = threading.get_ident()
            now = time.monotonic()
            try:
                self._turn(now, now - self._looked_at >= PUSH_PAUSE)
                self._pushed_at = now
            finally:
                self._driver = 0
                self._lock.release()
                self._leave()
        elif self._is_blocked:
            # If more is to come, it goes faster from here than by waking somebody each time.
            self._is_sent_off = True
            self._wake()

    def _turn(self, now: float, look: bool = True) -> bool:
        """Move what there is to move, without waiting; return whether anything came in.

        Args:
            now: The time.
            look: Whether to see what has come; otherwise only what callers want goes out.

        Raises:
            BaseException: an interrupt; the connection is torn.
        """
        if not self._links:
            self._end_all("closed", "this client was closed")
            return True
        self._n_turns += 1
        try:
            state = self._state
            said = bool(self._inbox)
            if said:
                self._take_inbox(now)
                self._flush(now)
            came = look and self._receive(now)
            if look and now >= self._tick_at and not came:
                # Everything that had arrived was taken, so silence is silence.
                self._events.extend(state.on_tick(now))
                said = True
                self._flush(now)
            elif came:
                self._flush(now)
            if came or said:
                self._tick_at = state.next_deadline() or math.inf
        except BaseException:
            self._tear()
            raise
        if not self._events:
            return came
        self._tell()
        return True

    def _take_inbox(self, now: float) -> None:
        inbox, state = self._inbox, self._state
        submit = state.submit
        while inbox:
            item = inbox.popleft()
            if isinstance(item, Ticket):
                submit(item, now)
            else:
                self._events.extend(item(state, now))

    def _flush(self, now: float) -> None:
        sends = self._state.flush(now)
        if not sends:
            return
        more = len(sends) > 1
        for send in sends:
            server, message, bodies = send
            if type(message) is wire.SubmitJobs and message.referred:
                server, message, bodies = _refer(send)
            backlog = self._backlog[server]
            link = self._links[server]
            if not backlog and link.send(message, bodies, more=more):
                continue
            if link.connected and not link.has_events:
                backlog.append((message, bodies))
        if more:
            for link in self._links:
                link.flush()

    def _receive(self, now: float) -> bool:
        """Take in what the links have; return whether there was anything."""
        self._looked_at = now
        ready, self._ready = self._ready, None
        if ready is None:
            self._register()
            ready = dict(self._poller.poll(0))
        came = False
        for index, link in enumerate(self._links):
            backlog = self._backlog[index]
            is_new = link.monitor in ready or link.has_events
            if not (link.socket in ready or is_new or backlog):
                continue
            for event in link.receive(look=is_new):
                came = True
                self._on_event(index, event, now)
            while backlog and link.send(*backlog[0]):
                backlog.popleft()
        return came

    def _on_event(
        self, index: int, event: Connected | Disconnected | Received | Returned, now: float
    ) -> None:
        state = self._state
        match event:
            case Received(message, bodies):
                if type(message) not in _FROM_SERVER:
                    logger.warning("%s said %s", self.servers[index], type(message).__name__)
                    return
                if type(message) is wire.JobComplete and message.jobs and message.jobs[0].shared:
                    try:
                        opened = shared.open_reference(bodies[0] if bodies else b"")
                    except shared.CannotOpen as error:
                        logger.info("a result is made again, since %s", error)
                        self._events.extend(state.on_unopened(index, message, now))
                        return
                    message.jobs[0].nbytes = wire.nbytes_of(opened)
                    bodies = (opened,)
                try:
                    found = state.on_message(index, message, bodies, now)  # type: ignore[arg-type]
                except wire.Malformed as error:
                    logger.warning("%s sent what makes no sense: %s", self.servers[index], error)
                    return
            case Connected():
                self._backlog[index].clear()
                found = state.on_connected(index, now)
            case Disconnected():
                self._backlog[index].clear()
                found = state.on_disconnected(index, now)
            case Returned(message, text):
                found = state.on_declined(index, message, text, now)
        self._events.extend(found)

    def _block(self, seconds: float) -> None:
        """Sleep until something comes in, but no longer than that."""
        self._is_blocked = True
        try:
            # Whoever puts something there and does not see us blocked has done so before this.
            if self._inbox:
                return
            self._register()
            ms = None if seconds == math.inf else max(0, math.ceil(seconds * 1000))
            self._ready = dict(self._poller.poll(ms))
        finally:
            self._is_blocked = False
        if self._wake_fd in self._ready:
            os.read(self._wake_fd, 4096)

    def _register(self) -> None:
        """Have the poller look for room in the sockets of those links that need some."""
        waiting = False
        for link in self._links:
            if not link.idle:
                waiting = True
        if waiting or not self._is_registered:
            for link in self._links:
                link.register(self._poller)
            self._is_registered = not waiting

    def _wake(self) -> None:
        try:
            os.write(self._waker_fd, b"\0")
        except (BlockingIOError, OSError):
            return  # it is full, so the driver wakes up anyway; or the connection has ended

    def _tell(self) -> None:
        """Tell owners what became of their tickets. Their code may wait, and so come back here."""
        events = self._events
        while events:
            event = events.popleft()
            if isinstance(event, NoWorkers):
                self._warn(event)
            elif isinstance(event, Complaint):
                logger.warning("%s: %s", event.address, event.text)
            else:
                try:
                    event.owner.hear(event)
                except BaseException:  # an interrupt; whoever hears it twice knows it
                    events.appendleft(event)
                    raise

    def _warn(self, event: NoWorkers) -> None:
        needs = event.terms.needs
        now = time.monotonic()
        if now - self._warned.get(needs, -math.inf) < WARN_AGAIN:
            return
        self._warned[needs] = now
        text = describe_no_workers(event, self.servers)
        warn(text)

    # --- the background thread ----------------------------------------------------------------

    def _run_background(self) -> None:
        while not self._closing:
            left = self._tick_at - time.monotonic()
            is_alert = self._alert.wait(None if left == math.inf else max(HAND_OVER, left))
            n_turns = self._n_turns
            if is_alert and not self._hurry:
                time.sleep(HAND_OVER)
                if n_turns != self._n_turns and not self._hurry and not self._closing:
                    continue  # the alert stays, and costs nobody another wake
            # In this order: who drives now and leaves later must find it cleared.
            self._alert.clear()
            self._hurry = False
            self._is_sent_off = False
            if self._lock.acquire(blocking=False):
                try:
                    self._drive_locked(self._nothing_to_do, math.inf, spin=False)
                except Exception:  # the top of a driver
                    logger.exception("the connection to %s broke", ", ".join(self.servers))

    def _nothing_to_do(self) -> bool:
        return (
            self._closing
            or self._is_sent_off
            or bool(self._followers)
            or not (self._inbox or self._state.tickets or self._events)
        )

    # --- the end ------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise DmapError(
                f"this job belongs to process {self._pid}, which forked this one: wait for it "
                "there, or submit it anew here"
            )

    def _tear(self) -> None:
        """End after an interrupt in mid-step: nobody knows what was done and what not."""
        self.usable = False
        self._events.extend(self._state.end_all("closed", "the client was interrupted"))
        self._end()

    def _end(self) -> None:
        links, self._links = self._links, []
        for link in links:
            link.send(wire.Goodbye())
            link.close(LINGER)
        if links:
            self._context.term()
            os.close(self._wake_fd)
            fd, self._waker_fd = self._waker_fd, -1
            os.close(fd)
        self._end_all("closed", "this client was closed")
        for event in list(self._followers):
            event.set()

    def _end_all(self, trouble: Literal["closed"], text: str) -> None:
        self._take_inbox(time.monotonic())
        self._events.extend(self._state.end_all(trouble, text))
        self._tell()


def _refer(send: Send) -> Send:
    """Have a submit refer to its argument if that lies in shared memory."""
    message = send.message
    assert isinstance(message, wire.SubmitJobs)
    reference = shared.refer(send.bodies[0])
    if reference is None:
        message.referred = False
        return send
    message.jobs[0].nbytes = len(reference)
    return send._replace(bodies=(reference,))


class _Answer:
    """Who waits for the answer to one question."""

    def __init__(self) -> None:
        self.event: Answered | None = None

    def hear(self, event: Answered) -> None:
        self.event = event


def python_version() -> str:
    """Return this Python's X.Y, which closures need on the other side."""
    return ".".join(platform.python_version_tuple()[:2])


def describe_no_workers(
    event: NoWorkers, servers: Sequence[str], then: str = "the jobs wait"
) -> str:
    """Say that nobody can do certain jobs, who there is and why that is not enough, and what to do.

    Args:
        event: Whom the servers have.
        servers: Their addresses.
        then: What follows from it.
    """
    terms = event.terms
    what = "closures" if terms.function == "dmap" else f"the function {terms.function!r}"
    where = ", ".join(servers)
    if event.n_others == 0:
        start = "start one: dmap-worker --servers ..."
        if terms.function != "dmap":
            start += " --import the_module_that_registers_it"
        return f"no worker at {where} can run {what}: {then}; {start}"
    pythons = [terms.python] if terms.python else []
    cloudpickles, labels = split_labels(terms.labels)
    under = " and ".join([*_versions("Python", pythons), *_versions("cloudpickle", cloudpickles)])
    text = f"no worker at {where} runs {what}"
    text += f" under {under}" if under else ""
    text += f" with {_labels(labels)}" if labels else ""
    if event.n_others is not None:
        text += f"; {_describe_others(event, pythons, cloudpickles, labels)}"
    todo = "start one that fits, or ask for less (`dmap workers` shows who is there)"
    return f"{text}: {then}; {todo}"


def _describe_others(
    event: NoWorkers, pythons: Sequence[str], cloudpickles: Sequence[str], labels: Sequence[str]
) -> str:
    """Say which workers there are, and what none of them has of what is asked for."""
    their_pythons = [python for python in event.pythons if python]
    their_cloudpickles, their_labels = split_labels(event.labels)
    having = _versions("Python", their_pythons) + _versions("cloudpickle", their_cloudpickles)
    having += [_labels(their_labels)] if their_labels else []
    missing = _versions("Python", [one for one in pythons if one not in their_pythons])
    missing += _versions(
        "cloudpickle", [one for one in cloudpickles if one not in their_cloudpickles]
    )
    missing += [f"the label {label}" for label in labels if label not in their_labels]
    text = "there is 1" if event.n_others == 1 else f"there are {event.n_others}"
    text += f" with {', '.join(having)}" if having else ""
    return f"{text}, but none with {' or '.join(missing) or 'all of that'}"


def _versions(what: str, versions: Sequence[str]) -> list[str]:
    return [f"{what} {' or '.join(versions)}"] if versions else []


def _labels(labels: Sequence[str]) -> str:
    return f"the label{'s' * (len(labels) > 1)} {', '.join(labels)}"


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_inherited: list[Any] = []  # connections of the process that forked us: never touched, never freed


def _after_fork() -> None:
    for connection in list(_connections):
        connection.usable = False
        _inherited.append(connection)
    _connections.clear()


os.register_at_fork(after_in_child=_after_fork)
