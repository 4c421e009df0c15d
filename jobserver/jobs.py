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
from typing import Final, Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from jobserver.protocol import (
    Ability,
    BlobId,
    Body,
    Completed,
    GrabJobs,
    JobComplete,
    JobException,
    JobFail,
    LaneId,
    Message,
    Origin,
    Seconds,
    SubmitJobs,
)
from jobserver.queues import Queue


class Send(Struct, frozen=True, gc=False):
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
"""How a job ended. A listener is told it under its own ticket."""


class Job(Struct, eq=False, gc=False):
    """One call of one function on one argument.

    There may be a million of these. They are nothing that the garbage collector looks at: whoever
    ends a job takes it out of what it points to.
    """

    handle: int
    ticket: int  # that it was submitted with
    queue: Queue
    terms: SubmitJobs  # what the jobs of one submit have in common; its list is empty
    lane: LaneId  # of its first submit, whose jobs share it as they do the terms
    argument: Body
    nbytes: int  # of the argument
    n_items: int = 1
    since: float = 0.0  # when it was submitted
    offered: bytes = b""  # the uniq that it was submitted with
    background: bool = False
    session: Session | None = None  # that submitted it, while that one listens
    others: list[tuple[Session, int]] | None = None  # who else listens, with their tickets
    uniq: bytes = b""  # what was offered, while others may join it, else empty
    also: dict[tuple[LaneId, int], None] | None = None  # lanes of those who joined
    earlier: Origin | None = None  # of which it is known where it runs since before our boot
    state: JobState = READY
    stands_at: int = 0  # bit set of priorities in whose lanes it counts; 0: not ready
    attempt: int = 0  # runs begun that may have ended by a loss
    worker: Worker | None = None  # valid while ASSIGNED
    progress: tuple[int, int] | None = None  # the last status
    unwanted: bool = False  # cancelled while ASSIGNED: its end interests no one

    @property
    def name(self) -> str:
        """Return the name of its function."""
        return self.queue.function.name

    @property
    def origin(self) -> Origin:
        """Return its client's own name for it."""
        # A million are made; the class's own constructor would take twice as long.
        return self.earlier or tuple.__new__(Origin, (self.lane.session, self.ticket))

    @property
    def listeners(self) -> list[tuple[Session, int]]:
        """Return who listens to it, with their tickets. O(listeners)."""
        first = [] if self.session is None else [(self.session, self.ticket)]
        return first + self.others if self.others else first

    @property
    def is_listened_to(self) -> bool:
        """Tell whether it has listeners."""
        return self.session is not None or bool(self.others)


class LaneInfo:
    """A map as its client described it, for people."""

    __slots__ = ("description", "n_done", "n_failed", "total")

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = total
        self.n_done = 0  # items
        self.n_failed = 0  # jobs


class Untaken(Struct, eq=False, gc=False):
    """An end that clients have not acknowledged: one for all who listened.

    Its message is about no ticket yet. That of a result is even the same for all results that
    came at once, and says what these have in common.
    """

    message: JobEnd
    bodies: tuple[Body, ...]
    nbytes: int  # of the bodies, and of what they refer to
    lender: tuple[Worker, int] | None = None  # in whose memory that is, by which report
    n_items: int = 0  # that a result covers
    shared: int = 0  # bytes of a result that are not in its body

    def told(self, ticket: int) -> JobEnd:
        """Return the message that tells a listener."""
        of = self.message
        if isinstance(of, JobComplete):
            done = Completed(ticket, self.nbytes - self.shared, self.n_items, self.shared)
            return JobComplete([done], of.seconds, of.host, of.n_workers)
        return replace(of, ticket=ticket)


class Session:
    """A client, from its first Hello to its Goodbye, over any number of links."""

    __slots__ = (
        "accepted",
        "due",
        "gone_at",
        "host",
        "id",
        "lane_id",
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
        self.lane_id = LaneId(session, 0)  # of its last submit
        self.nbytes = 0  # of its tickets' arguments and untaken ends

    def require_lane_id(self, lane: int) -> LaneId:
        """Return the name of one of its lanes; the same object for submits behind each other."""
        if self.lane_id.lane != lane:
            self.lane_id = LaneId(self.id, lane)
        return self.lane_id


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

    __slots__ = ("merge", "merged", "n_running", "name", "queues", "seconds", "workers")

    def __init__(self, name: str) -> None:
        self.name = name
        self.merge = False  # what its workers last said
        self.seconds: float | None = None  # running average of one job's time
        self.queues: dict[object, Queue] = {}  # needs -> queue
        self.workers: dict[Worker, None] = {}
        self.merged: dict[bytes, Job] = {}  # uniq -> live job to join
        self.n_running = 0  # jobs of it that are assigned


class Ended(Struct, eq=False, gc=False):
    """What is remembered of an ended job for a while."""

    at: float
    outcome: str
    function: str
    uniq: bytes
    end: Untaken | None  # kept for those who may still ask for it


Peer: TypeAlias = Session | Supervisor | Worker
Told: TypeAlias = tuple[Session, int, Untaken]
"""Who is to be told of an end, and under which ticket."""
BlobIds: TypeAlias = tuple[BlobId, ...]
