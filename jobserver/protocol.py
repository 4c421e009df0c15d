"""The wire: every message that a client, a worker and a job server say to each other.

A message is one header frame, msgpack of one tagged array, and at most two body frames that the
server never looks into::

    +--------+---------------------+---------------------+
    | header | body 1 (if any)     | body 2 (if any)     |      at most 3 frames, 32 MiB each
    +--------+---------------------+---------------------+

A header is ``[name, field, field, ...]``. Fields are only ever added at the end and with a default,
so a peer of a newer minor version is understood; another major version is refused by name.

What bears jobs is a *list* (``SubmitJobs``, ``JobAssign``, ``WorkComplete``, ``JobComplete``): at a
million jobs the message is the cost, not the job. The arguments (or results) of a list lie end to
end in the message's first body, and each entry says its ``nbytes``. A list whose body would
exceed ``BODY_NBYTES`` holds one entry only, and its body goes ahead in pieces::

    Offer(transfer, nbytes)  -->
                             <--  Grant(transfer, upto)          as often as there is room
    Piece(transfer) + bytes  -->                                 each at most PIECE_NBYTES
    Pieced(header, [transfer]) ->                                the message itself
                             <--  Declined(transfer, text)       or else: it is not taken

so that three gigabytes neither cut the link (``MAX_FRAME_NBYTES``) nor silence its heartbeats.

Small messages that go the same way at the same time may share one: ``Together``. A message costs
both ends some tens of microseconds, whatever it says.

Who may say what is in ``FROM``; a message out of role changes nothing and is answered by an
``Error``. Everything is safe to repeat: a job's *origin* (session, ticket) is chosen by its
client, and whoever hears of the same origin twice knows it.

This module imports nothing of ours. Times are seconds; they are durations, never clock readings,
because two hosts share no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias, cast

import msgspec
from msgspec import Meta, Struct

MAJOR: Final = 1
MINOR: Final = 1

DEFAULT_PORT: Final = 4731
"""4730 is Gearman's own."""

MAX_FRAMES: Final = 3
MAX_FRAME_NBYTES: Final = 32 * 2**20
BODY_NBYTES: Final = 2**20
"""Bodies up to this many bytes ride in their message; larger ones go in pieces."""
PIECE_NBYTES: Final = 8 * 2**20
"""Large enough that the message costs nothing beside its bytes, and two of them in flight keep a
link full; small enough that a heartbeat behind one waits milliseconds."""
MAX_LIST: Final = 16_384
"""Entries in one list of one message."""
MAX_TOGETHER: Final = 64
"""Messages in one ``Together``."""

CODE: TypeAlias = Literal[
    "bad_frame",
    "bad_header",
    "unknown_message",
    "version",
    "role",
    "limit",
    "hello_first",
    "unknown_job",
]
"""What an ``Error`` is about."""

HIGH: Final = 0
NORMAL: Final = 1
LOW: Final = 2
N_PRIORITIES: Final = 3

Name = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
Text = Annotated[str, Meta(max_length=65_536)]
ShortText = Annotated[str, Meta(max_length=256)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
BlobId = Annotated[bytes, Meta(min_length=32, max_length=32)]
Uniq = Annotated[bytes, Meta(max_length=256)]
Labels = Annotated[tuple[Name, ...], Meta(max_length=32)]

Role: TypeAlias = Literal["client", "worker", "supervisor"]


class Range(NamedTuple):
    """``n`` consecutive numbers from ``first`` on."""

    first: Count
    n: Count


class Origin(NamedTuple):
    """The client's own name for a job: it outlives links, servers and workers."""

    session: SessionId
    ticket: Count


class LaneId(NamedTuple):
    """One map, or (number 0) one session's single jobs."""

    session: SessionId
    lane: Count


class Reference(NamedTuple):
    """Sealed memory of a process on the same machine, which opens it by ``/proc/PID/fd/FD``.

    The ``token`` lies in its name, so that nothing else is taken for it.
    """

    pid: Count
    fd: Count
    nbytes: Count
    token: Annotated[bytes, Meta(max_length=32)]


class Message(Struct, array_like=True, gc=False):
    """The root of all messages."""


# --- said by any role -------------------------------------------------------------------------


class Hello(Message, tag=True):
    """any > server: I am this; from now on this connection speaks for me.

    A client's ``session`` outlives its link. A worker says the session of its supervisor and its
    own number there in ``child`` (a new number for every process); a worker without a supervisor
    says ``child=0`` and heartbeats for itself. ``holding`` are the handles that a worker has from
    this boot of the server and not reported yet: what the server assigned to it beyond these never
    arrived. ``running`` is what a supervisor's children run from an earlier boot. Two peers of the
    same ``machine`` (empty: of none) can open each other's memory. ``together``: I understand
    Together.
    """

    major: Count
    minor: Count
    role: Role
    session: SessionId
    python: ShortText = ""
    name: ShortText = ""
    host: ShortText = ""
    pid: Count = 0
    child: Count = 0
    labels: Labels = ()
    boot: ShortText = ""
    holding: list[Count] = []
    running: list[Running] = []
    machine: ShortText = ""
    together: bool = False


class Running(Struct, array_like=True, gc=False):
    """A job that a child still runs although the server that assigned it has restarted."""

    child: Count
    origin: Origin
    function: Name
    uniq: Uniq = b""


class Welcome(Message, tag=True):
    """server > any: I am this server, and this is what you may have under way.

    ``resumed``: the session is still known here with what it had submitted. ``interval``: how
    often I send a heartbeat, and how often I want yours. ``machine`` is where I am.
    """

    major: Count
    minor: Count
    name: Name
    boot: ShortText
    resumed: bool
    interval: Seconds
    jobs: Count
    nbytes: Count
    machine: ShortText = ""


class Heartbeat(Message, tag=True):
    """any <> server: I live. The server sends it also to find out whether a link is gone."""

    interval: Seconds = 0.0


class Goodbye(Message, tag=True):
    """any > server: I leave in order and will not come back as this."""


class Error(Message, tag=True):
    """server > any: what you sent changed nothing, and why."""

    code: CODE
    text: Text


class Offer(Message, tag=True):
    """any <> server: I have a body of ``nbytes`` for a message to come; may I send it?"""

    transfer: Count
    nbytes: Count


class Grant(Message, tag=True):
    """any <> server: of this transfer, send me the bytes up to ``upto``."""

    transfer: Count
    upto: Count


class Together(Message, tag=True):
    """any <> server: these messages, in this order. The bodies are those of number ``bodied``."""

    headers: Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=MAX_TOGETHER)]
    bodied: Count = 0


class Piece(Message, tag=True):
    """any <> server: the next bytes of this transfer are my body."""

    transfer: Count


class Pieced(Message, tag=True):
    """any <> server: this message, whose bodies are those transfers (0: my own next body)."""

    header: bytes
    transfers: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=2)]


class Declined(Message, tag=True):
    """any <> server: I do not take this transfer, nor the message that it is for, and why."""

    transfer: Count
    text: Text


# --- client > server --------------------------------------------------------------------------


class PutBlob(Message, tag=True):
    """client > server: keep these bytes (body 1), whose sha256 is ``blob``, for jobs to name.

    With ``memory`` they lie there and not in a body: open it, or else say ``send``.
    """

    blob: BlobId
    memory: Reference | None = None


class OpenLane(Message, tag=True):
    """client > server: a map begins. Shown to people; ``total`` 0 is unknown."""

    lane: Count
    description: ShortText = ""
    total: Count = 0


class CloseLane(Message, tag=True):
    """client > server: the map is over."""

    lane: Count


class JobSpec(Struct, array_like=True, gc=False):
    """One job of a ``SubmitJobs``; ``n_items`` is how many items its argument holds."""

    ticket: Count
    nbytes: Count
    uniq: Uniq = b""
    n_items: Count = 1


class SubmitJobs(Message, tag=True):
    """client > server: run ``function`` on each of these arguments (end to end in body 1).

    A worker must have ``python`` (X.Y; empty: any) and all ``labels``. ``attempts`` bounds the
    runs that end by the loss of their worker. ``timeout`` (0: none) bounds one run, and
    ``item_timeout`` each item of it. ``not_before`` delays the job by that many seconds.
    ``merge``: join a live job of the same uniq, even if the function itself does not allow it.
    ``encoding`` says what the arguments are ("pickle" or "raw" bytes). ``blobs`` must be on the
    server already. ``resubmit``: these tickets may have run on a server that is lost.
    ``ancestors``: the jobs inside which this one was submitted; it never joins those.
    ``shared``: results may lie in memory of my machine, and only refer to it. ``referred``: so does
    the argument, of one job; a worker elsewhere must not have it.
    """

    function: Name
    jobs: Annotated[list[JobSpec], Meta(min_length=1, max_length=MAX_LIST)]
    lane: Count = 0
    priority: Annotated[int, Meta(ge=0, lt=N_PRIORITIES)] = NORMAL
    background: bool = False
    merge: bool = False
    encoding: Literal["pickle", "raw"] = "pickle"
    python: ShortText = ""
    labels: Labels = ()
    attempts: Annotated[int, Meta(ge=1, le=1_000_000)] = 3
    timeout: Seconds = 0.0
    item_timeout: Seconds = 0.0
    not_before: Seconds = 0.0
    blobs: Annotated[tuple[BlobId, ...], Meta(max_length=64)] = ()
    resubmit: bool = False
    ancestors: Annotated[tuple[Origin, ...], Meta(max_length=256)] = ()
    shared: bool = False
    referred: bool = False


class CancelJobs(Message, tag=True):
    """client > server: I no longer want these of my jobs."""

    tickets: Annotated[list[Range], Meta(max_length=MAX_LIST)]


class CancelHandle(Message, tag=True):
    """client > server: end this job for all who listen to it. Answered by ``StatusIs``."""

    request: Count
    handle: Count


class ResultsTaken(Message, tag=True):
    """client > server: the ends of these of my jobs have reached me; forget them."""

    tickets: Annotated[list[Range], Meta(max_length=MAX_LIST)]


class Attach(Message, tag=True):
    """client > server: let my ``ticket`` listen to the job with this handle."""

    ticket: Count
    handle: Count


class GetStatus(Message, tag=True):
    """client > server: what of the job with this handle (or else this function and uniq)?"""

    request: Count
    handle: Count = 0
    function: ShortText = ""
    uniq: Uniq = b""


class CountWorkers(Message, tag=True):
    """client > server: how many workers would take such a job?"""

    request: Count
    function: Name
    python: ShortText = ""
    labels: Labels = ()


class Show(Message, tag=True):
    """client > server: tell what you have, for people. Answered by ``Shown``."""

    request: Count
    what: Literal["status", "workers", "jobs"]


# --- server > client --------------------------------------------------------------------------


class Accepted(Struct, array_like=True, gc=False):
    """Tickets ``ticket`` to ``ticket + n - 1`` have the handles from ``handle`` on."""

    ticket: Count
    n: Count
    handle: Count


class JobsAccepted(Message, tag=True):
    """server > client: these are my jobs now. ``n_workers`` can take such jobs at present."""

    jobs: list[Accepted]
    n_workers: Count


REFUSAL: TypeAlias = Literal["busy", "blobs", "draining", "too_large", "ancestor", "shared"]


class JobsRefused(Message, tag=True):
    """server > client: I did not take these tickets. ``blobs`` are the ones I do not have.

    shared: their worker cannot open the memory that the argument refers to, or I no longer have a
    worker that might; submit them anew, with the argument itself.
    """

    tickets: list[Range]
    code: REFUSAL
    text: Text
    blobs: tuple[BlobId, ...] = ()


class BlobTaken(Message, tag=True):
    """server > client: I keep this blob (or, with ``text``, I do not and why).

    ``send``: the memory that you named cannot be opened here; put the bytes themselves.
    """

    blob: BlobId
    text: Text = ""
    send: bool = False


class Completed(Struct, array_like=True, gc=False):
    """One result of a ``JobComplete``. It covers the first ``n_items`` items of the job.

    ``shared`` bytes of it lie in memory to which its body refers, until it is acknowledged. Such a
    result comes alone.
    """

    ticket: Count
    nbytes: Count
    n_items: Count
    shared: Count = 0


class JobComplete(Message, tag=True):
    """server > client: these jobs are done; their results lie end to end in body 1.

    They took ``seconds`` of a worker's time together.
    """

    jobs: list[Completed]
    seconds: Seconds
    host: ShortText
    n_workers: Count


class JobException(Message, tag=True):
    """server > client: the function raised at item ``n_items`` of this job.

    Body 1 is the pickled exception (empty if it would not travel), body 2 the results of the
    ``n_items`` items before it.
    """

    ticket: Count
    type_name: ShortText
    message: Text
    traceback: Text
    n_items: Count
    attempt: Count
    host: ShortText
    pid: Count
    seconds: Seconds


FAILURE: TypeAlias = Literal["lost", "timeout", "cancelled", "failed", "unknown"]


class JobFail(Message, tag=True):
    """server > client: this job ended without a result.

    lost: its worker died ``attempt`` times, with ``exit`` ("SIGKILL", "exit code 3"), at one of the
    ``n_items`` items from ``item`` on (0: at none, only the result was lost with it). failed: the
    worker said so, in ``text``. unknown: there is no such job, or its result was not kept.
    """

    ticket: Count
    code: FAILURE
    text: Text = ""
    item: Count = 0
    n_items: Count = 0
    attempt: Count = 0
    exit: ShortText = ""
    host: ShortText = ""


class JobStatus(Message, tag=True):
    """server > client: this running job is at ``numerator`` of ``denominator``."""

    ticket: Count
    numerator: Count
    denominator: Count


class JobData(Message, tag=True):
    """server > client: a partial result (body 1) of this running job."""

    ticket: Count


class JobWarning(Message, tag=True):
    """server > client: a warning (UTF-8 in body 1) of this running job."""

    ticket: Count


class StatusIs(Message, tag=True):
    """server > client: the answer to ``GetStatus`` and ``CancelHandle``.

    A job that ended is remembered for a while in ``ended`` (empty: it lives); ``known`` is false
    when it never existed here or was forgotten.
    """

    request: Count
    handle: Count
    known: bool
    running: bool
    numerator: Count
    denominator: Count
    n_listeners: Count
    ended: ShortText = ""


class WorkersAre(Message, tag=True):
    """server > client: ``n_workers`` fit; all that have the function have these attributes."""

    request: Count
    n_workers: Count
    n_others: Count
    pythons: tuple[ShortText, ...] = ()
    labels: tuple[ShortText, ...] = ()


class Shown(Message, tag=True):
    """server > client: the answer to ``Show``: body 1 is msgpack of a list of maps."""

    request: Count


class Credit(Message, tag=True):
    """server > client: from now on you may have this much under way."""

    jobs: Count
    nbytes: Count


class Draining(Message, tag=True):
    """server > client, worker: I take nothing new; go to another server."""


# --- worker > server --------------------------------------------------------------------------


class Ability(NamedTuple):
    """A function that a worker can do. ``timeout`` (0: none) bounds each run of it."""

    function: Name
    timeout: Seconds = 0.0
    merge: bool = False


class CanDo(Message, tag=True):
    """worker > server: I can do these."""

    abilities: Annotated[list[Ability], Meta(max_length=1024)]


class CantDo(Message, tag=True):
    """worker > server: I can no longer do these. What I have of them I finish."""

    functions: Annotated[list[Name], Meta(max_length=1024)]


class ResetAbilities(Message, tag=True):
    """worker > server: I can do nothing any more."""


class GrabJobs(Message, tag=True):
    """worker > server: give me work, at most ``n`` jobs and some ``nbytes``.

    With ``wait`` the grab stands until there is work. With ``lanes`` only jobs of these are meant:
    the ones that I wait for inside a job. Answered by ``JobAssign`` or ``NoJob``.
    """

    n: Count = 1
    nbytes: Count = BODY_NBYTES
    wait: bool = False
    lanes: Annotated[list[LaneId], Meta(max_length=256)] = []


class PreSleep(Message, tag=True):
    """worker > server: I go to sleep; wake me with a noop when there is work."""


class Awake(Message, tag=True):
    """worker > server: I found work elsewhere; wake another one in my place."""


class GiveBack(Message, tag=True):
    """worker, supervisor > server: these jobs were not started; let others have them."""

    handles: Annotated[list[Count], Meta(max_length=MAX_LIST)]


class FetchBlob(Message, tag=True):
    """worker, supervisor > server: send me these bytes.

    ``named``: or name their memory, if you have them so; I try to open it.
    """

    blob: BlobId
    named: bool = False


class WorkDone(Struct, array_like=True, gc=False):
    """One result of a ``WorkComplete``. ``n_items`` 0 covers all items of the job.

    ``shared`` bytes of it lie in memory of the worker, to which its body refers. Such a result
    comes alone, and the memory stays until ``WorkTaken``.
    """

    handle: Count
    nbytes: Count
    n_items: Count = 0
    shared: Count = 0


class WorkComplete(Message, tag=True):
    """worker > server: these jobs are done; their results lie end to end in body 1.

    ``seq`` numbers what ends jobs (WorkComplete, WorkException, WorkFail) on one worker, and is
    acknowledged. ``seconds`` is the time they took together. ``boot`` and ``origins`` (one a job)
    are given when the server is not the one that assigned them any more.
    """

    seq: Count
    jobs: Annotated[list[WorkDone], Meta(min_length=1, max_length=MAX_LIST)]
    seconds: Seconds = 0.0
    boot: ShortText = ""
    origins: list[Origin] = []


class WorkException(Message, tag=True):
    """worker > server: the function raised after ``n_items`` items of this job.

    The bodies are those of a ``JobException``.
    """

    seq: Count
    handle: Count
    type_name: ShortText
    message: Text
    traceback: Text
    n_items: Count = 0
    seconds: Seconds = 0.0
    boot: ShortText = ""
    origin: Origin | None = None


class WorkFail(Message, tag=True):
    """worker, supervisor > server: this job ended without a result, by no fault of a process.

    A supervisor speaks of its children's jobs (``seq`` 0): timeout, cancelled.
    """

    seq: Count
    handle: Count
    code: Literal["timeout", "cancelled", "failed"]
    text: Text = ""
    item: Count = 0
    n_items: Count = 0
    boot: ShortText = ""
    origin: Origin | None = None


class CannotOpen(Message, tag=True):
    """worker > server: I cannot open the memory that this job's argument refers to, and why."""

    handle: Count
    text: Text = ""


class WorkStatus(Message, tag=True):
    """worker > server: this job is at ``numerator`` of ``denominator``."""

    handle: Count
    numerator: Count
    denominator: Count


class WorkData(Message, tag=True):
    """worker, supervisor > server: a partial result (body 1) of this job."""

    handle: Count


class WorkWarning(Message, tag=True):
    """worker, supervisor > server: a warning (UTF-8 in body 1) of this job."""

    handle: Count


class ChildLost(Message, tag=True):
    """supervisor > server: this child's process ended, with ``exit``.

    It was running the jobs in ``running``, the innermost first, at one of the ``n_items`` items
    from ``item`` on of that one. Those in ``ended`` it had run to their end, but what it said of
    that may have died with it. What else it had was not started.
    """

    child: Count
    running: list[Count]
    item: Count
    n_items: Count
    exit: ShortText
    ended: list[Count] = []


# --- server > worker --------------------------------------------------------------------------


class Assigned(Struct, array_like=True, gc=False):
    """One job of a ``JobAssign``. ``attempt`` counts from 1.

    ``shared``: all who listen are on the worker's machine, and its result may lie in memory there.
    ``referred``: the argument refers to memory there.
    """

    handle: Count
    origin: Origin
    function: Name
    nbytes: Count
    n_items: Count
    attempt: Count
    encoding: Literal["pickle", "raw"]
    uniq: Uniq
    timeout: Seconds
    item_timeout: Seconds
    blobs: tuple[BlobId, ...]
    ancestors: tuple[Origin, ...]
    lane: LaneId
    shared: bool = False
    referred: bool = False


class JobAssign(Message, tag=True):
    """server > worker: run these; their arguments lie end to end in body 1."""

    jobs: list[Assigned]


class NoJob(Message, tag=True):
    """server > worker: there is nothing for you now."""


class Noop(Message, tag=True):
    """server > worker: wake up and grab."""


class WorkAccepted(Message, tag=True):
    """server > worker: what you sent under these ``seq`` has reached me; forget it."""

    seqs: list[Range]


class WorkTaken(Message, tag=True):
    """server > worker: nobody needs the memory any more to which these ``seq`` referred."""

    seqs: list[Range]


class Blob(Message, tag=True):
    """server > worker, supervisor: the bytes you asked for (body 1), or ``known`` is false.

    With ``memory`` they lie there and not in a body, for as long as I keep the blob.
    """

    blob: BlobId
    known: bool
    memory: Reference | None = None


class CancelJob(Message, tag=True):
    """server > supervisor: stop this job of that child, if it is still the one it runs."""

    child: Count
    handle: Count


FromClient: TypeAlias = (
    PutBlob
    | OpenLane
    | CloseLane
    | SubmitJobs
    | CancelJobs
    | CancelHandle
    | ResultsTaken
    | Attach
    | GetStatus
    | CountWorkers
    | Show
)
FromWorker: TypeAlias = (
    CanDo
    | CantDo
    | ResetAbilities
    | GrabJobs
    | PreSleep
    | Awake
    | GiveBack
    | FetchBlob
    | WorkComplete
    | WorkException
    | WorkFail
    | CannotOpen
    | WorkStatus
    | WorkData
    | WorkWarning
)
FromSupervisor: TypeAlias = GiveBack | FetchBlob | WorkFail | WorkData | WorkWarning | ChildLost
Transfer: TypeAlias = Offer | Grant | Piece | Pieced | Declined
ToServer: TypeAlias = (
    FromClient | FromWorker | ChildLost | Hello | Heartbeat | Goodbye | Transfer | Together
)

ToClient: TypeAlias = (
    JobsAccepted
    | JobsRefused
    | BlobTaken
    | JobComplete
    | JobException
    | JobFail
    | JobStatus
    | JobData
    | JobWarning
    | StatusIs
    | WorkersAre
    | Shown
    | Credit
    | Draining
)
ToWorker: TypeAlias = JobAssign | NoJob | Noop | WorkAccepted | WorkTaken | Blob | Draining
ToPeer: TypeAlias = (
    ToClient | ToWorker | CancelJob | Welcome | Heartbeat | Error | Transfer | Together
)

FROM: Final[dict[Role, frozenset[type[Message]]]] = {
    "client": frozenset(FromClient.__args__),
    "worker": frozenset(FromWorker.__args__),
    "supervisor": frozenset(FromSupervisor.__args__),
}
"""What each role may say after its Hello, beside Heartbeat, Goodbye and transfers."""

ANY_ROLE: Final[frozenset[type[Message]]] = frozenset((Hello, Heartbeat, Goodbye))

Buffer: TypeAlias = bytes | bytearray | memoryview
Body: TypeAlias = bytes | tuple[Buffer, ...]
"""Opaque bytes; a tuple is the pieces of one that is too large for a frame, in order."""


class SharedBody(tuple[Buffer, ...]):
    """A body whose one piece is sealed memory, which others on the machine open by its name."""

    memory: Reference


class Malformed(ValueError):
    """What came is not a message of this protocol; ``code`` is for the answering ``Error``."""

    def __init__(self, code: CODE, text: str) -> None:
        super().__init__(text)
        self.code: CODE = code


_encoder = msgspec.msgpack.Encoder()
_to_server = msgspec.msgpack.Decoder(ToServer)
_to_peer = msgspec.msgpack.Decoder(ToPeer)


def encode(message: Message) -> bytes:
    """Return the header frame of a message."""
    return _encoder.encode(message)


def decode_to_server(header: Buffer) -> ToServer:
    """Read a header frame that a server received.

    Raises:
        Malformed: it is no such message, or one of its fields is out of its range.
    """
    try:
        return cast(ToServer, _to_server.decode(header))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _malformed(error) from None


def decode_to_peer(header: Buffer) -> ToPeer:
    """Read a header frame that a client, worker or supervisor received.

    Raises:
        Malformed: it is no such message, or one of its fields is out of its range.
    """
    try:
        return cast(ToPeer, _to_peer.decode(header))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _malformed(error) from None


def _malformed(error: Exception) -> Malformed:
    text = str(error)
    if "Invalid value" in text and text.endswith("`$[0]`"):
        return Malformed("unknown_message", text[:200])
    return Malformed("bad_header", text[:200])


def split(body: Body, lengths: Sequence[int]) -> list[Body]:
    """Cut the body of a list into its entries' parts, without a copy when there is one entry.

    Raises:
        Malformed: the lengths do not add up to the body.
    """
    if sum(lengths) != nbytes_of(body):
        raise Malformed("bad_frame", "the entries' nbytes do not add up to the body")
    if len(lengths) == 1:
        return [body]
    if not isinstance(body, bytes):
        raise Malformed("bad_frame", "a body in pieces is for one entry only")
    parts: list[Body] = []
    start = 0
    for nbytes in lengths:
        parts.append(body[start : start + nbytes])
        start += nbytes
    return parts


def join(bodies: Sequence[Body]) -> Body:
    """Lay the entries' parts end to end: the inverse of ``split``.

    Only a single entry may be in pieces.
    """
    if len(bodies) == 1:
        return bodies[0]
    return b"".join(cast("Sequence[bytes]", bodies))


def nbytes_of(body: Body) -> int:
    """Return the number of bytes in a body."""
    if isinstance(body, bytes):
        return len(body)
    return sum(memoryview(part).nbytes for part in body)


def ranges(numbers: Iterable[int]) -> list[Range]:
    """Say ascending numbers as ranges."""
    found: list[Range] = []
    first = n = 0
    for number in numbers:
        if n and number == first + n:
            n += 1
        else:
            if n:
                found.append(Range(first, n))
            first, n = number, 1
    if n:
        found.append(Range(first, n))
    return found


def handle_text(name: str, boot: str, handle: int) -> str:
    """Return a handle as people read it: ``name:boot:n``."""
    return f"{name}:{boot}:{handle}"


def parse_handle(text: str) -> tuple[str, str, int]:
    """Return the server's name, its boot and the number: the inverse of ``handle_text``.

    Raises:
        ValueError: it is no handle.
    """
    server, _, number = text.rpartition(":")
    name, _, boot = server.rpartition(":")
    if not (name and boot and number.isdecimal() and number.isascii()):
        raise ValueError(f"not a handle: {text!r} (a handle looks like name:boot:number)")
    return name, boot, int(number)
