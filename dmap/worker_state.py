"""What one worker process thinks: its conversation with each of its servers. Pure.

No socket, clock or process in here; ``worker`` owns those. Towards each server the worker is in one
phase. It asks one server after the other, beginning behind the one that it asked last, so that no
server's backlog starves another's::

    AWAY --welcome--> IDLE --grab--> ASKED --no_job--> EMPTY --pre_sleep--> ASLEEP --noop--> WOKEN
                       ^               |                                       |              |
                       |               '--- job_assign: the others are told ---'---- awake ---'
                       '------------------------- the job is done ----------------------------'

* It sleeps only when every server that is there has said ``NoJob``. It then says ``PreSleep`` to
  each, and a server with work answers ``Noop``; so nobody sleeps through work.
* Whatever woke it, when one server gives it work it says ``Awake`` to the others that believe it
  asleep or on its way: they must wake somebody else.
* A worker that was *configured* with one server lets its grab stand there until there is work.
* A server that does not answer a grab holds up the others for ``OVERDUE`` seconds only. What it
  gives later is taken all the same.
* What ends a job is numbered per server, kept until the server has accepted it, and said again
  after a new Welcome: by handle, or to a server that restarted by origin. One that its server
  declines, since it is too large, is replaced by a ``WorkFail``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from enum import Enum, auto
from typing import Final, NamedTuple, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from dmap.references import Reference
from jobserver.protocol import (
    BODY_NBYTES,
    MAX_LIST,
    Ability,
    Assigned,
    Awake,
    Body,
    CanDo,
    CannotOpen,
    CantDo,
    Error,
    GiveBack,
    Goodbye,
    GrabJobs,
    Hello,
    JobAssign,
    LaneId,
    Message,
    NoJob,
    Noop,
    Origin,
    PreSleep,
    Welcome,
    WorkAccepted,
    WorkComplete,
    WorkDone,
    WorkException,
    WorkFail,
    WorkTaken,
    join,
    nbytes_of,
    split,
)

GRAB_JOBS: Final = 256
"""Short jobs taken at once; the server knows how short they are and gives no more than is fair."""

OVERDUE: Final = 1.0
"""Seconds after which a grab without an answer holds up no other server."""

MAX_ANCESTORS: Final = 255
"""A job names no more of those around it; what it submits names the job itself as well."""

MAX_UNACCEPTED_NBYTES: Final = 64 * 2**20
"""No further work while results of more than this have not been accepted; or not been taken, where
they lie in our memory."""

LENT_WITHOUT: Final = 30.0
"""Seconds for which results in our memory are kept for a server that is away."""

Report: TypeAlias = WorkComplete | WorkException | WorkFail


class Send(NamedTuple):
    """A message to hand to the server of that index."""

    server: int
    message: Message
    bodies: tuple[Body, ...] = ()


class Held(Struct, eq=False, gc=False):
    """A job that a server gave to this worker. Not to be changed."""

    server: int
    boot: str
    job: Assigned
    argument: Body


class Phase(Enum):
    """How this worker and one server stand; see the picture above."""

    AWAY = auto()
    IDLE = auto()
    ASKED = auto()
    EMPTY = auto()
    ASLEEP = auto()
    WOKEN = auto()


class _Ended(Struct, eq=False, gc=False):
    held: Held
    result: Body
    nbytes: int
    shared: int  # of what it refers to
    n_items: int
    seconds: float


class _Unaccepted(NamedTuple):
    message: Report
    bodies: tuple[Body, ...]
    boot: str
    jobs: tuple[Assigned, ...]


class _Server:
    """What is known of one server."""

    __slots__ = (
        "asked_at",
        "away_since",
        "boot",
        "last_seq",
        "lent",
        "name",
        "phase",
        "unaccepted",
    )

    def __init__(self) -> None:
        self.phase = Phase.AWAY
        self.name = ""
        self.boot = ""  # of its last Welcome
        self.asked_at = 0.0  # valid while ASKED
        self.last_seq = 0
        self.unaccepted: dict[int, _Unaccepted] = {}  # seq -> report
        # Of these, those that were accepted, and whose memory is still needed.
        self.lent: set[int] = set()
        self.away_since = 0.0  # valid while AWAY

    def within(self, first: int, n: int) -> list[int]:
        """Return which of these seqs are not accepted yet."""
        if n == 1:
            return [first] if first in self.unaccepted else []
        return [seq for seq in self.unaccepted if first <= seq < first + n]


class WorkerState:
    """One worker process among its servers.

    Every method that returns sends leaves it to the caller to hand them over, in order. Sends to a
    server whose link broke meanwhile may be dropped: what matters is said again.

    Args:
        hello: who this worker is; ``boot`` and ``holding`` are filled in here.
        n_servers: how many it was configured with.
        abilities: what it can do.

    Attributes:
        held: jobs not started yet, in the order in which they should be.
        running: jobs that are started and not ended, the innermost last. More than one only where
            a job waits for jobs.
        draining: whether it takes nothing new.
        n_lent: how many of the results that are kept lie in memory of this process.
    """

    def __init__(self, hello: Hello, n_servers: int, abilities: Iterable[Ability]) -> None:
        self.held: deque[Held] = deque()
        self.running: list[Held] = []
        self.draining = False
        self._hello = hello
        self._servers = [_Server() for _ in range(n_servers)]
        self._abilities = {ability.function: ability for ability in abilities}
        self._lanes: list[LaneId] = []  # the only ones wanted while a job waits for jobs
        self._next = 0  # the server that is asked next
        self._ended: list[_Ended] = []  # results that wait for others to go with
        self._unaccepted_nbytes = 0
        self.n_lent = 0

    # --- what the servers do ------------------------------------------------------------------

    def on_connected(self, server: int) -> list[Send]:
        """Introduce this worker on a new connection."""
        there = self._servers[server]
        there.phase = Phase.AWAY
        holding = [
            held.job.handle
            for held in (*self.held, *self.running, *(ended.held for ended in self._ended))
            if held.server == server and held.boot == there.boot
        ]
        for report in there.unaccepted.values():
            if report.boot == there.boot:
                holding += [job.handle for job in report.jobs]
        hello = replace(self._hello, boot=there.boot, holding=holding)
        return [Send(server, hello), Send(server, CanDo(list(self._abilities.values())))]

    def on_disconnected(self, server: int, now: float) -> list[Send]:
        """Note that a connection is gone. Jobs that came by it are kept."""
        self._servers[server].phase = Phase.AWAY
        self._servers[server].away_since = now
        return self._seek_if_free(now)

    def on_message(
        self, server: int, message: Message, bodies: tuple[Body, ...], now: float
    ) -> list[Send]:
        """Take in what a server says.

        Raises:
            Malformed: the bodies are not those of the message; nothing changes.
        """
        there = self._servers[server]
        match message:
            case JobAssign():
                return self._on_job_assign(server, message, bodies)
            case WorkAccepted():
                for first, n in message.seqs:
                    for seq in there.within(first, n):
                        if _is_lent(there.unaccepted[seq]):
                            there.lent.add(seq)
                        else:
                            self._accepted(there, seq)
            case WorkTaken():
                for first, n in message.seqs:
                    for seq in there.within(first, n):
                        self._accepted(there, seq)
            case NoJob():
                if there.phase is Phase.ASKED:
                    there.phase = Phase.EMPTY
            case Noop():
                if there.phase in (Phase.ASLEEP, Phase.EMPTY):
                    there.phase = Phase.WOKEN
            case Welcome():
                return self._on_welcome(server, message) + self._seek_if_free(now)
            case Error(code="hello_first"):
                return self.on_connected(server)
            case _:
                pass
        return self._seek_if_free(now)

    def on_declined(self, server: int, message: Message, text: str, now: float) -> list[Send]:
        """Fail the jobs whose end is larger than their server takes; drop whatever else is."""
        there = self._servers[server]
        sends: list[Send] = []
        if isinstance(message, WorkComplete | WorkException) and message.seq in there.unaccepted:
            report = self._accepted(there, message.seq)
            what = "result"
            if isinstance(message, WorkException):
                what = f"exception ({message.type_name})"
            why = f"its {what} is too large for {there.name}: {text}"
            for job in report.jobs:
                fail = WorkFail(0, job.handle, "failed", why)
                sends += self._report(server, report.boot, fail, (), (job,))
        return sends + self._seek_if_free(now)

    def on_tick(self, now: float) -> list[Send]:
        """Ask another server if one's answer is overdue."""
        return self._seek_if_free(now)

    def next_deadline(self) -> float | None:
        """Return when ``on_tick`` has something to do, or None."""
        if not self._is_free() or self._unaccepted_nbytes > MAX_UNACCEPTED_NBYTES:
            return None
        others = (Phase.IDLE, Phase.EMPTY, Phase.WOKEN)
        if not any(there.phase in others for there in self._servers):
            return None  # the answer is overdue, perhaps, but holds up nobody
        asked = [there.asked_at for there in self._servers if there.phase is Phase.ASKED]
        return max(asked) + OVERDUE if asked else None

    def _on_welcome(self, server: int, welcome: Welcome) -> list[Send]:
        there = self._servers[server]
        there.phase = Phase.IDLE
        there.name = welcome.name
        if there.boot != welcome.boot:
            # What it gave in an earlier life it does not know; its clients submit that again.
            self._drop(held for held in self.held if held.server == server)
        there.boot = welcome.boot
        there.lent.clear()
        return [
            Send(server, _addressed(report, there.boot), report.bodies)
            for report in there.unaccepted.values()
        ]

    def _on_job_assign(
        self, server: int, message: JobAssign, bodies: tuple[Body, ...]
    ) -> list[Send]:
        arguments = split(bodies[0] if bodies else b"", [job.nbytes for job in message.jobs])
        there = self._servers[server]
        if there.phase is Phase.ASKED:
            there.phase = Phase.IDLE
        # Inside a job that waits for jobs only those are of use, and they are also in a drain.
        wanted = self._lanes if self.running else [] if self.draining else None
        unwanted: list[int] = []
        n_held = len(self.held)
        for job, argument in zip(message.jobs, arguments, strict=True):
            if wanted is not None and job.lane not in wanted:
                unwanted.append(job.handle)
            else:
                self.held.append(Held(server, there.boot, job, argument))
        sends = [Send(server, GiveBack(unwanted))] if unwanted else []
        if len(self.held) > n_held:
            sends += self._wake_up()
        return sends

    def _wake_up(self) -> list[Send]:
        """There is work: tell those who believe otherwise, and begin a new round after it."""
        sends: list[Send] = []
        for index, there in enumerate(self._servers):
            if there.phase in (Phase.ASLEEP, Phase.WOKEN):
                sends.append(Send(index, Awake()))
            if there.phase in (Phase.ASLEEP, Phase.WOKEN, Phase.EMPTY):
                there.phase = Phase.IDLE
        return sends

    def _accepted(self, there: _Server, seq: int) -> _Unaccepted:
        """Keep a report no longer."""
        report = there.unaccepted.pop(seq)
        there.lent.discard(seq)
        self.n_lent -= _is_lent(report)
        self._unaccepted_nbytes -= sum(map(_weight, report.bodies))
        return report

    def forget_lent(self, now: float) -> None:
        """Give up results in our memory whose server has been away for long.

        Who still wants one cannot open it then, and has the job run again.
        """
        for there in self._servers:
            if there.phase is Phase.AWAY and now >= there.away_since + LENT_WITHOUT:
                for seq in [seq for seq, one in there.unaccepted.items() if _is_lent(one)]:
                    self._accepted(there, seq)

    # --- asking for work ----------------------------------------------------------------------

    def _is_free(self) -> bool:
        return not (self.held or self.running or self.draining)

    def _seek_if_free(self, now: float) -> list[Send]:
        return self.seek(now) if self._is_free() else []

    def seek(self, now: float, lanes: Sequence[LaneId] = ()) -> list[Send]:
        """Ask the next server for work, or go to sleep if none has any.

        To be called when a job has ended and nothing is held; from then on the messages that come
        call it. A job that waits for jobs calls it with their ``lanes`` for each server that it
        wants to ask, and does not sleep: with no server left to ask it returns nothing, and the
        next call begins anew.
        """
        self._lanes = list(lanes)
        n_servers = len(self._servers)
        if self.is_asking(now) or self._unaccepted_nbytes > MAX_UNACCEPTED_NBYTES:
            return []
        if self.draining and not lanes:
            return []
        if n_servers == 1 and not lanes and self._servers[0].phase is Phase.EMPTY:
            self._servers[0].phase = Phase.IDLE  # that answer was about lanes
        for step in range(n_servers):
            index = (self._next + step) % n_servers
            there = self._servers[index]
            if there.phase in (Phase.IDLE, Phase.WOKEN):
                there.phase = Phase.ASKED
                there.asked_at = now
                self._next = (index + 1) % n_servers
                wait = n_servers == 1 and not lanes
                return [Send(index, GrabJobs(GRAB_JOBS, wait=wait, lanes=self._lanes))]
        empty = [i for i, there in enumerate(self._servers) if there.phase is Phase.EMPTY]
        if self.running:
            for index in empty:
                self._servers[index].phase = Phase.IDLE
            return []
        for index in empty:
            self._servers[index].phase = Phase.ASLEEP
        return [Send(index, PreSleep()) for index in empty]

    def is_asking(self, now: float) -> bool:
        """Tell whether a server has yet to answer a grab, and is not overdue."""
        # A grab that stands is not overdue; with one server there is also nobody held up.
        patience = OVERDUE if len(self._servers) > 1 or self.running else float("inf")
        for there in self._servers:
            if there.phase is Phase.ASKED and now < there.asked_at + patience:
                return True
        return False

    # --- what the worker does -----------------------------------------------------------------

    def start(self) -> Held:
        """Move the first held job to the running ones, and return it.

        The job around it waits for it, whoever submitted it first: so what it submits may not join
        that one either.
        """
        held = self.held.popleft()
        job = held.job
        if self.running:
            around = self.running[-1].job
            known = dict.fromkeys((*around.ancestors, around.origin, *job.ancestors))
            job.ancestors = tuple(known)
        if len(job.ancestors) > MAX_ANCESTORS:
            job.ancestors = job.ancestors[-MAX_ANCESTORS:]
        self.running.append(held)
        return held

    def complete(self, result: Body, n_items: int, seconds: float) -> None:
        """End the innermost job with the result of its first ``n_items`` items.

        It goes with the next ``flush``.
        """
        nbytes = len(result) if type(result) is bytes else nbytes_of(result)
        shared = result.shared if type(result) is Reference else 0
        self._ended.append(_Ended(self.running.pop(), result, nbytes, shared, n_items, seconds))

    def flush(self) -> list[Send]:
        """Say the results that wait: of one function's jobs in a row together."""
        sends: list[Send] = []
        batch: list[_Ended] = []
        kind = None
        room = 0
        for ended in self._ended:
            nbytes = ended.nbytes + ended.shared
            if batch and (nbytes > room or len(batch) == MAX_LIST or _kind(ended.held) != kind):
                sends += self._report_batch(batch)
                batch = []
            if not batch:
                kind = _kind(ended.held)
                room = BODY_NBYTES
            batch.append(ended)
            room -= nbytes
        if batch:
            sends += self._report_batch(batch)
            self._ended.clear()
        return sends

    def raised(
        self,
        type_name: str,
        message: str,
        traceback: str,
        bodies: tuple[Body, Body],
        n_items: int,
        seconds: float,
    ) -> list[Send]:
        """End the innermost job with an exception at item ``n_items``.

        ``bodies`` are the pickled exception and the results of the items before.
        """
        sends = self.flush()
        held = self.running.pop()
        report = WorkException(0, held.job.handle, type_name, message, traceback, n_items, seconds)
        return sends + self._report(held.server, held.boot, report, bodies, (held.job,))

    def fail(self, text: str) -> list[Send]:
        """End the innermost job without a result, saying why in ``text``."""
        sends = self.flush()
        held = self.running.pop()
        report = WorkFail(0, held.job.handle, "failed", text)
        return sends + self._report(held.server, held.boot, report, (), (held.job,))

    def cannot_open(self, text: str) -> list[Send]:
        """Let go of the first held job, to whose argument this process has no access."""
        held = self.held.popleft()
        if not self.can_speak_of(held):
            return []
        return [Send(held.server, CannotOpen(held.job.handle, text))]

    def abandon(self) -> None:
        """End the innermost job without a word: its supervisor has said or will say what is due."""
        self.running.pop()

    def return_running(self) -> list[Send]:
        """Give the innermost job back, of which nothing is done."""
        held = self.running.pop()
        return self._give_back([held])

    def withdraw(self, taken: Collection[tuple[int, int]]) -> None:
        """Drop of what is held these (server, handle): the supervisor has given them back."""
        self._drop(held for held in self.held if (held.server, held.job.handle) in taken)

    def give_back(self) -> list[Send]:
        """Give back all that is held."""
        given = list(self.held)
        self.held.clear()
        return self._give_back(given)

    def cant_do(self, functions: Sequence[str]) -> list[Send]:
        """Own these functions no longer. What is held of them stays held."""
        for function in functions:
            self._abilities.pop(function, None)
        return [Send(index, CantDo(list(functions))) for index in self._present()]

    def drain(self) -> list[Send]:
        """Take nothing new from now on, and give back what is held."""
        self.draining = True
        return self.flush() + self.give_back()

    @property
    def drained(self) -> bool:
        """Tell whether nothing is under way any more but the goodbye."""
        return not (
            self.held
            or self.running
            or self._ended
            or any(there.unaccepted for there in self._servers)
        )

    @property
    def all_accepted(self) -> bool:
        """Tell whether all jobs that ended are known to their servers to have ended."""
        return not self._ended and not any(
            len(there.unaccepted) > len(there.lent) for there in self._servers
        )

    def unreported(self) -> list[Held]:
        """Return the jobs that run, or ended and are not known to have ended by their servers."""
        found = [*self.running, *(ended.held for ended in self._ended)]
        for index, there in enumerate(self._servers):
            for seq, report in there.unaccepted.items():
                if seq not in there.lent:
                    found += [Held(index, report.boot, job, b"") for job in report.jobs]
        return found

    def goodbye(self) -> list[Send]:
        """Leave in order. What was not accepted is lost."""
        return [Send(index, Goodbye()) for index in self._present()]

    def can_speak_of(self, held: Held) -> bool:
        """Tell whether the server that gave this job is there, and the same as it was then."""
        there = self._servers[held.server]
        return there.phase is not Phase.AWAY and there.boot == held.boot

    def text_handle(self, held: Held) -> str:
        """Return a job's handle as people write it: ``name:boot:n``."""
        return f"{self._servers[held.server].name}:{held.boot}:{held.job.handle}"

    def _present(self) -> list[int]:
        return [i for i, there in enumerate(self._servers) if there.phase is not Phase.AWAY]

    def _drop(self, given: Iterable[Held]) -> None:
        for held in list(given):
            self.held.remove(held)

    def _give_back(self, given: Iterable[Held]) -> list[Send]:
        handles: dict[int, list[int]] = {}  # server -> handles
        for held in given:
            if self.can_speak_of(held):
                handles.setdefault(held.server, []).append(held.job.handle)
        return [Send(server, GiveBack(some)) for server, some in handles.items()]

    def _report_batch(self, batch: list[_Ended]) -> list[Send]:
        jobs = tuple([ended.held.job for ended in batch])
        done = [
            WorkDone(
                job.handle,
                ended.nbytes,
                ended.n_items if ended.n_items < job.n_items else 0,
                ended.shared,
            )
            for job, ended in zip(jobs, batch, strict=True)
        ]
        report = WorkComplete(0, done, sum([ended.seconds for ended in batch]))
        body = join([ended.result for ended in batch])
        held = batch[0].held
        return self._report(held.server, held.boot, report, (body,), jobs)

    def _report(
        self,
        server: int,
        boot: str,
        report: Report,
        bodies: tuple[Body, ...],
        jobs: tuple[Assigned, ...],
    ) -> list[Send]:
        """Number a report on jobs of that boot, keep it, and say it if its server is there."""
        there = self._servers[server]
        there.last_seq += 1
        report.seq = there.last_seq
        unaccepted = _Unaccepted(report, bodies, boot, jobs)
        there.unaccepted[report.seq] = unaccepted
        self._unaccepted_nbytes += sum(map(_weight, bodies))
        self.n_lent += _is_lent(unaccepted)
        if there.phase is Phase.AWAY:
            return []
        return [Send(server, _addressed(unaccepted, there.boot), bodies)]

    # --- invariants ---------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        phases = [there.phase for there in self._servers]
        if self.held or self.running:
            assert not {Phase.ASLEEP, Phase.WOKEN} & set(phases), (
                "a worker with work lets no server believe it asleep"
            )
        if self._is_free() and self._unaccepted_nbytes <= MAX_UNACCEPTED_NBYTES:
            assert Phase.ASKED in phases or set(phases) <= {Phase.AWAY, Phase.ASLEEP}, (
                "a free worker asks, or has asked all who are there and sleeps"
            )
        assert len(self._servers) > 1 or Phase.ASLEEP not in phases, (
            "with one server its grab stands and it never sleeps"
        )
        assert self.running or not (self.draining and self.held), "a draining worker holds nothing"
        for there in self._servers:
            seqs = list(there.unaccepted)
            assert seqs == sorted(seqs), "reports are repeated in their order"
            assert all(0 < seq <= there.last_seq for seq in seqs)
            lent = {seq for seq, report in there.unaccepted.items() if _is_lent(report)}
            assert there.lent <= lent, "what is accepted is kept while its memory is needed"
        nbytes = sum(
            _weight(body)
            for there in self._servers
            for report in there.unaccepted.values()
            for body in report.bodies
        )
        assert nbytes == self._unaccepted_nbytes, "what is not accepted is counted"
        n_lent = sum(_is_lent(one) for there in self._servers for one in there.unaccepted.values())
        assert n_lent == self.n_lent, "what is lent is counted"


def _weight(body: Body) -> int:
    """Return the bytes of a body, and of what it refers to."""
    return nbytes_of(body) + (body.shared if type(body) is Reference else 0)


def _is_lent(report: _Unaccepted) -> bool:
    return any(type(body) is Reference for body in report.bodies)


def _kind(held: Held) -> tuple[int, str, str]:
    """Results of one kind go together: seconds are those of one function."""
    return held.server, held.boot, held.job.function


def _addressed(report: _Unaccepted, boot: str) -> Report:
    """Return the report as the server of that boot understands it."""
    if report.boot == boot:
        return report.message
    origins: list[Origin] = [job.origin for job in report.jobs]
    if isinstance(report.message, WorkComplete):
        return replace(report.message, boot=report.boot, origins=origins)
    return replace(report.message, boot=report.boot, origin=origins[0])
