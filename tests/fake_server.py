"""A job server that does what the test says: a ROUTER in the test's own thread, and nothing behind.

    with FakeServer(tmp_path) as server:
        ...  # something connects to server.address
        hello = server.wait(Hello)            # it was welcomed already
        server.say(hello.peer, Noop())
        grab = server.wait(GrabJobs)

It welcomes who says Hello, drops heartbeats, accepts what ends jobs, and hands out the blobs that
it has. All else waits, in order, until the test asks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import cloudpickle
import msgspec
import zmq

from dmap.closures import Closure
from dmap.page import Page
from jobserver import protocol
from jobserver.pieces import TRANSFERS, Link
from jobserver.protocol import (
    Assigned,
    Blob,
    Body,
    FetchBlob,
    GrabJobs,
    Heartbeat,
    Hello,
    JobAssign,
    LaneId,
    Message,
    Origin,
    Range,
    Together,
    Welcome,
    WorkAccepted,
    WorkComplete,
    WorkException,
    WorkFail,
)
from jobserver.together import unfold

WITHIN = 20.0  # seconds in which what must come comes, on any machine

M = TypeVar("M", bound=Message)
boots = itertools.count(1)


class Heard(NamedTuple, Generic[M]):
    peer: bytes
    message: M
    bodies: tuple[Body, ...]


class Job(NamedTuple):
    assigned: Assigned
    argument: Body

    @property
    def handle(self) -> int:
        return self.assigned.handle


class FakeServer:
    def __init__(self, folder: Path, name: str = "fake") -> None:
        self.name = name
        self.accepts = True  # whether it accepts what ends jobs
        self.blobs: dict[bytes, bytes] = {}
        self._handles = itertools.count(1)
        self.address = f"ipc://{folder}/{name}"
        self.heard: list[Heard[Any]] = []
        self.hellos: list[Heard[Hello]] = []
        self.together: list[list[type[Message]]] = []  # what came as one
        self._context: zmq.Context[Any] = zmq.Context()
        self.start()

    def start(self) -> None:
        """Bind, as a new boot of the server that knows nobody."""
        self.boot = f"boot{next(boots)}"
        self._links: dict[bytes, Link] = {}
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.bind(self.address)

    def stop(self) -> None:
        """Go away as a killed server does, with what it heard."""
        self._router.close()
        self.heard.clear()

    def restart(self) -> None:
        self.stop()
        self.start()

    def say(self, peer: bytes, message: Message, *bodies: Body) -> None:
        for frames in self._link(peer).outgoing(message, bodies):
            self._router.send_multipart([peer, *frames])

    def make(self, function: str, argument: Body = b"", **fields: Any) -> Job:
        """Make a job of this function with a handle of its own."""
        handle = next(self._handles)
        job = Assigned(
            handle,
            Origin(b"c" * 16, 1000 + handle),
            function,
            protocol.nbytes_of(argument),
            n_items=1,
            attempt=1,
            encoding="pickle",
            uniq=b"",
            timeout=0.0,
            item_timeout=0.0,
            blobs=(),
            ancestors=(),
            lane=LaneId(b"c" * 16, 0),
        )
        return Job(msgspec.structs.replace(job, **fields), argument)

    def put(self, function: Callable[..., Any]) -> tuple[bytes, ...]:
        """Have the blobs of a function, with test modules by value; return what a job names."""
        module = sys.modules[function.__module__]
        if module.__name__.startswith("test_"):
            cloudpickle.register_pickle_by_value(module)
        blobs = Closure(function).blobs
        for blob in blobs:
            self.blobs[blob.id] = blob.body if isinstance(blob.body, bytes) else b"".join(blob.body)
        return tuple(blob.id for blob in blobs)

    def assign(self, peer: bytes, *jobs: Job) -> None:
        message = JobAssign([job.assigned for job in jobs])
        self.say(peer, message, protocol.join([job.argument for job in jobs]))

    def assign_to_next(self, *jobs: Job, of: Callable[[GrabJobs], bool] = lambda _: True) -> bytes:
        """Give the jobs to who grabs; return who did."""
        peer = self.wait(GrabJobs, of).peer
        self.assign(peer, *jobs)
        return peer

    def wait(
        self, kind: type[M], of: Callable[[M], bool] = lambda message: True, within: float = WITHIN
    ) -> Heard[M]:
        """Return (and forget) the first message of that kind, as soon as it is there."""
        found = self.find(kind, of, within)
        assert found is not None, f"no {kind.__name__} came; there are {self.heard}"
        return found

    def find(
        self, kind: type[M], of: Callable[[M], bool] = lambda message: True, within: float = 0.0
    ) -> Heard[M] | None:
        deadline = time.monotonic() + within
        while True:
            self.pump(0)
            for index, heard in enumerate(self.heard):
                if type(heard.message) is kind and of(heard.message):
                    del self.heard[index]
                    return heard
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self.pump(left)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Serve until a condition holds, and fail if it does not in time."""
        deadline = time.monotonic() + WITHIN
        while not condition():
            assert time.monotonic() < deadline, f"it did not come to that; there are {self.heard}"
            self.pump(0.005)

    def pump(self, seconds: float) -> None:
        """Wait for a message at most so long, and take in all that are there."""
        timeout = int(seconds * 1000)
        while self._router.poll(timeout):
            timeout = 0
            peer, *frames = self._router.recv_multipart()
            message = protocol.decode_to_server(frames[0])
            bodies: tuple[Body, ...] = tuple(frames[1:])
            if isinstance(message, Together):
                several = list(unfold(message, bodies, protocol.decode_to_server))
                self.together.append([type(one) for one, _ in several])
                for one, its_bodies in several:
                    self._take(peer, one, its_bodies)
            else:
                self._take(peer, message, bodies)

    def _take(self, peer: bytes, message: Message, bodies: tuple[Body, ...]) -> None:
        if type(message) not in TRANSFERS:
            self._on_message(peer, message, bodies)
            return
        whole, answers = self._link(peer).incoming(message, bodies)
        for answer in answers:
            self._router.send_multipart([peer, *answer])
        for inner, its_bodies in whole:
            self._on_message(peer, inner, its_bodies)

    def _on_message(self, peer: bytes, message: Message, bodies: tuple[Body, ...]) -> None:
        if isinstance(message, Hello):
            self.hellos.append(Heard(peer, message, bodies))
            self.say(peer, Welcome(1, 0, self.name, self.boot, False, 1.0, 1000, 2**26))
        if isinstance(message, FetchBlob):
            blob = self.blobs.get(message.blob)
            answer = Blob(message.blob, blob is not None)
            self.say(peer, answer, *([] if blob is None else [blob]))
        match message:
            case WorkComplete() | WorkException() | WorkFail() if self.accepts and message.seq:
                self.say(peer, WorkAccepted([Range(message.seq, 1)]))
        if not isinstance(message, Heartbeat):
            self.heard.append(Heard(peer, message, bodies))

    def _link(self, peer: bytes) -> Link:
        if peer not in self._links:
            self._links[peer] = Link(2**40, decode=protocol.decode_to_server)
        return self._links[peer]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self._router.close()
        self._context.term()


class Running(NamedTuple):
    """A supervisor that runs, as its servers know it."""

    process: subprocess.Popen[str]

    def children(self) -> list[int]:
        """Return the pids of its children that live."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def is_draining(self) -> bool:
        """Tell whether its one child was told to leave; that stands on the page they share."""
        (child,) = self.children()
        for link in Path(f"/proc/{child}/fd").iterdir():
            if "dmap-page" in os.readlink(link):
                page = Page(os.open(link, os.O_RDWR))
                try:
                    return page.draining
                finally:
                    page.close()
        return False

    def end(self) -> None:
        """Kill it, its children and what their jobs have started."""
        groups = self.children() if self.process.poll() is None else []
        self.process.kill()
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.communicate()

    def exit_code(self) -> int:
        return self.process.wait(WITHIN)


@contextlib.contextmanager
def running_worker(
    servers: list[FakeServer] | list[str], *options: str, **popen: Any
) -> Iterator[Running]:
    """Run `dmap-worker` with one process, unless the options say otherwise, and end it.

    `popen` are options of `subprocess.Popen`.
    """
    addresses = [server if isinstance(server, str) else server.address for server in servers]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dmap.supervisor",
            "--servers",
            ",".join(addresses),
            "--processes",
            "1",
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    running = Running(process)
    try:
        yield running
    finally:
        running.end()
