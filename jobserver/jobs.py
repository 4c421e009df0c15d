"""All that a server holds, on one page: jobs, sessions, supervisors, workers, functions.

::

    Session --tickets--> Job --queue--> Queue --function--> Function
       ^                  | ^              |                    |
       +----listeners-----+ |              +----- workers ------+
                            |                        |
    Supervisor --children--> Worker --held-----------+

Records only; what moves them is in ``crew`` and ``state``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from jobserver.protocol import (
    Ability,
    BlobId,
    Body,
    GrabJobs,
    JobComplete,
    JobException,
    JobFail,
    LaneId,
    Message,
    Origin,
    Seconds,
    SubmitJobs,
    nbytes_of,
)
from jobserver.queues import Queue


class Send(NamedTuple):
    """A message to hand to a peer. If it is patient, it may wait for another one to go with."""

    peer: bytes
    message: Message
    bodies: tuple[Body, ...] = ()
    patient: bool = False


@dataclass(frozen=True)
class Limits:
    """What a server takes on, and how long it remembers. Sizes in bytes, times in seconds."""

    max_jobs: int = 2_000_000
    max_nbytes: int = 4 * 2**30
    session_jobs: int = 500_000
    session_nbytes: int = 2**30
    blob_nbytes: int = 2**30
    n_peers: int = 60_000
    n_lanes: int = 10_000  # open ones of one session
    abilities: int = 10_000  # of one worker
    session_ttl: Seconds = 10.0  # a session whose link is gone ends after this
    worker_grace: Seconds = 1.0  # a supervisor whose link is gone is lost after this
    worker_ttl: Seconds = 20.0  # a supervisor that fell silent is lost after this
    woken_ttl: Seconds = 0.25  # a woken worker that did not grab counts as busy elsewhere
    ended_ttl: Seconds = 60.0  # an ended job is remembered for this long
    n_ended: int = 100_000
    ended_nbytes: int = 64 * 2**20
    heartbeat: Seconds = 1.0


READY: Final = "ready"
DELAYED: Final = "delayed"
ASSIGNED: Final = "assigned"
ENDED: Final = "ended"
JobState: TypeAlias = Literal["ready", "delayed", "assigned", "ended"]

JobEnd: TypeAlias = JobComplete | JobException | JobFail
"""What a listener is told at the end: of one ticket each."""


class Job:
    """One call of one function on one argument."""

    __slots__ = (
        "also",
        "argument",
        "attempt",
        "background",
        "handle",
        "lane",
        "listeners",
        "n_items",
        "nbytes",
        "offered",
        "origin",
        "priority",
        "progress",
        "queue",
        "since",
        "stands_at",
        "state",
        "terms",
        "unwanted",
        "uniq",
        "worker",
    )

    def __init__(
        self,
        handle: int,
        origin: Origin,
        queue: Queue,
        terms: SubmitJobs,
        lane: LaneId,
        argument: Body,
    ) -> None:
        self.handle = handle
        self.origin = origin
        self.queue = queue
        self.terms = terms  # what the jobs of one submit have in common; its list is empty
        self.argument = argument
        self.nbytes = nbytes_of(argument)
        self.offered = b""  # the uniq that it was submitted with
        self.uniq = b""  # the same while others may join it, else empty
        self.n_items = 1
        self.since = 0.0  # when it was submitted
        self.background = terms.background
        self.priority = terms.priority
        self.lane = lane  # of its first submit, whose jobs share it as they do the terms
        self.also: dict[tuple[LaneId, int], None] | None = None  # lanes of those who joined
        self.listeners: list[tuple[Session, int]] = []  # with their tickets
        self.state: JobState = READY
        self.stands_at = 0  # bit set of priorities in whose lanes it counts; 0: not ready
        self.attempt = 0  # runs begun that may have ended by a loss
        self.worker: Worker | None = None  # valid while ASSIGNED
        self.progress: tuple[int, int] | None = None  # the last status
        self.unwanted = False  # cancelled while ASSIGNED: its end interests no one

    @property
    def name(self) -> str:
        """Return the name of its function."""
        return self.queue.function.name


class LaneInfo:
    """A map as its client described it, for people."""

    __slots__ = ("description", "n_done", "n_failed", "total")

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = total
        self.n_done = 0  # items
        self.n_failed = 0  # jobs


class Untaken(NamedTuple):
    """An end that a client has not acknowledged."""

    message: JobEnd
    bodies: tuple[Body, ...]
    nbytes: int  # of the bodies, and of what they refer to
    lender: tuple[Worker, int] | None = None  # in whose memory that is, by which report


class Session:
    """A client, from its first Hello to its Goodbye, over any number of links."""

    __slots__ = (
        "accepted",
        "due",
        "gone_at",
        "host",
        "id",
        "lanes",
        "machine",
        "name",
        "nbytes",
        "peer",
        "pid",
        "python",
        "tickets",
        "together",
        "untaken",
    )

    def __init__(self, session: bytes) -> None:
        self.id = session
        self.peer: bytes | None = None
        self.together = False  # whether its link understands several messages in one
        self.gone_at: float | None = None  # since when it has no link
        self.due: float | None = None  # when to look whether its time is over
        self.name = self.host = self.python = self.machine = ""
        self.pid = 0
        self.tickets: dict[int, Job] = {}  # ticket -> the live job that it listens to
        self.accepted: dict[int, int] = {}  # ticket -> handle of a background job, until taken
        self.untaken: dict[int, Untaken] = {}  # ticket -> how its job ended, until taken
        self.lanes: dict[int, LaneInfo] = {}
        self.nbytes = 0  # of its tickets' arguments and untaken ends


_ENDED_CHILDREN = 100
"""What a child said last may come behind the word of its death by so little that these do."""


class Supervisor:
    """A compute host's supervisor, or a lone worker that speaks for itself."""

    __slots__ = (
        "due",
        "ended",
        "gone_at",
        "heard_at",
        "host",
        "id",
        "name",
        "peer",
        "pid",
        "together",
        "workers",
    )

    def __init__(self, session: bytes, now: float) -> None:
        self.id = session
        self.peer: bytes | None = None
        self.together = False  # whether its link understands several messages in one
        self.heard_at = now
        self.gone_at: float | None = None  # since when its link is known to be gone
        self.due: float | None = None  # when to look whether its time is over
        self.name = self.host = ""
        self.pid = 0
        self.workers: dict[int, Worker] = {}  # child number -> its worker
        self.ended: deque[int] = deque(maxlen=_ENDED_CHILDREN)  # numbers, the last ones


Sleep: TypeAlias = Literal["awake", "asleep", "waiting", "woken", "overdue"]
"""A worker is awake (it works or grabs), asleep, waiting (its grab stands), woken (noop sent, not
grabbed yet), or overdue (woken for so long that others are woken in its place)."""


class Worker:
    """One process that runs jobs, for as long as it lives."""

    __slots__ = (
        "abilities",
        "adopted",
        "child",
        "grab",
        "held",
        "host",
        "labels",
        "lent",
        "machine",
        "n_done",
        "name",
        "peer",
        "pid",
        "python",
        "queues",
        "since",
        "sleep",
        "supervisor",
        "together",
    )

    def __init__(self, supervisor: Supervisor, child: int, now: float) -> None:
        self.supervisor = supervisor
        self.child = child
        self.peer: bytes | None = None
        self.together = False  # whether its link understands several messages in one
        self.name = self.host = self.python = self.machine = ""
        self.pid = 0
        self.labels: frozenset[str] = frozenset()
        self.abilities: dict[str, Ability] = {}
        self.queues: dict[Queue, None] = {}  # those whose jobs it can do
        self.held: dict[int, Job] = {}  # handle -> job, in the order of their assignment
        self.adopted: set[int] = set()  # of these, what it has run since before our boot
        self.sleep: Sleep = "awake"
        self.grab: GrabJobs | None = None  # the one that stands while WAITING
        self.since = now  # when ``sleep`` or the emptiness of ``held`` last changed
        self.n_done = 0
        # number of a report -> how many have yet to take what it lends of the worker's memory
        self.lent: dict[int, int] = {}


class Function:
    """A name under which work is asked for."""

    __slots__ = ("merge", "n_running", "name", "queues", "seconds", "workers")

    def __init__(self, name: str) -> None:
        self.name = name
        self.merge = False  # what its workers last said
        self.seconds: float | None = None  # running average of one job's time
        self.queues: dict[object, Queue] = {}  # needs -> queue
        self.workers: dict[Worker, None] = {}
        self.n_running = 0  # jobs of it that are assigned


class Ended(NamedTuple):
    """What is remembered of an ended job for a while."""

    at: float
    outcome: str
    function: str
    uniq: bytes
    end: Untaken | None  # kept for those who may still ask for it


Peer: TypeAlias = Session | Supervisor | Worker
BlobIds: TypeAlias = tuple[BlobId, ...]
