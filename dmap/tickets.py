"""What a client has under way: tickets and the terms they share, and what becomes of them.

Records only; what moves them is ``client_state``. An event goes to the *owner* of its ticket: a
``Job``, a map, or whoever asked a question.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

from msgspec import Struct

from jobserver.protocol import (
    NORMAL,
    Body,
    CancelHandle,
    CountWorkers,
    GetStatus,
    JobData,
    JobException,
    JobFail,
    JobSpec,
    JobStatus,
    JobWarning,
    Message,
    OpenLane,
    Origin,
    Show,
    Shown,
    StatusIs,
    SubmitJobs,
    WorkersAre,
    nbytes_of,
)

PATIENCE: Final = 60.0
"""Seconds that calls wait for servers that were there before, if their caller says no other."""


QUIET: Final = 3.0
"""Seconds without a result after which a client asks whether anyone can do such jobs at all."""


class Blob(NamedTuple):
    """Bytes that jobs name, under their sha256."""

    id: bytes
    body: Body


Needs: TypeAlias = tuple[str, str, tuple[str, ...]]
"""The function, the Python version (empty: any) and the labels that a worker must have."""


class Terms:
    """What jobs that are submitted together have in common; compared by identity.

    The fields are those of ``SubmitJobs``; and beside them

    Attributes:
        by_uniq: A job goes to the server that its uniq chooses, so that equal ones meet.
        once: A job runs at most once: it fails when its server is lost.
        patience: Seconds that a job waits while there is no server at all.
        shared: Whether large arguments and results may lie in memory of one of the two ends.
        n_workers: How many can take such a job, as last heard; None before that.
        n_live: Tickets of these terms that have not ended.
        absence: Who there is instead, while nobody was found that can take such a job.
        shipped: What their blobs cost: place of a server -> bytes that were put there for them.
    """

    __slots__ = (
        "absence",
        "ancestors",
        "attempts",
        "avoid",
        "background",
        "blobs",
        "by_uniq",
        "encoding",
        "function",
        "item_timeout",
        "labels",
        "lane",
        "merge",
        "n_live",
        "n_workers",
        "no_room_since",
        "not_before",
        "once",
        "patience",
        "priority",
        "probe_at",
        "probe_pause",
        "python",
        "retry_at",
        "say_at",
        "shared",
        "shipped",
        "stuck",
        "timeout",
    )

    def __init__(
        self,
        function: str,
        *,
        lane: int = 0,
        priority: int = NORMAL,
        background: bool = False,
        merge: bool = False,
        encoding: Literal["pickle", "raw"] = "pickle",
        python: str = "",
        labels: tuple[str, ...] = (),
        attempts: int = 3,
        timeout: float = 0.0,
        item_timeout: float = 0.0,
        not_before: float = 0.0,
        blobs: tuple[Blob, ...] = (),
        ancestors: tuple[Origin, ...] = (),
        by_uniq: bool = False,
        once: bool = False,
        patience: float = PATIENCE,
    ) -> None:
        self.function = function
        self.lane = lane
        self.priority = priority
        self.background = background
        self.merge = merge
        self.encoding = encoding
        self.python = python
        self.labels = labels
        self.attempts = attempts
        self.timeout = timeout
        self.item_timeout = item_timeout
        self.not_before = not_before
        self.blobs = blobs
        self.ancestors = ancestors
        self.by_uniq = by_uniq
        self.once = once
        self.patience = patience
        # In memory that ends with its process: no job that may run only once, or for others.
        self.shared = not (background or merge or once)
        self.n_workers: int | None = None
        self.no_room_since = 0.0  # since when a server has no room for the blobs; 0: it has
        self.retry_at = 0.0  # when to try again; 0: at once
        self.n_live = 0
        self.shipped: dict[int, int] = {}
        self.probe_at = 0.0  # when to ask who can do these, unless a result comes; if n_live
        self.probe_pause = QUIET
        self.stuck = False  # a server that has some has no workers for them; until they are asked
        self.avoid: frozenset[Server] = frozenset()  # no workers there, but elsewhere
        self.absence: NoWorkers | None = None
        self.say_at = 0.0  # from when on to say so; while there is an absence

    @property
    def needs(self) -> Needs:
        """Return what a worker must have for such a job."""
        return self.function, self.python, self.labels

    def submit(
        self, jobs: list[JobSpec], *, resubmit: bool, shared: bool = False, referred: bool = False
    ) -> SubmitJobs:
        """Make the message that submits these jobs."""
        return SubmitJobs(
            self.function,
            jobs,
            self.lane,
            self.priority,
            self.background,
            self.merge,
            self.encoding,
            self.python,
            self.labels,
            self.attempts,
            self.timeout,
            self.item_timeout,
            self.not_before,
            tuple([blob.id for blob in self.blobs]),
            resubmit,
            self.ancestors,
            shared,
            referred,
        )


WAITING: Final = 0
SENT: Final = 1
ACCEPTED: Final = 2
ENDED: Final = 3


class Owner(Protocol):
    """Who is told what becomes of a ticket or a question."""

    def hear(self, event: Any, /) -> None:
        """Take an event; called by the driver, from whichever thread drives."""


class _Nobody:
    """Owns the tickets whose owners want to hear no more."""

    def hear(self, event: Any, /) -> None:
        """Drop it."""


NOBODY: Final = _Nobody()


class Ticket:
    """A job as its client sees it. Made by any thread; changed by the state alone.

    Attributes:
        stage: WAITING, SENT, ACCEPTED or ENDED.
        handle: The server's number for it, valid from ACCEPTED on.
        where: ``name:boot`` of the server that accepted it last; empty before.
    """

    __slots__ = (
        "argument",
        "handle",
        "lost_at",
        "n_items",
        "nbytes",
        "number",
        "owner",
        "resubmit",
        "server",
        "stage",
        "terms",
        "uniq",
        "where",
    )

    def __init__(
        self,
        number: int,
        terms: Terms,
        argument: Body,
        owner: Owner,
        uniq: bytes = b"",
        n_items: int = 1,
    ) -> None:
        self.number = number
        self.terms = terms
        self.argument = argument
        self.nbytes = len(argument) if type(argument) is bytes else nbytes_of(argument)
        self.owner: Owner = owner
        self.uniq = uniq
        self.n_items = n_items
        self.stage = WAITING
        self.resubmit = False  # it may have run on a server that is lost
        self.server: Server | None = None  # where it waits or was sent; None: homeless
        self.lost_at: Server | None = None  # the last server that was lost with it
        self.handle = 0
        self.where = ""

    @property
    def handle_text(self) -> str:
        """Return ``name:boot:n``, or an empty text if no server has accepted it yet."""
        return f"{self.where}:{self.handle}" if self.where else ""


class Attached(Ticket):
    """A ticket that listens to a job which somebody else submitted."""

    __slots__ = ()

    def __init__(self, number: int, where: str, handle: int, owner: Owner) -> None:
        super().__init__(number, Terms(""), b"", owner)
        self.where = where
        self.handle = handle


# --- events -----------------------------------------------------------------------------------


class Completed(Struct):
    """The first ``n_items`` items of a job are done; the job has ended.

    ``seconds`` is what a worker spent on it: where results came together, its share by items. There
    is one for each job, and a Struct is made in a fifth of the time of a tuple with names.
    """

    owner: Owner
    ticket: Ticket
    result: Body
    n_items: int
    seconds: float
    host: str
    n_workers: int


class Failed(NamedTuple):
    """The job has ended otherwise. Bodies as in ``JobException``."""

    owner: Owner
    ticket: Ticket
    message: JobException | JobFail
    bodies: tuple[Body, ...]


TROUBLE: TypeAlias = Literal["too_large", "blobs", "no_server", "auth", "closed"]


class Refused(NamedTuple):
    """The job has ended: no server takes it, for a reason that waiting does not mend."""

    owner: Owner
    ticket: Ticket
    trouble: TROUBLE
    text: str


class InBackground(NamedTuple):
    """A server has accepted this background job, which is now no concern of this client."""

    owner: Owner
    ticket: Ticket


class Heard(NamedTuple):
    """A running job said something."""

    owner: Owner
    ticket: Ticket
    message: JobStatus | JobData | JobWarning
    body: Body


class Answered(NamedTuple):
    """The answer to a question; None if the server that knew it is lost or not known."""

    owner: Owner
    message: StatusIs | WorkersAre | Shown | None
    body: Body


class NoWorkers(NamedTuple):
    """Nobody can do jobs of these terms, which have been waiting for a while.

    Of ``n_others`` workers that have the function, these are the Python versions and labels; None
    where the servers were not asked.
    """

    terms: Terms
    n_others: int | None
    pythons: tuple[str, ...]
    labels: tuple[str, ...]


class Complaint(NamedTuple):
    """A server says that this client made a mistake, or cannot be used."""

    address: str
    text: str


Event: TypeAlias = (
    Completed | Failed | Refused | InBackground | Heard | Answered | NoWorkers | Complaint
)


class Send(NamedTuple):
    """A message for a server, which is named by its place among the addresses."""

    server: int
    message: Message
    bodies: tuple[Body, ...] = ()


Question: TypeAlias = GetStatus | CountWorkers | CancelHandle | Show
"""What can be asked; the state fills in its ``request``."""


# --- servers ----------------------------------------------------------------------------------

Status: TypeAlias = Literal["fresh", "up", "broken", "down"]


class Server:
    """One server, as far as this client knows it."""

    __slots__ = (
        "address",
        "attached",
        "beat_at",
        "blobs",
        "boot",
        "cancelling",
        "cancels",
        "draining",
        "heard_at",
        "index",
        "interval",
        "lanes",
        "linked",
        "machine",
        "max_jobs",
        "max_nbytes",
        "n_out",
        "name",
        "nbytes_out",
        "out",
        "pause",
        "paused_until",
        "putting",
        "queues",
        "refusal",
        "shared",
        "since",
        "status",
        "take_at",
        "taken",
        "unopened",
        "unshared",
        "unshared_until",
    )

    def __init__(self, index: int, address: str, now: float) -> None:
        self.index = index
        self.address = address
        self.name = self.boot = self.machine = ""
        self.status: Status = "fresh"
        self.since = now  # when the status last changed
        self.linked = False  # a Hello can be said, or was
        self.draining = False
        self.refusal = ""  # why it will never be up
        self.heard_at = now
        self.beat_at = now  # when to say the next heartbeat; while linked
        self.interval = 1.0
        self.max_jobs = self.max_nbytes = 0  # credit; while up
        self.n_out = self.nbytes_out = 0  # of the tickets SENT to it or ACCEPTED by it
        self.pause = 0.0  # seconds; not 0 after it was busy
        self.paused_until = 0.0  # when to try again; 0: at once
        self.out: list[tuple[Message, tuple[Body, ...]]] = []  # to say at the next flush
        self.queues: dict[Terms, deque[Ticket]] = {}  # WAITING for credit; ended ones are skipped
        self.attached: dict[int, Attached] = {}  # number -> ticket that listens here
        self.taken: list[int] = []  # numbers of ends to acknowledge
        self.take_at = 0.0  # when to do that at the latest; 0: nothing waits
        self.cancels: set[int] = set()  # numbers to cancel here, when it is up
        self.cancelling: set[int] = set()  # numbers whose cancel it has not answered
        self.blobs: set[bytes] = set()  # ids of those that it has
        self.putting: set[bytes] = set()  # ids of those on their way
        # Ids of those whose memory it cannot open; if there are any, no more is named to it.
        self.unopened: set[bytes] = set()
        self.lanes: set[int] = set()  # those that it was told of
        self.shared = False  # whether jobs that are submitted now may share memory
        self.unshared = 0.0  # seconds; not 0 after memory could not be opened
        self.unshared_until = 0.0  # when to share memory again

    @property
    def where(self) -> str:
        """Return what its handles begin with."""
        return f"{self.name}:{self.boot}"

    @property
    def lost(self) -> bool:
        """Whether its jobs should be elsewhere."""
        return self.status == "down"


class Lane:
    """A map: what people are told of it, and where it is."""

    __slots__ = ("message", "server")

    def __init__(self, message: OpenLane) -> None:
        self.message = message
        self.server: Server | None = None


class Probe:
    """Answers to ``CountWorkers`` as they come in from all servers."""

    __slots__ = ("counts", "labels", "n_others", "pythons", "terms", "waits_for")

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.waits_for = 0
        self.counts: dict[Server, int] = {}
        self.n_others = 0
        self.pythons: set[str] = set()
        self.labels: set[str] = set()


class Asked(NamedTuple):
    """A question without an answer."""

    server: Server
    message: Question
    owner: Owner | Probe
