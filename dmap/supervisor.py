"""The process that keeps a host's worker processes: starts them, watches them, speaks for them.

It never runs user code, so it always answers. Its children do, each with links of its own to the
servers; what a busy child cannot do, or cannot be told, is done here, by the page that the two
share (``page``), signals, and a link to each server::

    server -- CancelJob -------->  page.cancel, then a signal; after GRACE seconds, if the child is
    a time limit on the page --->  still at that job (in C code, say), SIGKILL
    a job runs for BUSY seconds ->  what its child has not started is taken and given back
    a child's process ends ----->  ChildLost, with what it was running, and another one is started

What its children's jobs name comes to the host once, through here (``shelf``).

``WorkFail`` goes ahead of the signal. So whatever becomes of the child, the job has ended for its
true reason, and the death of its process costs no attempt.

What a supervisor said shortly before its link broke may not have arrived. It is said again on the
next connection, where it is harmless.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import zmq

from dmap import start
from dmap.cores import n_cores
from dmap.link import Connected, Disconnected, Event, Received, ServerLink
from dmap.page import (
    CANCEL_SIGNAL,
    CANNOT_START,
    Claim,
    Key,
    Page,
    Settings,
    View,
    boot_key,
    python_version,
)
from dmap.shelf import Shelf
from jobserver.keys import endpoints
from jobserver.protocol import (
    MAJOR,
    MINOR,
    Blob,
    CancelJob,
    ChildLost,
    Error,
    FetchBlob,
    GiveBack,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Running,
    Welcome,
    WorkFail,
)

if TYPE_CHECKING:
    from zmq.sugar.socket import Socket

logger = logging.getLogger(__name__)

LOOK_EVERY: Final = 0.01
"""Seconds between two looks at the pages while there is something to watch."""
WATCH_FOR: Final = 1.0
"""Seconds that a page is watched after there last was something."""
REST: Final = 1.0
"""Seconds between two looks at the pages otherwise; a child that takes something on says so."""
BUSY: Final = 0.01
"""Seconds that a job may run before what its child has not started goes to others."""
GRACE: Final = 0.5
"""Seconds that a job has to end when it is interrupted."""
PENDING: Final = 5.0
"""Seconds for which a cancel is kept whose job the child has not come to yet."""
REPEAT: Final = 20.0
"""Seconds for which what was said may not have arrived: a half-open link is noticed by then."""
MAX_REPEATED: Final = 10_000
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
"""Seconds before a child that ended before it was ready is started again."""


class _Stopping(NamedTuple):
    """A job that was told to end."""

    key: Key
    kill_at: float


class _Child:
    """One worker process."""

    def __init__(self, number: int, process: start.Process, page: Page) -> None:
        self.number = number
        self.process = process
        self.page = page
        self.stopping: list[_Stopping] = []
        self.told: set[Key] = set()  # what has been said of them is all there is to say
        self.pending: dict[Key, float] = {}  # cancelled before it was claimed -> until when kept
        self.nudged: Key | None = None  # the last job that was asked to send what waits for it

    def signal(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process, and the programs that its jobs have started."""
        if self.process.poll() is None:  # else the number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class _Server:
    """What is known of one server, and the link to it."""

    def __init__(self, link: ServerLink) -> None:
        self.link = link
        self.boot = ""
        self.is_welcome = False
        self.interval = 1.0  # seconds between two heartbeats
        self.heartbeat_at = 0.0
        # Since REPEAT ago: (when, to which boot, what).
        self.said: deque[tuple[float, int, Message]] = deque(maxlen=MAX_REPEATED)


class _Death(NamedTuple):
    """A child that ended, and what its page said then."""

    at: float
    child: _Child
    view: View
    exit: str


class Supervisor:
    """Keep worker processes. To be made and run in the main thread: it takes over signals.

    Args:
        servers: their endpoints.
        processes: how many children.
        name: what jobs and people see as the worker's name.
        labels: what jobs may ask for.
        imports: modules that register functions.
        only: if not empty, the only functions that the children can do.
        lifeline: a descriptor of a pipe; when its other end closes, everything ends at once.
        log_level: of the children.
    """

    def __init__(
        self,
        servers: Sequence[str],
        processes: int,
        *,
        name: str = "",
        labels: Sequence[str] = (),
        imports: Sequence[str] = (),
        only: Sequence[str] = (),
        lifeline: int | None = None,
        log_level: int = logging.WARNING,
    ) -> None:
        host = socket.gethostname()
        self._processes = processes
        self._n_threads = max(1, n_cores() // processes)  # of a library, in each child
        self._lifeline = lifeline
        self._notified, notify_fd = os.pipe()
        os.set_blocking(self._notified, False)
        os.set_blocking(notify_fd, False)
        self._settings = Settings(
            list(servers),
            name or host,
            host,
            secrets.token_bytes(16),
            child=0,
            parent=os.getpid(),
            notify_fd=notify_fd,
            labels=tuple(labels),
            imports=tuple(imports),
            only=tuple(only),
            log_level=log_level,
        )
        self._children: dict[int, _Child] = {}  # child number -> child
        self._deaths: deque[_Death] = deque(maxlen=MAX_REPEATED)  # since REPEAT ago
        self._n_started = 0
        self._n_failed = 0  # children in a row that ended before they were ready
        self._start_at: list[float] = []  # when to start the ones that are missing
        self._was_ready = False  # any child so far
        self._n_terms = 0
        self._ending = False
        self._exit_code = 0
        self._watch_until = 0.0
        self._look_at = 0.0
        self._forked: list[start.Started] = []  # until it runs

    def fork_children(self) -> int | None:
        """Start the first children by fork, where ``start.can_fork`` holds and before ``run``.

        Returns:
            In a child the descriptor of its page, for ``dmap.worker.run``: it has no other use for
            this object. In this process None.
        """
        for _ in range(self._n_first):
            try:
                started = start.by_fork(self._next_settings(), self._n_threads, self._forked)
            except OSError as error:  # ``run`` starts what is missing
                logger.warning("cannot fork a worker process: %s", error)
                break
            if isinstance(started, int):
                return started
            self._forked.append(started)
        return None

    def run(self) -> int:
        """Work until a signal, the lifeline or a hopeless start ends it; return the exit code."""
        # Nothing of this may be there when children are forked.
        self._context: zmq.Context[Socket[bytes]] = zmq.Context()
        self._servers = [
            _Server(ServerLink(self._context, server)) for server in self._settings.servers
        ]
        self._shelf = Shelf(len(self._servers), self._fetch_blob)
        poller = zmq.Poller()
        with self._signals() as signals:
            sources = [signals, self._notified]
            if self._lifeline is not None:
                sources.append(self._lifeline)
            for source in (*sources, self._shelf.fileno()):
                poller.register(source, zmq.POLLIN)
            for started in self._forked:
                self._adopt(started)
            self._start_at = [0.0] * (self._n_first - len(self._children))
            try:
                while not self._ending or self._children:
                    timeout = self._next_deadline() - time.monotonic()
                    for server in self._servers:
                        server.link.register(poller)
                    if any(server.link.has_events for server in self._servers):
                        timeout = 0
                    ready = dict(poller.poll(max(0, math.ceil(timeout * 1000))))
                    for source in sources:
                        if source in ready and not os.read(source, 4096):
                            self._end_at_once()  # the lifeline is cut
                            poller.unregister(source)
                            sources.remove(source)
                            break
                    self._turn(self._notified in ready)
            finally:
                self._close()
        return self._exit_code

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """Take over signals; yield a descriptor that can be read when one came."""
        wake, waker = os.pipe()
        for fd in (wake, waker):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_term)
        try:
            yield wake
        finally:
            # The handlers stay: a process that is leaving is not ended by one more SIGTERM.
            signal.set_wakeup_fd(-1)
            os.close(wake)
            os.close(waker)

    def _on_term(self, number: int, frame: object) -> None:
        self._n_terms += 1

    def _next_deadline(self) -> float:
        deadlines = [self._look_at, self._shelf.next_deadline(), *self._start_at]
        deadlines += [server.heartbeat_at for server in self._servers if server.is_welcome]
        return min(deadlines)

    def _turn(self, notified: bool) -> None:
        """Do all that is due."""
        now = time.monotonic()
        if self._n_terms and not self._ending:
            self._drain()
        if self._n_terms > 1:
            self._end_at_once()
        for child in list(self._children.values()):
            returncode = child.process.poll()
            if returncode is not None:
                self._on_death(child, returncode, now)
        for index, server in enumerate(self._servers):
            for event in server.link.receive():
                self._on_event(index, event)
            if not server.link.idle:
                self._shelf.on_heard(index, server.link.heard_at)
            if server.is_welcome and server.heartbeat_at <= now:
                server.heartbeat_at = now + server.interval
                server.link.send(Heartbeat(server.interval))
        self._shelf.turn(now)
        if notified:
            self._watch_until = now + WATCH_FOR
        if notified or self._look_at <= now:
            self._look()
        for due in [at for at in self._start_at if at <= now]:
            self._start_at.remove(due)
            self._start_child()

    # --- children -----------------------------------------------------------------------------

    @property
    def _may_be_wrong(self) -> bool:
        return bool(self._settings.imports or self._settings.only)

    @property
    def _n_first(self) -> int:
        """Where it may be impossible to start, one tries first, and says why only once."""
        return 1 if self._may_be_wrong else self._processes

    def _on_ready(self) -> None:
        self._n_failed = 0
        if not self._was_ready:
            self._was_ready = True
            if self._may_be_wrong and not self._ending:
                self._start_at += [0.0] * (self._processes - 1)

    def _next_settings(self) -> Settings:
        self._n_started += 1
        return msgspec.structs.replace(self._settings, child=self._n_started)

    def _start_child(self) -> None:
        try:
            started = start.by_exec(self._next_settings(), self._n_threads)
        except OSError as error:  # no memory, too many processes or open files
            logger.warning("cannot start a worker process: %s", error)
            self._start_later()
        else:
            self._adopt(started)

    def _adopt(self, started: start.Started) -> None:
        page = Page(started.page_fd)
        page.set_watched(self._is_watching)
        self._children[started.number] = _Child(started.number, started.process, page)
        self._shelf.add(started.number, started.blobs)

    def _start_later(self) -> None:
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**self._n_failed)
        self._n_failed += 1
        self._start_at.append(time.monotonic() + pause)

    def _on_death(self, child: _Child, returncode: int, now: float) -> None:
        """Tell the servers what a process that ended was running, and start another one."""
        del self._children[child.number]
        self._shelf.remove(child.number)
        exit = exit_text(returncode)
        was_ready = child.page.ready
        view = child.page.view_unlocked()
        child.page.close()
        if was_ready:
            self._on_ready()
        death = _Death(now, child, view, exit)
        self._deaths.append(death)
        for index, server in enumerate(self._servers):
            if server.is_welcome:
                server.link.send(self._obituary(death, index))
        if self._ending:
            return
        if view.claims:
            claim = view.claims[0]
            at = f"item {claim.item} of {claim.function!r}"
            logger.warning("child %d died of %s at %s", child.number, exit, at)
        else:
            logger.info("child %d ended with %s", child.number, exit)
        if was_ready:
            self._start_at.append(now)
        elif returncode == CANNOT_START and not self._was_ready:
            logger.error("the worker processes cannot start; see above")
            self._exit_code = 1
            self._end_at_once()
        else:
            self._start_later()

    def _obituary(self, death: _Death, index: int) -> ChildLost:
        _, child, view, exit = death
        claims = [claim for claim in view.claims if self._is_of(claim.key, index, but=child.told)]
        ended = [key.handle for key in view.ended if self._is_of(key, index, but=child.told)]
        if self._n_terms > 1:
            claims, ended = [], []  # killed by us: handed back, by no fault of any job
        running = [claim.key.handle for claim in claims]
        item, n_items = (claims[0].item, claims[0].n_items) if claims else (0, 0)
        return ChildLost(child.number, running, item, n_items, exit, ended)

    def _drain(self) -> None:
        """Have every child finish its item and leave, and leave behind the last."""
        logger.info("draining")
        self._ending = True
        self._start_at.clear()
        for child in self._children.values():
            child.page.set_draining()
            child.signal(signal.SIGTERM)

    def _end_at_once(self) -> None:
        self._ending = True
        self._start_at.clear()
        for child in self._children.values():
            child.kill()

    def _close(self) -> None:
        """Say goodbye, and leave nothing behind however we came here."""
        for child in self._children.values():
            child.kill()
            child.process.wait()
            child.page.close()
        for server in self._servers:
            server.link.send(Goodbye())
            server.link.close(linger=1.0)
        self._context.term()
        self._shelf.close()
        for fd in (self._notified, self._settings.notify_fd):
            os.close(fd)

    # --- pages --------------------------------------------------------------------------------

    @property
    def _is_watching(self) -> bool:
        return time.monotonic() < self._watch_until

    def _look(self) -> None:
        """Look at every page, and see to what is due."""
        now = time.monotonic()
        was_watching = self._is_watching
        for child in self._children.values():
            # Ahead of the look: what the child takes on after it, it then has to say.
            child.page.set_watched(was_watching)
        for child in self._children.values():
            try:
                if self._look_at_page(child, now):
                    self._watch_until = now + WATCH_FOR
            except BlockingIOError:
                continue  # the child is in the middle of a change, perhaps stopped there
        if self._is_watching and not was_watching:
            for child in self._children.values():
                child.page.set_watched(True)
        self._look_at = now + (LOOK_EVERY if self._is_watching else REST)

    def _look_at_page(self, child: _Child, now: float) -> bool:
        """See to one child; tell whether there is something to watch."""
        if child.page.ready:
            self._on_ready()
        if not (child.stopping or child.pending) and child.page.is_brief(now - BUSY):
            return True
        view = child.page.view()
        running = {claim.key for claim in view.claims}
        for stopping in list(child.stopping):
            if stopping.key not in running:
                child.stopping.remove(stopping)
            elif stopping.kill_at <= now:
                logger.info("child %d did not stop its job and is killed", child.number)
                child.kill()
        for key, until in list(child.pending.items()):
            if self._cancel(child, key) or until <= now:
                del child.pending[key]
        for claim in view.claims:
            if claim.key not in child.told:
                self._check_time(child, claim, now)
        if view.claims and now - view.claims[0].since >= BUSY:
            self._relieve(child, view)
        limits = any(claim.deadline or claim.item_deadline for claim in view.claims)
        return bool(limits or child.stopping or child.pending or (view.claims and view.unclaimed))

    def _check_time(self, child: _Child, claim: Claim, now: float) -> None:
        """Stop a job that ran, or whose item ran, out of its time."""
        if claim.deadline and claim.deadline <= now:
            limit, subject, exact = claim.deadline - claim.since, "it", None
        elif claim.item_deadline and claim.item_deadline <= now:
            limit, subject, exact = claim.item_deadline - claim.item_since, "this item", claim
        else:
            return
        if child.page.cancel(claim.key, exact):
            text = f"{subject} ran longer than {limit:g} seconds"
            fail = WorkFail(0, claim.key.handle, "timeout", text, claim.item, claim.n_items)
            self._stop(child, claim.key, fail)

    def _cancel(self, child: _Child, key: Key) -> bool:
        """Stop a job of a child, if it has come to it, or if that holds it and has not."""
        fail = WorkFail(0, key.handle, "cancelled")
        if child.page.cancel(key):
            self._stop(child, key, fail)
        elif child.page.take([key]):
            self._say_of(key, fail)
        else:
            return False
        return True

    def _stop(self, child: _Child, key: Key, fail: WorkFail) -> None:
        """Say what a job ends of, and make it end."""
        self._say_of(key, fail)
        child.told.add(key)
        child.stopping.append(_Stopping(key, time.monotonic() + GRACE))
        child.signal(CANCEL_SIGNAL)

    def _relieve(self, child: _Child, view: View) -> None:
        """Give back what a busy child has not started, and have it send what it has done."""
        if view.unclaimed:
            handles: dict[tuple[int, int], list[int]] = {}  # (server, boot) -> of what was taken
            for key in child.page.take():
                handles.setdefault((key.server, key.boot), []).append(key.handle)
            for (index, boot), some in handles.items():
                self._say(index, boot, GiveBack(some))
        key = view.claims[0].key
        if view.ended and child.nudged != key:
            child.nudged = key
            child.signal(CANCEL_SIGNAL)

    # --- servers ------------------------------------------------------------------------------

    def _is_of(self, key: Key, index: int, but: set[Key] | frozenset[Key] = frozenset()) -> bool:
        """Tell whether a job is one of the server's present life, and none of those."""
        server = self._servers[index]
        return key.server == index and key.boot == boot_key(server.boot) and key not in but

    def _fetch_blob(self, index: int, blob: bytes, named: bool) -> bool:
        """Ask a server for a blob, or return False: it is not there, or reads too slowly."""
        server = self._servers[index]
        return server.is_welcome and server.link.send(FetchBlob(blob, named))

    def _say_of(self, key: Key, message: Message) -> None:
        """Say something of a job to the server that assigned it."""
        self._say(key.server, key.boot, message)

    def _say(self, index: int, boot: int, message: Message) -> None:
        """Say something to a server in that life of it, and once more if the link breaks soon.

        A child may have a job of a life of which this process has not heard yet.
        """
        server = self._servers[index]
        now = time.monotonic()
        while server.said and server.said[0][0] < now - REPEAT:
            server.said.popleft()
        server.said.append((now, boot, message))
        if server.is_welcome and boot == boot_key(server.boot):
            server.link.send(message)

    def _on_event(self, index: int, event: Event) -> None:
        server = self._servers[index]
        match event:
            case Connected() | Received(Error(code="hello_first")):
                self._say_hello(index)
            case Disconnected():
                server.is_welcome = False
                logger.info("the link to %s is gone", server.link.endpoint)
            case Received(Welcome() as welcome):
                self._on_welcome(index, welcome)
            case Received(CancelJob(number, handle)):
                child = self._children.get(number)
                if child is not None:
                    key = Key(handle, boot_key(server.boot), index)
                    child.pending[key] = time.monotonic() + PENDING
                    self._look_at = 0.0
            case Received(Blob(blob, known, memory), bodies):
                body = (memory or (bodies[0] if bodies else b"")) if known else None
                self._shelf.on_blob(index, server.boot, blob, body, time.monotonic())
            case Received(Error() as error):
                logger.warning("%s: %s", server.link.endpoint, error.text)
            case Received():
                pass

    def _say_hello(self, index: int) -> None:
        settings = self._settings
        server = self._servers[index]
        running = [
            Running(number, claim.origin, claim.function, claim.uniq)
            for number, view in self._views()
            for claim in view.claims
            if claim.key.server == index
        ]
        hello = Hello(
            MAJOR,
            MINOR,
            "supervisor",
            settings.session,
            python=python_version(),
            name=settings.name,
            host=settings.host,
            pid=os.getpid(),
            labels=settings.labels,
            boot=server.boot,
            running=running,
            together=True,
        )
        server.link.send(hello)

    def _on_welcome(self, index: int, welcome: Welcome) -> None:
        server = self._servers[index]
        logger.info("connected to %s at %s", welcome.name, server.link.endpoint)
        server.boot = welcome.boot
        server.interval = welcome.interval or server.interval
        server.is_welcome = True
        server.heartbeat_at = time.monotonic() + server.interval
        self._shelf.on_welcome(index, time.monotonic())
        # What was given back may have come back here since: then it is not given back once more.
        here = {
            key.handle
            for _, view in self._views()
            for key in (*(claim.key for claim in view.claims), *view.ended, *view.unclaimed)
            if self._is_of(key, index)
        }
        since = time.monotonic() - REPEAT
        for at, boot, message in server.said:
            if at < since or boot != boot_key(server.boot):
                continue
            if isinstance(message, GiveBack):
                handles = [handle for handle in message.handles if handle not in here]
                if not handles:
                    continue
                message = GiveBack(handles)
            server.link.send(message)
        for death in self._deaths:
            if death.at >= since:
                server.link.send(self._obituary(death, index))

    def _views(self) -> Iterator[tuple[int, View]]:
        for child in self._children.values():
            with suppress(BlockingIOError):
                yield child.number, child.page.view()


def exit_text(returncode: int) -> str:
    """Say how a process ended.

    >>> exit_text(3), exit_text(-9)
    ('exit code 3', 'SIGKILL')
    """
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:  # a real-time signal
        return f"signal {-returncode}"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``dmap-worker``; return its exit code.

    Args:
        argv: what follows the command's name. None: this process was started to be that command,
            and nothing else. Then its children are copies of it, where that is possible.
    """
    parser = argparse.ArgumentParser(
        prog="dmap-worker",
        description="Run jobs of one or several job servers, in a process a core.",
    )
    parser.add_argument(
        "--servers",
        metavar="A,B:PORT",
        default=os.environ.get("DMAP_SERVERS", ""),
        help="the job servers, with commas between them (default: DMAP_SERVERS)",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", default=n_cores(), help="default: a core each"
    )
    parser.add_argument("--name", default="", help="of this worker (default: the host's)")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        nargs="+",
        action="extend",
        default=[],
        help="modules that register functions with @job",
    )
    parser.add_argument(
        "--only", type=_names, metavar="F,G", default=[], help='do no other ("dmap": closures)'
    )
    parser.add_argument(
        "--labels", type=_names, metavar="A,B", default=[], help="what jobs may ask for"
    )
    parser.add_argument(
        "--lifeline",
        type=int,
        metavar="FD",
        help="a pipe that this process inherits; end at once when its other end closes",
    )
    parser.add_argument("--verbose", action="store_true", help="log what happens")
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error(f"--processes is {options.processes}: say 1 or more")
    try:
        servers = endpoints(options.servers)
    except ValueError as error:
        parser.error(f"--servers: {error}")
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    supervisor = Supervisor(
        servers,
        options.processes,
        name=options.name,
        labels=options.labels,
        imports=options.imports,
        only=options.only,
        lifeline=options.lifeline,
        log_level=level,
    )
    return run(supervisor) if argv is None else supervisor.run()


def run(supervisor: Supervisor) -> int:
    """Run a supervisor in a process that is for nothing else; return the exit code.

    Raises:
        SystemExit: in a forked child, which has been a worker until then.
    """
    from dmap import worker  # a supervisor that does not fork has no use for it

    if start.can_fork():
        page_fd = supervisor.fork_children()
        if page_fd is not None:
            sys.exit(worker.run(page_fd))
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
